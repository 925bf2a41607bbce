"""The one trainer: drives a loop to its last step, and owns evaluation, logging, checkpoints and the stop."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, Self

import safetensors.torch

from rlopt.agents.saving import write_agent
from rlopt.allocation import memory_told
from rlopt.analysis.tables import read_csv
from rlopt.files import replace_file
from rlopt.loops.base import Loop, Progress
from rlopt.loops.metrics import MetricSums, load_sums, means, merge, sums_state
from rlopt.policy import Policy, save_policy
from rlopt.runs.checkpoint import CheckpointFailed, Checkpoints, Loaded
from rlopt.runs.logging import Display, Logger
from rlopt.runs.run_folder import RunFolder, told_as_one_line
from rlopt.settings import read_settings_text
from rlopt.training.callback import Callback as Callback  # noqa: PLC0414 - where one looks for it
from rlopt.training.result import FINISHED, INTERRUPTED, NONFINITE, STOPPED, Result
from rlopt.training.signals import Signals
from rlopt.types import Episode, RloptError, State

log = logging.getLogger(__name__)

SMALLER = "make agent.batch_size, agent.network.hidden, num_envs or num_runs smaller"

FRUITLESS = 1_000
"""Advances in a row without one usable transition, after which a run stops even if it skips non-finite values."""


class UnfitCheckpoint(RloptError):
    """A checkpoint is sound, but what it holds is not of this run."""


class Trainer:
    """Runs a loop inside a run folder.

    Args:
        loop: what does the work.
        folder: where results go, created or opened as a writer; ``close`` releases its lock.
        eval_every: steps between evaluations; None evaluates at the end only.
        eval_episodes: episodes per evaluation. eval_at_start: evaluate the untrained policy as well, where curves
            begin; it counts for nothing else (not as the best, nor as the last evaluation).
        log_every: steps between rows of ``metrics.csv``.
        checkpoint_minutes, checkpoint_every: how often the run is saved, by the clock and by steps; None switches one
        off. keep: checkpoints kept.
        tensorboard, trackers: what shows the run's numbers besides its tables (``rlopt.runs.trackers``).
        skip_nonfinite: go on after a non-finite value was kept out of the weights, instead of stopping, until
            ``FRUITLESS`` advances in a row gave nothing else.
        policy_meta: plain values written into exported policies, so that ``rlopt evaluate`` can rebuild the
            environment.
    """

    def __init__(
        self,
        loop: Loop,
        folder: RunFolder,
        *,
        eval_every: int | None = 5_000,
        eval_episodes: int = 10,
        eval_at_start: bool = True,
        log_every: int = 1_000,
        checkpoint_minutes: float | None = 10.0,
        checkpoint_every: int | None = None,
        keep: int = 2,
        tensorboard: bool = True,
        trackers: Sequence[str] = (),
        skip_nonfinite: bool = False,
        policy_meta: State | None = None,
        callbacks: Sequence[Callback] = (),
        display: Display | None = None,
    ) -> None:
        self.loop, self.folder = loop, folder
        self.eval_at_start = eval_at_start and eval_every is not None
        self.eval_every, self.eval_episodes, self.log_every = eval_every, eval_episodes, log_every
        self.checkpoint_minutes, self.checkpoint_every = checkpoint_minutes, checkpoint_every
        self.skip_nonfinite, self.policy_meta, self.callbacks = skip_nonfinite, policy_meta or {}, list(callbacks)
        with told_as_one_line(folder.path):
            self.checkpoints = Checkpoints(folder.checkpoints, keep=keep, config=read_settings_text(folder.config_path))
        self.tensorboard, self.trackers, self.display = tensorboard, tuple(trackers), display
        self.logger: Logger | None = None
        self.last_evaluation: list[Episode] = []
        self.best = -math.inf
        """The best mean return of an evaluation, over all runs where there are several."""
        self._best_of_runs = [-math.inf] * loop.runs
        self._signal: int | None = None
        self._first_bad: str | None = None
        self._saved_step = self._exported_step = -1
        self._before = self._fruitless = 0
        self._failure: Exception | None = None
        """What a callback raised first; raised again once the run has been saved."""
        self._evaluation_due = False
        self._marks: dict[str, tuple[int, str]] = {}
        # The open window of the next row of metrics.csv; saved, so that a resumed run logs the same row.
        self._sums: MetricSums = {}
        self._returns: list[float] = []
        self._updates = 0
        # Wall-clock facts; never part of what a resume repeats.
        self._env_seconds = self._learn_seconds = 0.0
        self._update_seconds = math.nan
        """What an update took when it was last measured."""
        self._window_start, self._window_step = perf_counter(), 0

    def resume(self, without_lost_rows: bool = False) -> bool:
        """Load the newest sound checkpoint; False where there is none yet.

        Args:
            without_lost_rows: see ``Checkpoints.load``.

        Raises:
            UnfitCheckpoint: it does not fit this run. A trainer of a new loop that knows ``checkpoints.unfit`` of this
                one takes the one before.
            RloptError: as ``Checkpoints.load`` does.
        """
        loaded = self.checkpoints.load(without_lost_rows)
        if loaded is None:
            return False
        try:
            self._load(loaded)
        except OSError:
            raise
        except Exception as e:
            reason = f"{type(e).__name__}: {e}" if not isinstance(e, RloptError) else str(e)
            self.checkpoints.unfit[loaded.path] = f"{loaded.path} does not fit this run ({' '.join(reason.split())})"
            raise UnfitCheckpoint(self.checkpoints.unfit[loaded.path]) from e
        self.checkpoints.accept(loaded)
        self._saved_step = -1 if loaded.lost else self.loop.step
        self._window_step = self.loop.step
        return True

    def _load(self, loaded: Loaded) -> None:
        state = loaded.state
        self.loop.load_state_dict(state["loop"])
        logs = self.loop.row_logs()
        if differ := [name for name, log in loaded.logs.items() if log.rows_written != logs[name].rows_written]:
            raise ValueError(f"its state and its segments disagree about the rows of {differ[0]}")
        self.checkpoints.restore_logs(loaded, logs)
        self.loop.rows_restored()
        self._sums = load_sums(state["window"]["sums"])
        self._returns = [float(value) for value in state["window"]["returns"]]
        self._updates = int(state["window"]["updates"])
        self.best = float(state["best"])
        self._best_of_runs = [float(best) for best in state.get("best_of_runs", [self.best])]
        self.last_evaluation = [Episode(*entry) for entry in state["last_evaluation"]]
        self._evaluation_due = bool(state.get("evaluation_due", False))
        self._marks = loaded.tables
        if self.loop.step != loaded.step:
            raise ValueError(f"it is of step {loaded.step}, its loop of {self.loop.step}")

    def run(self) -> Result:
        """Train until ``total_steps``, a callback's wish, a signal, or a non-finite value; always saves before it
        returns, or raises what an environment or a callback raised."""
        first = self.loop.step
        with told_as_one_line(self.folder.path):
            self.logger = Logger(
                self.folder,
                self.tensorboard,
                resume_step=first,
                marks=self._marks,
                num_runs=self.loop.runs,
                trackers=self.trackers,
            )
        idle = self.loop.idle_reason()
        if idle is not None:
            self._say(f"{idle}: nothing will be learnt")
        with Signals(self.request_stop):
            self._tell(lambda c: c.on_start(self))
            self._window_start, self._window_step = perf_counter(), first
            try:
                with memory_told(SMALLER):
                    status = self._train() if self._failure is None else STOPPED
            except Exception:
                self._save_on_the_way_out()
                raise
            saved = self._save()
        if self._failure is not None:
            raise self._failure
        if idle is not None and status == FINISHED:
            self._say(f"no update was made, so nothing was learnt: {idle}")
        signum = self._signal if status == INTERRUPTED else None
        result = Result(
            status,
            self.loop.step,
            self.last_evaluation,
            self.folder.path,
            signum,
            self._first_bad,
            saved,
            self.loop.evaluation_mode,
        )
        self._tell(lambda c: c.on_end(self, result))
        if self._failure is not None:
            raise self._failure
        return result

    def _train(self) -> str:
        """Return everything between the first step and the last save; returns the status."""
        saved_at, first = monotonic(), self.loop.step
        due = self.eval_at_start if first == 0 else self._evaluation_due or first >= self.loop.total_steps
        if due and first not in read_csv(self.folder.evaluations)["step"]:  # else it was made before a resume
            self._evaluate()
            self._saved_step = -1
        while self.loop.step < self.loop.total_steps:
            status = self._advance()
            if status != FINISHED:
                return status
            minutes = (monotonic() - saved_at) / 60.0
            if self._checkpoint_due(minutes):
                self._save()
                saved_at = monotonic()
                if self._failure is not None:
                    return STOPPED
        return FINISHED

    def _save_on_the_way_out(self) -> None:
        """Keep what was learnt before an error that ends the run."""
        try:
            if self._save():
                self._say(f"the run was saved at step {self.loop.step}, where this error ends it")
        except Exception as e:
            self._say(f"step {self.loop.step} could not be saved on the way out: {' '.join(str(e).split())}")

    def _tell(self, call: Callable[[Callback], object]) -> bool:
        """Call every callback, also those after one that fails; true where one wishes to stop, or has failed."""
        wish = False
        for c in self.callbacks:
            try:
                wish = bool(call(c)) or wish
            except Exception as e:
                self._failure, wish = self._failure or e, True
        return wish

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release files, processes, the display, and last the folder's lock. Safe to call twice."""
        try:
            if self.logger is not None:
                self.logger.close()
                self.logger = None
            if self.display is not None:
                self.display.close()
        finally:
            try:
                self.loop.close()
            finally:
                self.folder.close()

    def request_stop(self, signum: int) -> None:
        """Finish the step in hand, save, and return from ``run``."""
        self._signal = signum

    def _advance(self) -> str:
        """Return one ``advance`` of the loop and what is due after it; the status says whether to go on (``finished``)
        or why not."""
        before = self._before = self.loop.step
        self.loop.torn = True
        progress = self.loop.advance()
        self.loop.torn = False
        step, end = self.loop.step, self.loop.step >= self.loop.total_steps
        self._collect(progress)
        wish = self._tell(lambda c: c.on_step(self, progress))
        self._fruitless = self._fruitless + 1 if step == before else 0
        told_now = self._fruitless >= FRUITLESS or (self.loop.bad_now() and not self.skip_nonfinite)
        stop = told_now and self._nonfinite()
        if stop or end or _crossed(before, step, self.log_every):
            stop = self._log() or stop
        if stop:
            return NONFINITE
        if end or _crossed(before, step, self.eval_every):
            self._evaluation_due = True
            wish = self._evaluate() or wish
        if end:
            return FINISHED
        if self._signal is not None:
            return INTERRUPTED
        return STOPPED if wish else FINISHED

    def _checkpoint_due(self, minutes: float) -> bool:
        if self.loop.step >= self.loop.total_steps:
            return False
        by_clock = self.checkpoint_minutes is not None and minutes >= self.checkpoint_minutes
        return by_clock or _crossed(self._before, self.loop.step, self.checkpoint_every)

    def _collect(self, progress: Progress) -> None:
        merge(self._sums, progress.metrics)
        self._updates += progress.updates
        self._env_seconds += progress.env_seconds
        self._learn_seconds += progress.learn_seconds
        assert self.logger is not None
        self.logger.trajectories(self.loop.step, progress.trajectories)
        if progress.episodes:
            self.logger.episodes(self.loop.step, progress.episodes)
            self._returns += [e.total_reward for e in progress.episodes]

    def _log(self) -> bool:
        """Write one row of ``metrics.csv`` and refresh the display; true where a non-finite value asks for the stop."""
        assert self.logger is not None
        self.folder.check()
        now = perf_counter()
        seconds = max(now - self._window_start, 1e-9)
        values: dict[str, float] = {
            "steps_per_second": self.loop.runs * (self.loop.step - self._window_step) / seconds,
            "env_seconds": self._env_seconds,
            "learn_seconds": self._learn_seconds,
            "updates": float(self._updates),
        }
        if self._returns:
            values["episode_return"] = sum(self._returns) / len(self._returns)
        values.update(means(self._sums))
        values.update(self.loop.counters())
        stop = self._nonfinite()
        self.logger.metrics(self.loop.step, values)
        if self.display is not None:
            self.display.total_steps = self.loop.total_steps  # lower once a solver has converged
            self.display.runs = self.loop.runs
            self.display.update(self.loop.step, {**values, "seconds_left": self._seconds_left(seconds)})
        self._sums, self._returns, self._updates = {}, [], 0
        self._env_seconds = self._learn_seconds = 0.0
        self._window_start, self._window_step = now, self.loop.step
        return stop

    def _seconds_left(self, seconds: float) -> float:
        """Estimate the time to the end from a window of ``seconds``: what its steps took and what its updates took,
        apart, because a run that has only warmed up learns later. NaN where no update was timed yet."""
        steps = max(self.loop.step - self._window_step, 1)
        steps_left = self.loop.total_steps - self.loop.step
        updates_left = self.loop.updates_left()
        if updates_left is None:
            return steps_left * seconds / steps
        if self._updates:
            self._update_seconds = self._learn_seconds / self._updates
        if updates_left == 0:
            return steps_left * (seconds - self._learn_seconds) / steps
        return steps_left * (seconds - self._learn_seconds) / steps + updates_left * self._update_seconds

    def _nonfinite(self) -> bool:
        """Report a non-finite value if there was one; true where it asks for the stop."""
        bad = self.loop.first_bad()
        hopeless = self._fruitless >= FRUITLESS
        if bad is None:
            if hopeless:
                raise RloptError(
                    f"{FRUITLESS:,} steps in a row gave no transition; look at the warnings about the environment"
                )
            return False
        self._first_bad = bad
        if not self.skip_nonfinite:
            what = "stopping; resume with on_nonfinite=skip to go on without it"
        elif hopeless:
            what = f"stopping, as {FRUITLESS:,} steps in a row gave nothing else; look at the environment"
        else:
            what = "skipped; training goes on"
        self._say(f"the {bad} was not finite by step {self.loop.step}; it never reached the weights: {what}")
        self.loop.clear_bad()  # told once; kept, it would stop a resumed run again
        self._fruitless = 0
        return hopeless or not self.skip_nonfinite

    def _evaluate(self) -> bool:
        """Run and write an evaluation, keep what is best; true where a callback wishes to stop."""
        assert self.logger is not None
        begin = perf_counter()
        episodes = self.loop.evaluate(self.eval_episodes)
        self._evaluation_due = False
        if not episodes:
            return False
        self.logger.evaluation(self.loop.step, episodes)
        returns: list[list[float]] = [[] for _ in self._best_of_runs]
        for e in episodes:
            returns[e.run].append(e.total_reward)
        means_of_runs = [sum(of_run) / len(of_run) for of_run in returns]
        mean = sum(means_of_runs) / len(means_of_runs)
        if self.display is not None:
            self.display.update(self.loop.step, {"evaluation_return": mean})
        trained = self.loop.step > 0
        if trained:
            self.last_evaluation = episodes
            self._keep_best(means_of_runs, mean)
        wish = trained and self._tell(lambda c: c.on_evaluation(self, episodes))
        self._window_start += perf_counter() - begin  # evaluation is not training time
        return wish

    def _keep_best(self, means_of_runs: list[float], mean: float) -> None:
        better = [r for r, m in enumerate(means_of_runs) if self._best_of_runs[r] < m < math.inf]
        for r in better:
            self._best_of_runs[r] = means_of_runs[r]
        whole = self.best < mean < math.inf
        if whole:
            self.best = mean
        if better or whole:
            self._guarded_save(lambda: self._save_best(better, whole), "the best policy")

    def _save_best(self, better: list[int], whole: bool) -> None:
        """The agent where it is ``better`` on the whole, and the policies of the runs that are."""
        if whole and self.loop.agent.loop != "solver":  # a solver is nothing without its model
            self.checkpoints.save_best(self.loop.step, partial(write_agent, self.loop.agent))
        policies = self.loop.policies()
        for r in better:
            self._save_policy(r, policies[r], self.folder.policy_best, "best", evaluation_return=self._best_of_runs[r])

    def _save_policy(self, run: int, policy: Policy, folder: Path, selected: str, **more: float) -> None:
        """Into ``folder``; of several runs into ``folder/run0`` …"""
        meta = {**self.policy_meta, "step": self.loop.step, "selected": selected, **more}
        if self.loop.runs > 1:
            folder, meta["seed"] = folder / f"run{run}", int(meta.get("seed", 0)) + run
        save_policy(policy, folder, meta)

    def _save(self) -> bool:
        """Checkpoint, exported policy and picture; a failure is reported and harms nothing that was there.

        The policy has a step of its own: a run killed between the two exports it when it is resumed.
        """
        assert self.logger is not None
        self.folder.check()
        begin = perf_counter()
        saved = True
        if self._saved_step != self.loop.step:
            self.logger.flush()
            saved = self._guarded_save(self._save_checkpoint, "the checkpoint")
        elif self._exported_step != self.loop.step:
            saved = self._guarded_save(self._export, "the policy")
        self._window_start += perf_counter() - begin
        return saved

    def _save_checkpoint(self) -> None:
        assert self.logger is not None
        step, marks = self.loop.step, self.logger.marks()
        path = self.checkpoints.save(step, self.state_dict(), self.loop.row_logs(), tables=marks)
        self._saved_step = self.loop.step
        self._export()
        self._tell(lambda c: c.on_checkpoint(self, path))

    def _export(self) -> None:
        for r, policy in enumerate(self.loop.policies()):
            self._save_policy(r, policy, self.folder.policy, "last")
        if self.loop.step >= self.loop.total_steps and (found := self.loop.results()):
            found = {name: tensor.cpu().contiguous() for name, tensor in found.items()}
            replace_file(self.folder.solution, safetensors.torch.save(found))
        self._exported_step = self.loop.step
        self.folder.draw_curve(self.loop.unit)
        if self.logger is not None and self.folder.curve.is_file():
            self.logger.picture(self.loop.step, "curve", self.folder.curve)

    def _guarded_save(self, save: Any, what: str) -> bool:
        try:
            save()
        except CheckpointFailed as e:
            self._say(str(e))
            return False
        except OSError as e:
            self._say(f"{what} of step {self.loop.step} could not be saved ({e}); the last good one is intact")
            return False
        return True

    def state_dict(self) -> State:
        """Return the loop, and the trainer's own window, so that a resumed run writes the same rows."""
        return {
            "loop": self.loop.state_dict(),
            "window": {
                "sums": sums_state(self._sums),
                "returns": self._returns,
                "updates": self._updates,
            },
            "best": self.best,
            "best_of_runs": self._best_of_runs,
            "last_evaluation": [list(e) for e in self.last_evaluation],
            "evaluation_due": self._evaluation_due,
        }

    def _say(self, text: str) -> None:
        if self.display is not None:
            self.display.message(text)
        else:
            log.warning(text)


def _crossed(before: int, after: int, every: int | None) -> bool:
    """Return whether a multiple of ``every`` lies in (before, after]."""
    return every is not None and after // every > before // every
