"""Training on a device that is not the CPU (``far_device``): the same numbers, and no wait but those that must be.

Run by ``test_far_device.py``.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces

import tests.training.screen_env  # noqa: F401 (registers its environment)
from rlopt.agents import SACConfig
from rlopt.buffers import ReplayBuffer
from rlopt.loops import captured
from rlopt.loops import replay as replay_loop
from rlopt.nn import NetworkConfig
from rlopt.policy import load_policy
from rlopt.registry import get_agent
from rlopt.state import load_state, save_state
from rlopt.training.evaluate import evaluate_path
from rlopt.training.grid_evaluation import evaluate_grid
from rlopt.training.setup import begin, make_loop, resume
from rlopt.training.trainer import Callback
from rlopt.types import EnvSpec
from tests.agents.cases import AGENTS, PENDULUM
from tests.agents.three_actors import ThreeActors
from tests.agents.two_learners import TwoLearners, TwoLearnersConfig
from tests.buffers.cases import SAMPLERS
from tests.training.far_device import NAME, FarDevice
from tests.training.far_runs import SAC, assert_equal, config, finished, numbers, on_the_cpu, result

SAC_DISCRETE, REINFORCE = {"name": "sac_discrete"}, {"name": "reinforce"}
SCREEN = {
    "id": "rlopt-tests/Screen-v0",
    "backend": "auto",
    "wrappers": [{"class": "FrameStackObservation", "kwargs": {"stack_size": 3, "padding_type": "zero"}}],
}
FRAMES = {"name": "reshuffled", "capacity": 16, "frame_stack": 3}
INVERTED = {"id": "InvertedPendulum-v5", "backend": "native"}
TEAM = {"total_steps": 60}
HOPPER = {"id": "Hopper-v5", "backend": "native"}


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


@pytest.fixture
def far_graphs(far, monkeypatch):
    """The same, where updates are recorded as on a GPU."""
    far.graphs(monkeypatch)
    monkeypatch.setattr(captured, "has_graphs", lambda device: device.type == NAME)
    return far


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
    assert sum(far.waits.values()) == 1  # it was copied there
    torch.zeros(2).to(NAME, non_blocking=True)
    far.waits.clear()
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


SAME = [
    *(
        pytest.param({"agent": {"name": name, **({"fused": False} if name == "ppo" else {})}}, id=name)
        for name in AGENTS
        if get_agent(name).loop not in ("solver", "text")
    ),
    pytest.param({"buffer": {"name": "reshuffled", "capacity": 16}}, id="reshuffled, the ring wraps"),
    pytest.param({"agent": {**SAC, "n_step": 3, "policy_delay": 2, "lr_schedule": "linear"}}, id="n-step"),
    pytest.param({"env": {**PENDULUM, "normalize_obs": True, "normalize_reward": True}}, id="normalised"),
    pytest.param({"precision": "bf16"}, id="bf16"),
    pytest.param({"overlap": True}, id="overlap"),
    pytest.param({"update_mode": "captured"}, id="captured without a graph"),
    pytest.param({"env": HOPPER}, id="native MuJoCo"),
    pytest.param({"env": {"backend": "sync"}}, id="Gymnasium's own"),
    pytest.param({"agent": {**SAC, "n_step": 2}, "env": SCREEN, "buffer": FRAMES}, id="single frames"),
]


@pytest.mark.parametrize("options", SAME)
def test_a_far_run_is_the_run_on_the_cpu(options, far) -> None:
    assert_equal(on_the_cpu(**options), finished(make_loop(config(NAME, **options))))


def test_stacked_runs_far_away_are_those_on_the_cpu(far) -> None:
    options = {"num_runs": 2, "buffer": {"name": "reshuffled", "capacity": 100}, "total_steps": 26}
    near, away = (finished(make_loop(config(device, **options))) for device in ("cpu", NAME))
    assert_equal(near, away, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", ["cpu", NAME])
def test_a_buffer_takes_rows_whose_parts_lie_on_two_devices(device, far) -> None:
    """An environment on the CPU, and what the agent adds where it is."""
    box = spaces.Box(-1, 1, (2,), np.float32)
    fields = {"log_prob": ((), torch.float32), "mean": ((2,), torch.float32)}
    buffer = ReplayBuffer(4, box, box, num_envs=2, extra_fields=fields, device=device)
    flags = torch.tensor([True, False])
    extras = {"log_prob": torch.tensor([1.0, 2.0]), "mean": torch.ones(2, 2)}
    away = {name: x.to(NAME) for name, x in extras.items()}
    for given in (away, {**away, "mean": extras["mean"]}):
        buffer.add(
            torch.ones(2, 2), torch.zeros(2, 2), torch.tensor([3.0, 4.0]), torch.ones(2, 2), flags, ~flags, **given
        )
    rows = buffer.read_rows(0, 2)
    assert torch.equal(rows["block"][0], rows["block"][1])
    batch = buffer.batch(torch.arange(2, device=device))
    found = {"log_prob": batch.extras["log_prob"], "mean": batch.extras["mean"], "reward": batch.reward}
    for name, expected in {**extras, "reward": torch.tensor([3.0, 4.0])}.items():
        assert torch.equal(found[name].cpu(), expected)


# ---- waits


@pytest.mark.parametrize(("buffer", "runs"), [*((name, 1) for name in SAMPLERS), ("reshuffled", 2), ("lap", 2)])
def test_a_step_and_its_updates_wait_for_the_device_twice(buffer, runs, far) -> None:
    """Whether all is well, and which episodes ended. Neither draws nor updates nor priorities wait."""
    early = {**SAC, "warmup_steps": 16}
    loop = make_loop(config(NAME, agent=early, buffer={"name": buffer, "capacity": 16}, num_runs=runs, total_steps=100))
    while loop.step < 20:  # the ring has wrapped, every sampler has begun
        loop.advance()
    far.waits.clear()
    for _ in range(3):
        loop.advance()
    assert far.waits == Counter({"loops/stepping.py:_all_well": 3, "types.py:on_host": 3})
    loop.close()


@pytest.mark.parametrize(
    "options", [{}, {"overlap": True}, {"env": {**HOPPER, "normalize_obs": True}}, {"num_runs": 2}]
)
def test_an_environment_on_the_cpu_waits_for_the_action_alone(options, far) -> None:
    """And its transitions go to the buffer in one copy."""
    early = {"agent": {**SAC, "warmup_steps": 8}, "env": HOPPER, "total_steps": 60, "update_mode": "eager"}
    loop = make_loop(config(NAME, **{**early, **options}))
    while loop.step < 12:
        loop.advance()
    far.waits.clear()
    far.uploads.clear()
    for _ in range(3):
        loop.advance()
    assert far.waits == Counter({"loops/replay.py:advance": 3})
    observed = 0 if loop.normalizer is None else 2  # flags, and what was acted on, for the statistics
    assert far.uploads == Counter({"types.py:on_device": 3 * (1 + observed), "buffers/storage.py:write": 3})
    loop.close()


def test_single_frames_are_put_together_without_a_wait(far) -> None:
    """Where no following row has a stack's frames, the first of an episode and the last, there too."""
    loop = make_loop(config(NAME, agent={**SAC, "update_ratio": (1, 8)}, env=SCREEN, buffer=FRAMES, total_steps=200))
    while loop.step < 84:
        loop.advance()
    ring = loop.buffer.storage.frames[""]
    assert not ring._plain and bool((ring.links[:, :, 2] >= 0).any())
    far.waits.clear()
    loop.buffer.sample(8)
    assert not far.waits
    loop.advance()
    assert far.waits == Counter({"loops/replay.py:advance": 1})
    loop.close()


def test_an_evaluation_waits_once_a_step(far) -> None:
    loop = make_loop(config(NAME, agent=REINFORCE, total_steps=1_000))
    assert loop.evaluator is not None
    far.waits.clear()
    longest = max(e.length for e in loop.evaluator.evaluate(loop.agent.policy, 3))
    assert far.waits["types.py:on_host"] == longest and sum(far.waits.values()) < longest + 10  # beside the resets
    loop.close()


NORMALISED = {"normalize_obs": True, "normalize_reward": True}


@pytest.mark.parametrize("more", [{}, NORMALISED], ids=["raw", "normalised"])
def test_a_group_rollout_waits_twice_a_step(more, far) -> None:
    """Whether all is well, and which episodes ended; and a few times where it begins and where it ends."""
    loop = make_loop(config(NAME, agent=REINFORCE, total_steps=1_000, env=more))
    loop.advance()
    far.waits.clear()
    longest = max(e.length for e in loop.advance().episodes)
    steps = {"loops/stepping.py:_all_well": longest, "types.py:on_host": longest}
    assert {place: far.waits.pop(place) for place in steps} == steps
    assert far.waits == Counter({"loops/group.py:_collect": 4, "loops/group.py:_begin": 1, "envs/streams.py:seed": 1})
    loop.close()


@pytest.mark.parametrize("more", [{}, NORMALISED], ids=["raw", "normalised"])
def test_a_group_rollout_in_an_environment_on_the_cpu_waits_for_the_action_alone(more, far) -> None:
    loop = make_loop(config(NAME, agent={**REINFORCE, "horizon": 9}, total_steps=1_000, env={**HOPPER, **more}))
    loop.advance()
    far.waits.clear()
    loop.advance()
    assert far.waits == Counter({"loops/group.py:_collect": 9})
    loop.close()


@pytest.mark.parametrize(("env", "waits"), [({}, 2), (HOPPER, 1)], ids=["far", "on the CPU"])
def test_a_rollout_waits_as_often_a_step_as_a_replay(env, waits, far) -> None:
    """And twice for its update: which rows are transitions, and how many."""
    loop = make_loop(config(NAME, agent={"name": "ppo", "rollout_steps": 5}, total_steps=40, num_envs=2, env=env))
    for _ in range(5):
        loop.advance()
    far.waits.clear()
    for _ in range(5):
        loop.advance()
    assert far.waits.pop("buffers/rollout.py:positions") == 1
    assert sum(far.waits.values()) == 5 * waits, far.waits
    loop.close()


def test_runs_are_evaluated_at_once_and_each_as_it_would_be_alone(far) -> None:
    loop = make_loop(config(NAME, num_runs=3, total_steps=24, agent=SAC_DISCRETE))
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
        pytest.param({"agent": {"name": "sac_2018"}}, id="sac_2018"),
        pytest.param({"agent": SAC_DISCRETE, "num_runs": 2}, id="discrete, runs"),
        pytest.param({"agent": {**SAC, "optimiser": {"name": "sgd"}}}, id="sgd"),
        pytest.param({"agent": {**SAC, "n_step": 3}, "buffer": {"name": "lap", "capacity": 16}}, id="n-step, lap"),
        pytest.param({"agent": {**SAC, "n_step": 2}, "env": SCREEN, "buffer": FRAMES}, id="single frames"),
        pytest.param({"env": {**PENDULUM, "normalize_obs": True, "normalize_reward": True}}, id="normalised"),
        pytest.param({"agent": {**SAC, "lr_schedule": "linear", "max_grad_norm": 1.0}}, id="linear schedule"),
        pytest.param({"agent": {**SAC_DISCRETE, "lr_schedule": "cosine"}}, id="cosine schedule"),
        pytest.param({"buffer": {"name": "prioritized", "capacity": 16, "device": "cpu"}}, id="replay on the host"),
        pytest.param({"agent": {"name": "hasac", "value_normalisation": True}, **TEAM}, id="hasac, a team of three"),
        pytest.param({"agent": {"name": "hatd3"}, **TEAM}, id="hatd3, a team of three"),
    ],
)  # fmt: skip
def test_a_recorded_update_is_the_eager_one(options, far_graphs) -> None:
    """Warm-up undone, nothing read from the host while recording, every number that changes read from a tensor."""
    options = {"update_mode": "eager", **options}
    # Of several runs the CPU sums products in another order, and of two priorities for one row it takes another.
    near = not options.keys() & {"num_runs", "buffer"}
    eager = on_the_cpu(**options) if near else finished(make_loop(config(NAME, **options)))
    loop = make_loop(config(NAME, **{**options, "update_mode": "captured"}))
    recorded = finished(loop)
    pieces = loop.captured.recorded
    assert pieces and all(piece.replay.__name__ == "replay" for piece in pieces.values())
    assert_equal(eager, recorded)


BOXES = EnvSpec("test", spaces.Box(-1, 1, (4,), np.float32), spaces.Box(-1, 1, (2,), np.float32))
SCHEDULED = SACConfig(
    network=NetworkConfig(hidden=(8,)), batch_size=8, fused=False, lr_schedule="linear", schedule_steps=30
)


def recorded_and_eager(make, updates, before=lambda agent, i: None):
    """The recorded updates of an agent equal the eager ones; returns the recorder, and the orders of the stages."""
    found = []
    for recorded in (False, True):
        agent = make()
        buffer = ReplayBuffer(32, BOXES.observation_space, BOXES.action_space, device=NAME, seed=1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(32):
            draw, no = torch.rand(1, 11, generator=generator), torch.zeros(1, dtype=torch.bool)
            buffer.add(draw[:, :4], draw[:, 4:6], draw[:, 6], draw[:, 7:], no, no)
        update = captured.CapturedUpdate(agent, buffer, 8)
        told, orders = [], set()
        for i in range(updates):
            agent.clock.env_steps = 2 * i
            orders.add(agent.stages())
            before(agent, i)
            done = update() if recorded else agent.update(buffer.sample(8))
            told.append({path: x.nan_to_num(nan=-1.0) for path, x in numbers(done.metrics).items()})
        found.append({**numbers(agent.state_dict()), **numbers(told)})
    assert_equal(*found)
    return update, orders


def test_stages_are_recorded_once_and_replayed_in_any_order(far_graphs) -> None:
    """Each in the middle of an update that is under way, whose passing results the warm-up must not change."""

    def before(agent, i):
        if i in (6, 7):
            agent.actors[1].flat.fill_(torch.nan if i == 6 else 0.1)

    update, orders = recorded_and_eager(lambda: ThreeActors(BOXES, SCHEDULED, seed=2, device=NAME), 9, before)
    assert update.recorded.keys() == {"prepare", "critic", "target", *(f"actor/{i}" for i in range(3))}
    assert len(orders) > captured.FEW_ORDERS and update.agent.guard.first_bad() == "actor/1 loss"


def test_an_agent_that_holds_agents_is_recorded_whole(far_graphs) -> None:
    slow = replace(SCHEDULED, lr_schedule="constant", schedule_steps=None, policy_delay=2)
    options = TwoLearnersConfig(left=SCHEDULED, right=slow, batch_size=8)
    update, orders = recorded_and_eager(lambda: TwoLearners(BOXES, options, device=NAME), 4)
    assert update.recorded.keys() == orders and len(orders) == 2


def test_what_is_frozen_or_set_by_hand_between_updates_is_recorded_anew(far_graphs) -> None:
    found = []
    for mode in ("eager", "captured"):
        loop = make_loop(config(NAME, update_mode=mode, total_steps=26))
        for step, change in ((14, "frozen"), (18, "by hand"), (22, "learns again")):
            while loop.step < step:
                loop.advance()
            agent = loop.agent
            agent.actor.params["body.layers.0.weight"].requires_grad_(change == "learns again")
            if change == "by hand":
                agent.critic_optimiser.learning_rate, agent.temperature.target_entropy = 0.01, 3.0
        found.append(finished(loop))
    assert_equal(*found)


# ---- saved far away


@pytest.mark.parametrize("device", [NAME, "cpu"])
@pytest.mark.parametrize("runs", [1, 2])
def test_a_far_run_goes_on_anywhere_and_there_to_the_bit(runs, device, far, tmp_path) -> None:
    """Resumed elsewhere too, in the middle of what is logged together: here both devices compute alike."""
    options = {"agent": SAC_DISCRETE, "num_runs": runs, "log": {"every": 100, "tensorboard": False}}
    whole = begin(config(NAME, tmp_path / "whole", **options))
    part = begin(config(NAME, tmp_path / "part", **options), [StopAt(24)])
    whole.run()
    part.run()
    part.close()
    rest = resume(tmp_path / "part", {"device": device})
    rest.run()
    same = {} if runs == 1 or device == NAME else {"rtol": 1e-3, "atol": 1e-3}
    assert_equal(result(whole.loop), result(rest.loop), **same)
    for trainer in (whole, rest):
        trainer.close()
    tables = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "part")]
    assert [len(table) for table in tables] == [2, 2]
    if runs == 1:
        obs = np.zeros((1, 4), np.float32)
        policies = load_policy(tmp_path / "whole", device=NAME), load_policy(tmp_path / "part")
        assert np.array_equal(*(policy(obs) for policy in policies))


@pytest.mark.parametrize("device", [NAME, "cpu"])
def test_a_carry_is_loaded_to_where_the_agent_is(device, far, tmp_path) -> None:
    """And with it the carries that are stored in an open rollout."""
    agent = {"name": "ppo", "network": {"memory": "gru", "hidden": [8]}, "rollout_steps": 5, "batch_size": 5}
    options = {"agent": agent, "num_envs": 2, "total_steps": 20}
    loop, again = make_loop(config(NAME, **options)), make_loop(config(device, **options))
    for _ in range(3):
        loop.advance()
    save_state(tmp_path / "state", loop.state_dict())
    again.load_state_dict(load_state(tmp_path / "state"))
    carries = {**again.carry, **again.steps[0].extras}
    assert len(again.steps) == 3 and {x.device.type for x in carries.values()} == {device}
    assert_equal(numbers(loop.carry), numbers(again.carry))
    assert_equal(finished(loop), finished(again))


class StopAt(Callback):
    """Ends a run at a step, as Ctrl-C would."""

    def __init__(self, step):
        self.step = step

    def on_step(self, trainer, progress):
        return trainer.loop.step >= self.step


def test_a_policy_far_away_is_evaluated_in_an_environment_on_the_cpu(far, tmp_path) -> None:
    """The same returns as on the CPU, by ``evaluate_path`` and over a grid of parameters."""
    run = begin(config("cpu", tmp_path / "run", env=INVERTED))
    run.run()
    run.close()
    bounds = {"mass_pole": (4.0, 6.0)}
    found = {}
    for device in ("cpu", NAME):
        policy = load_policy(tmp_path / "run", device=device)
        grid = evaluate_grid(policy, INVERTED["id"], bounds, count=2, episodes=2, backend="native")
        found[device] = evaluate_path(tmp_path / "run", 3, device=device).returns, grid.returns.tolist()
    assert found["cpu"] == found[NAME]
