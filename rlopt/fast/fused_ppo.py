"""PPO's update written out by hand for plain tanh or ReLU networks on the CPU.

``rlopt.agents.ppo`` is the definition; this computes the same numbers (a test holds them equal) without the
interpreter: an epoch over a rollout is one call of compiled code (``rlopt.fast.ppo_update``). At the small networks and
minibatches that PPO is run with, two thirds of an update otherwise go into beginning operations.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlopt.fast.adam import describe, refresh
from rlopt.fast.lanes import one_thread
from rlopt.fast.mlp import ensemble, single
from rlopt.fast.plain import is_plain, plain
from rlopt.fast.ppo_update import ENTROPY, LOSSES, NORMS, POLICY, VALUE, Coefficients, Memory, RolloutRows, epoch
from rlopt.fast.products import Products, array, products_available
from rlopt.jit import compiles
from rlopt.nn import CategoricalActor, GaussianActor, Optimiser
from rlopt.types import Metrics

if TYPE_CHECKING:
    from rlopt.agents.ppo import PPO, Samples

log = logging.getLogger(__name__)

METHODS = ("update", "samples", "judge", "learn", "descend", "rate", "own_view", "make_networks", "make_policy")
"""What of an agent's class the compiled functions stand for."""


def applies(agent: PPO, written: type[PPO]) -> bool:
    """Return whether all that ``agent`` is made of is what the formulas assume, those of the class ``written``.

    Decided on what was built, and only by what is known here: anything else takes the readable path.
    """
    c, module, optimiser = agent.config, agent.module, agent.optimiser
    networks = (module.actor, module.critic)
    activations = (F.relu, torch.tanh)
    return (
        agent.device.type == "cpu"
        and agent.precision == "float32"
        and agent.runs == 1
        and all(getattr(type(agent), name) is getattr(written, name) for name in METHODS)
        and type(optimiser) is Optimiser
        and optimiser.config.name in ("adam", "adamw")
        and not c.value_clip
        and not module.shared
        and type(module.actor) in (GaussianActor, CategoricalActor)
        and not getattr(module.actor, "masked", False)
        and all(is_plain(net, activations) for net in networks)
        and products_available()
    )


class FusedEpochs:
    """Epochs over rollouts, in minibatches of ``config.batch_size``."""

    def __init__(self, agent: PPO) -> None:
        self.agent, self.products, rows = agent, Products(), agent.config.batch_size
        actor, critic = agent.module.actor, agent.module.critic
        names = dict(agent.module.named_parameters())

        def parts(flat: Tensor) -> dict[str, Tensor]:
            return dict(zip(names, agent.networks.cut(flat.detach()), strict=True))

        leaves, grads = parts(agent.networks.flat), parts(agent.optimiser.grad)

        def of(prefix: str, tensors: dict[str, Tensor]) -> list[Tensor]:
            return [tensor for name, tensor in tensors.items() if name.startswith(prefix)]

        policy, judge = "actor.body.", "critic.body."
        first = of(policy, leaves)[0]
        outputs = of(policy, leaves)[-1].shape[0]
        self._buffers = obs, delta = torch.zeros(rows, first.shape[1]), torch.zeros(rows, outputs)
        self._nets = (
            single(
                self.products, of(policy, leaves), of(policy, grads), obs, torch.float32, delta,
                tanh=actor.body.activation is torch.tanh,
            ),
            *ensemble(
                self.products, of(judge, leaves), of(judge, grads), obs, torch.float32,
                tanh=critic.body.activation is torch.tanh,
            ),
        )  # fmt: skip
        empty = torch.zeros(0)
        q, dq, advantage, log_ratio = (np.zeros(rows, np.float32) for _ in range(4))
        self.memory = Memory(
            self.products.state, self._nets[0].table, self._nets[1].table, array(obs), array(self._nets[0].space.z[-1]),
            array(of(policy, leaves)[-1]), array(delta), array(leaves.get("actor.log_std", empty)),
            array(grads.get("actor.log_std", empty)), q, dq, advantage, log_ratio, describe(agent.optimiser),
            np.zeros(5),
        )  # fmt: skip

    def __getstate__(self) -> Any:
        raise TypeError("an agent's compiled update holds addresses in memory: save agent.state_dict() instead")

    def rows(self, data: Samples) -> RolloutRows:
        """Return a rollout as compiled code reads it."""
        sample = data.sample
        if isinstance(self.agent.actor_module, CategoricalActor):
            sample = (sample - self.agent.actor_module.start).unsqueeze(-1)
        assert isinstance(data.obs, Tensor)
        return RolloutRows(*(plain(x) for x in (data.obs, sample, data.log_prob, data.advantage, data.target)))

    def __call__(self, rows: RolloutRows, order: Tensor, clip: float, ok: bool) -> tuple[Tensor, Tensor]:
        """Learn from the rows in ``order`` (N · B,); return the sums of the losses and of the gradients' norms, ()
        each. Nothing moves where not ``ok``."""
        if compiles(epoch):
            log.info("compiling the update; the first time on a machine this takes up to half a minute")
        m, c = self.memory, self.agent.config
        refresh(m.descent, self.agent.optimiser)
        constants = Coefficients(
            np.float32(clip), np.float32(c.value_coefficient), np.float32(c.entropy_coefficient), c.normalise_advantage,
            float(self.agent.rate()),
        )  # fmt: skip
        with one_thread():  # a product of 64 rows is done before a second thread has woken
            epoch(m, rows, array(order), constants, ok)
        self.products.check()
        return torch.tensor(m.report[LOSSES]), torch.tensor(m.report[NORMS])

    def terms(self) -> tuple[Tensor, Metrics]:
        """Return log ρ (B,) and the parts of the loss of the last minibatch."""
        named = {"policy_loss": POLICY, "value_loss": VALUE, "entropy": ENTROPY}
        report = torch.from_numpy(self.memory.report).float()
        return torch.from_numpy(self.memory.log_ratio).clone(), Metrics({k: report[i] for k, i in named.items()})
