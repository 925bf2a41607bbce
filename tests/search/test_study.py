"""Sweeps on the real Optuna: seeds, pruning, retries, and a kill after which all is as if it had not been."""

from __future__ import annotations

import csv
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

optuna = pytest.importorskip("optuna")

from rlopt.cli import main  # noqa: E402
from rlopt.cli.compose import compose  # noqa: E402
from rlopt.config import changed  # noqa: E402
from rlopt.loops.configuration import TrainConfig  # noqa: E402
from rlopt.search import study as searching  # noqa: E402
from rlopt.search.outcome import best_command, settings  # noqa: E402
from rlopt.search.plan import Sweep  # noqa: E402
from rlopt.search.space import Choices, Range  # noqa: E402
from rlopt.search.study import Worker, latest, open_study, original  # noqa: E402
from rlopt.training.result import FINISHED, INTERRUPTED, NONFINITE, STOPPED  # noqa: E402
from rlopt.types import RloptError  # noqa: E402
from tests.cli.command_line import ROOT, SHORT, refused, rows  # noqa: E402

WORDS = [word for word in SHORT if not word.startswith(("agent.network.hidden", "eval.every"))]
WORDS += ["agent.fused=false", "eval.every=20", "checkpoint.every_steps=10"]
SPACE = {
    "agent.learning_rate": Range(low=1e-4, high=1e-1, log=True),
    "agent.network.hidden": Choices(choices=[[256, 256], [8]]),
}
RATE = "agent.learning_rate="
Configure = Callable[[Sequence[str]], TrainConfig]
FILE = "agent.learning_rate: {low: 1e-4, high: 1e-1, log: true}\nagent.network.hidden: {choices: [[256, 256], [8]]}\n"


def sweep_of(root: Path, configure: Configure = compose, **options: Any) -> Sweep:
    return Sweep(SPACE, tuple(WORDS), configure, root, **options).prepare()


@cache
def composed(words: tuple[str, ...]) -> TrainConfig:
    return compose(words)


def drawn(words: Sequence[str]) -> TrainConfig:
    """Do what ``compose`` does, with each drawn rate put into what was composed once."""
    config = composed(tuple(word for word in words if not word.startswith(RATE)))
    for word in words:
        if word.startswith(RATE):
            config = replace(config, agent=changed(config.agent, learning_rate=float(word.removeprefix(RATE))))
    return config


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage of Optuna's without a study: making its tables takes half a second."""
    path = tmp_path_factory.mktemp("empty") / "study.db"
    optuna.storages.RDBStorage(f"sqlite:///{path}")
    return path


pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


class Killed(BaseException):
    """Ends a worker without a word to anybody, as kill -9 does."""


class Runs:
    """Stands in for training: each run's evaluations are what ``returns(learning rate, seed)`` says, one every 20
    steps, until it answers with how the run ends."""

    def __init__(self, returns: Callable[[float, int], list[float | str]]) -> None:
        self.returns = returns
        self.trained: list[tuple[str, int]] = []

    def begin(self, config: Any, callbacks: Any) -> FakeTrainer:
        self.trained.append((Path(config.run_dir).parent.name, config.seed))
        return FakeTrainer(config, callbacks[0], self.returns(config.agent.learning_rate, config.seed))


class FakeTrainer:
    def __init__(self, config: Any, callback: Any, returns: list[float | str]) -> None:
        self.folder, self.callback, self.returns = Path(config.run_dir), callback, returns
        self.loop = SimpleNamespace(step=0, total_steps=config.total_steps)
        for name in ("best", "step60"):
            (self.folder / "checkpoints" / name).mkdir(parents=True)

    def __enter__(self) -> FakeTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self) -> Any:
        status, lines = FINISHED, ["step,episode,return,length"]
        for value in self.returns:
            if isinstance(value, str):
                status = value
                break
            self.loop.step += 20
            lines.append(f"{self.loop.step},0,{value},200")
            (self.folder / "evaluations.csv").write_text("\n".join(lines) + "\n")
            if self.callback.on_evaluation(self, []) and self.loop.step < self.loop.total_steps:
                status = STOPPED
                break
        return SimpleNamespace(status=status, step=self.loop.step, saved=True, first_bad="critic")


@pytest.fixture
def quick(empty: Path) -> Callable[..., Sweep]:
    """Return sweeps whose trials cost next to nothing, beside what is trained."""

    def make(root: Path, **options: Any) -> Sweep:
        if not root.exists():
            root.mkdir(parents=True)
            shutil.copy(empty, root)
        return sweep_of(root, drawn, **options)

    return make


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runs]:
    def put(returns: Callable[[float, int], list[float | str]]) -> Runs:
        runs = Runs(returns)
        monkeypatch.setattr(searching, "begin", runs.begin)
        return runs

    return put


def test_trials_are_ranked_by_the_iqm_over_seeds_of_their_last_evaluations(
    tmp_path: Path, quick: Callable[..., Sweep], instead: Callable[..., Runs]
) -> None:
    runs = instead(lambda rate, seed: [0.0, 1.0, -abs(math.log10(rate) + 2) + seed])
    sweep = quick(tmp_path / "s", trials=6, seeds=2, pruner="none")
    said: list[str] = []
    Worker(sweep, study := open_study(sweep), said.append).run()
    assert runs.trained == [(f"trial{i:04d}", seed) for i in range(6) for seed in (0, 1)]
    assert len(said) == 6
    assert study.trials[0].params == {
        "agent.learning_rate": 3e-4,
        "agent.network.hidden": "[256,256]",
    }  # without a search
    for trial in study.trials:
        assert trial.value == pytest.approx(-abs(math.log10(trial.params["agent.learning_rate"]) + 2) + 0.5)
        assert sorted(trial.intermediate_values) == [20, 40, 60, 80, 100, 120]
        assert trial.intermediate_values[60] == pytest.approx(trial.value - 0.5)  # the first seed
        assert trial.intermediate_values[120] == pytest.approx(trial.value)  # both
    best = study.best_trial
    command = best_command(sweep, study.trials, " ".join)
    assert command is not None
    assert f"agent.learning_rate={best.params['agent.learning_rate']!r}" in command
    assert command.endswith("-m seed=2,3,4")  # seeds that the search has not seen
    left = [path.name for path in (tmp_path / "s").glob("trial*/seed*/checkpoints/*")]
    assert set(left) == {"best"}


def test_more_trials_go_on_with_what_there_is_and_draw_what_they_would_have_drawn(
    tmp_path: Path, quick: Callable[..., Sweep], instead: Callable[..., Runs]
) -> None:
    instead(lambda rate, seed: [1.0, 2.0, math.log(rate)])
    found = []
    for name, counts in (("once", [12]), ("twice", [5, 12])):
        for count in counts:
            sweep = quick(tmp_path / name / "s", trials=count, startup=2)
            Worker(sweep, study := open_study(sweep), lambda line: None).run()
        found.append([trial.params for trial in study.trials])
    assert found[0] == found[1]
    assert len(found[0]) == 12


def test_a_sweep_does_not_go_on_in_the_folder_of_another(tmp_path: Path, quick: Callable[..., Sweep]) -> None:
    open_study(quick(tmp_path / "s"))
    with pytest.raises(RloptError, match="holds a sweep with other seeds"):
        open_study(quick(tmp_path / "s", seeds=2))
    other = Sweep(SPACE, (*WORDS, "agent.gamma=0.9"), compose, tmp_path / "s")
    with pytest.raises(RloptError, match="holds a sweep with other overrides"):
        open_study(other)


@pytest.mark.parametrize(
    ("options", "whole"),
    [({"startup": 2}, 2), ({"pruner": "percentile", "percentile": 60.0, "startup": 3}, 3), ({"pruner": "none"}, 6)],
)
def test_trials_that_lie_behind_are_pruned_in_their_first_seed(
    tmp_path: Path, quick: Callable[..., Sweep], instead: Callable[..., Runs], options: dict[str, Any], whole: int
) -> None:
    """Each trial is worse than all before it."""
    count = iter(range(100))
    runs = instead(lambda rate, seed: [-float(next(count))] * 3)
    sweep = quick(tmp_path / "s", trials=6, seeds=2, **options)
    Worker(sweep, study := open_study(sweep), lambda line: None).run()
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE"] * whole + ["PRUNED"] * (6 - whole)
    assert len(runs.trained) == 2 * whole + 6 - whole
    told = settings(sweep, study.trials)
    assert {one.ended for one in told[whole:]} <= {"pruned at step 20 of seed 0"}


def test_hyperband_prunes_too_and_nothing_is_pruned_before_its_step(
    tmp_path: Path, quick: Callable[..., Sweep], instead: Callable[..., Runs]
) -> None:
    count = iter(range(100))
    instead(lambda rate, seed: [-float(next(count))] * 3)
    sweep = quick(tmp_path / "s", trials=12, pruner="hyperband", prune_after=40)
    Worker(sweep, study := open_study(sweep), lambda line: None).run()
    pruned = [trial for trial in study.trials if trial.state.name == "PRUNED"]
    assert pruned
    assert min(max(trial.intermediate_values) for trial in pruned) >= 40


def test_what_diverges_is_pruned_and_what_fails_is_told_unless_all_would(
    tmp_path: Path, quick: Callable[..., Sweep], instead: Callable[..., Runs]
) -> None:
    ends: list[Any] = [[1.0, 1.0, 1.0], [1.0, NONFINITE], None, [1.0, 1.0, 2.0]]

    def returns(rate: float, seed: int) -> list[float | str]:
        end = ends.pop(0)
        if end is None:
            raise RloptError("no luck")
        return list(end)

    instead(returns)
    sweep = quick(tmp_path / "s", trials=4)
    Worker(sweep, study := open_study(sweep), lambda line: None).run()
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "FAIL", "COMPLETE"]
    told = [one.ended for one in settings(sweep, study.trials)]
    assert told == ["done", "pruned: the critic was not finite", "failed: no luck", "done"]
    ends[:] = [None, [1.0, 1.0, 1.0]]
    hopeless = quick(tmp_path / "t", trials=4)
    with pytest.raises(RloptError, match="no luck"):
        Worker(hopeless, open_study(hopeless), lambda line: None).run()


def test_an_interrupted_trial_is_the_next_one(
    tmp_path: Path, quick: Callable[..., Sweep], instead: Callable[..., Runs]
) -> None:
    ends: list[list[float | str]] = [[1.0, 1.0, 1.0], [1.0, INTERRUPTED], [1.0, 1.0, 2.0], [1.0, 1.0, 3.0]]
    runs = instead(lambda rate, seed: ends.pop(0))
    sweep = quick(tmp_path / "s", trials=3)
    with pytest.raises(KeyboardInterrupt):
        Worker(sweep, open_study(sweep), lambda line: None).run()
    shutil.rmtree(tmp_path / "s" / "trial0001")  # what stands in for training cannot go on
    Worker(sweep, study := open_study(sweep), lambda line: None).run()
    assert [name for name, _ in runs.trained] == ["trial0000", "trial0001", "trial0001", "trial0003"]
    assert [(original(trial), trial.value) for trial in latest(study)] == [(0, 1.0), (1, 2.0), (3, 3.0)]
    assert study.trials[1].params == study.trials[2].params


def test_a_listener_who_left_does_not_turn_a_trial_into_a_failed_one(
    tmp_path: Path, quick: Callable[..., Sweep], instead: Callable[..., Runs]
) -> None:
    """A closed terminal or pipe, as the sweep is stopped."""
    ends: list[list[float | str]] = [[1.0, 1.0, 1.0], [1.0, INTERRUPTED]]
    instead(lambda rate, seed: ends.pop(0))

    def say(line: str) -> None:
        if len(ends) == 0:
            raise BrokenPipeError

    sweep = quick(tmp_path / "s", trials=3)
    with pytest.raises(BrokenPipeError):
        Worker(sweep, study := open_study(sweep), say).run()
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "WAITING"]


def test_a_killed_trial_goes_on_from_its_checkpoint_and_equals_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By real training; the kill comes at step 40 of a second seed, ten steps after a checkpoint."""
    whole = sweep_of(tmp_path / "whole" / "s", trials=1, seeds=2)
    Worker(whole, open_study(whole), lambda line: None).run()

    def kill(self: Any, trainer: Any, episodes: Any) -> bool:
        if self.seed == 1 and trainer.loop.step == 40:
            raise Killed
        return told(self, trainer, episodes)

    told = searching.Reporter.on_evaluation
    sweep = sweep_of(tmp_path / "cut" / "s", trials=1, seeds=2)
    monkeypatch.setattr(searching.Reporter, "on_evaluation", kill)
    with pytest.raises(Killed):
        Worker(sweep, open_study(sweep), lambda line: None).run()
    monkeypatch.setattr(searching.Reporter, "on_evaluation", told)
    monkeypatch.setattr(searching, "_alive", lambda process: False)
    Worker(sweep, study := open_study(sweep), lambda line: None).run()
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    assert study.trials[1].intermediate_values == open_study(whole).trials[0].intermediate_values
    for seed in (0, 1):
        for name in ("evaluations.csv", "episodes.csv", "policy/tensors.safetensors"):
            one, other = (
                root / "s" / "trial0000" / f"seed{seed}" / name for root in (tmp_path / "whole", tmp_path / "cut")
            )
            assert one.read_bytes() == other.read_bytes()
    main_words = ["train", *WORDS, "threads=1", "seed=1", "agent.learning_rate=0.0003", f"run_dir={tmp_path / 'alone'}"]
    assert main(main_words) == 0  # and a trial is the run that it would be alone
    alone = (tmp_path / "alone" / "policy" / "tensors.safetensors").read_bytes()
    assert alone == (tmp_path / "cut/s/trial0000/seed1/policy/tensors.safetensors").read_bytes()


def test_a_trial_of_another_machine_is_tried_again_once_its_heart_stands_still(
    tmp_path: Path, quick: Callable[..., Sweep], instead: Callable[..., Runs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "HEARTBEAT", 1)
    monkeypatch.setattr(searching, "GRACE", 1)

    def returns(rate: float, seed: int) -> list[float | str]:
        if not killed:
            killed.append(True)
            raise Killed
        return [1.0, 1.0, 1.0]

    killed: list[bool] = []
    instead(returns)
    sweep = quick(tmp_path / "s", trials=1)
    monkeypatch.setattr(searching, "HOST", "far away")
    with pytest.raises(Killed):
        Worker(sweep, open_study(sweep), lambda line: None).run()
    monkeypatch.setattr(searching, "HOST", "here")
    Worker(sweep, study := open_study(sweep), lambda line: None).run()
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    assert original(study.trials[1]) == 0


def test_the_command_shows_what_it_would_do_then_does_it_and_tells_what_came_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("space.yaml").write_text(FILE)
    words = ["sweep", "space.yaml", *WORDS, "--trials", "2", "--pruner", "none"]
    assert main([*words, "--print"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["space.yaml"]
    head, *shown = capsys.readouterr().out.splitlines()
    assert head == "# the first 2 of 2 trials; seeds 0"
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "rank  trial  IQM [95 % interval]" in said
    assert "train best   rlopt train env=Pendulum-v1" in said
    table = rows(tmp_path / "sweeps" / "space" / "trials.csv")
    for row, line in zip(table, shown, strict=True):
        assert (
            f"agent.learning_rate={row['agent.learning_rate']} 'agent.network.hidden={row['agent.network.hidden']}'"
            in line
        )
        with (tmp_path / "sweeps" / "space" / row["folder"] / "seed0" / "evaluations.csv").open() as file:
            last = [float(one["return"]) for one in csv.DictReader(file) if one["step"] == "60"]
        assert float(row["iqm"]) == pytest.approx(sum(last) / len(last))
    assert "| rank | trial |" in (tmp_path / "sweeps" / "space" / "ranking.md").read_text()


@pytest.mark.parametrize(
    ("space", "words", "told"),
    [
        ("agent.learning_rat: {low: 1e-4, high: 1e-2}", [], "did you mean agent.learning_rate?"),
        ("agent.tau: {low: 0.1, high: 2}", [], "agent.tau: must be at most 1, got 2"),
        ("agent.noise: {choices: [1]}", ["agent=ppo"], "agent.noise: no such option"),
        ("agent.optimiser.name: {low: 1, high: 2}", [], "agent.optimiser.name: "),
        ("agent.batch_size: {low: 8, high: 12, step: 0.5}", [], "takes whole numbers, so its step is one; got 0.5"),
        (FILE, ["agent.learning_rate=0.1"], "agent.learning_rate is searched by the space; leave one of them out"),
        (FILE, ["agent.gama=0.9"], "did you mean agent.gamma?"),
        (FILE, ["--percentile", "20"], "--percentile has no effect with --pruner median; leave it out"),
        (FILE, ["--pruner", "none", "--prune-after", "9"], "--prune-after has no effect with --pruner none"),
        (FILE, ["eval.every=null"], "eval.every=null: nothing to prune by; set eval.every, or add --pruner none"),
        (FILE, ["--root", "space.yaml"], "--root space.yaml is no folder; name one"),
        (FILE, ["--storage", "nonsense"], "nonsense cannot be used"),
    ],
)
def test_a_mistake_is_one_line_before_anything_begins(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    space: str,
    words: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("space.yaml").write_text(space)
    assert told in refused(["sweep", "space.yaml", "env=Pendulum-v1", *words], capsys)
    assert not list(tmp_path.rglob("trial*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_sweep_of_two_workers_is_killed_twice_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """``pytest -m slow tests/search``: a worker by kill -9, then all of them."""
    (tmp_path / "space.yaml").write_text(FILE.replace("[256, 256]", "[16]"))
    words = [w for w in WORDS if not w.startswith(("total_steps", "eval.every"))] + [
        "total_steps=3_000",
        "eval.every=500",
    ]
    command = [sys.executable, "-m", "rlopt", "sweep", "space.yaml", *words, "checkpoint.every_steps=100"]
    command += ["--trials", "4", "--pruner", "none", "--workers", "2", "--root"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def children(process: int) -> list[int]:
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in listed.stdout.split()]

    def under_way(root: str, trial: str) -> bool:
        return any((tmp_path / root).glob(f"{trial}/seed0/checkpoints/*"))

    sweep = subprocess.Popen([*command, "cut"], cwd=tmp_path, env=environment, start_new_session=True)
    while not under_way("cut", "trial0001"):
        assert sweep.poll() is None
        time.sleep(0.1)
    os.kill(children(sweep.pid)[0], signal.SIGKILL)  # another one takes its place
    while not under_way("cut", "trial*[2-9]"):
        assert sweep.poll() is None
        time.sleep(0.1)
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.wait()
    done = subprocess.run([*command, "cut"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = rows(tmp_path / "cut" / "trials.csv")
    assert [row["ended"] for row in table] == ["done"] * 4
    study = optuna.load_study(study_name="cut", storage=f"sqlite:///{tmp_path / 'cut' / 'study.db'}")
    again = [trial for trial in study.trials if "failed_trial" in trial.system_attrs]
    assert len(again) >= 2
    for number in {original(trial) for trial in again}:
        row = next(one for one in table if one["trial"] == str(number))
        own = [
            f"agent.learning_rate={row['agent.learning_rate']}",
            f"agent.network.hidden={row['agent.network.hidden']}",
        ]
        alone = tmp_path / f"alone{number}"
        assert main(["train", *words, "checkpoint.every_steps=100", "threads=1", *own, f"run_dir={alone}"]) == 0
        for name in ("evaluations.csv", "policy/tensors.safetensors"):
            cut = tmp_path / "cut" / row["folder"] / "seed0" / name
            assert (alone / name).read_bytes() == cut.read_bytes()
