"""One contract for every backend and autoreset mode, with environments whose every number is written down by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from rlopt.envs import AsyncVectorEnv, SyncVectorEnv, VectorAdapter, VectorEnv
from rlopt.envs.counting import CountEnv
from rlopt.envs.factory import EnvFactory, find_spec
from rlopt.envs.native import NativeVectorEnv
from rlopt.envs.native.tasks import Task
from rlopt.types import RloptError

SLOTS: list[dict[str, Any]] = [
    {"length": 3, "end": "terminate"},
    {"length": 2, "end": "truncate"},
    {"length": (1, 4), "end": ("both", "truncate")},
]

# Per slot the first five transitions: (count, episode) acted on and led to, reward, terminated, truncated, ended.
NO, YES = False, True
EXPECTED = [
    [
        ((0, 0), (1, 0), 1.0, NO, NO, NO),
        ((1, 0), (2, 0), 2.0, NO, NO, NO),
        ((2, 0), (3, 0), 3.0, YES, NO, YES),
        ((0, 1), (1, 1), 1.0, NO, NO, NO),
        ((1, 1), (2, 1), 2.0, NO, NO, NO),
    ],
    [
        ((0, 0), (1, 0), 1.0, NO, NO, NO),
        ((1, 0), (2, 0), 2.0, NO, YES, YES),
        ((0, 1), (1, 1), 1.0, NO, NO, NO),
        ((1, 1), (2, 1), 2.0, NO, YES, YES),
        ((0, 2), (1, 2), 1.0, NO, NO, NO),
    ],
    [
        ((0, 0), (1, 0), 1.0, YES, YES, YES),
        ((0, 1), (1, 1), 1.0, NO, NO, NO),
        ((1, 1), (2, 1), 2.0, NO, NO, NO),
        ((2, 1), (3, 1), 3.0, NO, NO, NO),
        ((3, 1), (4, 1), 4.0, NO, YES, YES),
    ],
]
ACTION = torch.zeros(3, 1)


def _factories() -> list[EnvFactory]:
    return [EnvFactory(find_spec("rlopt/Count-v0"), slot) for slot in SLOTS]


def _gym_sync(mode: AutoresetMode) -> Callable[[bool], VectorEnv]:
    fns = [lambda slot=slot: CountEnv(**slot) for slot in SLOTS]
    return lambda autoreset: VectorAdapter(
        gymnasium.vector.SyncVectorEnv(fns, autoreset_mode=mode), autoreset=autoreset
    )


def _gym_async(mode: AutoresetMode, shared_memory: bool) -> Callable[[bool], VectorEnv]:
    def build(autoreset: bool) -> VectorEnv:
        env = gymnasium.vector.AsyncVectorEnv(
            _factories(), autoreset_mode=mode, shared_memory=shared_memory, context="forkserver"
        )
        return VectorAdapter(env, autoreset=autoreset)

    return build


MODEL = """<mujoco><option timestep="1" gravity="0 0 0"/><worldbody><body>
<joint name="count" type="slide"/><joint name="episode" type="slide"/><joint name="slot" type="slide"/>
<geom size="1" mass="1" contype="0"/></body></worldbody></mujoco>"""


class _MujocoCount(gymnasium.Env[Any, Any]):
    """A body that slides one unit per step; where it began, beside its path, says which episode and slot it is."""

    observation_space = spaces.Box(0.0, np.inf, (2,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    frame_skip, dt = 1, 1.0
    init_qpos, init_qvel = np.zeros(3), np.array([1.0, 0.0, 0.0])

    def __init__(self) -> None:
        import mujoco

        self.model = mujoco.MjModel.from_xml_string(MODEL)


class _CountTask(Task):
    """The terminations of ``SLOTS``. Slots are told apart by their generators, which are first drawn from in turn."""

    def __init__(self, env: Any, version: int) -> None:
        super().__init__(env, version)
        self.episodes: dict[Any, int] = {}

    def observe(self, d: Any) -> Any:
        return d["qpos"][..., :2].copy()

    def outcome(self, d: Any, action: Any, before: Any, after: Any) -> Any:
        assert action.shape == (3, 1)
        rows = d["qpos"].astype(int).tolist()
        return after.copy(), np.array(
            [(slot, count) in ((0, 3), (2, 1)) and not (slot and e % 2) for count, e, slot in rows]
        )

    def draw(self, generator: Any) -> Any:
        episode = self.episodes[generator] = self.episodes.get(generator, -1) + 1
        return np.array([0.0, episode, list(self.episodes).index(generator)]), self.init_qvel


class _ThreadedCountTask(_CountTask):
    contact_forces = True


class _NativeCount(NativeVectorEnv):
    """The time limits of ``SLOTS``, which differ from slot to slot and from episode to episode."""

    def _look_ahead(self) -> None:
        super()._look_ahead()
        third = 4 if list(self._task.episodes.values())[2] % 2 else 1  # type: ignore[attr-defined]
        self._limit, self._next_limit = np.array([np.inf, 2, third]), 0  # type: ignore[assignment]


def _native(task: type[Task]) -> Callable[[bool], VectorEnv]:
    def build(autoreset: bool) -> VectorEnv:
        pytest.importorskip("mujoco.batch")
        return _NativeCount(_MujocoCount(), lambda env: task(env, 5), 3, autoreset=autoreset, threads=2)

    return build


class _FirstAgent:
    """A team of ``CountTeamEnv`` as its first agent sees it, which is what ``CountEnv`` gives."""

    def __init__(self, env: VectorEnv) -> None:
        self.env, self.spec, self.num_envs, self.device = env, env.spec, env.num_envs, env.device
        self.autoreset, self.close = env.autoreset, env.close
        self.state_dict, self.load_state_dict = env.state_dict, env.load_state_dict

    def reset(self, *args: Any, **more: Any) -> Any:
        return self._seen(self.env.reset(*args, **more))

    def step(self, action: torch.Tensor) -> Any:
        assert action is ACTION
        space = self.spec.action_space
        step = self.env.step(torch.zeros((3, *(space.shape or ()))))
        assert step.reward.shape == (3, 3)
        return step._replace(obs=self._seen(step.obs), next_obs=self._seen(step.next_obs), reward=step.reward[:, 0])

    @staticmethod
    def _seen(obs: Any) -> torch.Tensor:
        return obs["obs"][:, 0, :2]  # type: ignore[no-any-return]


def _team_factories(**kwargs: Any) -> list[EnvFactory]:
    return [EnvFactory(find_spec("rlopt/CountTeam-v0"), {**slot, **kwargs}) for slot in SLOTS]


def _gym_team(mode: AutoresetMode) -> Callable[[bool], VectorEnv]:
    def build(autoreset: bool) -> VectorEnv:
        env = gymnasium.vector.SyncVectorEnv(_team_factories(), autoreset_mode=mode)
        env._rewards = np.zeros((3, 3))  # Gymnasium's own vector knows one reward only
        return _FirstAgent(VectorAdapter(env, autoreset=autoreset))

    return build


BACKENDS: dict[str, Callable[[bool], VectorEnv]] = {
    "sync": lambda autoreset: SyncVectorEnv(_factories(), autoreset=autoreset),
    "async": lambda autoreset: AsyncVectorEnv(_factories(), autoreset=autoreset),
    "gym-sync-next-step": _gym_sync(AutoresetMode.NEXT_STEP),
    "gym-sync-same-step": _gym_sync(AutoresetMode.SAME_STEP),
    "gym-sync-disabled": _gym_sync(AutoresetMode.DISABLED),
    "native": _native(_CountTask),
    "native-threads": _native(_ThreadedCountTask),
    "gym-async-next-step-pipes": _gym_async(AutoresetMode.NEXT_STEP, shared_memory=False),
    "team-sync": lambda autoreset: _FirstAgent(SyncVectorEnv(_team_factories(), autoreset=autoreset)),
    "team-async": lambda autoreset: _FirstAgent(AsyncVectorEnv(_team_factories(actions="box"), autoreset=autoreset)),
    "team-gym-next-step": _gym_team(AutoresetMode.NEXT_STEP),
    "team-gym-same-step": _gym_team(AutoresetMode.SAME_STEP),
    "team-gym-disabled": _gym_team(AutoresetMode.DISABLED),
}


@pytest.fixture(params=list(BACKENDS))
def build(request: pytest.FixtureRequest) -> Iterator[Callable[[bool], VectorEnv]]:
    made: list[VectorEnv] = []

    def make(autoreset: bool) -> VectorEnv:
        made.append(BACKENDS[request.param](autoreset))
        return made[-1]

    yield make
    for env in made:
        env.close()
        env.close()


def _pairs(obs: Any) -> list[tuple[int, int]]:
    assert obs.dtype == torch.float32
    return [tuple(row) for row in obs.int().tolist()]


def _collect(env: VectorEnv, obs: Any, count: int) -> list[list[Any]]:
    """What a loop stores: valid rows only, until every slot has ``count`` of them."""
    rows: list[list[Any]] = [[] for _ in range(env.num_envs)]
    while min(map(len, rows)) < count:
        step = env.step(ACTION)
        before, after = _pairs(obs), _pairs(step.next_obs)
        for i in range(env.num_envs):
            if step.valid[i]:
                flags = (bool(step.terminated[i]), bool(step.truncated[i]), bool(step.ended[i]))
                rows[i].append((before[i], after[i], float(step.reward[i]), *flags))
            else:
                assert float(step.reward[i]) == 0.0
                assert not step.terminated[i]
                assert not step.truncated[i]
                assert not step.ended[i]
        obs = step.obs
    return [row[:count] for row in rows]


def test_rows_equal_the_hand_written_ones_and_a_reset_in_mid_episode_begins_anew(build: Any) -> None:
    env = build(True)
    assert isinstance(env, VectorEnv)
    assert env.num_envs == 3
    assert _collect(env, env.reset(), 5) == EXPECTED
    # Wherever the slots stand now (mid-episode, or just after an end), a reset leaves nothing behind.
    for steps in (1, 2, 3):
        obs = env.reset()
        assert [count for count, _ in _pairs(obs)] == [0, 0, 0]
        rows = _collect(env, obs, steps)
        assert rows[0][0][0][0] == 0
        episode = rows[0][0][0][1]
        assert [r[:3] for r in rows[0]] == [((k, episode), (k + 1, episode), k + 1.0) for k in range(steps)]
        assert rows[1][0][1][0] == 1


def test_returns_lengths_and_step_count_are_exact(build: Any) -> None:
    env = build(True)
    env.reset()
    totals, lengths, real = [0.0] * 3, [0] * 3, 0
    finished: list[list[tuple[float, int]]] = [[], [], []]
    while min(map(len, finished)) < 2:
        step = env.step(ACTION)
        real += int(step.valid.sum())
        for i in range(3):
            totals[i] += float(step.reward[i])
            lengths[i] += int(step.valid[i])
            if step.ended[i]:
                finished[i].append((totals[i], lengths[i]))
                totals[i], lengths[i] = 0.0, 0
    assert [f[:2] for f in finished] == [[(6.0, 3), (6.0, 3)], [(3.0, 2), (3.0, 2)], [(1.0, 1), (10.0, 4)]]
    assert real == sum(n for f in finished for _, n in f) + sum(lengths)


def test_without_autoreset_ended_rows_wait_for_their_reset(build: Any) -> None:
    env = build(False)
    env.reset()
    seen = [env.step(ACTION) for _ in range(3)]
    assert [s.valid.tolist() for s in seen] == [[YES, YES, YES], [YES, YES, NO], [YES, NO, NO]]
    assert [s.terminated.tolist() for s in seen] == [[NO, NO, YES], [NO, NO, NO], [YES, NO, NO]]
    assert [s.truncated.tolist() for s in seen] == [[NO, NO, YES], [NO, YES, NO], [NO, NO, NO]]
    assert [s.reward.tolist() for s in seen] == [[1, 1, 1], [2, 2, 0], [3, 0, 0]]
    assert [s.ended.tolist() for s in seen] == [[NO, NO, YES], [NO, YES, NO], [YES, NO, NO]]
    assert _pairs(seen[2].obs) == _pairs(seen[2].next_obs) == [(3, 0), (2, 0), (1, 0)]
    idle = env.step(ACTION)
    assert idle.valid.tolist() == [NO, NO, NO]
    assert idle.reward.tolist() == [0, 0, 0]
    assert not any(flag.any() for flag in (idle.terminated, idle.truncated, idle.ended))
    assert _pairs(idle.obs) == [(3, 0), (2, 0), (1, 0)]

    counts = [c for c, _ in _pairs(env.reset(mask=torch.tensor([NO, YES, NO])))]
    assert counts == [3, 0, 1]
    after = env.step(ACTION)
    while not after.valid[1]:  # Gymnasium without shared memory resets once more; that row is no transition
        assert _pairs(after.obs)[1][0] == 0
        after = env.step(ACTION)
    assert after.valid.tolist() == [NO, YES, NO]
    assert [c for c, _ in _pairs(after.next_obs)] == [3, 1, 1]
    assert after.reward.tolist() == [0, 1, 0]
    assert [c for c, _ in _pairs(env.reset())] == [0, 0, 0]


def test_a_masked_reset_in_mid_episode_leaves_the_other_rows_alone(build: Any) -> None:
    env = build(True)
    env.reset()
    env.step(ACTION)  # counts 1, 1, and the third slot has ended
    while not env.step(ACTION).valid[2]:
        pass
    before = env.reset(mask=torch.zeros(3, dtype=torch.bool))
    obs = env.reset(mask=torch.tensor([YES, NO, NO]))
    assert _pairs(obs)[0][0] == 0
    assert torch.equal(obs[1:], before[1:])
    step = env.step(ACTION)
    assert float(step.reward[2]) == float(before[2, 0]) + 1
    while not step.valid[0]:  # Gymnasium without shared memory resets once more; that row is no transition
        step = env.step(ACTION)
    assert _pairs(step.next_obs)[0][0] == 1


@pytest.mark.parametrize("name", ["sync", "native", "gym-sync-same-step"])
def test_mistakes_of_the_caller_are_named(name: str) -> None:
    env = BACKENDS[name](True)
    with pytest.raises(RloptError, match="before reset"):
        env.step(ACTION)
    with pytest.raises(RloptError, match="2 seeds for 3"):
        env.reset(seeds=[1, 2])
    env.reset()
    with pytest.raises(RloptError, match=r"must be \(3,\)"):
        env.reset(mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(RloptError, match=r"want \(3, 1\)"):
        env.step(torch.zeros(2, 1))


def test_what_a_caller_writes_into_a_step_never_comes_back() -> None:
    env = SyncVectorEnv([lambda: CountEnv(5)] * 2)
    env.reset()
    for k in range(3):
        step = env.step(ACTION[:2])
        assert _pairs(step.obs) == [(k + 1, 0)] * 2
        assert step.reward.tolist() == [k + 1.0] * 2
        assert step.valid.tolist() == [YES, YES]
        assert step.terminated.tolist() == [NO, NO]
        for field in (step.valid, step.obs, step.reward):
            field.zero_()
        step.terminated.fill_(YES)


class _Dense(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """SAME_STEP as ale-py 0.12 does it: final observations of all rows in one array, no mask, and lying metadata."""

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    autoreset_mode = AutoresetMode.SAME_STEP

    def __init__(self) -> None:
        inner = gymnasium.vector.SyncVectorEnv(
            [lambda slot=slot: CountEnv(**slot) for slot in SLOTS], autoreset_mode=AutoresetMode.SAME_STEP
        )
        self.inner, self.num_envs, self.spec = inner, 3, None
        self.single_observation_space, self.single_action_space = (
            inner.single_observation_space,
            inner.single_action_space,
        )

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return self.inner.reset(seed=seed, options=options)

    def step(self, actions: Any) -> Any:
        obs, reward, terminated, truncated, info = self.inner.step(actions)
        final = obs.copy()
        for i in (terminated | truncated).nonzero()[0]:
            final[i] = info["final_obs"][i]
        return obs, reward.astype("int32"), terminated, truncated, {"final_obs": final}


def test_dense_final_observations_without_a_mask() -> None:
    env = VectorAdapter(_Dense())
    assert env.mode == AutoresetMode.SAME_STEP
    assert _collect(env, env.reset(), 5) == EXPECTED


def test_a_vector_environment_that_resets_all_rows_refuses_a_mask() -> None:
    env = VectorAdapter(gymnasium.make_vec("CartPole-v1", 3, vectorization_mode="vector_entry_point"))
    obs = env.reset()
    with pytest.raises(RloptError, match="can only reset all rows"):
        env.reset(mask=torch.tensor([YES, NO, NO]))
    obs = env.reset()
    ended = torch.zeros(3, dtype=torch.bool)
    for _ in range(80):
        step = env.step(torch.ones(3, dtype=torch.int64))
        assert torch.equal(~step.valid, ended)  # the row after an end, and no other, is no transition
        assert (step.obs[ended].abs() <= 0.05).all()
        ended = step.terminated | step.truncated
        assert torch.equal(step.ended, ended)
        obs = step.obs
    assert obs.shape == (3, 4)


def test_a_dead_worker_of_gymnasium_is_named_in_one_line() -> None:
    fns = [EnvFactory(find_spec("rlopt/Count-v0"), {"trouble": "exit"})] * 2
    env = VectorAdapter(gymnasium.vector.AsyncVectorEnv(fns, context="forkserver"))
    env.reset()
    with pytest.raises(RloptError, match="backend=async replaces"):
        env.step(torch.tensor([[0.0], [1.0]]))
    env.env.close(terminate=True)
