"""The trainer: exact steps, callbacks, failures of the disk."""

import shutil
import signal
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

from rlopt.loops.base import Loop
from rlopt.loops.episodes import EpisodeCounter
from rlopt.runs import checkpoint as checkpoint_module
from rlopt.runs import csv_table
from rlopt.runs.checkpoint import CheckpointFailed, Checkpoints
from rlopt.runs.run_folder import RunFolder
from rlopt.training import signals
from rlopt.training.evaluate import evaluate_path
from rlopt.training.setup import begin, make_loop, resume
from rlopt.training.trainer import Callback, Trainer
from rlopt.types import EnvSpec, Episode, RloptError, Step
from tests.training.small_runs import PLAIN, SMALL, config, rows, run_to_end


@pytest.mark.parametrize(("signum", "usual"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_stop_that_arrives_twice_is_one_and_a_later_one_acts_as_usual(monkeypatch, signum, usual):
    def leave(*_):
        raise SystemExit

    now, wishes = [10.0], []
    monkeypatch.setattr(signals, "monotonic", lambda: now[0])
    # Set in both cases: a background job of a shell begins with SIGINT ignored.
    before = signal.signal(signum, leave if signum == signal.SIGTERM else signal.default_int_handler)
    try:
        with signals.Signals(wishes.append):
            signal.raise_signal(signum)
            signal.raise_signal(signum)
            assert wishes == [signum]
            now[0] = 11.5
            with pytest.raises(usual):
                signal.raise_signal(signum)
        assert wishes == [signum]
    finally:
        signal.signal(signum, before)


@pytest.mark.parametrize("num_envs", [1, 3, 7])
def test_total_steps_is_reached_exactly(tmp_path, num_envs):
    trainer = begin(config(tmp_path / "run", num_envs=num_envs))
    result = run_to_end(trainer)
    assert result.status == "finished" and result.step == 100
    assert trainer.loop.buffer.transitions == 100
    assert trainer.loop.agent.clock.env_steps == 100


@pytest.mark.parametrize(("ratio", "updates"), [((1, 1), 80), ((1, 4), 20), ((3, 2), 120), ((2, 1), 160)])
def test_the_update_ratio_is_exact(tmp_path, ratio, updates):
    """The 80 steps after the 20 of the warm-up owe updates."""
    trainer = begin(config(tmp_path / "run", agent={**SMALL, "update_ratio": list(ratio)}))
    run_to_end(trainer)
    assert trainer.loop.agent.clock.updates == updates


@pytest.mark.parametrize("ratio", [(1, 1), (1, 4), (3, 2)])
def test_the_updates_that_are_left_are_those_that_come(tmp_path, ratio):
    left: list[float] = []

    class Watch(Callback):
        def on_step(self, trainer, progress):
            left.append(trainer.loop.updates_left() + trainer.loop.agent.clock.updates)

    trainer = begin(config(tmp_path / "run", agent={**SMALL, "update_ratio": list(ratio)}), callbacks=[Watch()])
    run_to_end(trainer)
    assert set(left) == {80 * ratio[0] / ratio[1]} and trainer.loop.updates_left() == 0


def test_the_time_left_counts_steps_and_updates_apart():
    """A window of the warm-up tells nothing of the updates to come; later ones do, whatever part of them learnt."""
    loop = SimpleNamespace(step=1_000, total_steps=2_000, updates_left=lambda: 900.0)
    trainer = SimpleNamespace(loop=loop, _window_step=0, _updates=0, _learn_seconds=0.0, _update_seconds=float("nan"))
    assert np.isnan(Trainer._seconds_left(trainer, 1.0))
    trainer.__dict__.update(_updates=100, _learn_seconds=2.0)
    assert Trainer._seconds_left(trainer, 3.0) == pytest.approx(1.0 + 900 * 0.02)
    trainer.__dict__.update(_updates=0, _learn_seconds=0.0)
    assert Trainer._seconds_left(trainer, 1.0) == pytest.approx(1.0 + 900 * 0.02)
    loop.updates_left = lambda: None
    assert Trainer._seconds_left(trainer, 5.0) == 5.0


@pytest.mark.parametrize(
    ("agent", "option"), [({"warmup_steps": 100}, "warmup_steps=100"), ({"learning_starts": 99}, "learning_starts=99")]
)
def test_a_run_that_never_learns_says_so(tmp_path, caplog, agent, option):
    settings = {"agent": {**PLAIN, "update_ratio": [1, 2], **agent}, "total_steps": 100}
    result = run_to_end(begin(config(tmp_path / "run", **settings)))
    assert result.status == "finished"
    before, after = (line for line in caplog.messages if "learnt" in line)
    assert before == f"total_steps=100 is over before the first update (agent.{option}): nothing will be learnt"
    assert after.startswith("no update was made, so nothing was learnt: total_steps=100")
    caplog.clear()
    run_to_end(resume(tmp_path / "run", {"total_steps": 110}))
    assert not [line for line in caplog.messages if "learnt" in line]


def test_the_run_folder_holds_what_it_promises(tmp_path):
    run = tmp_path / "run"
    result = run_to_end(begin(config(run, log={"every": 25, "tensorboard": True})))
    for name in (
        "config.yaml",
        "metrics.csv",
        "evaluations.csv",
        "curve.png",
        "policy/policy.json",
        "policy_best/policy.json",
    ):
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").iterdir())
    evaluations = rows(run / "evaluations.csv")
    assert [(r["step"], r["episode"]) for r in evaluations] == [(s, e) for s in ("0", "50", "100") for e in "01"]
    assert [float(r["return"]) for r in evaluations[4:]] == [e.total_reward for e in result.evaluation]
    assert {r["length"] for r in evaluations} == {"200"}
    metrics = rows(run / "metrics.csv")
    assert [r["step"] for r in metrics] == ["25", "50", "75", "100"]
    assert all(float(r["critic_loss"]) > 0 for r in metrics[1:])


def test_the_untrained_policy_is_evaluated_first_and_counts_for_nothing_else(tmp_path, monkeypatch):
    """An untrained policy that does best of all, in a run that is stopped and goes on."""
    told: list[int] = []

    class Watch(Callback):
        def on_step(self, trainer, progress):
            return trainer.loop.step == 10

        def on_evaluation(self, trainer, episodes):
            told.append(trainer.loop.step)

    evaluate = Loop.evaluate
    better = lambda self, n: [e._replace(total_reward=-float(self.step)) for e in evaluate(self, n)]  # noqa: E731
    monkeypatch.setattr(Loop, "evaluate", better)
    run, settings = tmp_path / "run", {"agent": PLAIN, "total_steps": 30, "eval": {"every": 15, "episodes": 1}}
    stopped = run_to_end(begin(config(run, **settings), callbacks=[Watch()]))
    assert (stopped.step, stopped.evaluation, told) == (10, [], []) and not (run / "policy_best").exists()
    trainer = resume(run, {}, callbacks=[Watch()])
    result = run_to_end(trainer)
    assert [float(row["return"]) for row in rows(run / "evaluations.csv")] == [0.0, -15.0, -30.0]
    assert told == [15, 30] and trainer.best == -15.0
    assert [e.total_reward for e in result.evaluation] == [-30.0]
    again = run_to_end(begin(config(tmp_path / "off", **{**settings, "eval": {"every": 15, "at_start": False}})))
    assert again.status == "finished" and rows(tmp_path / "off" / "evaluations.csv")[0]["step"] == "15"


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    run_to_end(begin(config(tmp_path / "run", total_steps=30)))
    with pytest.raises(RloptError, match="resume="):
        begin(config(tmp_path / "run"))


def test_callbacks_see_everything_and_can_stop(tmp_path):
    seen: list[str] = []

    class Watch(Callback):
        def on_start(self, trainer):
            seen.append("start")

        def on_step(self, trainer, progress):
            return trainer.loop.step >= 60

        def on_evaluation(self, trainer, episodes):
            seen.append(f"evaluation of {len(episodes)}")

        def on_checkpoint(self, trainer, path):
            seen.append(f"checkpoint {trainer.loop.step}")

        def on_end(self, trainer, result):
            seen.append(result.status)

    result = run_to_end(begin(config(tmp_path / "run"), callbacks=[Watch()]))
    assert result.status == "stopped" and result.step == 60
    assert seen == ["start", "evaluation of 2", "checkpoint 60", "stopped"]


def test_a_disk_that_is_full_at_the_start_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    told = rf"^{tmp_path}/\w+ cannot be written: .*No space left on device; free some space"
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint_module.Checkpoints, "__init__", full)
        with pytest.raises(RloptError, match=told):
            begin(config(tmp_path / "one", agent=PLAIN))
    trainer = begin(config(tmp_path / "two", agent=PLAIN))
    monkeypatch.setattr(csv_table, "replace_file", full)
    with pytest.raises(RloptError, match=told):
        run_to_end(trainer)


@pytest.mark.parametrize(("at", "status", "signum"), [(99, "interrupted", signal.SIGTERM), (100, "finished", None)])
def test_a_signal_on_the_last_step_interrupts_nothing(tmp_path, at, status, signum):
    class Stop(Callback):
        def on_step(self, trainer, progress):
            if trainer.loop.step == at:
                trainer.request_stop(signal.SIGTERM)

    result = run_to_end(begin(config(tmp_path / "run"), callbacks=[Stop()]))
    assert (result.status, result.step, result.signal) == (status, at, signum)


def test_a_part_of_an_episode_is_no_episode():
    """The second row's first transition was left out, as the surplus of a run's last vector step is."""
    spec = EnvSpec("test", gym.spaces.Discrete(2), gym.spaces.Discrete(2))
    counter = EpisodeCounter(spec, 2)
    no, yes = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    obs, reward = torch.zeros(2, 1), torch.tensor([1.0, 2.0])
    counter.drop(torch.tensor([False, True]))
    assert counter.count(Step(obs, obs, reward, no, no, no, torch.tensor([True, False]), {})) == {}
    resumed = EpisodeCounter(spec, 2)
    resumed.load_state_dict(counter.state_dict())
    assert resumed.count(Step(obs, obs, reward, no, yes, yes, yes, {})) == {0: Episode(2.0, 2)}
    assert resumed.count(Step(obs, obs, reward, no, yes, yes, yes, {})) == {0: Episode(1.0, 1), 1: Episode(2.0, 1)}


def test_a_policy_that_a_crash_left_unwritten_is_exported_by_a_resume(tmp_path):
    result = run_to_end(begin(config(tmp_path / "run", total_steps=30)))
    shutil.rmtree(tmp_path / "run" / "policy")
    trainer = resume(tmp_path / "run", {})
    assert run_to_end(trainer).step == 30
    assert evaluate_path(tmp_path / "run").episodes == result.evaluation


def test_what_fails_to_be_built_leaves_no_lock_and_no_environment_behind(tmp_path, monkeypatch):
    trainer = begin(config(tmp_path / "run", total_steps=30))
    run_to_end(trainer)
    closed, close = [], Loop.close

    def noted(loop):
        closed.append(loop)
        close(loop)

    monkeypatch.setattr(Loop, "close", noted)
    with monkeypatch.context() as broken:
        broken.setattr(Trainer, "__init__", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            begin(config(tmp_path / "other"))
        with pytest.raises(ZeroDivisionError):
            resume(tmp_path / "run", {})
    with pytest.raises(RloptError, match="lies before"):
        resume(tmp_path / "run", {"total_steps": 20})
    assert len(closed) == 3
    for name in ("other", "run"):
        RunFolder.open(tmp_path / name).close()


def test_closing_a_trainer_lets_the_next_one_write_there(tmp_path):
    trainer = begin(config(tmp_path / "run", total_steps=30))
    trainer.run()
    trainer.close()
    again = resume(tmp_path / "run", {"total_steps": 40})
    assert again.run().step == 40
    again.close()


def test_a_full_disk_is_reported_and_training_goes_on(tmp_path, monkeypatch, caplog):
    good = Checkpoints.save
    calls = []

    def full_at_second(self, step, *args, **kwargs):
        calls.append(step)
        if len(calls) == 2:
            raise CheckpointFailed("no space left on device; what was saved before is intact")
        return good(self, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint_module.Checkpoints, "save", full_at_second)
    trainer = begin(config(tmp_path / "run", checkpoint={"minutes": None, "every_steps": 30}))
    result = run_to_end(trainer)
    assert result.status == "finished" and result.saved
    assert calls == [30, 60, 90, 100]
    assert "no space left" in caplog.text and "intact" in caplog.text
    assert Checkpoints(tmp_path / "run" / "checkpoints").load().step == 100


def test_a_damaged_newest_checkpoint_falls_back_loudly(tmp_path, capfd, caplog):
    run_to_end(begin(config(tmp_path / "run", checkpoint={"minutes": None, "every_steps": 60})))
    folders = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    victim = next(folders[-1].rglob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    trainer = resume(tmp_path / "run", {})
    assert trainer.loop.step == 60
    said = caplog.text + capfd.readouterr().err
    assert "checksum" in said or "damaged" in said
    assert run_to_end(trainer).step == 100


def test_resume_refuses_to_go_backwards(tmp_path):
    run_to_end(begin(config(tmp_path / "run")))
    with pytest.raises(RloptError, match="total_steps=50"):
        resume(tmp_path / "run", {"total_steps": 50})


def test_global_generators_are_never_used(tmp_path):
    torch.manual_seed(1)
    np.random.seed(1)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    run_to_end(begin(config(tmp_path / "run")))
    assert torch.equal(torch_before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()


def test_an_agent_that_cannot_act_there_says_so(tmp_path):
    with pytest.raises(RloptError, match="sac_discrete"):
        make_loop(config(tmp_path / "run", env={"id": "CartPole-v1"}))
