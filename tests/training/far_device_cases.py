"""Training on a device that is not the CPU (``far_device``): the same numbers, and no wait but those that must be.

Run by ``test_far_device.py``.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import screen_env  # noqa: F401 (registers its environment)
import torch
from far_device import NAME, FarDevice, FarTensor

from rlopt.policy import load_policy
from rlopt.training import captured, replay_loop
from rlopt.training.config import train_config
from rlopt.training.setup import make_loop, resume, settle, train

AGENT = {"network": {"hidden": [16, 16]}, "batch_size": 8, "warmup_steps": 10}
SAC = {"name": "sac", "fused": False, **AGENT}
SAC_DISCRETE = {"name": "sac_discrete", **AGENT}
REINFORCE = {"name": "reinforce", "groups": 2, "group_size": 2}
DRPG = {
    "name": "drpg_deep",
    "fused": False,
    **AGENT,
    "box": {"m": (0.5, 1.5)},
    "adversary_every": 10,
    "search": {"candidates": 3, "episodes": 1, "rounds": 1},
}
SCREEN = {
    "id": "rlopt-tests/Screen-v0",
    "wrappers": [{"class": "FrameStackObservation", "kwargs": {"stack_size": 3, "padding_type": "zero"}}],
}
FRAMES = {"name": "reshuffled", "capacity": 16, "frame_stack": 3}
PENDULUM = {"id": "Pendulum-v1", "backend": "torch"}
HOPPER = {"id": "Hopper-v5", "backend": "native"}
CARTPOLE = {"id": "CartPole-v1", "backend": "torch"}


def config(device: str, run_dir=None, **options):
    common = {
        "seed": 4, "total_steps": 20, "num_envs": 2, "device": device, "threads": 1, "env": PENDULUM, "agent": SAC,
        "buffer": {"name": "uniform", "capacity": 100}, "run_dir": None if run_dir is None else str(run_dir),
        "eval": {"every": None, "episodes": 1}, "log": {"every": 10, "tensorboard": False},
    }  # fmt: skip
    return settle(train_config({**common, **options}))


@pytest.fixture
def far(monkeypatch):
    """A FarDevice that is entered, in the environments' thread of ``overlap`` too."""
    with FarDevice() as device:

        class Aside(ThreadPoolExecutor):
            def submit(self, function, *args):
                def there():
                    with device.here():
                        return function(*args)

                return super().submit(there)

        monkeypatch.setattr(replay_loop, "ThreadPoolExecutor", Aside)
        yield device


def numbers(tree):
    """Every tensor of a state, by its path, near."""
    if isinstance(tree, dict):
        return {f"{k}/{path}": x for k, child in tree.items() for path, x in numbers(child).items()}
    if isinstance(tree, FarTensor):
        tree = tree.near
    return {"": tree} if isinstance(tree, torch.Tensor) else {}


def finished(loop):
    """The loop's state at the end, as numbers."""
    while loop.step < loop.total_steps:
        loop.advance()
    state = numbers(loop.state_dict())
    loop.close()
    return state


# ---- the tool


def test_far_tensors_mix_with_no_cpu_tensor_and_have_no_memory(far) -> None:
    x = torch.ones(3, device=NAME)
    assert x.device.type == NAME and not far.waits
    with pytest.raises(RuntimeError, match="two devices"):
        x + torch.ones(3)
    with pytest.raises(TypeError, match="to numpy"):
        x.numpy()
    assert torch.equal((x + torch.tensor(1.0)).near, torch.full((3,), 2.0))  # a CPU number may
    for device, other in ((NAME, "cpu"), ("cpu", NAME)):
        torch.rand(2, generator=torch.Generator(device), device=device)
        with pytest.raises(RuntimeError, match="generator lies on another device"):
            torch.rand(2, generator=torch.Generator(other), device=device)


def test_every_look_at_a_far_number_is_a_wait(far) -> None:
    x = torch.tensor([1.0, 0.0], device=NAME)
    looks = (
        x.sum().item,
        x.cpu,
        x.tolist,
        x.nonzero,
        lambda: bool(x.any()),
        lambda: x[x > 0],
        lambda: x.numpy(force=True),
    )
    for n, look in enumerate(looks, 1):
        look()
        assert sum(far.waits.values()) == n
    torch.where(x > 0, x, 0.0).cumsum(0)
    assert sum(far.waits.values()) == len(looks)


def test_a_replayed_graph_repeats_numbers_of_the_host_and_reads_tensors_again(far, monkeypatch) -> None:
    far.graphs(monkeypatch)
    x, factor = torch.ones(2, device=NAME), 2.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x[0] * factor
    factor = 3.0
    x.fill_(5.0)
    graph.replay()
    assert y.near == 10.0
    with pytest.raises(RuntimeError, match="waits for the device while a graph is recorded"), torch.cuda.graph(graph):
        x.sum().item()


# ---- the same run


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"buffer": {"name": "reshuffled", "capacity": 16}}, id="reshuffled, the ring wraps"),
        pytest.param({"agent": {**SAC, "n_step": 3, "policy_delay": 2, "lr_schedule": "linear"}}, id="n-step"),
        pytest.param({"env": {**PENDULUM, "normalize_obs": True, "normalize_reward": True}}, id="normalised"),
        pytest.param({"agent": {"name": "sac_2018", **AGENT}, "precision": "bf16"}, id="sac_2018, bf16"),
        pytest.param({"agent": SAC_DISCRETE, "env": CARTPOLE}, id="sac_discrete"),
        pytest.param({"overlap": True}, id="overlap"),
        pytest.param({"update_mode": "captured"}, id="captured without a graph"),
        pytest.param({"env": HOPPER}, id="native MuJoCo"),
        pytest.param({"env": {"id": "Pendulum-v1", "backend": "sync"}}, id="Gymnasium's own"),
        pytest.param({"agent": REINFORCE, "env": CARTPOLE, "num_envs": 1}, id="reinforce"),
        pytest.param({"agent": DRPG}, id="drpg_deep"),
        pytest.param({"agent": {**SAC, "n_step": 2}, "env": SCREEN, "buffer": FRAMES}, id="single frames"),
    ],
)  # fmt: skip
def test_a_far_run_is_the_run_on_the_cpu(options, far) -> None:
    near = finished(make_loop(config("cpu", **options)))
    away = finished(make_loop(config(NAME, **options)))
    assert near.keys() == away.keys()
    for name, x in near.items():
        assert torch.equal(x, away[name]), name


def test_stacked_runs_far_away_are_those_on_the_cpu(far) -> None:
    options = {"num_runs": 2, "buffer": {"name": "reshuffled", "capacity": 100}, "total_steps": 16}
    near, away = (finished(make_loop(config(device, **options))) for device in ("cpu", NAME))
    for name, x in near.items():
        if x.is_floating_point():
            torch.testing.assert_close(x, away[name], rtol=1e-3, atol=1e-3, msg=name)


# ---- waits


SAMPLERS = ["uniform", "distinct", "reshuffled", "prioritized", "lap", "prioritized_reshuffled"]


@pytest.mark.parametrize(("buffer", "runs"), [*((name, 1) for name in SAMPLERS), ("reshuffled", 2), ("lap", 2)])
def test_a_step_and_its_updates_wait_for_the_device_twice(buffer, runs, far) -> None:
    """Whether all is well, and which episodes ended. Neither draws nor updates nor priorities wait."""
    loop = make_loop(config(NAME, buffer={"name": buffer, "capacity": 16}, num_runs=runs, total_steps=100))
    while loop.step < 24:  # the ring has wrapped, every sampler has begun
        loop.advance()
    far.waits.clear()
    for _ in range(3):
        loop.advance()
    assert far.waits == Counter({"training/replay_loop.py:_all_well": 3, "types.py:on_host": 3})
    loop.close()


@pytest.mark.parametrize(
    "options", [{}, {"overlap": True}, {"env": {**HOPPER, "normalize_obs": True}}, {"num_runs": 2}]
)
def test_an_environment_on_the_cpu_waits_for_the_action_alone(options, far) -> None:
    """And its transitions go to the buffer in one copy."""
    loop = make_loop(config(NAME, **{"env": HOPPER, "total_steps": 60, "update_mode": "eager", **options}))
    while loop.step < 20:
        loop.advance()
    far.waits.clear()
    far.uploads.clear()
    for _ in range(3):
        loop.advance()
    assert far.waits == Counter({"training/replay_loop.py:advance": 3})
    assert far.uploads["buffers/storage.py:write"] == 3
    assert far.uploads["training/replay_loop.py:<lambda>"] == 3  # observations to act on
    loop.close()


def test_single_frames_are_put_together_without_a_wait(far) -> None:
    """Where no following row has a stack's frames, the first of an episode and the last, there too."""
    loop = make_loop(config(NAME, agent={**SAC, "update_ratio": (1, 8)}, env=SCREEN, buffer=FRAMES, total_steps=200))
    while loop.step < 80:
        loop.advance()
    ring = loop.buffer.storage.frames[""]
    assert not ring._plain and bool((ring.links[:, :, 2] >= 0).any())
    far.waits.clear()
    loop.buffer.sample(8)
    assert not far.waits
    loop.advance()
    assert far.waits == Counter({"training/replay_loop.py:advance": 1})
    loop.close()


def test_an_evaluation_waits_once_a_step_and_a_rollout_twice(far) -> None:
    loop = make_loop(config(NAME, agent=REINFORCE, env=CARTPOLE, num_envs=1, total_steps=1_000))
    assert loop.evaluator is not None
    far.waits.clear()
    longest = max(e.length for e in loop.evaluator.evaluate(loop.agent.policy, 3))
    assert far.waits["types.py:on_host"] == longest
    far.waits.clear()
    longest = max(e.length for e in loop.advance().episodes)
    assert far.waits["types.py:on_host"] == longest and sum(far.waits.values()) < 2 * longest + 10
    loop.close()


def test_runs_are_evaluated_at_once_and_each_as_it_would_be_alone(far) -> None:
    loop = make_loop(config(NAME, num_runs=3, total_steps=14, agent=SAC_DISCRETE, env=CARTPOLE))
    while loop.step < loop.total_steps:
        loop.advance()
    assert loop.evaluator is not None
    policies = loop.policies()
    alone = [loop.evaluator.evaluate(policy, 3, run=r) for r, policy in enumerate(policies)]
    far.waits.clear()
    found = loop.evaluate(3)
    assert far.waits["types.py:on_host"] == max(e.length for e in found)  # once a step for all runs
    assert found == [e._replace(run=r) for r, episodes in enumerate(alone) for e in episodes]
    loop.close()


# ---- recorded updates


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="sac"),
        pytest.param({"agent": {**SAC, "policy_delay": 2, "max_grad_norm": 1.0}}, id="policy delay"),
        pytest.param({"num_runs": 2, "buffer": {"name": "prioritized", "capacity": 16}}, id="runs, prioritized"),
        pytest.param({"overlap": True, "precision": "bf16"}, id="overlap, bf16"),
        pytest.param({"agent": {"name": "sac_2018", **AGENT}}, id="sac_2018"),
        pytest.param({"agent": SAC_DISCRETE, "env": CARTPOLE, "num_runs": 2}, id="discrete, runs"),
        pytest.param({"agent": {**SAC, "optimiser": {"name": "sgd"}}}, id="sgd"),
    ],
)  # fmt: skip
def test_a_recorded_update_is_the_eager_one(options, far, monkeypatch) -> None:
    """Warm-up undone, nothing read from the host while recording, every number that changes read from a tensor."""
    far.graphs(monkeypatch)
    monkeypatch.setattr(captured, "has_graphs", lambda device: device.type == NAME)
    eager = finished(make_loop(config(NAME, update_mode="eager", **options)))
    loop = make_loop(config(NAME, update_mode="captured", **options))
    recorded = finished(loop)
    assert loop.captured is not None and all(
        phase.replay.__name__ == "replay" for phase in loop.captured.phases.values()
    )
    assert eager.keys() == recorded.keys()
    for name, x in eager.items():
        assert torch.equal(x, recorded[name]), name


# ---- saved far away


@pytest.mark.parametrize("device", [NAME, "cpu"])
def test_a_far_run_goes_on_anywhere_and_there_to_the_bit(device, far, tmp_path) -> None:
    """Resumed elsewhere too: here both devices compute alike."""
    options = {"agent": SAC_DISCRETE, "env": CARTPOLE}
    whole, part = (train(config(NAME, tmp_path / str(n), total_steps=n, **options)) for n in (20, 14))
    whole.run()
    part.run()
    part.close()
    rest = resume(tmp_path / "14", {"total_steps": 20, "device": device})
    rest.run()
    expected, found = (numbers(trainer.loop.state_dict()) for trainer in (whole, rest))
    assert expected.keys() == found.keys()
    for name, x in expected.items():
        assert torch.equal(x, found[name]), name
    obs = np.zeros((1, 4), np.float32)
    assert np.array_equal(load_policy(tmp_path / "20", device=NAME)(obs), load_policy(tmp_path / "14")(obs))
    for trainer in (whole, rest):
        trainer.close()
