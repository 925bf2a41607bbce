"""A plain ReLU or tanh network over minibatches of one size, with its gradients by layer: compiled, without autograd.

Activations live in buffers that are reused; gradients are written where the optimiser reads them. Between two hidden
layers products are in ``dtype`` (float32 or bfloat16), those that touch an input or an output in float32, as in
``rlopt.nn.networks.MLP``.

``describe`` writes a network down once, as a table of operands and addresses with one row per layer; the functions
below it, for other compiled code to call, read the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlopt.fast import elementwise
from rlopt.fast.products import Array, Products, compiled, floats, low_matrix, matrix, product

OPERANDS = (
    "read", "weight", "z", "turned_weight", "delta", "back", "grad_left", "grad_right", "grad",
)  # fmt: skip
ADDRESSES = (
    "z_at", "activation_at", "delta_at", "back_at", "weight_at", "low_weight_at", "bias_at", "grad_at", "low_grad_at",
    "bias_grad_at",
)  # fmt: skip
LOW = ("z_low", "activation_low", "delta_low", "back_low")
"""Whether the memory of that name is bfloat16."""
LAYER = np.dtype([(name, np.int64) for name in ("inputs", "outputs", "tanh", *OPERANDS, *ADDRESSES, *LOW)])
"""``tanh``: whether that follows the layer, in float32 alone; else ReLU does."""


class Workspace:
    """Activations and deltas, shared by networks of the same shape that work one after the other.

    ``widths`` are those of all layers, ``dtypes`` the types of their products.
    """

    def __init__(self, rows: int, widths: Sequence[int], dtypes: Sequence[torch.dtype]) -> None:
        self.z = [torch.empty(rows, w, dtype=d) for w, d in zip(widths, dtypes, strict=True)]
        """What the products give; of the last layer without its bias."""
        # An activation is what the next layer reads, in that layer's type; where types agree it overwrites the product,
        # because a smaller set of buffers stays in the cache. The last layer has none.
        self.activations = [
            z if z.dtype == after else torch.empty(z.shape, dtype=after)
            for z, after in zip(self.z[:-1], dtypes[1:], strict=True)
        ]
        self.back = [torch.empty_like(a) for a in self.activations]
        """dL/d activation."""
        self.deltas = [
            y if y.dtype == d else torch.empty(y.shape, dtype=d) for y, d in zip(self.back, dtypes[:-1], strict=True)
        ]
        """dL/dz of the hidden layers, in the type of their own product."""


class FusedMLP:
    """One network: ``table`` (L,) of ``LAYER``, and everything that it points to."""

    def __init__(
        self,
        products: Products,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        grads: Sequence[Tensor],
        x: Tensor,
        dtype: torch.dtype,
        delta: Tensor | None = None,
        turned: bool = False,
        space: Workspace | None = None,
        tanh: bool = False,
    ) -> None:
        """``weights`` (in, out), or (out, in) where ``turned``, and ``biases`` (out,) are views of the parameters;
        ``grads`` their gradients in the same shapes and order (weight, bias, weight, …), or nothing where nobody wants
        them. ``x`` (rows, in) is read anew at every pass; ``delta`` (rows, out) is dL/d output, before the last bias,
        where the last layer's gradient is formed by products."""
        assert dtype == torch.float32 or not tanh
        last, rows = len(weights) - 1, x.shape[0]
        dtypes = [dtype if 0 < i < last else torch.float32 for i in range(last + 1)]
        low = [torch.empty_like(w, dtype=d) if d != w.dtype else w for w, d in zip(weights, dtypes, strict=True)]
        if not grads:
            grads = [torch.empty_like(p) for pair in zip(weights, biases, strict=True) for p in pair]
        low_grads = [
            torch.empty_like(g, dtype=d) if d != g.dtype else g for g, d in zip(grads[::2], dtypes, strict=True)
        ]
        self.space = space or Workspace(rows, [b.shape[0] for b in biases], dtypes)
        s = self.space
        self.table = np.zeros(last + 1, LAYER)
        self._kept = [weights, biases, grads, low, low_grads, x, delta, s]
        for i, row in enumerate(self.table):
            weight = low[i].t() if turned else low[i]
            (row["inputs"], row["outputs"]), row["tanh"] = weight.shape, tanh
            read = s.activations[i - 1] if i else x
            below = s.deltas[i] if i < last else delta
            tensors: dict[str, Tensor | None] = {
                "read": read, "weight": weight, "z": s.z[i], "turned_weight": weight.t(), "delta": below,
                "back": s.back[i - 1] if i else None, "grad": low_grads[i],
            }  # fmt: skip
            if below is not None:
                tensors["grad_left"], tensors["grad_right"] = (below.t(), read) if turned else (read.t(), below)
            for name, tensor in tensors.items():
                row[name] = 0 if tensor is None else products.add(tensor)
            places: dict[str, Tensor] = {
                "z": s.z[i], "weight": weights[i], "bias": biases[i], "grad": grads[2 * i],
                "bias_grad": grads[2 * i + 1],
            }  # fmt: skip
            if i < last:
                places |= {"activation": s.activations[i], "delta": s.deltas[i], "back": s.back[i]}
            if low[i] is not weights[i]:
                places |= {"low_weight": low[i], "low_grad": low_grads[i]}
            for name, tensor in places.items():
                assert tensor.is_contiguous()
                row[f"{name}_at"] = tensor.data_ptr()
                if f"{name}_low" in LOW:
                    row[f"{name}_low"] = tensor.dtype == torch.bfloat16


@compiled
def hidden(products: Array, net: Array, rows: int) -> None:
    """Go from the input to the last hidden activation; every one lies in its buffer."""
    for i in range(net.shape[0] - 1):
        layer = net[i]
        if layer.low_weight_at != 0:
            size = layer.inputs * layer.outputs
            elementwise.narrow(matrix(layer.weight_at, 1, size), low_matrix(layer.low_weight_at, 1, size))
        product(products, layer.z, layer.read, layer.weight)
        _activate(layer, rows)


@compiled
def forward(products: Array, net: Array, rows: int) -> None:
    """Go from the input to the last layer's product, which is in float32 as it is."""
    hidden(products, net, rows)
    last = net[net.shape[0] - 1]
    product(products, last.z, last.read, last.weight)


@compiled
def value(products: Array, net: Array, q: Array) -> None:
    """Write the only output of a network to ``q`` (rows,), which takes no product."""
    rows, last = q.shape[0], net.shape[0] - 1
    hidden(products, net, rows)
    layer = net[last]
    seen = matrix(net[last - 1].activation_at, rows, layer.inputs)
    elementwise.value_forward(seen, floats(layer.weight_at, layer.inputs), floats(layer.bias_at, 1), q)


@compiled
def value_delta(net: Array, dq: Array) -> None:
    """Return the last layer's gradients and the delta below it, from dL/dq (rows,)."""
    rows, last = dq.shape[0], net.shape[0] - 1
    layer, under = net[last], net[last - 1]
    width = layer.inputs
    weight, weight_grad = floats(layer.weight_at, width), floats(layer.grad_at, width)
    bias_grad, below = floats(layer.bias_grad_at, 1), floats(under.bias_grad_at, width)
    seen = matrix(under.activation_at, rows, width)
    if under.tanh != 0:
        elementwise.value_backward_tanh(
            dq, weight, seen, matrix(under.delta_at, rows, width), weight_grad, bias_grad, below
        )
    elif under.delta_low != 0:
        delta = low_matrix(under.delta_at, rows, width)
        elementwise.value_backward(dq, weight, seen, delta, weight_grad, bias_grad, below)
    else:
        elementwise.value_backward(dq, weight, seen, matrix(under.delta_at, rows, width), weight_grad, bias_grad, below)


@compiled
def descend(products: Array, net: Array, i: int, rows: int) -> None:
    """Return the delta of layer i - 1 and the gradient of its bias, from the delta of layer i."""
    layer, under = net[i], net[i - 1]
    product(products, layer.back, layer.delta, layer.turned_weight)
    _deactivate(under, rows)


@compiled
def weight_gradient(products: Array, net: Array, i: int) -> None:
    """Return the gradient of layer i's weight from its delta."""
    layer = net[i]
    product(products, layer.grad, layer.grad_left, layer.grad_right)
    if layer.low_grad_at != 0:
        size = layer.inputs * layer.outputs
        elementwise.widen(low_matrix(layer.low_grad_at, 1, size), matrix(layer.grad_at, 1, size))


@compiled
def _activate(layer: Any, rows: int) -> None:
    """activation = relu(z + bias), or tanh."""
    width, bias = layer.outputs, floats(layer.bias_at, layer.outputs)
    if layer.tanh != 0:
        elementwise.bias_tanh_(matrix(layer.z_at, rows, width), bias)
    elif layer.z_low == 0 and layer.activation_low == 0:
        elementwise.bias_relu_(matrix(layer.z_at, rows, width), bias)
    elif layer.z_low == 0:
        elementwise.bias_relu(matrix(layer.z_at, rows, width), bias, low_matrix(layer.activation_at, rows, width))
    elif layer.activation_low == 0:
        elementwise.bias_relu(low_matrix(layer.z_at, rows, width), bias, matrix(layer.activation_at, rows, width))
    else:
        elementwise.bias_relu_(low_matrix(layer.z_at, rows, width), bias)


@compiled
def _deactivate(layer: Any, rows: int) -> None:
    """delta = back where the activation is not zero (or by tanh's derivative), and its sum over the rows."""
    width, grad = layer.outputs, floats(layer.bias_grad_at, layer.outputs)
    if layer.tanh != 0:
        elementwise.tanh_backward_(matrix(layer.back_at, rows, width), matrix(layer.activation_at, rows, width), grad)
    elif layer.delta_low == 0 and layer.back_low == 0:
        elementwise.relu_backward_(matrix(layer.back_at, rows, width), matrix(layer.activation_at, rows, width), grad)
    elif layer.delta_low == 0:
        elementwise.relu_backward(
            low_matrix(layer.back_at, rows, width), low_matrix(layer.activation_at, rows, width),
            matrix(layer.delta_at, rows, width), grad,
        )  # fmt: skip
    elif layer.back_low == 0:
        elementwise.relu_backward(
            matrix(layer.back_at, rows, width), matrix(layer.activation_at, rows, width),
            low_matrix(layer.delta_at, rows, width), grad,
        )  # fmt: skip
    else:
        elementwise.relu_backward_(
            low_matrix(layer.back_at, rows, width), low_matrix(layer.activation_at, rows, width), grad
        )


def ensemble(
    products: Products,
    leaves: Sequence[Tensor],
    grads: Sequence[Tensor],
    x: Tensor,
    dtype: torch.dtype,
    like: Sequence[FusedMLP] = (),
    tanh: bool = False,
) -> list[FusedMLP]:
    """Return the members of an ``EnsembleMLP`` (leaves and gradients (E, in, out) and (E, 1, out)), each on views of
    its own part; they share the workspaces of ``like``."""
    return [
        FusedMLP(
            products,
            [w[e] for w in leaves[0::2]],
            [b[e, 0] for b in leaves[1::2]],
            [g[e, 0] if i % 2 else g[e] for i, g in enumerate(grads)],
            x,
            dtype,
            space=like[e].space if like else None,
            tanh=tanh,
        )
        for e in range(leaves[0].shape[0])
    ]


def single(
    products: Products,
    leaves: Sequence[Tensor],
    grads: Sequence[Tensor],
    x: Tensor,
    dtype: torch.dtype,
    delta: Tensor,
    like: FusedMLP | None = None,
    tanh: bool = False,
) -> FusedMLP:
    """Return an ``MLP`` (leaves and gradients (out, in) and (out,)), in the workspace of ``like``."""
    space = like.space if like else None
    return FusedMLP(products, leaves[0::2], leaves[1::2], grads, x, dtype, delta, turned=True, space=space, tanh=tanh)
