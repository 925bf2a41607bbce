"""Memory: what an actor or a critic keeps of the observations that it has seen of an episode."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlopt.nn.networks import EnsembleLinear, NetworkConfig, initialise
from rlopt.types import Carry, Obs, RloptError, map_obs

SIZE = 128
"""Numbers that a memory keeps unless ``network.memory_size`` says otherwise."""


class GRU(nn.Module):
    """A gated recurrent unit (Cho et al. 2014, as ``torch.nn.GRU`` has it), or E of them side by side.

    It is written out as two products, of the inputs and of the state, because ``torch.vmap`` maps those and not
    ``torch.nn.GRU``. A carry is ``{"memory": (N, H)}``, of an ensemble (N, E, H), and zeros where an episode begins.
    """

    def __init__(self, in_features: int, config: NetworkConfig, ensemble: int | None = None) -> None:
        super().__init__()
        self.size, self.ensemble = config.memory_size or SIZE, ensemble
        linear: Any = nn.Linear if ensemble is None else partial(EnsembleLinear, ensemble)
        self.input, self.state = linear(in_features, 3 * self.size), linear(self.size, 3 * self.size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1.0 / math.sqrt(self.size), 1.0 / math.sqrt(self.size))
        initialise(self, config, gain=1.0)

    def initial_carry(self, rows: int) -> Carry:
        """Return the carry with which ``rows`` episodes begin."""
        members = () if self.ensemble is None else (self.ensemble,)
        return {"memory": torch.zeros(rows, *members, self.size, device=next(self.parameters()).device)}

    def read(
        self,
        encode: Callable[[Obs], Tensor],
        obs: Obs,
        carry: Carry,
        ended: Tensor | None = None,
        valid: Tensor | None = None,
        burnt: Tensor | None = None,
    ) -> tuple[Tensor, Carry]:
        """Return what is remembered once the encoded observations are seen, and the next carry.

        Without ``ended`` that is one step: observations (N, …) to (N, H). With it ``unroll``: observations (B, L, …) to
        (B, L, H). An ensemble's results have its axis first.

        Raises:
            RloptError: no carry was given.
        """
        if carry is None:
            raise RloptError("a network with a memory needs its carry; an episode begins with initial_carry(rows)")
        if ended is None:
            return self.step(encode(obs), carry)
        axis = ended.dim() - 2  # behind that of the runs, where several are seen at once
        features = encode(map_obs(lambda x: x.flatten(axis, axis + 1), obs))
        return self.unroll(features.unflatten(-2, ended.shape[-2:]), carry, ended, valid, burnt)  # type: ignore[no-untyped-call]

    def step(self, x: Tensor, carry: dict[str, Tensor]) -> tuple[Tensor, Carry]:
        """Return the state (N, H) after inputs (N, F), and the carry; of an ensemble (E, N, H), from (N, F) or
        (E, N, F)."""
        h = self._cell(self.input(self._by_member(x, 2)), self._inside(carry))
        return h, self._outside(h)

    def unroll(
        self,
        x: Tensor,
        carry: dict[str, Tensor],
        ended: Tensor,
        valid: Tensor | None = None,
        burnt: Tensor | None = None,
    ) -> tuple[Tensor, Carry]:
        """Return the states (B, L, H) after each of the inputs (B, L, F), and the carry after the last one.

        It equals stepping: after a step that ``ended`` (B, L) an episode the carry begins anew, and one that was not
        ``valid`` (B, L) nor an end leaves it where it stood. No gradient goes back from later steps into one that is
        ``burnt`` (B, L). Of an ensemble (E, B, L, H), from (B, L, F) or (E, B, L, F).
        """
        x, h = self._by_member(x, 3), self._inside(carry)
        # One product for all steps; only the state's must wait for the step before.
        gates = self.input(x.flatten(-3, -2)).unflatten(-2, x.shape[-3:-1])
        states = []
        for t, gate in enumerate(gates.unbind(-2)):
            after = self._cell(gate, h)
            states.append(after)
            if valid is not None:
                after = torch.where(valid[..., t, None].bool(), after, h)
            if burnt is not None:
                after = torch.where(burnt[..., t, None].bool(), after.detach(), after)
            h = torch.where(ended[..., t, None].bool(), 0.0, after)
        return torch.stack(states, -2), self._outside(h)

    def _cell(self, gates: Tensor, h: Tensor) -> Tensor:
        x_reset, x_update, x_new = gates.chunk(3, -1)
        h_reset, h_update, h_new = self.state(h).chunk(3, -1)
        new = torch.tanh(x_new + torch.sigmoid(x_reset + h_reset) * h_new)
        return torch.lerp(new, h, torch.sigmoid(x_update + h_update))

    def _by_member(self, x: Tensor, dims: int) -> Tensor:
        return x if self.ensemble is None or x.dim() > dims else x.expand(self.ensemble, *x.shape)

    def _inside(self, carry: dict[str, Tensor]) -> Tensor:
        return carry["memory"] if self.ensemble is None else carry["memory"].transpose(0, 1)

    def _outside(self, h: Tensor) -> Carry:
        return {"memory": h if self.ensemble is None else h.transpose(0, 1)}


def make_memory(in_features: int, config: NetworkConfig, ensemble: int | None = None) -> GRU | None:
    """Return the memory that ``config.memory`` names, or None."""
    return GRU(in_features, config, ensemble) if config.memory == "gru" else None
