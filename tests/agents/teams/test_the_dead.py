"""What no living agent did moves nothing: neither by momentum, nor through priorities, nor through a loss's scale."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rlopt.agents.base import Agent
from rlopt.agents.teams.independent import ISAC
from rlopt.agents.teams.qmix import QMIX
from rlopt.config import build
from rlopt.nn import OptimiserConfig
from rlopt.registry import get_agent
from rlopt.types import EnvSpec
from tests.agents.teams.games import SMALL, joined, shared_spec, team_batch, team_spec

JOINT, VALUES = ("hasac", "masac", "hatd3", "matd3"), ("iql", "vdn", "qmix")
OPTIMISERS = {
    "adam": OptimiserConfig(),
    "adamw": OptimiserConfig(name="adamw", weight_decay=0.1),
    "torch": OptimiserConfig(name="torch:AdamW", kwargs={"weight_decay": 0.1}),
}


def make(name: str, runs: int = 1, spec: EnvSpec | None = None, each_state: bool = False, **options: Any) -> Any:
    cls = get_agent(name)
    always: dict[str, Any] = {"hatd3": {"policy_delay": 1}, "matd3": {"policy_delay": 1}}.get(name, {})
    if name in VALUES:
        always = {"mixer": {"iql": "none", "vdn": "sum", "qmix": "monotone"}[name], "share_parameters": False}
    if spec is None:
        spec = team_spec("discrete" if name in VALUES else "box", alive=True, each_state=each_state)
    return cls(spec, build(cls.config_class, {**SMALL, **always, **options}), runs=runs)


def lived(agent: Agent, seed: int, *who: bool) -> Any:
    """A minibatch in all of whose rows those agents live."""
    batch = team_batch(agent.spec, seed)
    obs: Any = batch.obs
    return batch._replace(obs={**obs, "alive": torch.tensor(who).expand(8, 3)})


def learnt(agent: Agent) -> dict[str, list[Tensor]]:
    """All that updates move by gradients: networks, optimisers, temperatures."""
    found = {}
    for each in agent.family():
        for name, state in each.state_dict().items():
            if not any(word in name for word in ("target", "generator", "guard", "clock", "latest", "learner")):
                found[f"{id(each)}/{name}"] = [x.clone() for x in tree_leaves(state) if isinstance(x, Tensor)]
    return found


def of_agent(agent: Any, i: int) -> list[Tensor]:
    """What is agent i's of it."""
    if not isinstance(agent, QMIX):
        mine = agent.learners[i] if isinstance(agent, ISAC) else agent
        named = [(name.partition("/")[2], tensors) for name, tensors in learnt(mine).items()]
        return [x for name, tensors in named if mine is not agent or f"_{i}" in name for x in tensors]
    sizes = [sum(p.numel() for p in actor.parameters()) for actor in agent.critic.module.actors]  # type: ignore[union-attr]
    own, optimiser = slice(sum(sizes[:i]), sum(sizes[: i + 1])), agent.critic_optimiser
    kept = [x[..., own].clone() for x in (agent.critic.flat, *optimiser.state.values())]
    leaves: Any = getattr(optimiser, "leaves", ())
    for run, stepping in zip(leaves, getattr(optimiser, "stepping", ()), strict=True):
        inside = [
            leaf for leaf in run if own.start <= leaf.value.storage_offset() % agent.critic.flat.shape[-1] < own.stop
        ]
        kept += [x.clone() for leaf in inside for x in stepping.state[leaf.parameter].values()]
    return kept


def same(one: list[Tensor], other: list[Tensor], run: int | None = None) -> list[bool]:
    assert len(one) == len(other) > 0
    pairs = zip(one, other, strict=True)
    return [torch.equal(a, b) if run is None else torch.equal(a[run], b[run]) for a, b in pairs]


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("name", [*JOINT, "isac", *VALUES])
def test_neither_momentum_nor_decay_moves_an_agent_without_a_living_row(name: str, optimiser: str) -> None:
    agent = make(name, optimiser=OPTIMISERS[optimiser])
    for i in range(2):
        agent.update(lived(agent, i, True, True, True))
    before = [of_agent(agent, i) for i in range(3)]
    agent.update(lived(agent, 2, True, False, True))
    after = [of_agent(agent, i) for i in range(3)]
    assert all(same(before[1], after[1]))
    assert not any(same(before[0], after[0])) and not any(same(before[2], after[2]))
    everything = learnt(agent)
    agent.update(lived(agent, 3, False, False, False))
    for key, tensors in learnt(agent).items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, everything[key], strict=True)), key
    agent.update(lived(agent, 4, True, True, True))
    assert not any(same(after[1], of_agent(agent, 1))), "it goes on where it stood"
    assert agent.guard.first_bad() is None


@pytest.mark.parametrize("name", [*JOINT, "isac", *VALUES])
def test_of_several_runs_those_in_which_it_lives_go_on(name: str) -> None:
    agent = make(name, runs=2)
    for i in range(2):
        agent.update(joined([lived(agent, i, True, True, True)] * 2))
    before = of_agent(agent, 1)
    agent.update(joined([lived(agent, 2, True, False, True), lived(agent, 2, True, True, True)]))
    after = of_agent(agent, 1)
    assert all(same(before, after, 0)) and not any(same(before, after, 1))


@pytest.mark.parametrize("name", ["hasac", "masac", "vdn"])
def test_a_shared_network_moves_where_anybody_lives(name: str) -> None:
    agent = make(name, spec=shared_spec(alive=True), share_parameters=True)
    net, optimiser = agent.actor, agent.critic_optimiser if name == "vdn" else agent.actor_optimisers[0]
    for i, who in enumerate([(True, True, True), (False, False, True), (False, False, False)]):
        before, steps = net.flat.clone(), float(optimiser.count)
        agent.update(lived(agent, i, *who))
        taken = min(sum(who), 1) if name == "vdn" else sum(who)
        assert float(optimiser.count) - steps == taken
        assert torch.equal(before, net.flat) == (not any(who))


@pytest.mark.parametrize("td_loss", ["squared", "pal"])
@pytest.mark.parametrize(
    ("name", "each_state"), [*product([*JOINT, "isac", *VALUES], [False]), *product(JOINT, [True])]
)
def test_the_dead_count_in_no_priority_and_in_no_scale(name: str, td_loss: str, each_state: bool) -> None:
    """In four rows nobody lives, in the others not the last agent: whatever these have beside, all numbers stay."""
    ends = []
    for junk in (0.0, 3.0):
        agent = make(name, each_state=each_state, td_loss=td_loss)
        batch = team_batch(agent.spec)
        obs: Any = {key: leaf.clone() for key, leaf in batch.obs.items()}  # type: ignore[union-attr]
        next_obs: Any = {key: leaf.clone() for key, leaf in batch.next_obs.items()}  # type: ignore[union-attr]
        for seen in (obs, next_obs):
            seen["alive"][:4] = False
            seen["alive"][4:, 2] = False
            dead = ~seen["alive"]
            seen["obs"][dead] = junk
            seen["state"][dead if each_state else slice(0, 4)] = junk
        reward = batch.reward.clone()
        reward[:4] = junk
        update = agent.update(batch._replace(obs=obs, next_obs=next_obs, reward=reward))
        ends.append([update.priority, *(x for key, x in update.metrics.items() if "critic_loss" in key)])
        assert not update.priority[:4].any() and update.priority[4:].all()
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
