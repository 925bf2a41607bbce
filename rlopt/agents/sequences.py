"""Networks that remember, learnt from slices of a replay buffer: what they see, what they answer, and what is stored.

An agent makes ``Memories`` of its networks, lets ``rows`` turn slices into a minibatch whose rows are single steps, and
calls ``Remembering`` networks in its losses, which are then the same as without a memory.

A stored carry was made by older weights. So the first steps of a slice may be burnt in (Kapturowski et al. 2019,
"Recurrent experience replay in distributed reinforcement learning", section 3): every network, targets too, runs over
them with the weights it has now, which renews the carry, and no gradient goes back into them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from rlopt.agents.base import Agent
from rlopt.buffers import Batch, slice_priority
from rlopt.buffers.samplers.sequence import CARRY
from rlopt.nn import Actor, Net, Params
from rlopt.types import Carry, Obs, RloptError, map_obs


class Course(NamedTuple):
    """What a network with a memory sees of B slices, (B, T, …) in order."""

    obs: Obs
    burnt: Tensor
    """(B, T) 1 where a step is burnt in."""
    carry: dict[str, Tensor]
    """{network: (B, …)} what was stored with the first step."""
    skipped: int
    """The first steps, which are seen and not answered."""


def rows(batch: Batch) -> Batch:
    """Return a minibatch of slices (B, L, …) as one of B·L single steps; of single transitions as it is. Of several
    runs everything has a leading axis R, before and after.

    ``obs`` and ``next_obs`` become a ``Course`` each, for ``Remembering`` networks. ``weight`` is 0 where the ``mask``,
    which stays (B, L), is 0, and elsewhere the slice's, divided by the mask's mean: so the mean over rows is one over
    the steps that count.
    """
    if batch.mask is None:
        return batch
    assert batch.valid is not None
    mask, burnt, time = batch.mask, batch.valid - batch.mask, batch.mask.dim() - 1
    flat = batch._replace(obs=mask, next_obs=mask, weight=None, index=mask, extras={}, valid=None, carry=None)
    flat = flat.map(lambda x: x.flatten(time - 1, time))
    # Of a minibatch in which nothing counts (MANSA's calls may all be burnt in) the loss is 0.
    weight = mask / mask.mean((-2, -1), keepdim=True).clamp(min=1e-6)
    if batch.weight is not None:
        weight = weight * batch.weight.unsqueeze(-1)
    # The steps of a slice follow each other, so the first observation and all next ones are the whole course.
    later = _map(lambda first, after: torch.cat((first.narrow(time, 0, 1), after), time), batch.obs, batch.next_obs)
    carry = batch.carry or {}
    return flat._replace(
        obs=Course(batch.obs, burnt, carry, 0),  # type: ignore[arg-type]
        next_obs=Course(  # type: ignore[arg-type]
            later, torch.cat((burnt.narrow(time, 0, 1), burnt), time), carry, 1
        ),
        weight=weight.flatten(-2),
        index=batch.index,
        extras={name: x.flatten(time - 1, time) for name, x in batch.extras.items()},
        mask=mask,
    )


def steps(batch: Batch, runs: int = 1) -> Batch:
    """Return a minibatch of slices (R·B, L, …) as one of single steps (R·B·L, …) for an agent that remembers nothing,
    those that do not count with weight 0; of single transitions as it is."""
    if batch.mask is None:
        return batch
    share = batch.mask.view(runs, -1).mean(1).clamp(min=1e-6)
    weight = batch.mask / share.repeat_interleave(len(batch.mask) // runs).unsqueeze(-1)
    if batch.weight is not None:
        weight = weight * batch.weight.unsqueeze(-1)
    flat = batch._replace(weight=weight, index=batch.mask, valid=None, mask=None, carry=None)
    return flat.map(lambda x: x.flatten(0, 1))._replace(index=batch.index)


def observations(obs: Obs | Course) -> Obs:
    """Return the observations of a course; others as they are."""
    return obs.obs if isinstance(obs, Course) else obs


def mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of rows (…, B) over those whose ``mask`` (of slices, (B, L)) is 1; of all without."""
    return x.mean() if mask is None else ((x * mask.flatten()).sum(-1) / mask.sum()).mean()


def mean_of_rows(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean (…,) of rows (…, B) over those whose ``mask`` (of slices, (…, B, L)) is 1; of all without."""
    return x.mean(-1) if mask is None else (x * mask.flatten(-2)).sum(-1) / mask.sum((-2, -1)).clamp(min=1.0)


def priorities(error: Tensor, mask: Tensor | None) -> Tensor:
    """Return one priority per slice from the errors of the rows; of single transitions their errors."""
    if mask is None:
        return error
    return slice_priority(error.reshape(-1, mask.shape[-1]), mask.flatten(0, -2))


class Remembering:
    """A network with a memory, as a loss calls it: ``net(params, course, …)`` gives a row for each step of each slice,
    (B·L, …), critics (E, B·L, …). What comes behind the course is the network's as it is."""

    def __init__(self, net: Net, name: str) -> None:
        self.net, self.name = net, name
        self._members = 0 if isinstance(net.module, Actor) else 1

    def __call__(self, params: Params, course: Course, *more: Any) -> Any:
        return recall(partial(self.net, params), course, self.name, *more, members=self._members)


def recall(network: Callable[..., Any], course: Course, name: str, *more: Any, members: int = 0) -> Any:
    """Return what ``network`` answers at each step of each slice, rows (…, B·L, …); ``name`` is its carry's, and
    ``members`` counts the axes of an ensemble, which come first."""
    # Nothing ends inside of a slice: it ends itself with its episode.
    outputs, _ = network(
        course.obs, *more, carry={"memory": course.carry[name]}, ended=torch.zeros_like(course.burnt),
        burnt=course.burnt,
    )  # fmt: skip
    cut, time = course.skipped, members + course.burnt.dim() - 1
    steps = course.burnt.shape[-1] - cut
    many = outputs if isinstance(outputs, tuple) else (outputs,)
    found = tuple(x.narrow(time, cut, steps).flatten(time - 1, time) for x in many)
    return found if isinstance(outputs, tuple) else found[0]


class Memories:
    """What the networks of a replay agent remember between steps: the collector's carry, stored with each transition.

    Args:
        agent: whose they are; the carry is declared in its ``extra_fields``.
        nets: {name: network}, the one that acts first. The carry's leaves have their names.

    Raises:
        RloptError: an option of the losses knows single steps alone.
    """

    def __init__(self, agent: Agent, nets: Mapping[str, Net]) -> None:
        if getattr(agent.config, "td_loss", None) == "pal":  # its scale is a mean over all rows
            raise RloptError("agent.td_loss=pal is not combined with agent.network.memory; use squared or huber")
        self.agent, self.nets = agent, dict(nets)
        own = {CARRY + name: (tuple(x.shape[1:]), x.dtype) for name, x in self.initial_carry(1).items()}
        agent.extra_fields = {**agent.extra_fields, **own}

    def initial_carry(self, count: int) -> dict[str, Tensor]:
        """Return the carry with which ``count`` episodes begin."""
        carries = {name: net.module.initial_carry(count) for name, net in self.nets.items()}  # type: ignore[operator]
        return {name: carry["memory"] for name, carry in carries.items()}

    @torch.no_grad()
    def step(self, obs: Obs, carry: Carry) -> tuple[Any, Carry]:
        """Return what the network that acts gives for observations (R·N, …), and the next carry of all.

        Raises:
            RloptError: there is no carry.
        """
        if carry is None:
            raise RloptError("an agent with a memory needs its carry; an episode begins with initial_carry(rows)")
        answers, after = [], {}
        for name, net in self.nets.items():
            answer, last = self._step(net, obs, {"memory": carry[name]})
            answers.append(answer)
            after[name] = last["memory"]
        return answers[0], after

    def _step(self, net: Net, obs: Obs, carry: dict[str, Tensor]) -> Any:
        if not net.stacked:
            return net(net.params, obs, carry=carry)
        runs = self.agent.runs
        by_run = [map_obs(lambda x: x.view(runs, -1, *x.shape[1:]), tree) for tree in (obs, carry)]
        if self.agent.beside:
            return tree_map(lambda x: x.flatten(0, 1), net(net.params, by_run[0], carry=by_run[1]))
        found = torch.vmap(lambda params, seen, before: net(params, seen, carry=before))(net.params, *by_run)
        return tree_map(lambda x: x.flatten(0, 1), found)


def _map(function: Any, one: Obs, other: Obs) -> Obs:
    if isinstance(one, dict):
        assert isinstance(other, dict)
        return {key: function(leaf, other[key]) for key, leaf in one.items()}
    return function(one, other)  # type: ignore[no-any-return]
