"""REINFORCE with a group baseline (Williams 1992, "Simple statistical gradient-following algorithms for connectionist
reinforcement learning", Machine Learning 8; the leave-one-out baseline is that of Kool, van Hoof and Welling 2019,
"Buy 4 REINFORCE samples, get a baseline for free!").

Every rollout is G groups of episodes that begin in the same state. An action is made likelier by how much better its
episode went on than the others of its group did from the same step; there is no critic and no bootstrap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.agents.base import Agent
from rlopt.agents.group import GroupAgentConfig, leave_one_out, returns_to_go
from rlopt.buffers import Rollout
from rlopt.nn import (
    CategoricalActor,
    MultiCategoricalActor,
    Net,
    NetworkConfig,
    OptimiserConfig,
    Params,
    SquashedGaussianActor,
    network_options,
)
from rlopt.nn.actors import NetworkActor
from rlopt.nn.distributions import squashed_gaussian
from rlopt.policy import Policy
from rlopt.types import Act, Carry, Metrics, Obs, RloptError, Update, map_obs, option


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig(GroupAgentConfig):
    """Options of REINFORCE."""

    learning_rate: float = option(5e-3, "learning rate", above=0.0)
    credit: str = option(
        "return_to_go",
        "what an action is credited with: the rewards after it, or those of the whole episode",
        choices=("return_to_go", "episode"),
    )
    entropy_coefficient: float = option(
        0.0, "weight of the policy's entropy, in units of normalised advantage", low=0.0
    )
    optimiser: OptimiserConfig = option(OptimiserConfig, "optimiser of the policy")
    max_grad_norm: float | None = option(None, "clip the gradient to this norm (null: never)", above=0.0)
    network: NetworkConfig = option(lambda: NetworkConfig(hidden=(64, 64), activation="tanh"), "shape of the policy")

    def __post_init__(self) -> None:
        for name in ("critic_hidden", "value_gain"):
            if getattr(self.network, name) is not None:
                raise RloptError(f"agent.network.{name}: agent=reinforce has no critic; leave it out")


def policy_outputs(actor: Net, params: Params, obs: Obs) -> Any:
    """Return what the actor computes of whole episodes (T, N, …), as (T·N, …)."""
    module = actor.module
    assert isinstance(module, NetworkActor)
    if module.memory is None:
        return actor(params, map_obs(lambda x: x.flatten(0, 1), obs))
    episodes = map_obs(lambda x: x.transpose(0, 1), obs)
    rows, steps = next(iter(episodes.values()) if isinstance(episodes, dict) else iter([episodes])).shape[:2]
    # A row is one episode, so nothing ends before its padding.
    ended = torch.zeros(rows, steps, dtype=torch.bool, device=actor.flat.device)
    outputs, _ = actor(params, episodes, module.initial_carry(rows), ended)
    if isinstance(outputs, tuple):
        return tuple(x.transpose(0, 1).flatten(0, 1) for x in outputs)
    return outputs.transpose(0, 1).flatten(0, 1)


def categorical_terms(logits: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Return log π(a|s) (B,) of the action indices ``sample`` (B,), and the entropy (B,) of π(·|s) of ``logits`` (B,
    K)."""
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, sample.unsqueeze(-1)).squeeze(-1), entropy


def squashed_terms(outputs: tuple[Tensor, Tensor], sample: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return log π(a|s) (B,) of a = tanh(``sample``), and one-sample estimates (B,) of the entropy from ``noise`` (B,
    A); ``outputs`` are mean and log standard deviation, (B, A) each."""
    mean, log_std = outputs
    log_prob = squashed_gaussian(mean, log_std, (sample - mean) * (-log_std).exp())[1]
    return log_prob, -squashed_gaussian(mean, log_std, noise)[1]


def baseline_advantages(rollout: Rollout, gamma: float, credit: str, groups: int) -> tuple[Tensor, Tensor]:
    """Return what each action is credited with beyond its baseline, A_t = G_t - b_t, and which actions count: (T, N)
    each.

    With ``return_to_go`` G_t = Σ_k γᵏ r_{t+k}, and b_t is the mean of G_t over the other episodes of the group that are
    still running at step t; with ``episode`` G_t is the return from the start, and b_t that of the others. Episodes
    that did not come to their end take no part. A truncated episode is taken as ended: nothing is bootstrapped.
    """
    assert rollout.complete is not None and rollout.group is not None
    used = rollout.valid & rollout.complete
    score = returns_to_go(rollout.reward * used, gamma, None if credit == "episode" else rollout.terminated)
    counted = used
    if credit == "episode":
        score, counted = score[:1].expand_as(score), rollout.complete.expand_as(used)
    return score - leave_one_out(score, counted, rollout.group, groups), used


def policy_loss(
    log_prob: Tensor, entropy: Tensor, advantage: Tensor, used: Tensor, entropy_coefficient: float
) -> tuple[Tensor, Metrics]:
    """Return the score-function surrogate (Williams 1992): J = -(1/M) Σ (A log π(a|s) + β H) over the M actions that
    count.

    All tensors (B,); ``used`` is bool. Its gradient is REINFORCE's estimate, per action rather than per episode.
    """
    weight = used.to(log_prob.dtype)
    total = weight.sum().clamp(min=1.0)
    mean_entropy = (entropy * weight).sum() / total
    loss = -(advantage * log_prob * weight).sum() / total - entropy_coefficient * mean_entropy
    return loss, {"entropy": mean_entropy.detach()}


def normalise(advantage: Tensor, used: Tensor) -> Tensor:
    """Divide by the root mean square of those that count, so that the scale of rewards does not matter."""
    weight = used.to(advantage.dtype)
    square = (advantage.square() * weight).sum() / weight.sum().clamp(min=1.0)
    return advantage / (square.sqrt() + 1e-8)


KINDS: dict[type, type[CategoricalActor | MultiCategoricalActor | SquashedGaussianActor]] = {
    spaces.Discrete: CategoricalActor,
    spaces.MultiDiscrete: MultiCategoricalActor,
    spaces.MultiBinary: MultiCategoricalActor,
}
"""Kinds of policy by action space; in any other space a squashed Gaussian."""


class Reinforce(Agent):
    """REINFORCE for Discrete, MultiDiscrete, MultiBinary and bounded Box action spaces."""

    name: ClassVar[str] = "reinforce"
    loop: ClassVar[str] = "group"
    supports_memory = True
    config_class = ReinforceConfig
    config: ReinforceConfig

    def build(self) -> None:
        c, spec = self.config, self.spec
        kind = KINDS.get(type(spec.action_space), SquashedGaussianActor)
        options = network_options(c.network)
        self.actor = self.net("actor", lambda: kind(spec.observation_space, spec.action_space, options))
        assert isinstance(self.actor.module, CategoricalActor | MultiCategoricalActor | SquashedGaussianActor)
        self.actor_module: CategoricalActor | MultiCategoricalActor | SquashedGaussianActor = self.actor.module
        if isinstance(self.actor_module, SquashedGaussianActor):
            self.extra_fields = {"before_tanh": ((self.actor_module.action_features,), torch.float32)}
        self.optimiser = self.add_optimiser("optimiser", self.actor, c.learning_rate)

    @property
    def policy(self) -> Policy:
        return Policy(self.spec, self.actor_module)

    @torch.no_grad()
    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        """Return actions (N, …) in environment units. Stores a Gaussian sample before its tanh, which has no exact
        inverse."""
        module = self.actor_module
        if deterministic or not isinstance(module, SquashedGaussianActor):
            return Act(*module.act(obs, carry, deterministic, self.act_generator))
        (mean, log_std), carry = module.read(obs, carry)
        noise = torch.randn(mean.shape, generator=self.act_generator, device=self.device)
        sample = torch.addcmul(mean, log_std.exp(), noise)
        return Act(module.to_env(sample.tanh()), carry, {"before_tanh": sample})

    def update(self, batch: Rollout) -> Update:
        """Do one gradient step on one rollout."""
        c = self.config
        self.open_update(observation=batch.obs, reward=batch.reward)
        advantage, used = baseline_advantages(batch, c.gamma, c.credit, c.groups)
        advantage = normalise(advantage, used)
        outputs = policy_outputs(self.actor, self.actor.params, batch.obs)
        if isinstance(self.actor_module, CategoricalActor):
            sample = (batch.action - self.actor_module.start).flatten()
            log_prob, entropy = categorical_terms(outputs, sample)
        elif isinstance(self.actor_module, MultiCategoricalActor):
            log_prob = self.actor_module.log_prob(outputs, batch.action.flatten(0, 1))
            entropy = self.actor_module.entropy(outputs)
        else:
            sample = batch.extras["before_tanh"].flatten(0, 1)
            noise = torch.randn(sample.shape, generator=self.update_generator, device=self.device)
            log_prob, entropy = squashed_terms(outputs, sample, noise)
        loss, metrics = policy_loss(log_prob, entropy, advantage.flatten(), used.flatten(), c.entropy_coefficient)
        self.descend("policy", self.optimiser, loss, self.actor)
        self.end_update()
        metrics["policy_loss"] = loss.detach()
        return Update(metrics)
