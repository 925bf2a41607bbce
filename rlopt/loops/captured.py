"""The update from the gather on as one CUDA graph: a replay instead of some two hundred launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlopt.agents.base import Agent, ReplayAgentConfig
from rlopt.buffers import ReplayBuffer
from rlopt.types import RloptError, Update

_WARM_UP = 3
"""Updates made before the capture (and undone), in which libraries allocate what they keep."""


def has_graphs(device: torch.device) -> bool:
    """Whether what runs on this device can be recorded."""
    return device.type == "cuda"


def why_not(agent: Agent, buffer: ReplayBuffer, normalized: bool) -> str | None:
    """What stands against capturing this update, or None. A graph repeats fixed addresses and fixed numbers."""
    config = agent.config
    assert isinstance(config, ReplayAgentConfig)
    if config.lr_schedule != "constant":
        return f"agent.lr_schedule={config.lr_schedule} changes a number that a graph fixes"
    if config.n_step > 1 or buffer.layout.frames:
        return "n-step windows and stacked frames read where the ring stands"
    if normalized:
        return "normalisation reads statistics that grow"
    if buffer.batch_device != buffer.device:
        return f"the replay buffer lies on {buffer.device}"
    return None


@dataclass
class _Phase:
    """One graph: what an update at this place of the agent's cycle does."""

    replay: Callable[[], None]
    update: Update


class CapturedUpdate:
    """Draws a minibatch and makes one update with it, as ``agent.update(buffer.sample(batch_size))`` does.

    Draws stay outside: a sampler may read the host. Index and weights are copied into fixed tensors, then the graph of
    the agent's present phase is replayed; an agent whose updates differ in a cycle (a policy delay) has one for each.
    On the CPU, where there are no graphs, the same fixed tensors are used by the same calls (which is how it is
    tested).

    Raises:
        RloptError: where ``why_not`` has an answer.
    """

    def __init__(self, agent: Agent, buffer: ReplayBuffer, batch_size: int, normalized: bool = False) -> None:
        if reason := why_not(agent, buffer, normalized):
            raise RloptError(f"update_mode=captured cannot be: {reason}; use update_mode=eager")
        self.agent, self.buffer, self.batch_size = agent, buffer, batch_size
        self.cycle = int(getattr(agent.config, "policy_delay", 1))
        self.index = torch.zeros(batch_size, dtype=torch.int64, device=agent.device)
        self.weight: Tensor | None = None
        self.phases: dict[int, _Phase] = {}

    def __call__(self) -> Update:
        """One update. Its tensors are overwritten by the next one."""
        index, weight = self.buffer.draw(self.batch_size)
        self.index.copy_(index)
        if weight is not None:
            if self.weight is None:
                self.weight = torch.empty_like(weight)
            self.weight.copy_(weight)
        clock = self.agent.clock
        number = clock.updates % self.cycle
        if number not in self.phases:
            self.phases[number] = self._capture() if has_graphs(self.agent.device) else self._eager()
        phase = self.phases[number]
        phase.replay()
        clock.updates += 1
        return phase.update

    def _once(self) -> Update:
        """The work of one update, clock aside: a replay would not move it."""
        clock = self.agent.clock
        before = clock.updates
        update = self.agent.update(self.buffer.batch(self.index, self.weight))
        clock.updates = before
        return update

    def _eager(self) -> _Phase:
        phase = _Phase(lambda: None, Update({}, None))

        def work() -> None:
            phase.update = self._once()

        phase.replay = work
        return phase

    def _capture(self) -> _Phase:
        """Warm up on a stream aside, put everything back, and record."""
        agent = self.agent
        state = agent.state_dict()
        stream = torch.cuda.Stream(agent.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(agent.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._once()
        torch.cuda.current_stream(agent.device).wait_stream(stream)
        agent.load_state_dict(state)
        graph = torch.cuda.CUDAGraph()
        for generator in agent.update_generators:
            graph.register_generator_state(generator)
        # With overlap the environments' thread may allocate meanwhile, which is its own affair.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            update = self._once()
        agent.load_state_dict(state)  # recording moves the generators on the host
        return _Phase(graph.replay, update)
