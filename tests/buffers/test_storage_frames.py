"""Single-frame storage gives the very bits that storing whole stacks gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlopt.buffers import Batch, ReplayBuffer
from rlopt.buffers.placement import Placement
from rlopt.buffers.storage import Layout
from rlopt.runs.checkpoint import Checkpoints
from rlopt.types import RloptError

K = 3
FRAME = (1, 2, 2)
STACK = spaces.Box(0, 255, (K, 2, 2), np.uint8)


@pytest.fixture(scope="module", params=[3, 4], autouse=True)
def stack(request: pytest.FixtureRequest) -> Iterator[None]:
    """All tests are of three frames, and of four, which a CPU gathers by compiled code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "K", request.param)
        patch.setitem(globals(), "STACK", spaces.Box(0, 255, (request.param, 2, 2), np.uint8))
        yield


class Stacker:
    """N environments behind frame stacks that pad an episode's start with zeros, with its first frame, or with frames
    that were seen before the agent began to act."""

    def __init__(self, num_envs: int, padding: list[str], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.padding = padding
        self.queue = np.stack([self.first(e) for e in range(num_envs)])

    def frame(self) -> np.ndarray:
        # Few values, so that frames repeat and a wrong rebuild is not hidden by accident only.
        return self.rng.integers(0, 3, FRAME[1:], np.uint8)

    def first(self, env: int) -> np.ndarray:
        frame, zero = self.frame(), np.zeros(FRAME[1:], np.uint8)
        older = {
            "zero": [zero] * (K - 1),
            "reset": [frame] * (K - 1),
            "seen": [self.frame() for _ in range(K - 1)],
        }[self.padding[env]]
        return np.stack([*older, frame])

    def obs(self) -> Tensor:
        return torch.from_numpy(self.queue.copy())

    def step(self, begin: list[bool]) -> tuple[Tensor, Tensor]:
        """(next_obs, obs): the true next observation, and the one to act on, where some rows begin an episode."""
        frames = np.stack([self.frame() for _ in begin])
        moved = np.concatenate((self.queue[:, 1:], frames[:, None]), 1)
        self.queue = np.stack([self.first(e) if b else moved[e] for e, b in enumerate(begin)])
        return torch.from_numpy(moved), self.obs()


def make(framed: bool, rows: int, num_envs: int, n_step: int = 1, seed: int = 0, **options: Any) -> ReplayBuffer:
    return ReplayBuffer(
        rows * num_envs,
        STACK,
        spaces.Discrete(3),
        num_envs,
        n_step=n_step,
        seed=seed,
        frame_stack=K if framed else None,
        **options,
    )


def everything(buffer: ReplayBuffer) -> Batch:
    """Every valid transition held."""
    valid = buffer.block[: len(buffer) // buffer.num_envs, :, buffer.slices["valid"].start].flatten() != 0
    index = valid.nonzero().flatten()
    buffer.draw = lambda batch_size: (index, None)  # type: ignore[method-assign]
    try:
        return buffer.sample(len(index))
    finally:
        del buffer.draw


def assert_equal(a: Batch, b: Batch) -> None:
    for x, y in zip(a[:6], b[:6], strict=True):
        assert isinstance(x, Tensor) and isinstance(y, Tensor)
        assert x.dtype == y.dtype and torch.equal(x, y)


def play(buffers: list[ReplayBuffer], env: Stacker, row: list[str] | None) -> None:
    """One vector step of both buffers; None stands for a cut, after which new episodes begin."""
    n = buffers[0].num_envs
    if row is None:
        env.step([True] * n)
        for buffer in buffers:
            buffer.add_cut()
        return
    obs = env.obs()
    begin = [event in ("terminate", "truncate", "reset", "silent", "lost") for event in row]
    next_obs, _ = env.step(begin)
    valid = torch.tensor([event not in ("invalid", "lost") for event in row])
    next_obs[~valid] = 7  # no transition: anything may stand there
    for buffer in buffers:
        buffer.add(
            obs,
            torch.arange(n) % 3,
            torch.arange(n) + float(buffer.rows_written),
            next_obs,
            torch.tensor([event in ("terminate", "life") for event in row]),
            torch.tensor([event == "truncate" for event in row]),
            ended=torch.tensor([b and event != "silent" for b, event in zip(begin, row, strict=True)]),
            valid=None if valid.all() else valid,
        )


EVENTS = ["go"] * 5 + ["terminate", "truncate", "life", "reset", "silent", "invalid", "lost"]


def scripts(num_envs: int) -> st.SearchStrategy[list[list[str] | None]]:
    rows = st.lists(st.sampled_from(EVENTS), min_size=num_envs, max_size=num_envs)
    return st.lists(st.one_of(*[rows] * 12, st.none()), min_size=1, max_size=40)


@pytest.mark.parametrize("num_envs", [1, 3])
@settings(max_examples=100, deadline=None)
@given(data=st.data(), rows=st.integers(1, 12), n_step=st.integers(1, 4), seed=st.integers(0, 99))
def test_drawn_observations_equal_those_of_whole_stacks(
    num_envs: int, data: st.DataObject, rows: int, n_step: int, seed: int
) -> None:
    """Random histories: terminations, truncations, lost lives, resets, invalid rows, cuts, rings overwritten often."""
    script = data.draw(scripts(num_envs))
    padding = data.draw(st.lists(st.sampled_from(["zero", "reset", "seen"]), min_size=num_envs, max_size=num_envs))
    framed, whole = make(True, rows, num_envs, n_step), make(False, rows, num_envs, n_step)
    env = Stacker(num_envs, padding, seed)
    for row in script:
        play([framed, whole], env, row)
        assert (len(framed), framed.transitions) == (len(whole), whole.transitions)
        if framed.transitions:
            assert_equal(everything(framed), everything(whole))


def test_stacks_of_frames_with_several_channels() -> None:
    """(k·C, H, W): the first C entries of the first axis are the oldest frame."""
    k, c = 4, 3
    space = spaces.Box(0, 255, (k * c, 2, 2), np.uint8)
    buffer = ReplayBuffer(8, space, spaces.Discrete(2), frame_stack=k)
    frames = torch.arange(10, dtype=torch.uint8).repeat_interleave(c)[:, None, None].expand(-1, 2, 2)
    no, one = torch.tensor([False]), torch.zeros(1)
    for t in range(4):
        obs, next_obs = (frames[c * i : c * (i + k)][None] for i in (t, t + 1))
        buffer.add(obs, torch.tensor([0]), one, next_obs, no, no)
    batch = everything(buffer)
    assert isinstance(batch.obs, Tensor) and isinstance(batch.next_obs, Tensor)
    for t in range(4):
        assert torch.equal(batch.obs[t], frames[c * t : c * (t + k)])
        assert torch.equal(batch.next_obs[t], frames[c * (t + 1) : c * (t + 1 + k)])


def test_in_a_dict_only_the_stacked_images_are_rebuilt() -> None:
    space = spaces.Dict({"camera": STACK, "arm": spaces.Box(-1, 1, (2,)), "bytes": spaces.Box(0, 255, (5,), np.uint8)})
    framed, whole = (ReplayBuffer(4, space, spaces.Discrete(2), frame_stack=k) for k in (K, None))
    env = Stacker(1, ["reset"])
    no, one = torch.tensor([False]), torch.zeros(1)
    for t in range(6):
        camera = env.obs()
        after, _ = env.step([t == 2])
        obs, next_obs = (
            {"camera": c, "arm": torch.full((1, 2), x), "bytes": torch.full((1, 5), t, dtype=torch.uint8)}
            for c, x in ((camera, 0.25), (after, 0.5))
        )
        for buffer in (framed, whole):
            buffer.add(obs, torch.tensor([0]), one, next_obs, no, torch.tensor([t == 2]))
    a, b = everything(framed), everything(whole)
    for x, y in ((a.obs, b.obs), (a.next_obs, b.next_obs)):
        assert isinstance(x, dict) and isinstance(y, dict) and list(x) == list(y)
        assert all(torch.equal(x[key], y[key]) for key in x)


def test_what_is_no_stack_is_refused() -> None:
    buffer = make(True, 4, 1)
    env = Stacker(1, ["zero"])
    obs, (next_obs, _) = env.obs(), env.step([False])
    flag, one = torch.tensor([False]), torch.zeros(1)
    with pytest.raises(RloptError, match=f"no stacks of {K} frames"):
        buffer.add(obs, torch.tensor([0]), one, next_obs.roll(1, 1) + 1, flag, flag)
    assert len(buffer) == 0
    for space in (
        spaces.Box(-1, 1, (3, 4)),
        spaces.Box(0, 255, (4, 8, 8), np.uint8),
        spaces.Box(0, 255, (9,), np.uint8),
    ):
        with pytest.raises(RloptError, match="frame_stack=3 needs uint8 images"):
            ReplayBuffer(4, space, spaces.Discrete(2), frame_stack=3)


# --- size -----------------------------------------------------------------------------------------------------------

ATARI = spaces.Box(0, 255, (4, 84, 84), np.uint8)


@pytest.mark.parametrize("num_envs", [1, 8])
def test_a_million_atari_transitions_take_at_most_7_6_gb(num_envs: int) -> None:
    layout = Layout(1_000_000 // num_envs, num_envs, ATARI, spaces.Discrete(18), frame_stack=4)
    frame = 84 * 84
    each = frame + 4 * 5 + 3 * 8  # action, reward, three flags; three links
    assert layout.nbytes == 1_000_000 * each + (4 * num_envs + 50_000) * frame
    assert layout.nbytes < 7.6e9
    whole = Layout(1_000_000 // num_envs, num_envs, ATARI, spaces.Discrete(18))
    assert whole.nbytes == 1_000_000 * (8 * frame + 4 * 5)


def test_planned_and_allocated_sizes_agree_until_the_side_store_grows() -> None:
    buffer = make(True, 100, 1)
    assert buffer.nbytes == buffer.layout.nbytes
    env = Stacker(1, ["seen"])
    for _ in range(300):  # every episode has one step, and its first stack is of another kind
        play([buffer], env, ["truncate"])
    side = buffer.side_stores()["0"]
    assert side.nbytes == side.tensor.shape[0] * 4 > buffer.layout.frames[""]["side"][0][0] * 4
    assert buffer.nbytes == buffer.layout.nbytes + side.nbytes - 5 * 4
    # A stack of frames per row is in use, and what is not needed any more is not kept.
    assert K * 100 <= side.tensor.shape[0] <= 1.5 * K * 103
    assert side.rows_written == K * 300 - 1


def test_episodes_that_never_end_free_what_lies_beside() -> None:
    """An environment whose only start was kept aside does not hold on to it for ever."""
    buffer = make(True, 10, 2)
    env = Stacker(2, ["seen", "seen"])
    for _ in range(200):
        play([buffer], env, ["go", "truncate"])
    assert buffer.side_stores()["0"].tensor.shape[0] < 20 * K


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("rows", [2, 9, 200])
def test_a_restored_buffer_goes_on_with_the_same_bits(num_envs: int, rows: int, tmp_path: Path) -> None:
    """Saved three times, only what is new each time, while the ring wraps and the side store grows."""
    rng = np.random.default_rng(rows)
    padding = ["seen", "zero", "reset"][:num_envs]
    framed, whole, env = make(True, rows, num_envs), make(False, rows, num_envs), Stacker(num_envs, padding)
    checkpoints = Checkpoints(tmp_path)

    def logs(buffer: ReplayBuffer) -> dict[str, Any]:
        return {"replay": buffer, "side": buffer.side_stores()["0"]}

    for save in range(3):
        for _ in range(25):
            play([framed, whole], env, list(rng.choice(EVENTS, num_envs)))
        checkpoints.save(save, framed.state_dict(), logs(framed))
    loaded = Checkpoints(tmp_path).load()
    assert loaded is not None and loaded.step == 2
    back = make(True, rows, num_envs, seed=1)
    back.load_state_dict(loaded.state)
    checkpoints.restore_logs(loaded, logs(back))
    assert_equal(everything(back), everything(whole))
    for _ in range(30):
        play([framed, whole, back], env, list(rng.choice(EVENTS, num_envs)))
        assert_equal(everything(back), everything(whole))
        a, b = framed.sample(8), back.sample(8)
        assert_equal(a, b)
        assert torch.equal(a.index, b.index)


# --- other places ---------------------------------------------------------------------------------------------------


def test_single_frames_on_disk(tmp_path: Any) -> None:
    framed, whole = make(True, 6, 2, device="disk", folder=tmp_path), make(False, 6, 2)
    env = Stacker(2, ["zero", "seen"])
    for t in range(30):
        play([framed, whole], env, ["truncate" if t % 2 else "go", "terminate"])
    assert_equal(everything(framed), everything(whole))


def test_memory_is_taken_as_it_is_filled() -> None:
    """A million transitions can be planned on a machine that has not the memory: pages are taken when first written."""
    tensor = Placement("cpu").empty((50_000, 84 * 84), torch.uint8)
    before = resident()
    tensor[:10] = 1
    assert resident() - before < 20e6


def resident() -> int:
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096
    except OSError:
        pytest.skip("no /proc here")


def test_stacks_of_four_come_with_the_channels_of_a_pixel_side_by_side() -> None:
    buffer = make(True, 4, 1)
    env = Stacker(1, ["zero"])
    play([buffer], env, ["go"])
    obs = buffer.sample(2).obs
    assert isinstance(obs, Tensor)
    assert obs.movedim(1, -1).is_contiguous() == (K == 4)  # what convolutions on a CPU are faster with
    assert buffer.batch(torch.zeros(0, dtype=torch.int64)).reward.shape == (0,)
