"""The one contract of vector environments. Every backend is translated to it once, at its own edge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlopt.types import EnvSpec, Obs, State, Step


@runtime_checkable
class VectorEnv(Protocol):
    """N copies of one environment, stepped together.

    With ``autoreset`` (training) a row whose episode ended is reset inside ``step``: ``Step.obs`` is then the first
    observation of the next episode, ``Step.next_obs`` the last of the ended one and ``Step.ended`` true. Without it
    (evaluation, group rollouts) an ended row keeps its last observation in both, ``ended`` stays false, further steps
    of that row return ``valid`` false with reward 0, and the caller resets rows with ``reset(mask=…)``.
    Tensors live on ``device``. Floating observations are float32, images uint8, indices int64.
    """

    spec: EnvSpec
    num_envs: int
    device: torch.device
    autoreset: bool

    def reset(
        self, seeds: Sequence[int] | None = None, mask: Tensor | None = None, options: dict[str, Any] | None = None
    ) -> Obs:
        """Begin new episodes in all rows, or in those where ``mask`` (N,) is true, and return all rows' observations.

        ``seeds`` gives each row (all N) its own seed; without it a row goes on with its own generator.
        """
        ...

    def step(self, action: Tensor) -> Step:
        """Step all rows with ``action``: (N, A) float in environment units, or (N,) int64."""
        ...

    def state_dict(self) -> State | None:
        """All that a bit-exact continuation needs, or None where the environment cannot be saved."""
        ...

    def load_state_dict(self, state: State) -> Obs:
        """Continue where ``state_dict`` stood; returns the observations to act on (N, …)."""
        ...

    def close(self) -> None:
        """Release processes, windows and files. Safe to call twice."""
        ...
