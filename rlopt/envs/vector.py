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

    What the flags of a ``Step`` mean together, row by row, for whoever reads them:

    ==================  ====  =====  =====  =====  ==========================  =======================================
    case                term  trunc  ended  valid  windows, GAE, slices        return, carry
    ==================  ====  =====  =====  =====  ==========================  =======================================
    ordinary step       0     0      0      1      go on                       count, go on
    end for good        1     0      1      1      cut, no bootstrap           counted, episode closed, begins anew
    time limit          0     1      1      1      cut, bootstrap, next_obs    the same
    both at once        1     1      1      1      cut, no bootstrap           the same
    lost life           1     0      0      1      cut, no bootstrap           the episode goes on, the carry stays
    surplus row         0     0      0      0      not stored                  stand still
    episode lost        0     0      1      0      cut before it               not counted, carry begins anew
    ==================  ====  =====  =====  =====  ==========================  =======================================

    ``ended`` is true on exactly one row of every episode, its last, with and without ``autoreset``. A surplus row is no
    transition and ends nothing: the reset row of Gymnasium's NEXT_STEP mode, a hidden FIRE, a row that waits for its
    reset. (Where only some rows of a vector step are surplus they take a slot of a buffer, which is never drawn, and
    a window that meets one ends before it.) An episode is lost where a worker was replaced, a simulation broke or a
    value was not finite; the row begins a new episode at once, with and without ``autoreset``.

    With ``autoreset`` (training) a row whose episode ended is reset inside ``step``: ``Step.obs`` is then the first
    observation of the next episode and ``Step.next_obs`` the last of the ended one. Without it (evaluation, group
    rollouts) both are the last observation, the following steps of that row are surplus rows with reward 0, and the
    caller resets rows with ``reset(mask=…)``.
    Tensors live on ``device``. Floating observations are float32, images uint8, indices int64.
    """

    spec: EnvSpec
    num_envs: int
    device: torch.device
    autoreset: bool

    def reset(
        self,
        seeds: Sequence[int] | None = None,
        mask: Tensor | None = None,
        options: dict[str, Any] | None = None,
        noise_seeds: Sequence[int] | None = None,
    ) -> Obs:
        """Begin new episodes in all rows, or in those where ``mask`` (N,) is true, and return all rows' observations.

        ``seeds`` gives each row (all N) its own seed; without it a row goes on with its own generator.
        ``noise_seeds`` (N) gives each row another one for what is drawn after its first state, so that rows of equal
        seeds may begin in the same state and yet meet different noise.

        Raises:
            RloptError: the number of seeds or the mask's shape is wrong, or the backend has no place for ``options``
                or ``noise_seeds``.
        """
        ...

    def step(self, action: Tensor) -> Step:
        """Step all rows with ``action`` (N, …), of the action space's shape: float in environment units, or int64."""
        ...

    def state_dict(self) -> State | None:
        """Return all that a bit-exact continuation needs, or None where the environment cannot be saved."""
        ...

    def load_state_dict(self, state: State) -> Obs:
        """Continue where ``state_dict`` stood; returns the observations to act on (N, …)."""
        ...

    def close(self) -> None:
        """Release processes, windows and files. Safe to call twice."""
        ...
