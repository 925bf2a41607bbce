"""Deep Q-networks (Mnih et al. 2015, "Human-level control through deep reinforcement learning", Nature 518) and what
grew from them: double (van Hasselt, Guez and Silver 2016, arXiv 1509.06461), dueling, noisy and distributional ones.

One network estimates the values of all actions; a copy of it, renewed now and then, says what the next state is worth.
What the network's numbers mean (a value, a categorical distribution, quantiles) is ``rlopt.nn.values``, how it is built
(two streams, noisy layers) ``rlopt.nn.noisy``; which transitions it learns from, and over how many steps, is the replay
layer's. So C51, QR-DQN, double DQN with LAP, and Rainbow are this file with presets (``rlopt.registry``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rlopt.agents.sequences import Memories, Remembering, mean_of_rows, observations, priorities, rows
from rlopt.agents.td import TDLoss
from rlopt.agents.value_based import ValueBased, ValueBasedConfig
from rlopt.buffers import Batch
from rlopt.nn import NetworkConfig, OptimiserConfig, Params, QActor, network_options
from rlopt.nn.values import VALUES, Values
from rlopt.types import Metrics, Obs, RloptError, Update, option


@dataclass(frozen=True, kw_only=True)
class DQNConfig(ValueBasedConfig):
    """Options of DQN; the defaults are Dopamine's (google/dopamine @5873f54, jax/agents/dqn/configs/dqn.gin)."""

    batch_size: int = option(32, "transitions per update", low=1)
    update_ratio: tuple[int, int] = option((1, 4), "updates per environment steps, as a pair of integers", low=1)
    warmup_steps: int = option(20_000, "environment steps with uniformly random actions", low=0)
    learning_rate: float = option(6.25e-5, "learning rate", above=0.0)
    optimiser: OptimiserConfig = option(lambda: OptimiserConfig(epsilon=1.5e-4), "optimiser of the network")
    network: NetworkConfig = option(lambda: NetworkConfig(hidden=None), "shape of the network")
    double: bool = option(False, "the network chooses the next action, its target only values it")
    values: str = option("scalar", "what the network says of an action's return", choices=tuple(VALUES))
    atoms: int | None = option(
        None,
        "numbers per action (null: 51 of values=categorical, 200 of quantile)",
        low=2,
        needs={"values": ("categorical", "quantile")},
    )
    v_min: float | None = option(None, "lowest return told apart (null: -10)", needs={"values": ("categorical",)})
    v_max: float | None = option(None, "highest return told apart (null: 10)", needs={"values": ("categorical",)})
    dueling: bool = option(False, "two streams, for the state's value and the actions' advantages")
    noisy: float | None = option(None, "noisy layers, whose deviations begin with this σ₀ (0.5: paper)", above=0.0)

    def __post_init__(self) -> None:
        if self.values != "scalar" and self.td_loss != "auto":
            raise RloptError(
                f"agent.td_loss={self.td_loss} is of residuals, and agent.values={self.values} has a loss of its own; "
                "leave it out"
            )
        if self.noisy is not None and self.network.memory != "none":
            raise RloptError("agent.noisy is not combined with agent.network.memory; leave one of them out")
        if self.network.policy_gain is not None:
            raise RloptError("agent.network.policy_gain: there is no policy network; give agent.network.value_gain")

    @property
    def auto_td_loss(self) -> str | None:
        # Clipping the error term (Mnih et al. 2015, methods) is a gradient of at most 1: Huber's loss.
        return "huber" if self.values == "scalar" else None

    def network_options(self) -> dict[str, object]:
        """Return the options of the ``QActor``."""
        sizes = {"scalar": 1, "categorical": 51, "quantile": 200}
        network = self.network.of_critic()
        return network_options(network) | {
            "value_gain": network.value_gain,
            "values": self.values,
            "size": self.atoms or sizes[self.values],
            "low": -10.0 if self.v_min is None else self.v_min,
            "high": 10.0 if self.v_max is None else self.v_max,
            "dueling": self.dueling,
            "sigma": self.noisy,
            "epsilon": self.epsilon_end,
        }


@dataclass(frozen=True)
class Nets:
    """The functions the loss is made of."""

    q: Callable[..., Any]
    target: Callable[..., Any]
    values: Values
    """What their numbers mean."""


Noise = tuple[Tensor | None, ...]


class Work(NamedTuple):
    """What the stages of one update read; of several runs with a leading axis R."""

    batch: Batch
    noise: Noise = (None, None, None)
    """Of noisy layers (F,): the network's, the target's, and the network's where it chooses."""


def loss(
    nets: Nets, params: Params, target: Params, batch: Batch, noise: Noise, double: bool, td: TDLoss
) -> tuple[Tensor, Metrics]:
    """Return the loss of Q-learning from replay (Mnih et al. 2015, algorithm 1): between what the network says of the
    action taken, and y = r + γᵏ (1 - terminated) Q̄(s', argmax_a Q̄(s', a)).

    ``double``: argmax_a Q(s', a) (van Hasselt et al. 2016, eq. 4). For distributions y is one, of the same action.
    ``batch.action`` counts from 0, (B,). Metrics include ``td`` (B,), the size of each error, of slices a priority
    each, which prioritised samplers use. Everything may have a leading run axis, where ``td`` has it too.
    """
    with torch.no_grad():
        q, after = nets.target(target, batch.next_obs, noise[1])
        if double:
            q, _ = nets.q(params, batch.next_obs, noise[2])
        # A time limit is no end (``terminated`` is 0 there): the value goes on beyond it.
        y = nets.values.goal(of_action(after, q.argmax(-1)), batch.reward, batch.discount * (1.0 - batch.terminated))
    _, outputs = nets.q(params, batch.obs, noise[0])
    chosen = of_action(outputs, batch.action)
    error = nets.values.error(chosen, y)
    return td(error, batch.weight), {
        "q": mean_of_rows(nets.values.mean(chosen.detach()), batch.mask),
        "td": priorities(error.detach().abs(), batch.mask),
    }


def of_action(outputs: Tensor, action: Tensor) -> Tensor:
    """Return the outputs (B, Z) of actions (B,) from those of all (B, K, Z)."""
    return outputs.gather(-2, action[..., None, None].expand(*action.shape, 1, outputs.shape[-1])).squeeze(-2)


class DQN(ValueBased):
    """Deep Q-networks for Discrete action spaces: plain, double, dueling, noisy, categorical, quantile.

    With ``network.memory`` the network remembers the episode, and learns from slices of it (Hausknecht and Stone 2015,
    arXiv 1507.06527, with what R2D2 adds: ``rlopt.agents.sequences``).
    """

    name: ClassVar[str] = "dqn"
    supports_memory = True
    config_class = DQNConfig
    config: DQNConfig
    actor_module: QActor

    def build(self) -> None:
        c, spec = self.config, self.spec
        options = c.network_options()
        self.actor = self.critic = self.net(
            "critic", lambda: QActor(spec.observation_space, spec.action_space, options)
        )
        self.critic_optimiser = self.add_optimiser("critic_optimiser", self.critic, c.learning_rate)
        self.target = self.persist("target", self.critic.target())
        module = self.critic.module
        assert isinstance(module, QActor)
        self.actor_module = module
        nets = Nets(self.critic, self.target, module.form)
        if c.network.memory != "none":
            self.memories = Memories(self, {"critic": self.critic})
            nets = Nets(Remembering(self.critic, "critic"), Remembering(self.target, "critic"), module.form)
        self.lie_beside(self.critic)
        self.loss = partial(loss, nets, double=c.double, td=self.td_loss())
        self.begin()

    def q(self, obs: Obs, action: Tensor) -> Tensor:
        if self.memories is not None:
            raise RloptError(f"agent={self.name} remembers: its values depend on more than these observations")
        values, _ = self.critic.module(obs)
        return values.gather(-1, (action - self.actor_module.start)[:, None]).T  # type: ignore[no-any-return]

    def prepare(self, batch: Batch) -> Work:
        batch = rows(self.by_run(batch._replace(action=batch.action - self.actor_module.start)))
        if not self.actor_module.noise_size:
            return Work(batch)
        return Work(batch, self.noise(3, self.actor_module.noise_size).unbind(-2))

    def watch(self, work: Work) -> None:
        batch = work.batch
        seen, next_seen = observations(batch.obs), observations(batch.next_obs)
        self.open_update(observation=seen, next_observation=next_seen, reward=batch.reward)

    def stages(self) -> tuple[str, ...]:
        return ("critic", "target") if self.target_is_due() else ("critic",)

    def critic_stage(self, work: Work) -> Update:
        found, metrics = self.per_run(self.loss)(self.critic.params, self.target.params, work.batch, work.noise)
        self.descend("critic", self.critic_optimiser, found, self.critic, self.learning(work))
        priority = metrics.pop("td").flatten()
        return Update(metrics | {"critic_loss": found.detach()}, priority)

    def target_stage(self, work: Work) -> Update:
        self.target.follow(self.critic, self.config.tau)
        return Update({})
