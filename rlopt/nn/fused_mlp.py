"""A plain ReLU network over minibatches of one size, with its gradients by layer and without autograd (CPU).

Activations live in buffers that are reused; gradients are written where the optimiser reads them. Between two hidden
layers products are in ``dtype`` (float32 or bfloat16), those that touch an input or an output in float32, as in
``rlopt.nn.networks.MLP``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlopt.nn.kernels import array, bias_relu, bias_relu_, relu_backward, relu_backward_, value_backward, value_forward


class Workspace:
    """Activations and deltas of one lane, shared by networks of the same shape that work one after the other.

    ``widths`` are those of all layers, ``dtypes`` the types of their products.
    """

    def __init__(self, rows: int, widths: Sequence[int], dtypes: Sequence[torch.dtype]) -> None:
        self.z = [torch.empty(rows, w, dtype=d) for w, d in zip(widths, dtypes, strict=True)]
        """What the products give; of the last layer without its bias."""
        # An activation is what the next layer reads, in that layer's type; where types agree it overwrites the product,
        # because a smaller set of buffers stays in the cache.
        self.activations = [
            z if z.dtype == after else torch.empty(z.shape, dtype=after)
            for z, after in zip(self.z[:-1], dtypes[1:], strict=True)
        ]
        self.back = [torch.empty_like(a) for a in self.activations]
        self.deltas = [
            y if y.dtype == d else torch.empty(y.shape, dtype=d) for y, d in zip(self.back, dtypes[:-1], strict=True)
        ]


class FusedMLP:
    """``weights`` are (in, out) views of the parameters, ``biases`` (out,) views; ``grads`` their gradients in the
    same shapes and order (weight, bias, weight, …), or nothing where nobody wants them."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        grads: Sequence[Tensor],
        rows: int,
        dtype: torch.dtype,
        space: Workspace | None = None,
    ) -> None:
        self.weights, self.last = list(weights), len(weights) - 1
        dtypes = [dtype if 0 < i < self.last else torch.float32 for i in range(len(weights))]
        self.low = [w if d == w.dtype else torch.empty_like(w, dtype=d) for w, d in zip(weights, dtypes, strict=True)]
        """The weights in the type of their product."""
        if not grads:
            grads = [torch.empty_like(p) for pair in zip(weights, biases, strict=True) for p in pair]
        self.weight_grads, self.bias_grads = grads[0::2], [array(g) for g in grads[1::2]]
        self.biases = [array(b) for b in biases]
        self.space = space or Workspace(rows, [w.shape[1] for w in weights], dtypes)
        s = self.space
        self.z, self.activations, self.back, self.deltas = s.z, s.activations, s.back, s.deltas
        self._z, self._a = [array(z) for z in s.z], [array(a) for a in s.activations]
        self._back, self._delta = [array(y) for y in s.back], [array(d) for d in s.deltas]

    def hidden(self, x: Tensor) -> Tensor:
        """The last hidden activation (rows, W) of inputs (rows, in), which must outlive the backward pass."""
        self.x = x
        for i in range(self.last):
            if self.low[i] is not self.weights[i]:
                self.low[i].copy_(self.weights[i])
            torch.mm(x, self.low[i], out=self.z[i])
            if self.z[i] is self.activations[i]:
                bias_relu_(self._z[i], self.biases[i])
            else:
                bias_relu(self._z[i], self.biases[i], self._a[i])
            x = self.activations[i]
        return x

    def output(self, x: Tensor) -> Tensor:
        """(rows, out) of inputs (rows, in), without the last bias."""
        return torch.mm(self.hidden(x), self.weights[-1], out=self.z[-1])

    def value(self, x: Tensor, q: Tensor) -> None:
        """Write the only output of inputs (rows, in) to ``q`` (rows,)."""
        self.hidden(x)
        value_forward(self._a[-1], array(self.weights[-1]).reshape(-1), self.biases[-1], array(q))

    def value_delta(self, dq: Tensor) -> Tensor:
        """dL/d the last hidden layer before its ReLU, from dL/dq (rows,); writes the last layer's gradients."""
        weight, grad = array(self.weights[-1]).reshape(-1), array(self.weight_grads[-1]).reshape(-1)
        value_backward(array(dq), weight, self._a[-1], self._delta[-1], grad, self.bias_grads[-1], self.bias_grads[-2])
        return self.deltas[-1]

    def below(self, i: int, delta: Tensor) -> Tensor:
        """dL/d layer i - 1 before its ReLU, from that of layer i; writes the gradient of layer i - 1's bias."""
        torch.mm(delta, self.low[i].t(), out=self.back[i - 1])
        y, a, bias_grad = self._back[i - 1], self._a[i - 1], self.bias_grads[i - 1]
        if self.back[i - 1] is self.deltas[i - 1]:
            relu_backward_(y, a, bias_grad)
        else:
            relu_backward(y, a, self._delta[i - 1], bias_grad)
        return self.deltas[i - 1]

    def weight_gradient(self, i: int, delta: Tensor) -> None:
        """Write the gradient of layer i's weight from its delta."""
        read, grad = (self.activations[i - 1] if i else self.x), self.weight_grads[i]
        if delta.dtype == grad.dtype:
            torch.mm(read.t(), delta, out=grad)
        else:
            grad.copy_(read.t() @ delta)


def ensemble(
    leaves: Sequence[Tensor],
    grads: Sequence[Tensor],
    rows: int,
    dtype: torch.dtype,
    like: Sequence[FusedMLP] = (),
) -> list[FusedMLP]:
    """The members of an ``EnsembleMLP`` (leaves and gradients (E, in, out) and (E, 1, out)), each on views of its own
    part; they share the workspaces of ``like``."""
    return [
        FusedMLP(
            [w[e] for w in leaves[0::2]],
            [b[e, 0] for b in leaves[1::2]],
            [g[e, 0] if i % 2 else g[e] for i, g in enumerate(grads)],
            rows,
            dtype,
            like[e].space if like else None,
        )
        for e in range(leaves[0].shape[0])
    ]


def single(leaves: Sequence[Tensor], grads: Sequence[Tensor], rows: int, dtype: torch.dtype) -> FusedMLP:
    """An ``MLP`` (leaves and gradients (out, in) and (out,))."""
    turned = [g if i % 2 else g.t() for i, g in enumerate(grads)]
    return FusedMLP([w.t() for w in leaves[0::2]], leaves[1::2], turned, rows, dtype)
