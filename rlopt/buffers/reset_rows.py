"""A watch for reset rows: what a Gymnasium vector in its NEXT_STEP mode returns after an end is no transition."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

log = logging.getLogger(__name__)

WATCHED = 10_000
"""Vector steps after which nothing is looked at any more."""
ENOUGH = 3
"""Ends in a row that all look so before it is said."""


class ResetRowWatch:
    """Warns once where the rows that follow ends look like reset rows: they begin with the observation with which the
    episode ended, earn nothing, and do not end.

    In the mode NEXT_STEP, which ``gymnasium.make_vec`` takes by default, the call of ``step`` after an end ignores the
    action and gives the first observation of the next episode. Stored as a transition it teaches that an end leads to a
    beginning.
    """

    def __init__(self) -> None:
        self.done = False
        self._ended: tuple[Tensor, dict[str, Tensor]] | None = None
        self._alike = 0

    def see(self, values: Mapping[str, Tensor], rows: int) -> None:
        """Look at a vector step (N, …) on the CPU that is stored as ``rows`` before it were."""
        if rows > WATCHED or not values["ended"].is_cpu:
            self.done = True
            return
        over = (values["terminated"].bool() | values["ended"].bool()).reshape(-1)  # of one environment ()
        count = len(over)
        if self._ended is not None:
            where, last = self._ended
            same = all(torch.equal(values[f"obs{key}"].reshape(count, -1)[where], leaf) for key, leaf in last.items())
            plain = not (over[where].any() or values["reward"].reshape(count, -1)[where].any())
            self._alike = self._alike + len(where) if same and plain else 0
            if self._alike >= ENOUGH:
                self.done = True
                log.warning(
                    "rows that follow an episode's end look like reset rows of a Gymnasium vector in NEXT_STEP mode, "
                    "which are no transitions; step it through rlopt.envs.VectorAdapter, and give ended= and valid= too"
                )
        where = over.nonzero()[:, 0]
        if not len(where):
            self._ended = None
            return
        leaves = {name.removeprefix("next_obs"): x for name, x in values.items() if name.startswith("next_obs")}
        self._ended = where, {key: x.reshape(count, -1)[where].clone() for key, x in leaves.items()}
