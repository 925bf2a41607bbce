"""Single-frame storage of stacked images: each frame is kept once, and stacks are rebuilt when drawn.

A stack of k frames is stored as its newest frame, and so is the next observation: its newest frame is that of the
following row. What cannot be found among the frames of the k rows around it lies in a small side store:

- the last frame of an episode, which no following row holds (so truncated episodes keep their true last observation);
- the older frames of an episode's first stack, where they are neither zeros nor copies of its newest one.

Nothing is assumed about where episodes begin or how their first stacks are padded: a stack that does not follow from
the row before begins a new one. So what is drawn equals what was given, bit for bit. The frame ring has k rows more
than there are transitions, so that the oldest one is whole too.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlopt.buffers.placement import Placement
from rlopt.types import RloptError, State

NONE, ZERO, REPEAT = -1, -2, -3
SHARE = 20
"""The side store begins with room for one frame in this many transitions."""
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
_log = logging.getLogger(__name__)


def plan_frames(rows: int, num_envs: int, stack: int, shape: tuple[int, ...]) -> Shapes:
    """Return the tensors of a ``FrameRing`` for leaves of ``shape``, whose first axis holds ``stack`` frames."""
    frame = (shape[0] // stack, *shape[1:])
    return {
        "frames": ((rows + stack, num_envs, *frame), torch.uint8),
        "links": ((rows, num_envs, 3), torch.int64),
        "side": ((max(stack, math.ceil(rows * num_envs / SHARE)), *frame), torch.uint8),
    }


class SideStore:
    """Keeps frames in a ring, numbered as they come, which grows where more of them are in use than it holds.

    It is a row log: ``capacity_rows`` counts the frames since the oldest in use, which are those that are saved.
    """

    def __init__(self, tensor: Tensor, placement: Placement) -> None:
        self.tensor, self.placement = tensor, placement
        self.rows_written = 0
        self.capacity_rows = 0

    @property
    def nbytes(self) -> int:
        return self.tensor.numel()

    def push(self, frames: Tensor, oldest: Callable[[], int]) -> int:
        """Append ``frames`` (m, …) and return the first one's number. ``oldest`` tells the smallest number in use; it
        is asked only when the ring looks full."""
        first, count = self.rows_written, frames.shape[0]
        if self.capacity_rows + count > self.tensor.shape[0]:
            self.free(oldest())
            self._make_room(self.capacity_rows + count)
        self.rows_written += count
        self.capacity_rows += count
        self.write_rows(first, {"frames": frames})
        return first

    def read(self, number: Tensor) -> Tensor:
        """Return frames (…) by their numbers."""
        return self.tensor.index_select(0, number % self.tensor.shape[0])

    def free(self, oldest: int) -> None:
        """Forget the frames before number ``oldest``."""
        self.capacity_rows = self.rows_written - max(oldest, self.rows_written - self.capacity_rows)

    def _make_room(self, count: int) -> None:
        size = self.tensor.shape[0]
        if count <= size:
            return
        larger = self.placement.empty((max(count, size + size // 2), *self.tensor.shape[1:]), torch.uint8)
        held = torch.arange(self.rows_written - self.capacity_rows, self.rows_written, device=self.tensor.device)
        larger.index_copy_(0, held % larger.shape[0], self.read(held))
        self.tensor = larger
        _log.info("episodes are short: the frames beside the ring now take %.2f GiB", self.nbytes / 2**30)

    def state_dict(self) -> State:
        return {"rows_written": self.rows_written, "capacity_rows": self.capacity_rows}

    def load_state_dict(self, state: State) -> None:
        self.rows_written, self.capacity_rows = 0, 0
        self._make_room(int(state["capacity_rows"]))
        self.rows_written, self.capacity_rows = int(state["rows_written"]), int(state["capacity_rows"])

    def read_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        return {"frames": self.read(torch.arange(start, stop, device=self.tensor.device)).cpu()}

    def write_rows(self, start: int, rows: dict[str, Tensor]) -> None:
        frames = rows["frames"].to(self.tensor.device)
        where = torch.arange(start, start + frames.shape[0], device=self.tensor.device) % self.tensor.shape[0]
        self.tensor.index_copy_(0, where, frames)

    def forget_rows(self, start: int, stop: int) -> None:
        raise RloptError(
            "images that lie beside the ring are lost, and what they belong to cannot be told; start again in a new "
            "run_dir"
        )


class FrameRing:
    """Keeps the frames of one stacked image leaf over the rows of a ring.

    Args:
        tensors: allocated as ``plan_frames`` says.
        stack: k.
        placement: where the side store grows.
        stays: whether stacks are used where the frames lie.
    """

    def __init__(self, tensors: dict[str, Tensor], stack: int, placement: Placement, stays: bool = True) -> None:
        self.frames, self.links = tensors["frames"], tensors["links"]
        self.side = SideStore(tensors["side"], placement)
        self.capacity_rows, self.num_envs = self.links.shape[:2]
        self.stack, self.frame = stack, tuple(self.frames.shape[2:])
        self.frames[self.capacity_rows + 1 :].zero_()  # so that a saved state holds nothing undefined
        n, self._top = self.num_envs, (stack - 1) * self.num_envs
        self._last = torch.zeros((n, stack, *self.frame), dtype=torch.uint8)
        self._open = np.zeros(n, bool)  # the newest row is a transition, whose next observation must be kept
        self._age = np.zeros(n, np.int64)  # N · rows since the episode's first, at most _top
        self._start = np.full(n, REPEAT)
        self._steps = n * torch.arange(stack - 1, -2, -1, device=self.frames.device)
        self._away = not self.frames.is_cpu
        # Convolutions on a CPU want the channels of a pixel side by side: cheap while a frame is moved anyway.
        self._weaves = stays and not self._away and stack == 4 and self.frame[0] == 1 and sys.byteorder == "little"
        self._plain = True  # whether all first stacks so far repeat their newest frame

    @property
    def nbytes(self) -> int:
        return self.frames.numel() + 8 * self.links.numel() + self.side.nbytes

    def check(self, obs: Tensor, next_obs: Tensor, valid: Tensor | None) -> None:
        """Raise RloptError where ``next_obs`` is not ``obs`` moved on by one frame."""
        before, after = self._split(obs)[:, 1:], self._split(next_obs)[:, :-1]
        if not _equal(before, after):
            wrong = (before != after).flatten(1).any(1)
            if bool((wrong if valid is None else wrong & valid.to(wrong.device)).any()):
                raise RloptError(
                    f"next_obs is not obs moved on by one frame, so these are no stacks of {self.stack} frames; "
                    "leave buffer.frame_stack out"
                )

    def write(self, t: int, obs: Tensor, next_obs: Tensor, valid: Tensor | None) -> None:
        """Store row ``t`` since the beginning: stacks (N, k·C, …) before and after the step, ``valid`` (N,) bool."""
        obs, next_obs = self._split(obs), self._split(next_obs)
        if self._last.device != obs.device:
            self._last = self._last.to(obs.device)
        pushed = self.side.rows_written
        before = np.full(self.num_envs, NONE)
        follows = self._open
        if not (follows.all() and _equal(obs, self._last)):
            follows = follows & (obs == self._last).flatten(1).all(1).cpu().numpy()
            for e in np.flatnonzero(~follows):
                if self._open[e]:
                    before[e] = self.side.push(self._last[e, -1:], lambda: self._oldest(t, pushed))
                self._start[e] = self._opening(obs[e], t, pushed)
            self.frames[t % self.frames.shape[0]].copy_(obs[:, -1], non_blocking=self._away)
        self._age = np.where(follows, np.minimum(self._age + self.num_envs, self._top), 0)
        start = np.where(self._age < self._top, self._start, REPEAT)
        links = torch.from_numpy(np.stack((self._age, start, before), 1))
        self.links[t % self.capacity_rows].copy_(links, non_blocking=self._away)
        self.frames[(t + 1) % self.frames.shape[0]].copy_(next_obs[:, -1], non_blocking=self._away)
        self._last.copy_(next_obs)
        self._open = np.ones(self.num_envs, bool) if valid is None else valid.cpu().numpy().copy()

    def _opening(self, stack: Tensor, t: int, pushed: int) -> int:
        """Keep the older frames of an episode's first stack; return how."""
        older = stack[:-1]
        if not older.any():
            start = ZERO
        elif bool((older == stack[-1]).all()):
            return REPEAT
        else:
            start = self.side.push(older, lambda: self._oldest(t, pushed))
        self._plain = False
        return start

    def _oldest(self, t: int, pushed: int) -> int:
        """Return the smallest number in the side store that a row may still need; ``pushed`` is the first of this
        row's."""
        held = self.links[: min(t, self.capacity_rows), :, 1:]
        used = held[held >= 0]
        young = self._start[(self._age < self._top) & (self._start >= 0)]
        return min([pushed, *(int(numbers.min()) for numbers in (used, young) if len(numbers))])

    def cut(self) -> None:
        """Let the newest row hold no transitions; its frames stay what followed the row before."""
        self._open = np.zeros(self.num_envs, bool)

    def forget(self, t: int) -> None:
        """Let row ``t`` hold no transitions."""
        self.links[t % self.capacity_rows].copy_(torch.tensor([0, REPEAT, NONE]))

    def read(self, index: Tensor, written: int, *offsets: int) -> list[Tensor]:
        """Return stacks (B, k·C, …) of the slots ``index`` (B,) for each of ``offsets``, in order: 0 is of the
        observation, 1 of the next one. ``written`` is the number of rows written so far."""
        if self._weaves:
            return [self._woven(index, written, offset) for offset in offsets]
        found = self._found(index, written, offsets[0], offsets[-1] + self.stack)
        return [found[:, i - offsets[0] :][:, : self.stack].flatten(1, 2) for i in offsets]

    def _woven(self, index: Tensor, written: int, offset: int) -> Tensor:
        """Return the stacks of one offset, the channels of a pixel side by side in memory."""
        from rlopt.buffers.frame_loops import weave  # numba takes a second to load

        out = torch.empty((index.shape[0], *self.frame[1:], self.stack), dtype=torch.uint8)
        flat = [x.view(-1, math.prod(self.frame)).numpy() for x in (self.frames, self.side.tensor)]
        pixels = out.view(torch.int32).flatten(1).numpy()
        weave(*flat, self.links.view(-1, 3).numpy(), self.num_envs, index.numpy(), written, offset, pixels)
        return out.movedim(-1, 1)

    def _found(self, index: Tensor, written: int, first: int, stop: int) -> Tensor:
        """Return frames ``first … stop - 1`` (B, stop - first, *frame) of what the slots ``index`` hold: 0 … k - 1 are
        the observation, 1 … k the next one."""
        slots, size = self.capacity_rows * self.num_envs, self.frames.shape[0] * self.num_envs
        links = self.links.view(-1, 3)
        age, start, _ = links.index_select(0, index).unbind(1)
        # The same slots of a ring that never wraps, and the frames of the rows before and after them.
        place = index + (written * self.num_envs - 1 - index).div(slots, rounding_mode="floor") * slots
        steps = self._steps[first:stop]
        where = (place[:, None] - torch.minimum(steps, age[:, None])) % size
        out = self.frames.view(size, -1).index_select(0, where.flatten())
        out = out.view(index.shape[0], stop - first, *self.frame)
        if not self._plain:
            # Position j of a stack n rows after the first holds that one's frame j + n.
            number = start[:, None] + torch.arange(first, stop, device=index.device) + age[:, None] // self.num_envs
            number = torch.where(start[:, None] == ZERO, ZERO, number)
            self._patch(out, (steps > age[:, None]) & (start != REPEAT)[:, None], number)
        if stop > self.stack:
            following = (index + self.num_envs) % slots
            newest = (written - 1) % self.capacity_rows
            apart = links[:, 2].index_select(0, following)
            final = (apart >= 0) & (index.div(self.num_envs, rounding_mode="floor") != newest)
            self._patch(out[:, self.stack - first], final, apart)
        return out

    def _patch(self, out: Tensor, where: Tensor, number: Tensor) -> None:
        """Put the side store's frames ``number`` (zeros where it is negative) at the places ``where``, of the same
        shape, into ``out`` (…, *frame)."""
        if out.is_cpu:
            places = where.nonzero(as_tuple=True)
            number = number[places]
            if number.numel():
                frames = self.side.read(number.clamp(min=0))
                frames[number < 0] = 0
                out[places] = frames
            return
        # How many they are only the host could know, and it would have to wait: so a frame for every place.
        frames = self.side.read(number.clamp(min=0).flatten()).view(out.shape)
        column = (*number.shape, *[1] * len(self.frame))
        out.copy_(torch.where(where.view(column), frames * (number >= 0).view(column), out))

    def _split(self, obs: Tensor) -> Tensor:
        return obs.reshape(self.num_envs, self.stack, *self.frame)

    def state_dict(self, written: int) -> State:
        """Return what rows and side store do not hold: the newest next observation, and the frames older than the
        oldest row."""
        self.side.free(self._oldest(written, self.side.rows_written))
        return {
            "last": self._last.to("cpu", copy=True),
            "open": torch.from_numpy(self._open.copy()),
            "age": torch.from_numpy(self._age.copy()),
            "start": torch.from_numpy(self._start.copy()),
            "plain": self._plain,
            "head": self.frames.index_select(0, self._head(written)).cpu(),
            "side": self.side.state_dict(),
        }

    def load_state_dict(self, state: State, written: int) -> None:
        self._last = state["last"].clone()
        self._open, self._age, self._start = (state[k].cpu().numpy().copy() for k in ("open", "age", "start"))
        self._plain = bool(state["plain"])
        self.frames.index_copy_(0, self._head(written), state["head"].to(self.frames.device))
        self.frames[written % self.frames.shape[0]].copy_(self._last[:, -1])
        self.side.load_state_dict(state["side"])

    def _head(self, written: int) -> Tensor:
        first = max(0, written - self.capacity_rows)
        return torch.arange(first - self.stack + 1, first, device=self.frames.device) % self.frames.shape[0]


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.device.type == "cpu" and b.device.type == "cpu":
        x: npt.NDArray[np.uint8] = a.numpy()
        return bool((x == b.numpy()).all())  # 6 times as fast as torch.equal for bytes
    return torch.equal(a, b)
