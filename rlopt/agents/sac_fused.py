"""SAC's two gradients written out by hand for plain ReLU networks on the CPU.

``rlopt.agents.sac`` is the definition; this file computes the same numbers (a test holds them equal) with fewer
passes over memory: activations live in buffers that are reused, the actor reads observations and next observations in
one product, products that nobody needs are never formed, and gradients are written where the optimiser reads them.
"""

from __future__ import annotations

import torch
from gymnasium import spaces
from torch import Tensor

from rlopt.buffers import Batch
from rlopt.nn import Net, NetworkConfig, Optimiser
from rlopt.nn.distributions import LOG_STD_MAX, LOG_STD_MIN, squashed_gaussian
from rlopt.types import Metrics, Space

_relu_backward = torch.ops.aten.threshold_backward.grad_input


def applies(observation_space: Space, network: NetworkConfig, device: torch.device) -> bool:
    """Whether these networks are what the formulas below assume."""
    vector = isinstance(observation_space, spaces.Box) and len(observation_space.shape) == 1
    return device.type == "cpu" and vector and network.activation == "relu" and network.encoder in ("auto", "flatten")


def _views(net: Net, optimiser: Optimiser) -> list[Tensor]:
    """The optimiser's gradient, cut like the net's leaves."""
    views, offset = [], 0
    for leaf in net.leaves:
        views.append(optimiser.grad[offset : offset + leaf.numel()].view_as(leaf))
        offset += leaf.numel()
    return views


class _Layers:
    """Weights, biases and their gradients of one network, as plain tensors without autograd."""

    def __init__(self, net: Net, optimiser: Optimiser | None) -> None:
        leaves = [leaf.detach() for leaf in net.leaves]
        self.weights, self.biases = leaves[0::2], leaves[1::2]
        views = _views(net, optimiser) if optimiser is not None else []
        self.weight_grads, self.bias_grads = views[0::2], views[1::2]


class FusedGradients:
    """Gradients of the critic loss and the actor loss for minibatches of one size."""

    def __init__(
        self,
        actor: Net,
        critic: Net,
        target: Net,
        actor_optimiser: Optimiser,
        critic_optimiser: Optimiser,
        batch_size: int,
    ) -> None:
        self.actor = _Layers(actor, actor_optimiser)
        self.critic = _Layers(critic, critic_optimiser)
        self.target = _Layers(target, None)
        self.batch_size = b = batch_size
        ensemble, inputs, _ = self.critic.weights[0].shape
        self.obs_features = self.actor.weights[0].shape[1]
        self.actions = inputs - self.obs_features
        actor_widths = [w.shape[0] for w in self.actor.weights]
        critic_widths = [w.shape[2] for w in self.critic.weights]
        self.actor_in = torch.empty(2 * b, self.obs_features)
        self.actor_out = [torch.empty(2 * b, w) for w in actor_widths]
        self.actor_back = [torch.empty(b, w) for w in actor_widths]
        self.critic_in = torch.empty(b, inputs)
        self.critic_out = [torch.empty(ensemble, b, w) for w in critic_widths]
        self.critic_back = [torch.empty(ensemble, b, w) for w in critic_widths]
        self.members = range(ensemble)

    def _actor_forward(self, batch: Batch, noise: Tensor) -> None:
        """Both policies' samples, for next observations (first half) and observations (second half)."""
        x, last = self.actor_in, len(self.actor_out) - 1
        torch.cat([batch.next_obs, batch.obs], out=x)  # type: ignore[list-item]
        for i, (w, bias, out) in enumerate(zip(self.actor.weights, self.actor.biases, self.actor_out, strict=True)):
            torch.addmm(bias, x, w.t(), out=out)
            x = out if i == last else out.relu_()
        self.mean, self.raw_log_std = x.chunk(2, -1)
        self.log_std = self.raw_log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
        self.noise = noise.view(-1, self.actions)
        self.action, self.log_prob = squashed_gaussian(self.mean, self.log_std, self.noise)

    def _critic_forward(self, layers: _Layers, obs: Tensor, action: Tensor) -> Tensor:
        """Q (E, B); the activations stay in ``critic_out``."""
        torch.cat([obs, action], 1, out=self.critic_in)
        last = len(self.critic_out) - 1
        previous = None
        for i, (w, bias, out) in enumerate(zip(layers.weights, layers.biases, self.critic_out, strict=True)):
            for e in self.members:
                torch.addmm(bias[e], self.critic_in if previous is None else previous[e], w[e], out=out[e])
            previous = out if i == last else out.relu_()
        assert previous is not None
        return previous.squeeze(-1)

    def _critic_backward(self, grad: Tensor, weight_gradients: bool) -> Tensor | None:
        """From dL/dQ (E, B): either the weights' gradients, or dL/da (B, A)."""
        layers, back = self.critic, self.critic_back
        delta = grad.unsqueeze(-1)
        for i in range(len(layers.weights) - 1, -1, -1):
            w = layers.weights[i]
            if weight_gradients:
                torch.sum(delta, 1, keepdim=True, out=layers.bias_grads[i])
                for e in self.members:
                    x = self.critic_out[i - 1][e] if i else self.critic_in
                    torch.mm(x.t(), delta[e], out=layers.weight_grads[i][e])
            if i == 0:
                break
            below = back[i - 1]
            if delta.shape[-1] == 1:
                torch.mul(delta, w.transpose(1, 2), out=below)
            else:
                for e in self.members:
                    torch.mm(delta[e], w[e].t(), out=below[e])
            _relu_backward(below, self.critic_out[i - 1], 0, grad_input=below)
            delta = below
        if weight_gradients:
            return None
        first = layers.weights[0][:, self.obs_features :]
        action_grad = delta[0] @ first[0].t()
        for e in self.members[1:]:
            action_grad.addmm_(delta[e], first[e].t())
        return action_grad

    @torch.no_grad()
    def critic_gradient(self, temperature: Tensor, batch: Batch, noise: Tensor) -> tuple[Tensor, Metrics]:
        """Loss and metrics of ``critic_loss``; its gradient is left in the critic optimiser. ``noise`` is (2, B, A)."""
        b = self.batch_size
        assert isinstance(batch.obs, Tensor) and isinstance(batch.next_obs, Tensor)
        self._actor_forward(batch, noise)
        next_q = self._critic_forward(self.target, batch.next_obs, self.action[:b]).amin(0)
        next_value = next_q - temperature * self.log_prob[:b]
        y = batch.reward + batch.discount * (1.0 - batch.terminated) * next_value
        q = self._critic_forward(self.critic, batch.obs, batch.action)
        residual = q - y
        weighted = residual if batch.weight is None else residual * batch.weight
        loss = (0.5 / b) * (weighted * residual).sum()
        metrics = {"q": q.mean(), "td": residual.abs().mean(0)}
        self._critic_backward(weighted / b, weight_gradients=True)
        return loss, metrics

    @torch.no_grad()
    def actor_gradient(self, temperature: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss and metrics of ``actor_loss``; its gradient is left in the actor optimiser. Follows
        ``critic_gradient``."""
        b = self.batch_size
        assert isinstance(batch.obs, Tensor)
        action, log_prob = self.action[b:], self.log_prob[b:]
        q, chosen = self._critic_forward(self.critic, batch.obs, action).min(0)
        loss = (temperature * log_prob - q).mean()
        q_grad = torch.zeros(len(self.members), b).scatter_(0, chosen.unsqueeze(0), -1.0 / b)
        action_grad = self._critic_backward(q_grad, weight_gradients=False)
        assert action_grad is not None
        # log π = Σ -½ε² - log σ - c - 2(log 2 - u - softplus(-2u)), so d log π / du = 2 tanh u and du/d log σ = σ ε.
        share = temperature / b
        u_grad = action_grad * (1.0 - action.square()) + (2.0 * share) * action
        raw = self.raw_log_std[b:]
        std_grad = u_grad * self.log_std[b:].exp() * self.noise[b:] - share
        std_grad.mul_((raw >= LOG_STD_MIN) & (raw <= LOG_STD_MAX))
        delta = torch.cat([u_grad, std_grad], 1, out=self.actor_back[-1])
        layers = self.actor
        for i in range(len(layers.weights) - 1, -1, -1):
            x = self.actor_out[i - 1][b:] if i else self.actor_in[b:]
            torch.sum(delta, 0, out=layers.bias_grads[i])
            torch.mm(delta.t(), x, out=layers.weight_grads[i])
            if i:
                below = self.actor_back[i - 1]
                torch.mm(delta, layers.weights[i], out=below)
                _relu_backward(below, x, 0, grad_input=below)
                delta = below
        return loss, {"log_prob": log_prob}
