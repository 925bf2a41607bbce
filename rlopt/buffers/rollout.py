"""On-policy data: T steps of N environments, learnt from for some epochs of reshuffled minibatches, then forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlopt.buffers.transition import Transition, make_reward_transform
from rlopt.types import Obs, RloptError, map_obs


class Rollout(NamedTuple):
    """T steps of N environments in the order in which they happened: what an on-policy loop gives to ``agent.update``.

    What a fixed number of steps and whole episodes have in common: column n is one environment's time line. Where
    ``ended``, the next row begins another episode (or, in a group's rollout, padding: rows that are not ``valid``, with
    reward 0). ``next_obs`` is the true last observation there, which a truncated episode bootstraps from.
    """

    obs: Obs
    """(T, N, …) what the policy saw (normalised where the run normalises observations)."""
    action: Tensor
    """(T, N, …) in environment units: (T, N, A), (T, N) int64, of a team (T, N, n, …)."""
    reward: Tensor
    """(T, N), or (T, N, n) where agents are paid apart; float32."""
    next_obs: Obs | None
    """(T, N, …) where each step led, seen as ``obs`` is; None where the agent bootstraps from nothing."""
    terminated: Tensor
    """(T, N) bool: the bootstrap is cut here."""
    truncated: Tensor
    """(T, N) bool: a limit, or the loop's horizon, ended the episode; the bootstrap goes on."""
    ended: Tensor
    """(T, N) bool: the last row of an episode."""
    valid: Tensor
    """(T, N) bool: a transition."""
    extras: dict[str, Tensor] = {}
    """{name: (T, N, …)} what the agent declared in ``extra_fields``, and what it adds (``with_extras``)."""
    group: Tensor | None = None
    """(N,) int64 in [0, G): the group of each column; None where there are no groups."""
    complete: Tensor | None = None
    """(N,) bool: the episode came to its end. False where it was lost half-way (a dead worker, a non-finite value), so
    that its return is unknown. None where columns are not episodes."""

    @classmethod
    def of(cls, steps: Sequence[Transition], group: Tensor | None = None, complete: Tensor | None = None) -> Rollout:
        """Return the rollout of T ``steps``. Where their ``next_obs`` are of no use, give them an empty dict."""

        def stack(rows: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(rows))

        def flags(rows: Sequence[Tensor | None], default: Callable[[Transition], Tensor]) -> Tensor:
            return stack([default(step) if row is None else row for row, step in zip(rows, steps, strict=True)])

        next_obs = None if steps[0].next_obs == {} else _stack_obs([step.next_obs for step in steps])
        return cls(
            _stack_obs([step.obs for step in steps]),
            stack([step.action for step in steps]),
            stack([step.reward for step in steps]),
            next_obs,
            stack([step.terminated for step in steps]),
            stack([step.truncated for step in steps]),
            flags([step.ended for step in steps], lambda step: step.terminated | step.truncated),
            flags([step.valid for step in steps], lambda step: torch.ones_like(step.terminated)),
            {name: stack([step.extras[name] for step in steps]) for name in steps[0].extras},
            group,
            complete,
        )

    @classmethod
    def beside(cls, rollouts: Sequence[Rollout]) -> Rollout:
        """Return the time lines of several rollouts as one (T, ΣN); shorter ones are padded with rows that are not
        ``valid``, which repeat their last step without its reward."""
        if len(rollouts) == 1:
            return rollouts[0]
        steps = max(len(rollout.reward) for rollout in rollouts)
        times = torch.arange(steps, device=rollouts[0].reward.device)
        lengths = [len(rollout.reward) for rollout in rollouts]
        every: list[list[Tensor]] = [[] for _ in rollouts]
        for rollout, index, parts in zip(rollouts, (times.clamp(max=n - 1) for n in lengths), every, strict=True):
            rollout.map(lambda x, index=index, parts=parts: parts.append(x.index_select(0, index)) or x)  # type: ignore[misc]
        joined = iter([torch.cat(parts, 1) for parts in zip(*every, strict=True)])
        whole = rollouts[0].map(lambda x: next(joined))
        there = [(times < n).unsqueeze(1).expand(-1, r.reward.shape[1]) for n, r in zip(lengths, rollouts, strict=True)]
        inside = torch.cat(there, 1)
        group, complete = (
            None if getattr(rollouts[0], name) is None else torch.cat([getattr(r, name) for r in rollouts])
            for name in ("group", "complete")
        )
        return whole._replace(
            reward=torch.where(inside.view(*inside.shape, *[1] * (whole.reward.dim() - 2)), whole.reward, 0.0),
            terminated=whole.terminated & inside,
            truncated=whole.truncated & inside,
            ended=whole.ended & inside,
            valid=whole.valid & inside,
            group=group,
            complete=complete,
        )

    def with_extras(self, **extras: Tensor) -> Rollout:
        """Return the rollout with further extras (T, N, …), such as advantages."""
        return self._replace(extras={**self.extras, **extras})

    def transformed(self, word: str) -> Rollout:
        """Return the rollout with each single reward as learning takes it: ``raw``, ``sign`` or ``clip``."""
        transform = make_reward_transform(word)
        return self if transform is None else self._replace(reward=transform(self.reward))

    def map(self, function: Callable[[Tensor], Tensor]) -> Rollout:
        """Apply ``function`` to every tensor that is (T, N, …)."""
        return Rollout(
            map_obs(function, self.obs),
            function(self.action),
            function(self.reward),
            None if self.next_obs is None else map_obs(function, self.next_obs),
            function(self.terminated),
            function(self.truncated),
            function(self.ended),
            function(self.valid),
            {name: function(value) for name, value in self.extras.items()},
            self.group,
            self.complete,
        )

    def without_gaps(self) -> Rollout:
        """Return the rollout with 0 for the numbers of rows that are no transition: they may not even be finite.
        Integers stay, which name an action or an observation that there is."""

        def cleaned(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            return torch.where(self.valid.view(*self.valid.shape, *[1] * (x.ndim - 2)), x, 0.0)

        return self.map(cleaned)

    def positions(self) -> Tensor:
        """Return the flat positions (M,) of the M transitions, ``t * N + n``."""
        return self.valid.flatten().nonzero().flatten()

    def at(self, position: Tensor) -> Rollout:
        """Return the steps at flat positions (B,): every field is (B, …), and groups are left out."""
        return self.map(lambda x: x.flatten(0, 1).index_select(0, position))._replace(group=None, complete=None)

    def columns(self, index: Tensor) -> Rollout:
        """Return the time lines of the environments ``index`` (B,): every field is (T, B, …)."""
        chosen = self.map(lambda x: x.index_select(1, index))
        group, complete = (None if x is None else x.index_select(0, index) for x in (self.group, self.complete))
        return chosen._replace(group=group, complete=complete)


def minibatches(count: int, epochs: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield indices in [0, ``count``), (``batch_size``,) at a time: in each epoch every one once, reshuffled anew.

    The one loop over epochs and minibatches of every on-policy agent, whatever is counted: transitions, time lines,
    episodes, tokens::

        positions = rollout.positions()
        for chosen in minibatches(len(positions), epochs=10, batch_size=64, generator=generator):
            batch = rollout.at(positions[chosen])

    The last minibatch of an epoch is smaller where ``batch_size`` does not divide ``count``. Sampling without
    replacement in this way is random reshuffling; indices lie on the generator's device.

    Raises:
        RloptError: there is nothing to draw.
    """
    if count < 1 or batch_size < 1:
        raise RloptError(f"minibatches of {batch_size} out of {count}: there is nothing to draw")
    for _ in range(epochs):
        yield from torch.split(torch.randperm(count, generator=generator, device=generator.device), batch_size)


def _stack_obs(steps: Sequence[Obs]) -> Obs:
    first = steps[0]
    if isinstance(first, dict):
        return {key: torch.stack([step[key] for step in steps if isinstance(step, dict)]) for key in first}
    return torch.stack([step for step in steps if isinstance(step, Tensor)])
