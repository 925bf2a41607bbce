"""Trials: asked of Optuna one by one, trained, pruned, and gone on with after a kill.

Any number of workers, on machines that share the folder and the storage, take trials in turn. A trial whose worker is
gone (its process; on another machine, its signs of life) is tried again in the same folder, so that its runs go on from
their checkpoints.
"""

from __future__ import annotations

import math
import os
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from rlopt.analysis.ranking import once_trained, score_of
from rlopt.analysis.run_results import EvaluationCurve, evaluations
from rlopt.analysis.statistics import iqm
from rlopt.errors import RloptError
from rlopt.files import remove
from rlopt.loops.configuration import TrainConfig
from rlopt.random import derive_seed
from rlopt.runs.lock import Lock
from rlopt.runs.run_folder import RunFolder
from rlopt.search.plan import Sweep
from rlopt.search.space import stored
from rlopt.training.result import INTERRUPTED, NONFINITE
from rlopt.training.setup import begin, resume
from rlopt.training.trainer import Callback, Trainer
from rlopt.types import Episode

HEARTBEAT, GRACE = 30, 120
"""Seconds between signs of life, and without one before a trial on another machine counts as lost."""
RETRIES = 3
"""How often a trial is tried again whose worker was killed: one that no memory holds would go on for ever."""
HOST = socket.gethostname()
OVER = (TrialState.COMPLETE, TrialState.PRUNED)

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
optuna.logging.set_verbosity(optuna.logging.ERROR)  # what a trial came to is told here
_again = RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)


def open_study(sweep: Sweep) -> optuna.Study:
    """Return the sweep's study; a new one has the settings without a search as its first trial.

    Raises:
        RloptError: the storage cannot be used, or holds a sweep of another space, other overrides or seeds.
    """
    url = sweep.storage or f"sqlite:///{sweep.root.resolve() / 'study.db'}"
    try:
        sweep.root.mkdir(parents=True, exist_ok=True)
        with closing(Turn(sweep.root)):
            storage = optuna.storages.RDBStorage(
                url,
                engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=_again,
            )
            study = optuna.create_study(
                storage=storage,
                study_name=sweep.root.name,
                direction="maximize",
                pruner=pruner(sweep),
                load_if_exists=True,
            )
            known = study.user_attrs.get("sweep", sweep.identity)
            for name, value in sweep.identity.items():
                if known.get(name) != value:
                    raise RloptError(
                        f"{sweep.root} holds a sweep with other {name} ({known.get(name)}); name another root"
                    )
            if not study.get_trials(deepcopy=False):
                begin_study(study, sweep)
    except (OSError, ImportError, SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise RloptError(f"{url} cannot be used: {str(error).splitlines()[0]}") from error
    return study


def begin_study(study: optuna.Study, sweep: Sweep) -> None:
    """Note what is searched, and let the first trial be the settings without a search, where the space has them."""
    study.set_user_attr("sweep", sweep.identity)
    if (first := sweep.defaults()) is not None:
        study.enqueue_trial({key: stored(value) for key, value in first.items()})


def pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    """Return what stops trials that lie behind others at the same step of the same seed."""
    total, every = sweep.base.total_steps, sweep.base.eval.every or sweep.base.total_steps
    after = total // 3 if sweep.prune_after is None else sweep.prune_after
    if sweep.pruner == "median":
        return optuna.pruners.MedianPruner(sweep.startup, after)
    if sweep.pruner == "percentile":
        return optuna.pruners.PercentilePruner(sweep.percentile, sweep.startup, after)
    if sweep.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(max(every, after), sweep.seeds * total)
    return optuna.pruners.NopPruner()


def sampler(sweep: Sweep, begun: int) -> optuna.samplers.BaseSampler:
    """Return TPE with a random stream of its own for each trial, so that a sweep that is gone on with draws what it
    would have drawn, and no two workers draw the same."""
    return optuna.samplers.TPESampler(seed=derive_seed(sweep.base.seed, "sweep", begun))


def original(trial: FrozenTrial) -> int:
    """Return the number of the trial that this one is, or tries again."""
    return int(trial.system_attrs.get("failed_trial", trial.number))


def latest(study: optuna.Study) -> list[FrozenTrial]:
    """Return each trial as it was tried last, in their order."""
    return list({original(trial): trial for trial in study.get_trials(deepcopy=False)}.values())


class Turn:
    """One worker at a time looks at the study and takes a trial: waits for its turn, until ``close``."""

    def __init__(self, root: Path) -> None:
        while True:
            try:
                self.close = Lock(root).release
                return
            except RloptError:
                time.sleep(0.05)


class Worker:
    """Takes trials until the sweep has all of them; ``say`` is told a line about each."""

    def __init__(self, sweep: Sweep, study: optuna.Study, say: Callable[[str], object] = print) -> None:
        self.sweep, self.study, self.say = sweep, study, say
        self._turn: Turn | None = None
        self._told = ""

    def run(self) -> None:
        """Work; the sweep is over when it returns.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM, once the run has been saved; the trial waits to be gone on with.
            Exception: what a trial failed by, where no other one has come to anything: all would.
        """
        while True:
            self._turn = Turn(self.sweep.root)
            try:
                self._revive()
                trials = self.study.get_trials(deepcopy=False)
                begun = sum("failed_trial" not in trial.system_attrs for trial in trials)
                states = {trial.state for trial in trials}
                if begun < self.sweep.trials or TrialState.WAITING in states:
                    self._one(sampler(self.sweep, begun), bool(states & set(OVER)))
                    continue
            finally:
                self._turn.close()
            if TrialState.RUNNING not in states:
                return
            time.sleep(1.0)  # another worker has the last ones; should it be killed, they are tried again here

    def _one(self, drawn_by: optuna.samplers.BaseSampler, hopeful: bool) -> None:
        """Train one trial to its end."""
        self.study.sampler = drawn_by
        number: list[int] = []
        try:
            self.study.optimize(
                lambda trial: self._objective(trial, number), n_trials=1, catch=(Exception,) if hopeful else ()
            )
        except KeyboardInterrupt:
            if number:
                self._wait_again(self.study.get_trials(deepcopy=False)[number[-1]])
            raise
        finally:
            if number:  # last of all: who listens may have left
                self.say(self._told)
        trial = self.study.get_trials(deepcopy=False)[number[-1]]
        if not self.sweep.keep_checkpoints and trial.state in OVER:
            self._tidy(self.sweep.folder(original(trial)))

    def _wait_again(self, trial: FrozenTrial) -> None:
        """Let an interrupted trial be the next one."""
        self.study.add_trial(
            optuna.create_trial(
                state=TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs=trial.user_attrs,
                system_attrs={"failed_trial": trial.number, **trial.system_attrs},
            )
        )

    def _revive(self) -> None:
        """Let trials be tried again whose workers are gone: of this machine at once, of others after ``GRACE``."""
        optuna.storages.fail_stale_trials(self.study)
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            host, process = trial.user_attrs.get("worker", (HOST, None))  # none: killed as it took the trial
            if host == HOST and not _alive(process):
                self.study.tell(trial.number, state=TrialState.FAIL)
                _again(self.study, trial)

    def _objective(self, trial: Trial, number: list[int]) -> float:
        """Return the interquartile mean over seeds of their last evaluations."""
        number.append(trial.number)
        drawn = {name: _suggest(trial, name, one) for name, one in self.sweep.distributions.items()}
        of = original(self.study.get_trials(deepcopy=False)[trial.number])
        folder = self.sweep.folder(of)
        folder.mkdir(exist_ok=True)
        trial.set_user_attr("worker", [HOST, os.getpid()])
        assert self._turn is not None
        self._turn.close()
        record = Record(self.sweep, trial)
        ended = "stopped"
        try:
            for i, config in enumerate(self.sweep.runs(of, self.sweep.params(drawn))):
                self._train(config, i, record)
            ended = "done"
            return float(iqm(record.scores))
        except optuna.TrialPruned as pruned:
            ended = str(pruned)
            raise
        except Exception as error:
            ended = f"failed: {' '.join(str(error).split()) or type(error).__name__}"
            raise
        finally:
            record.close(ended)
            self._told = f"trial {of}: {record.told(ended)}"

    def _train(self, config: TrainConfig, index: int, record: Record) -> None:
        """Train one seed, or go on with it."""
        folder = Path(str(config.run_dir))
        report = Reporter(record, index, folder, config.seed)
        if (folder / "config.yaml").is_file():
            trainer = resume(folder, {}, [report], env_id=config.env.id)
        else:
            trainer = begin(config, [report])
        with trainer:
            result = trainer.run()
        if result.status == INTERRUPTED:
            raise KeyboardInterrupt
        if result.status == NONFINITE:  # so bad that the search should keep away, which a failed trial does not tell it
            raise optuna.TrialPruned(f"pruned: the {result.first_bad} was not finite")
        if not result.saved:
            raise RloptError(f"{folder} could not be saved; free some space")
        record.read(index, folder, config.seed)
        if not record.seeds[index]:
            raise RloptError(f"agent={config.agent.name} is not evaluated, and a sweep ranks by evaluations")
        if report.pruned:
            raise optuna.TrialPruned(f"pruned at step {result.step:,} of seed {config.seed}")

    def _tidy(self, folder: Path) -> None:
        """Remove what only a resume would need: replay buffers of many trials fill a disk."""
        for run in folder.glob("seed*"):
            for checkpoint in RunFolder(run).checkpoints.glob("*"):
                if checkpoint.name != "best":
                    remove(checkpoint)


class Record:
    """What the seeds of a trial came to so far, and what of it Optuna knows.

    Seed i at step s is told as step i · total_steps + s, with the mean over the seeds so far at s: a trial is held
    against others that were as far, and one that lies behind after its first seed costs no second one.
    """

    def __init__(self, sweep: Sweep, trial: Trial) -> None:
        self.sweep, self.trial, self.begin = sweep, trial, time.monotonic()
        self.seeds: dict[int, list[EvaluationCurve]] = {}
        self.at: dict[int, list[float]] = {}
        """Mean returns at each step, of all seeds that came by."""
        self.known: set[int] = set()

    @property
    def curves(self) -> list[EvaluationCurve]:
        return [curve for of_run in self.seeds.values() for curve in of_run]

    @property
    def scores(self) -> list[float]:
        return [curve.means[-1] for curve in self.curves]

    def read(self, index: int, folder: Path, seed: int) -> None:
        """Tell Optuna what ``evaluations.csv`` has that it does not know."""
        self.seeds[index] = found = once_trained(evaluations(folder, seed))
        total, every = self.sweep.base.total_steps, self.sweep.base.eval.every or self.sweep.base.total_steps
        for i, step in enumerate(found[0].steps if found else []):
            due = step if step >= total else step // every * every  # the same, however many environments step at once
            if (at := index * total + due) not in self.known:
                self.known.add(at)
                self.at.setdefault(due, []).extend(curve.means[i] for curve in found)
                self.trial.report(float(iqm(self.at[due])), at)

    def close(self, ended: str) -> None:
        """Keep what the table needs in the study, which other machines see too."""
        found = self.curves
        score = score_of(found) if found else None
        self.trial.set_user_attr(
            "outcome",
            {
                "scores": self.scores,
                "interval": None if score is None or math.isnan(score.low) else [score.low, score.high],
                "step": min((curve.steps[-1] for curve in found), default=None),
                "seconds": round(time.monotonic() - self.begin, 2),
                "ended": ended,
            },
        )

    def told(self, ended: str) -> str:
        value = f"{iqm(self.scores):.1f}, " if self.curves else ""
        minutes = (time.monotonic() - self.begin) / 60
        words = " ".join(self.sweep.searched(self.sweep.params(self.trial.params)))
        return f"{value}{ended} after {minutes:.1f} min  {words}"


class Reporter(Callback):
    """Tells each evaluation of a run, and stops it where its trial is pruned."""

    def __init__(self, record: Record, index: int, folder: Path, seed: int) -> None:
        self.record, self.index, self.folder, self.seed = record, index, folder, seed
        self.pruned = False

    def on_evaluation(self, trainer: Trainer, episodes: Sequence[Episode]) -> bool:
        """Stop where the pruner says so, but a trial that has come to its end: it costs nothing more."""
        self.record.read(self.index, self.folder, self.seed)
        whole = trainer.loop.step >= trainer.loop.total_steps and self.index == self.record.sweep.seeds - 1
        self.pruned = not whole and self.record.trial.should_prune()
        return self.pruned


def _alive(process: int | None) -> bool:
    if process is None or os.name == "nt":  # where asking would end it: another GRACE seconds will tell
        return process is not None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _suggest(trial: Trial, name: str, one: Any) -> Any:
    if isinstance(one, optuna.distributions.CategoricalDistribution):
        return trial.suggest_categorical(name, one.choices)
    suggest: Any = trial.suggest_int if isinstance(one, optuna.distributions.IntDistribution) else trial.suggest_float
    return suggest(name, one.low, one.high, step=one.step, log=one.log)
