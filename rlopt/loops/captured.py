"""Updates as CUDA graphs: a replay instead of some two hundred launches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlopt.agents.base import Agent
from rlopt.agents.replay_agent import ReplayAgent, join_updates
from rlopt.buffers import Batch, ReplayBuffer
from rlopt.envs import Normalizer
from rlopt.nn import Optimiser
from rlopt.types import RloptError, Update

_WARM_UP = 3
"""Times that a piece runs before it is recorded (and is undone), in which libraries allocate what they keep."""
FEW_ORDERS = 2
"""Up to so many orders of the stages each is one graph; with more, every stage is one."""


def has_graphs(device: torch.device) -> bool:
    """Return whether what runs on this device can be recorded."""
    return device.type == "cuda"


def why_eager(agent: Agent) -> str | None:
    """Return in words what stands against recording this agent's updates, or None."""
    if not isinstance(agent, ReplayAgent):
        return f"the updates of agent={agent.name} are no stages"
    if type(agent).update is not ReplayAgent.update:
        return f"the updates of agent={agent.name} are more than its stages"
    for optimiser in (thing for each in agent.family() for thing in each.registered(Optimiser)):
        if not optimiser.recordable:
            return f"agent.optimiser.name={optimiser.config.name} steps on the host"
    return None


class _Recorded(NamedTuple):
    """A piece of an update."""

    replay: Callable[[], None]
    result: Any
    """What it returned, at addresses that every replay fills anew."""


class CapturedUpdate:
    """Draws a minibatch and makes one update with it, as ``agent.update(buffer.sample(batch_size))`` does.

    Draws stay outside: a sampler may read the host. What is drawn is copied into fixed tensors, from which graphs read:
    slots and weights where a graph can gather the transitions itself, else the minibatch as the buffer and the
    ``normalizer`` made it (n-step windows and stacked frames read where the ring stands, statistics grow, and a replay
    buffer may lie elsewhere).

    An agent whose stages come in few orders (a policy delay has two) is recorded order by order; otherwise stage by
    stage, each once, to be replayed in any order. The learning rate of a schedule is read from the device. What else
    a graph fixes and a user may change (``ReplayAgent.constants``) is looked at in every update, which is recorded anew
    where it changed.

    On the CPU, where there are no graphs, the same fixed tensors are used by the same calls.

    Raises:
        RloptError: where ``why_eager`` has an answer.
    """

    def __init__(
        self, agent: Agent, buffer: ReplayBuffer, batch_size: int, normalizer: Normalizer | None = None
    ) -> None:
        if reason := why_eager(agent):
            raise RloptError(f"update_mode=captured cannot be: {reason}; use update_mode=eager")
        assert isinstance(agent, ReplayAgent)
        self.agent, self.buffer, self.batch_size, self.normalizer = agent, buffer, batch_size, normalizer
        self.gathers = normalizer is None and buffer.gathers_only and buffer.batch_device == buffer.device
        """Whether the graphs gather the minibatch themselves."""
        self.index: Any = torch.zeros(0, dtype=torch.int64)
        """(B,) slots of the latest minibatch, of several by name."""
        self.inputs: list[Tensor] = []
        self.recorded: dict[Hashable, _Recorded] = {}
        self._batch: Callable[[], Batch]
        self._shape: Any = None
        self._orders: set[tuple[str, ...]] = set()
        self._rates = {
            each: torch.ones((), dtype=torch.float64, device=agent.device)
            for each in agent.family()
            if isinstance(each, ReplayAgent) and each.schedule.kind != "constant"
        }

    def __call__(self) -> Update:
        """Make one update. Its tensors are overwritten by the next one."""
        agent = self.agent
        self._draw()
        if not has_graphs(agent.device):
            return agent.update(self._batch())
        for each, rate in self._rates.items():
            rate.fill_(each.schedule.factor(each.clock))
        order = agent.stages()
        if len(self._orders) <= FEW_ORDERS and order not in self._orders:
            self._orders.add(order)
            if len(self._orders) > FEW_ORDERS:
                self.recorded.clear()
        if len(self._orders) <= FEW_ORDERS:
            done: Update = self._do(order, partial(self._stages, order))
        else:
            work = self._do("prepare", self._prepare)
            done = join_updates([self._do(name, partial(agent.stage, name, work), work) for name in order])
        agent.end_update()
        return done

    def _draw(self) -> None:
        """Copy the next minibatch, or its slots, into the fixed tensors."""
        drawn: Any
        if self.buffer.several:
            drawn = self.buffer.sample(self.batch_size)
            self.index = slots_of(drawn)
        else:
            self.index, _ = drawn = self.buffer.draw(self.batch_size)
            drawn = drawn if self.gathers else self.buffer.batch(*drawn)
        if self.normalizer is not None:
            drawn = self.normalizer.normalize_batch(drawn)
        given = list(_leaves(drawn))
        shape = _shape(drawn), self.agent.constants()
        if shape != self._shape:
            self._shape = shape
            self.recorded.clear()
            self.inputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given]
            fixed = _like(drawn, iter(self.inputs))
            self._batch = partial(self.buffer.batch, *fixed) if self.gathers else lambda: fixed
        for own, x in zip(self.inputs, given, strict=True):
            own.copy_(x, non_blocking=True)

    def _prepare(self) -> Any:
        work = self.agent.prepare(self._batch())
        self.agent.watch(work)
        return work

    def _stages(self, order: tuple[str, ...]) -> Update:
        work = self._prepare()
        return join_updates([self.agent.stage(name, work) for name in order])

    def _do(self, name: Hashable, piece: Callable[[], Any], work: Any = None) -> Any:
        """Replay ``piece``, recorded when it is first met; ``work`` is what it may change besides the agent."""
        if name not in self.recorded:
            self.recorded[name] = self._record(piece, work)
        self.recorded[name].replay()
        return self.recorded[name].result

    def _record(self, piece: Callable[[], Any], work: Any) -> _Recorded:
        """Warm up on a stream aside, put everything back, and record."""
        agent = self.agent
        stream = torch.cuda.Stream(agent.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(agent.device))
        with torch.cuda.stream(stream), self._undone(work):
            for _ in range(_WARM_UP):
                piece()
        torch.cuda.current_stream(agent.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        for each in agent.family():
            for generator in each.update_generators:
                graph.register_generator_state(generator)
        # Recording moves the generators on the host. With overlap the environments' thread may allocate meanwhile.
        with self._undone(work), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = piece()
        return _Recorded(graph.replay, result)

    @contextmanager
    def _undone(self, work: Any) -> Iterator[None]:
        """Put back what happens inside; schedules are read from the device meanwhile."""
        agent = self.agent
        state = agent.state_dict()
        # An expanded tensor (of discounts, say) holds one number several times: nobody can write to it.
        passing = [x for x in (*agent.guard.scratch, *_leaves(work)) if 0 not in x.stride()]
        before = [x.clone() for x in passing]
        with ExitStack() as stack:
            for each, rate in self._rates.items():
                each.recorded_rate = rate
                stack.callback(setattr, each, "recorded_rate", None)
            yield
        agent.load_state_dict(state)
        for x, old in zip(passing, before, strict=True):
            x.copy_(old)


def _shape(tree: Any) -> Any:
    """Return what two trees that can be copied into each other have in common."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.dtype
    if isinstance(tree, dict):
        return {name: _shape(child) for name, child in tree.items()}
    return [_shape(child) for child in tree] if isinstance(tree, tuple) else tree


def _like(tree: Any, leaves: Iterator[Tensor]) -> Any:
    """Return a tree of other leaves."""
    if isinstance(tree, Tensor):
        return next(leaves)
    if isinstance(tree, dict):
        return {name: _like(child, leaves) for name, child in tree.items()}
    if isinstance(tree, tuple):
        children = [_like(child, leaves) for child in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)
    return tree


def slots_of(batch: Batch | dict[str, Batch]) -> Any:
    """Return the slots (B,) of a minibatch, of several by name: what their priorities are given with."""
    return {name: each.index for name, each in batch.items()} if isinstance(batch, dict) else batch.index


def _leaves(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | dict):
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(child)
