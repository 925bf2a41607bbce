"""Proximal policy optimisation (Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv 1707.06347;
equation numbers below are that paper's, advantages those of Schulman et al. 2016, arXiv 1506.02438).

What the paper leaves out decides how well it learns. Its details are numbered here as in Huang et al. 2022, "The 37
Implementation Details of Proximal Policy Optimization": [n] of the thirteen core ones, [cn] of the nine for continuous
actions. Some stand elsewhere: [1] a vector of environments (``RolloutLoop``); [c5] an action is clipped to its Box and
its unclipped sample learnt from (``GaussianActor.to_env``); [c6] observations are normalised and [c7] clipped to ±10,
[c8] rewards divided by the deviation of the discounted return and [c9] clipped to ±10 (``Normalizer``; on with
``env.normalize_obs=true env.normalize_reward=true``). Its statistics stand still from the first step of a rollout to
the last epoch of its update, so the first ratio of probabilities is 1.

A time limit is no end: the value of the state that it cut is bootstrapped, where CleanRL takes it for one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from rlopt.agents.base import Agent
from rlopt.agents.rollout_agent import RolloutAgentConfig, generalised_advantages
from rlopt.buffers import Rollout, minibatches
from rlopt.buffers.samplers.sequence import CARRY
from rlopt.config import default_of
from rlopt.fast import fused_ppo
from rlopt.nn import (
    CategoricalActor,
    Critic,
    GaussianActor,
    MultiCategoricalActor,
    Net,
    NetworkConfig,
    OptimiserConfig,
    Params,
    Schedule,
    network_options,
)
from rlopt.nn.boxes import bounds, scale
from rlopt.nn.distributions import gaussian_log_prob
from rlopt.policy import Policy
from rlopt.types import Act, Carry, Clock, Metrics, Obs, RloptError, Space, Update, map_obs, one_line, option

PolicyNetwork = GaussianActor | CategoricalActor | MultiCategoricalActor
SCHEDULES = ("constant", "linear")
CHUNK = 1024
"""Rows of a rollout that are evaluated at once before it is learnt from."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig(RolloutAgentConfig):
    """Options of PPO. The defaults are CleanRL's for MuJoCo, but for value clipping, which hurts (Andrychowicz et al.
    2021, arXiv 2006.05990), and a constant learning rate."""

    epochs: int = option(10, "passes over a rollout", low=1, high=10_000)
    batch_size: int = option(64, "transitions per minibatch (with a memory: of whole time lines)", low=1, high=2**20)
    learning_rate: float = option(3e-4, "learning rate", above=0.0)
    lr_schedule: str = option("constant", "learning rate over time; linear falls to 0", choices=SCHEDULES)
    clip: float = option(0.2, "ε: how far the ratio of probabilities may move and still pay", above=0.0)
    clip_schedule: str = option("constant", "ε over time; linear falls to 0", choices=SCHEDULES)
    schedule_steps: int | None = option(
        None,
        "environment steps until those are at 0 (null: total_steps)",
        low=1,
        needs={"lr_schedule": ("linear",), "clip_schedule": ("linear",)},
    )
    gae_lambda: float = option(0.95, "λ of generalised advantages", low=0.0, high=1.0)
    bootstrap: bool = option(True, "value what lies beyond a time limit (false: take it for an end, as CleanRL does)")
    normalise_advantage: bool = option(True, "zero mean and unit deviation of the advantages in each minibatch")
    recompute_advantage: bool = option(False, "advantages and value targets anew before each epoch, as Tianshou does")
    value_clip: bool = option(False, "clip the value's change to ε as well")
    value_coefficient: float = option(0.5, "weight of the value loss, ½ mean squared error", low=0.0)
    entropy_coefficient: float = option(0.0, "weight of the policy's entropy", low=0.0)
    target_kl: float | None = option(None, "end the epochs once the divergence exceeds this (null: never)", above=0.0)
    max_grad_norm: float | None = option(0.5, "clip the gradient of policy and value together to this norm", above=0.0)
    log_std: float = option(0.0, "where the log standard deviation of continuous actions begins")
    unit_box: bool = option(True, "sample bounded continuous actions in units of [-1, 1], not the environment's")
    shared_encoder: bool = option(False, "see images through one encoder for policy and value, as on Atari")
    fused: bool = option(True, "use the hand-written gradients where they apply (plain networks on the CPU)")
    optimiser: OptimiserConfig = option(lambda: OptimiserConfig(epsilon=1e-5), "optimiser of both networks")  # [3]
    network: NetworkConfig = option(  # [13] and [c4]: policy and value share nothing
        lambda: NetworkConfig(hidden=(64, 64), activation="tanh", init="orthogonal"), "shape of policy and value"
    )

    def __post_init__(self) -> None:
        if self.shared_encoder and self.network.memory != "none":
            raise RloptError("agent.shared_encoder is not combined with agent.network.memory; leave one of them out")
        if self.network.memory != "none" and self.batch_size < self.rollout_steps:
            raise RloptError(
                f"agent.batch_size={self.batch_size}: with agent.network.memory={self.network.memory} a minibatch is "
                f"made of whole time lines of agent.rollout_steps={self.rollout_steps}; give at least that"
            )


class PolicyAndValue(nn.Module):
    """The policy π(a|s) and the value V(s): two networks, one set of parameters to clip and to step [11]. They may have
    one encoder, through which observations are then seen once.

    Where they remember, a carry is ``{"actor": (N, H), "critic": (N, 1, H)}``.
    """

    def __init__(self, actor: PolicyNetwork, critic: Critic) -> None:
        super().__init__()
        self.actor, self.critic = actor, critic
        self.shared = critic.encoders[0] is actor.encoder

    def initial_carry(self, rows: int) -> Carry:
        parts = {"actor": self.actor.initial_carry(rows), "critic": self.critic.initial_carry(rows)}
        return {name: carry["memory"] for name, carry in parts.items() if carry is not None} or None

    def forward(
        self, obs: Obs, carry: Carry = None, ended: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Any, Tensor, Carry]:
        """Return what the policy gives, the values (B,) and the next carry; of sequences, told by ``ended`` (B, L),
        each is (B, L, …)."""
        if self.shared:
            seen = self.actor.encoder(obs)
            return self.actor.head(self.actor.body(seen), obs), self.critic.values(seen)[0], None
        if carry is None:
            return self.actor(obs), self.critic(obs)[0], None
        outputs, actors = self.actor(obs, {"memory": carry["actor"]}, ended, valid)
        values, critics = self.critic(obs, None, {"memory": carry["critic"]}, ended, valid)
        return outputs, values[0], {"actor": actors["memory"], "critic": critics["memory"]}


class Samples(NamedTuple):
    """What is learnt from: M transitions (M, …), or where networks remember M time lines (M, T, …)."""

    obs: Obs
    sample: Tensor
    """What the policy drew: unclipped (M, A), or the action itself."""
    log_prob: Tensor
    """(M,) log π_old(a|s)."""
    value: Tensor
    """(M,) V_old(s)."""
    advantage: Tensor
    target: Tensor
    """(M,) Â + V_old(s), what the value is fitted to [5]."""
    carry: Carry = None
    """With which the time lines begin."""
    ended: Tensor | None = None
    valid: Tensor | None = None
    """(M, T) bool; None where all are transitions."""
    factor: Tensor | None = None
    """(M,) what the policy's loss of a transition is multiplied by, from the extra ``factor``; None: nothing."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Samples:
        """Apply ``function`` to every tensor."""
        return Samples(*(x if x is None else map_obs(function, x) for x in self))  # type: ignore[arg-type]


class Terms(NamedTuple):
    """Parts of a loss, detached."""

    log_ratio: Tensor
    """(B,) log π(a|s) - log π_old(a|s)."""
    policy: Tensor
    value: Tensor
    entropy: Tensor


def log_prob(actor: PolicyNetwork, outputs: Any, sample: Tensor) -> Tensor:
    """Return log π (B,) of what the policy drew (of a Gaussian the unclipped sample [c5])."""
    if isinstance(actor, GaussianActor):
        return gaussian_log_prob(outputs[0], outputs[1], sample)
    return actor.log_prob(outputs, sample)


def mean(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the mean of ``x`` (B,) over the ``valid`` rows, of all without."""
    return x.mean() if valid is None else torch.where(valid, x, 0.0).sum() / valid.sum().clamp(min=1)


def normalised(advantage: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return advantages (B,) with zero mean and unit (unbiased) deviation within a minibatch [7]; one alone stays."""
    if advantage.numel() == 1:
        return advantage
    if valid is None:
        deviation, middle = torch.std_mean(advantage)
    else:
        middle = mean(advantage, valid)
        squares = torch.where(valid, advantage - middle, 0.0).square().sum()
        deviation = (squares / (valid.sum() - 1).clamp(min=1)).sqrt()
    return (advantage - middle) / (deviation + 1e-8)


def policy_loss(log_ratio: Tensor, advantage: Tensor, clip: float, valid: Tensor | None = None) -> Tensor:
    """Return the clipped surrogate (eq. 7) [8]: -mean min(ρ Â, clip(ρ, 1-ε, 1+ε) Â) with ρ = π(a|s) / π_old(a|s)."""
    ratio = log_ratio.exp()
    return -mean(torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage), valid)


def value_loss(
    value: Tensor, target: Tensor, old: Tensor, clip: float | None = None, valid: Tensor | None = None
) -> Tensor:
    """Return the value function's loss: ½ mean (V(s) - R)², of which [9] ``clip`` takes the larger of this and of V
    held within ε of V_old."""
    square = (value - target).square()
    if clip is not None:
        held = old + (value - old).clamp(-clip, clip)
        square = torch.maximum(square, (held - target).square())
    return 0.5 * mean(square, valid)


def diagnostics(log_ratio: Tensor, clip: float, valid: Tensor | None = None) -> Metrics:
    """Return two estimates of KL(π_old, π), k1 and the better k3 (Schulman 2020), and how many ratios are beyond ε
    [12]."""
    ratio = log_ratio.exp()
    return {
        "old_approx_kl": mean(-log_ratio, valid),
        "approx_kl": mean(ratio - 1.0 - log_ratio, valid),
        "clip_fraction": mean(((ratio - 1.0).abs() > clip).float(), valid),
    }


def ppo_loss(net: Net, params: Params, batch: Samples, c: PPOConfig, clip: float) -> tuple[Tensor, Terms]:
    """Return the loss of a minibatch (eq. 9) [10]: policy loss + c₁ · value loss - c₂ · entropy, and its parts."""
    outputs, value, _ = net(params, batch.obs, batch.carry, batch.ended, batch.valid)
    if batch.ended is not None:  # time lines (B, T, …): from here on each step is a row
        outputs = tuple(x.flatten(0, 1) for x in outputs) if isinstance(outputs, tuple) else outputs.flatten(0, 1)
        batch, value = batch._replace(carry=None).map(lambda x: x.flatten(0, 1)), value.flatten()
    actor: Any = net.module.actor
    log_ratio = log_prob(actor, outputs, batch.sample) - batch.log_prob
    entropy = mean(actor.entropy(outputs), batch.valid)
    advantage = normalised(batch.advantage, batch.valid) if c.normalise_advantage else batch.advantage
    if batch.factor is not None:
        advantage = advantage * batch.factor
    policy = policy_loss(log_ratio, advantage, clip, batch.valid)
    fit = value_loss(value, batch.target, batch.value, clip if c.value_clip else None, batch.valid)
    loss = torch.add(policy, fit, alpha=c.value_coefficient)
    if c.entropy_coefficient:
        loss = torch.sub(loss, entropy, alpha=c.entropy_coefficient)
    return loss, Terms(log_ratio.detach(), policy.detach(), fit.detach(), entropy.detach())


KINDS: dict[type, type[CategoricalActor | MultiCategoricalActor]] = {
    spaces.Discrete: CategoricalActor,
    spaces.MultiDiscrete: MultiCategoricalActor,
    spaces.MultiBinary: MultiCategoricalActor,
}
"""Kinds of policy by action space; in a Box a Gaussian."""


class PPO(Agent):
    """PPO for Box, Discrete, MultiDiscrete and MultiBinary action spaces. An update is all epochs over one rollout.

    With ``network.memory`` a minibatch holds whole time lines: what the networks remember is computed anew along them,
    from the carry that was stored where the rollout began.
    """

    name: ClassVar[str] = "ppo"
    loop: ClassVar[str] = "rollout"
    supports_memory = True
    config_class = PPOConfig
    config: PPOConfig

    def build(self) -> None:
        c = self.config
        self.refuse_idle(c)
        self.networks = self.net("networks", self.make_networks)
        assert isinstance(self.networks.module, PolicyAndValue)
        self.module: PolicyAndValue = self.networks.module
        self.actor_module = self.module.actor
        if self.module.shared and next(self.actor_module.encoder.parameters(), None) is None:
            what = one_line(self.spec.observation_space)
            raise RloptError(f"agent.shared_encoder: no encoder learns to read {what}; leave it out")
        self.optimiser = self.add_optimiser("optimiser", self.networks, c.learning_rate)
        self.fused = fused_ppo.FusedEpochs(self) if c.fused and fused_ppo.applies(self, PPO) else None
        self.factor, self.schedules = 1.0, [Schedule(k, c.schedule_steps) for k in (c.lr_schedule, c.clip_schedule)]
        if isinstance(self.actor_module, GaussianActor):
            self.extra_fields = {"sample": ((self.actor_module.action_features,), torch.float32)}
        for name, leaf in (self.initial_carry(1) or {}).items():
            self.extra_fields = {**self.extra_fields, CARRY + name: (tuple(leaf.shape[1:]), leaf.dtype)}

    def make_networks(self) -> PolicyAndValue:
        observed = self.spec.observation_space
        actor = self.make_policy(observed)
        encoder = actor.encoder if self.config.shared_encoder else None
        return PolicyAndValue(actor, Critic(observed, self.config.network, ensemble=1, encoder=encoder))

    def make_policy(self, observed: Space) -> PolicyNetwork:
        """Return a policy that sees ``observed``."""
        c, acted, options = self.config, self.spec.action_space, network_options(self.config.network)
        if (kind := KINDS.get(type(acted))) is not None:
            return kind(observed, acted, options)  # [2] gains: √2, policy 0.01, value 1
        # [c1] a Gaussian, [c2] its deviation a parameter of its own, [c3] dimensions independent
        return GaussianActor(observed, acted, options | {"log_std": c.log_std, "unit_box": c.unit_box})

    def own_view(self, obs: Obs) -> Obs:
        """Return the part of observations that the policy sees."""
        return obs

    def refuse_idle(self, c: PPOConfig) -> None:
        """Refuse options of a Gaussian that have no effect on the actions of this environment."""
        space = self.spec.action_space
        gaussian = isinstance(space, spaces.Box)
        bounded = isinstance(space, spaces.Box) and bool(np.isfinite(scale(*bounds(space))[1]).any())
        for name, counts in (("log_std", gaussian), ("unit_box", bounded)):
            if not counts and getattr(c, name) != default_of(PPOConfig, name):
                word = str(getattr(c, name)).lower()
                raise RloptError(f"agent.{name}={word} has no effect on actions in {one_line(space)}; leave it out")

    @property
    def policy(self) -> Policy:
        return Policy(self.spec, self.actor_module)

    def initial_carry(self, rows: int) -> Carry:
        return self.module.initial_carry(rows)

    def rate(self) -> float:
        return self.factor

    @torch.no_grad()
    def act(self, obs: Obs, carry: Carry = None, deterministic: bool = False) -> Act:
        """Return actions (N, …) in environment units. A Gaussian's unclipped sample is stored [c5]; log-probabilities
        and values of a rollout are computed at once when it is complete, by the networks that acted."""
        actor = self.actor_module
        outputs, after = (actor(self.own_view(obs)), None) if carry is None else self.module(obs, carry)[::2]
        rows = len(outputs[0] if isinstance(outputs, tuple) else outputs)
        noise = None if deterministic else actor.noise(rows, self.act_generator)
        self.clock.acted += 0 if deterministic else rows
        if isinstance(actor, GaussianActor):
            sample = actor.sample(outputs, noise)
            return Act(actor.to_env(sample), after, {"sample": sample})
        return Act(actor.choose(outputs, noise), after)

    def update(self, batch: Rollout) -> Update:
        """Learn from one rollout (T, N) for some epochs. The host waits for the device once per rollout, to know how
        many rows are transitions, and with ``target_kl`` once per epoch."""
        c, metrics = self.config, Metrics()
        assert batch.next_obs is not None
        self.open_update(observation=batch.obs, next_observation=batch.next_obs, reward=batch.reward)
        position = batch.positions()
        begun = self.begun(position)
        self.factor, narrowed = (schedule.factor(begun) for schedule in self.schedules)
        clip = c.clip * narrowed
        data = self.samples(batch, position)
        for epoch in range(c.epochs):
            if epoch and c.recompute_advantage:
                fresh = self.samples(batch, position)
                data = data._replace(advantage=fresh.advantage, target=fresh.target)
            metrics = self.learn(data, clip)
            if c.target_kl is not None and float(metrics["approx_kl"]) > c.target_kl:
                break
        residual, spread = (x.var(correction=0) for x in (data.target - data.value, data.target))
        return Update(metrics | {"explained_variance": 1.0 - residual / spread.clamp(min=1e-12)})

    def learn(self, data: Samples, clip: float) -> Metrics:
        """Learn from everything once, in reshuffled minibatches [6]; return what the last one says."""
        c, metrics = self.config, Metrics()
        size = c.batch_size if data.ended is None else c.batch_size // data.value.shape[1]
        parts = list(minibatches(len(data.value), 1, size, self.update_generator))
        if self.fused is not None and data.factor is None and all(self.networks.learns):
            whole = [chosen for chosen in parts if len(chosen) == size]
            parts = parts[len(whole) :]
            metrics = self.compiled(data, whole, clip) if whole else metrics
        for chosen in parts:
            part = data.map(lambda x, at=chosen: x.index_select(0, at))  # type: ignore[misc]
            loss, terms = ppo_loss(self.networks, self.networks.params, part, c, clip)
            self.descend("networks", self.optimiser, loss, self.networks)
            self.end_update()
            if chosen is parts[-1]:
                metrics = diagnostics(terms.log_ratio, clip, None if part.valid is None else part.valid.flatten())
                metrics |= {"policy_loss": terms.policy, "value_loss": terms.value, "entropy": terms.entropy}
        return metrics

    def compiled(self, data: Samples, chosen: list[Tensor], clip: float) -> Metrics:
        """Do the same for minibatches of the full size, by compiled code."""
        assert self.fused is not None
        well = bool(self.guard.passes("networks loss", torch.zeros(())))
        losses, norms = self.fused(self.fused.rows(data), torch.cat(chosen), clip, well)
        self.guard.passes("networks loss", losses)
        self.guard.passes("networks gradient", norms)
        for _ in chosen:
            self.end_update()
        log_ratio, terms = self.fused.terms()
        return diagnostics(log_ratio, clip) | terms

    def begun(self, position: Tensor) -> Clock:
        """Return the clock when the rollout began, of which the transitions lie at ``position``: schedules make the
        first update at the full rate [4]."""
        return Clock(max(0, self.clock.steps - len(position)))

    def samples(self, rollout: Rollout, position: Tensor) -> Samples:
        """Return what is learnt from a rollout, of which the transitions lie at the flat ``position`` (M,)."""
        c = self.config
        if not c.bootstrap:
            rollout = rollout._replace(terminated=rollout.terminated | rollout.truncated)
        old, value, next_value = self.judge(rollout)
        advantage = generalised_advantages(rollout, value, next_value, c.gamma, c.gae_lambda)
        sample = rollout.extras.get("sample", rollout.action)
        data = Samples(
            rollout.obs, sample, old, value, advantage, advantage + value, factor=rollout.extras.get("factor")
        )  # fmt: skip
        if c.network.memory == "none":
            return data.map(lambda x: x.flatten(0, 1).index_select(0, position))
        data = data.map(lambda x: x.transpose(0, 1))
        carry = {name: rollout.extras[CARRY + name][0] for name in self.initial_carry(1) or {}}
        valid = None if len(position) == rollout.valid.numel() else rollout.valid.transpose(0, 1)
        return data._replace(carry=carry, ended=rollout.ended.transpose(0, 1), valid=valid)

    @torch.no_grad()
    def judge(self, rollout: Rollout) -> tuple[Tensor, ...]:
        """Return log π(a|s), V(s) and V(s') of every step, (T, N) each, by the networks as they are."""
        rows, found = rollout.map(lambda x: x.flatten(0, 1)), []
        names = [name for name in rows.extras if name.startswith(CARRY)]
        for i in range(0, len(rows.reward), CHUNK):
            part = rows.map(lambda x, at=i: x[at : at + CHUNK])  # type: ignore[misc]
            carry = {name.removeprefix(CARRY): part.extras[name] for name in names} or None
            outputs, value, after = self.module(part.obs, carry)
            assert part.next_obs is not None
            drawn = log_prob(self.actor_module, outputs, part.extras.get("sample", part.action))
            found.append((drawn, value, self.module(part.next_obs, after)[1]))
        return tuple(torch.cat(x).view(rollout.reward.shape) for x in zip(*found, strict=True))
