"""Group-in-group policy optimisation (Feng, Xue, Liu and An 2025, "Group-in-Group Policy Optimization for LLM Agent
Training", arXiv 2505.10978; equation numbers below are that paper's), for policies on Gymnasium environments.

Several episodes begin in the same state. An action is made likelier by how much better its episode was than the others
(as GRPO does), and by how much better things went on from an observation than where others, or the same episode at
another time, acted on it. There is no critic: a group's mean is the baseline. ``agent.estimator`` names the advantage,
so its relatives, and PPO's with a critic, learn from the same rollouts by the same loss.

It lives on observations that repeat: grids, toy text, cards. Of continuous ones, ``agent.anchor_digits`` rounds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.agents.anchors import anchor_key, tensor_anchors
from rlopt.agents.base import Agent
from rlopt.agents.group import INFO
from rlopt.agents.group_advantages import ANCHORED, Rows, generalised_advantages, group_advantages, group_metrics
from rlopt.agents.surrogate import GroupPolicyConfig, policy_loss
from rlopt.buffers import Rollout, minibatches
from rlopt.config import default_of
from rlopt.nn import (
    CategoricalActor,
    ChoiceTable,
    Critic,
    GaussianActor,
    MultiCategoricalActor,
    Net,
    NetworkConfig,
    OptimiserConfig,
    Params,
    network_options,
)
from rlopt.nn.distributions import gaussian_log_prob
from rlopt.policy import Policy
from rlopt.types import Act, Carry, Metrics, Obs, RloptError, Update, map_obs, on_device, on_host, option

CRITIC = {"estimator": ("ppo",)}
PolicyNetwork = ChoiceTable | CategoricalActor | MultiCategoricalActor | GaussianActor


@dataclass(frozen=True, kw_only=True)
class GiGPOConfig(GroupPolicyConfig):
    """Options of GiGPO for networks; ``network.hidden=[]`` over Discrete observations is a table."""

    learning_rate: float = option(1e-3, "learning rate of the policy", above=0.0)
    anchor: str = option(
        "observation", "what steps have in common that are compared; or what register_anchor named", needs=ANCHORED
    )
    anchor_digits: int | None = option(
        None, "decimals of floating observations that count (null: all)", low=0, needs=ANCHORED
    )
    anchor_history: int = option(0, "earlier observations that must agree as well", low=0, needs=ANCHORED)
    critic_learning_rate: float = option(1e-3, "learning rate of the critic", above=0.0, needs=CRITIC)
    gae_lambda: float = option(0.95, "λ of generalised advantages", low=0.0, high=1.0, needs=CRITIC)
    table: int | None = option(
        None,
        "a table of so many entries in place of a network, over what an observation offers in its leaf choices",
        low=1,
    )
    optimiser: OptimiserConfig = option(OptimiserConfig, "optimiser of every network")
    network: NetworkConfig = option(lambda: NetworkConfig(hidden=(64, 64), activation="tanh"), "shape of the networks")

    def __post_init__(self) -> None:
        for name in ("critic_hidden", "value_gain"):
            if getattr(self.network, name) is not None and self.estimator != "ppo":
                raise RloptError(f"agent.network.{name}: agent.estimator={self.estimator} has no critic; leave it out")
        if self.table is not None and self.estimator == "ppo":
            raise RloptError("agent.table: there is no critic of texts; choose another agent.estimator, or a network")
        if self.table is not None and self.network != default_of(GiGPOConfig, "network"):
            raise RloptError("agent.network: agent.table takes the place of the network; leave one of them out")


class Samples(NamedTuple):
    """What is learnt from, M steps."""

    obs: Obs
    sample: Tensor
    """(M, …) what the policy drew: the action, of a Gaussian before it is clipped."""
    log_prob: Tensor
    """(M,) log π_old(a|s)."""
    advantage: Tensor
    """(M,)."""
    reference: Tensor | None = None
    """(M,) log π_ref(a|s), where a divergence from it counts."""
    target: Tensor | None = None
    """(M,) what the critic is fitted to, where there is one."""

    def at(self, index: Tensor) -> Samples:
        """Return the steps at ``index`` (B,)."""
        return Samples(*(x if x is None else map_obs(lambda y: y.index_select(0, index), x) for x in self))  # type: ignore[arg-type]


KINDS: dict[type, type[CategoricalActor | MultiCategoricalActor]] = {
    spaces.Discrete: CategoricalActor,
    spaces.MultiDiscrete: MultiCategoricalActor,
    spaces.MultiBinary: MultiCategoricalActor,
}
"""Kinds of policy by action space; in a Box a Gaussian."""


class GiGPO(Agent):
    """GiGPO, GRPO, RLOO, step-wise groups, REINFORCE, or PPO on group rollouts, for networks and tables."""

    name: ClassVar[str] = "gigpo"
    loop: ClassVar[str] = "group"
    config_class = GiGPOConfig
    config: GiGPOConfig

    def build(self) -> None:
        c, spec = self.config, self.spec
        options = network_options(c.network)
        kind: Any = KINDS.get(type(spec.action_space), GaussianActor)
        if c.table is not None:
            kind, options = ChoiceTable, {"size": c.table}
        self.actor = self.net("actor", lambda: kind(spec.observation_space, spec.action_space, options))
        self.actor_module: PolicyNetwork = self.actor.module  # type: ignore[assignment]
        if isinstance(self.actor_module, GaussianActor):
            self.extra_fields = {"sample": ((self.actor_module.action_features,), torch.float32)}
        self.optimiser = self.add_optimiser("optimiser", self.actor, c.learning_rate)
        self.reference = self.persist("reference", self.actor.target()) if c.kl_coefficient else None
        self.key = anchor_key(c.anchor)
        if self.key is not None:  # what the environment says beside an observation is for it to know
            told = {INFO + name: ((), torch.float32) for name in spec.facts}
            self.extra_fields = {**self.extra_fields, **told}
        self.critic: Net | None = None
        if c.estimator == "ppo":
            self.critic = self.net("critic", lambda: Critic(spec.observation_space, c.network, ensemble=1))
            self.critic_optimiser = self.add_optimiser("critic_optimiser", self.critic, c.critic_learning_rate)

    @property
    def policy(self) -> Policy:
        return Policy(self.spec, self.actor_module)

    @torch.no_grad()
    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        """Return actions (N, …) in environment units; a Gaussian's unclipped sample is stored."""
        actor = self.actor_module
        outputs = actor(obs)
        rows = len(outputs[0] if isinstance(outputs, tuple) else outputs)
        noise = None if deterministic else actor.noise(rows, self.act_generator)
        if isinstance(actor, GaussianActor):
            sample = actor.sample(outputs, noise)
            return Act(actor.to_env(sample), None, {"sample": sample})
        return Act(actor.choose(outputs, noise))

    def terms(self, net: Net, params: Params, obs: Obs, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Return log π(a|s) (B,) of what was drawn, and the entropy (B,) of π(·|s), by a policy ``net``."""
        actor, outputs = self.actor_module, net(params, obs)
        if isinstance(actor, GaussianActor):
            return gaussian_log_prob(outputs[0], outputs[1], sample), actor.entropy(outputs)
        return actor.log_prob(outputs, sample), actor.entropy(outputs)

    def update(self, batch: Rollout) -> Update:
        """Learn from one rollout of whole episodes; the host waits for the device once, to compare observations."""
        c = self.config
        self.open_update(observation=batch.obs, reward=batch.reward)
        data, metrics = self.samples(batch)
        for chosen in minibatches(len(data.advantage), c.epochs, c.batch_size, self.update_generator):
            part = data.at(chosen)
            log_prob, entropy = self.terms(self.actor, self.actor.params, part.obs, part.sample)
            loss, found = policy_loss(log_prob, entropy, part.log_prob, part.advantage, part.reference, c)
            self.descend("policy", self.optimiser, loss, self.actor)
            if self.critic is not None:
                assert part.target is not None
                fit = 0.5 * (self.critic(self.critic.params, part.obs)[0] - part.target).square().mean()
                self.descend("critic", self.critic_optimiser, fit, self.critic)
                found["critic_loss"] = fit.detach()
            self.end_update()
        return Update(metrics | found)

    @torch.no_grad()
    def samples(self, rollout: Rollout) -> tuple[Samples, Metrics]:
        """Return the steps of a rollout's complete episodes with their advantages, and what the groups were like."""
        c = self.config
        assert rollout.complete is not None
        complete = rollout.columns(rollout.complete.nonzero().flatten())  # of the others nobody knows the return
        position = complete.positions()
        steps = complete.at(position)
        # Who is compared with whom is found on the host: bytes of observations in a dictionary.
        assert complete.group is not None
        (order, reward), group = on_host(position, steps.reward), complete.group.cpu()
        rows = Rows(reward.double(), order % len(group), group)
        if c.anchored:
            task = group[rows.episode]
            told = {name.removeprefix(INFO): x for name, x in steps.extras.items() if name.startswith(INFO)}
            anchors = tensor_anchors(
                steps.obs, steps.action, rows.episode, task, self.key, c.anchor_digits, c.anchor_history, c.nested, told
            )
            rows = rows._replace(anchors=anchors)
            if isinstance(steps.obs, dict) and "exact" in steps.obs:
                (exact,) = tensor_anchors(steps.obs, steps.action, rows.episode, task, anchor_key("exact"))
                rows = rows._replace(exact=exact)
        target = None
        metrics = group_metrics(rows, c.gamma)
        if self.critic is not None:
            value = self.critic(self.critic.params, steps.obs)[0].cpu().double()
            advantage = generalised_advantages(rows, value, c.gamma, c.gae_lambda)
            target = on_device((advantage + value).float(), self.device)
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        else:
            advantage = group_advantages(rows, c.gamma, c)
        sample = steps.extras.get("sample", steps.action)
        log_prob, _ = self.terms(self.actor, self.actor.params, steps.obs, sample)
        reference = None
        if self.reference is not None:
            reference, _ = self.terms(self.reference, self.reference.params, steps.obs, sample)
        return Samples(
            steps.obs, sample, log_prob, on_device(advantage.float(), self.device), reference, target
        ), metrics
