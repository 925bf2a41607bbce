"""Acting on a few images on the CPU: a network of images and the layers behind it in one call of compiled code.

``rlopt.nn.q_actor`` is the definition; this computes the same numbers (a test holds them equal). At one image the
arithmetic is a fourth of what the interpreter and torch's calls take.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlopt.fast.lanes import one_thread
from rlopt.fast.products import Array, Products, array, compiled, product, products_available
from rlopt.nn.encoders import CNN, Conv, FirstConv, NatureCNN, NatureConv, PerLeaf, SmallCNN
from rlopt.nn.networks import MLP
from rlopt.nn.q_actor import QActor

if TYPE_CHECKING:
    from rlopt.agents.value_based import ValueBased


def compiled_actor(agent: ValueBased) -> CompiledActor | None:
    """Return what acts for an agent, or None where its networks are none of those that are written out here."""
    modules: list[Any] = agent.actor.modules
    one, cnn = modules[0], image_network(modules[0])
    if (
        cnn is None
        or type(one.body.main) is not MLP
        or one.body.main.norms is not None
        or (one.body.main.activation is not F.relu and len(one.body.main.layers) > 1)
        or one.body.value is not None
        or any(m._forward_hooks or m._forward_pre_hooks for module in modules for m in module.modules())
        or not products_available()
    ):
        return None
    return CompiledActor(agent.actor.flat, modules)


def image_network(module: nn.Module) -> CNN | None:
    """Return the network of the one image that a ``QActor`` sees, where it sees nothing else and remembers nothing."""
    if type(module) is not QActor or module.memory is not None:
        return None
    cnn: Any = module.encoder
    if type(cnn) is PerLeaf and len(cnn.parts) == 1:
        cnn = cnn.parts[0]
    if type(cnn) not in (NatureCNN, NatureConv, SmallCNN):
        return None
    return None if cnn.body[0].pixels.scaled else cnn


class CompiledActor:
    """Acts for every run of an agent, one image at a time.

    Args:
        flat: the parameters of all runs, (P,) or (R, P).
        modules: of each run the ``QActor`` whose parameters they are.
    """

    def __init__(self, flat: Tensor, modules: list[QActor]) -> None:
        self.module = module = modules[0]
        cnns = [image_network(each) for each in modules]
        assert cnns[0] is not None
        first = cnns[0].body[0]
        assert isinstance(first, FirstConv)
        self.pixels = first.pixels
        self.scale = np.float32(1.0 / 255.0 if first.pixels.bytes else 1.0)
        self.flat = array(flat.detach().view(len(modules), -1))
        shape, convolutions, sizes = first.pixels.size, [], []
        for layer in _convolutions(cnns[0]):
            rows, columns = ((side - layer.kernel_size[0]) // layer.stride[0] + 1 for side in shape[1:])
            convolutions.append(
                [layer.kernel_size[0], layer.stride[0], *shape, layer.out_channels, rows, columns, _place(layer.bias)]
            )
            sizes.append((layer.out_channels, layer.weight[0].numel(), rows * columns))
            shape = (layer.out_channels, rows, columns)
        self.convolutions = np.array(convolutions)
        planes = torch.zeros(max(math.prod(first.pixels.size), *(o * p for o, _, p in sizes)))
        patches = torch.zeros(max(k * p for _, k, p in sizes))
        self.products = Products()
        self.operands = np.array([
            [
                [self.products.add(x) for x in (planes[: o * p].view(o, p), layer.weight.detach().view(o, k), right)]
                for layer, (o, k, p) in zip(_convolutions(cnn), sizes, strict=True)
                for right in [patches[: k * p].view(k, p)]
            ]
            for cnn in cnns
            if cnn is not None
        ])  # fmt: skip
        self.planes, self.patches = array(planes), array(patches)
        head = [] if cnns[0].head is None else [cnns[0].head]
        linear: list[Any] = [*head, *module.body.layers]
        self.dense = np.array([[*x.weight.shape[::-1], _place(x.weight), _place(x.bias)] for x in linear])

    def __getstate__(self) -> Any:
        raise TypeError("an agent's compiled actor holds addresses in memory: save agent.state_dict() instead")

    def __call__(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Return actions (R·N,) at images ``obs`` (R·N, …), explored where there is ``noise`` (R·N, 2)."""
        images = self.pixels.arrange(obs).contiguous()
        out = torch.empty(len(images), int(self.dense[-1, 1]))
        with one_thread():  # to wake another costs what it would save
            image_rows(
                array(images if images.dtype == torch.uint8 else images.float()), self.scale, self.flat,
                self.convolutions, self.operands, self.products.state, self.planes, self.patches, self.dense,
                array(out),
            )  # fmt: skip
        self.products.check()
        outputs = self.module.head(out.view(len(out), -1, self.module.form.size), obs)
        return self.module.choose(outputs, noise)


def _convolutions(cnn: CNN) -> list[Conv]:
    return [layer for layer in cnn.body if isinstance(layer, Conv)]


def _place(parameter: Tensor | None) -> int:
    """Return where among the parameters of the first run one begins."""
    assert parameter is not None
    return int(parameter.storage_offset())


@compiled
def image_rows(
    images: Array, scale: Any, flat: Array, convolutions: Array, operands: Array, state: Array, planes: Array,
    patches: Array, dense: Array, out: Array,
) -> None:  # fmt: skip
    """Compute outputs (R·N, K·Z) at images (R·N, C, H, W) of R networks with parameters (R, P): convolutions without
    padding and linear layers, a ReLU behind each but the last.

    ``convolutions`` (L, 9): kernel and stride, channels, height and width of what comes in and of what goes out, place
    of the biases. ``operands`` (R, L, 3): numbers of the products, weights (out, k) times ``patches`` (k, p) into
    ``planes``. ``dense`` (D, 4): inputs, outputs, places of weights and biases.
    """
    each, zero = images.shape[0] // flat.shape[0], np.float32(0)
    wide = dense[:, :2].max()
    x, y = np.empty(wide, np.float32), np.empty(wide, np.float32)
    for row in range(images.shape[0]):
        run = row // each
        parameters, place = flat[run], 0
        for c in range(images.shape[1]):
            for i in range(images.shape[2]):
                for j in range(images.shape[3]):
                    planes[place] = np.float32(images[row, c, i, j]) * scale
                    place += 1
        for layer in range(convolutions.shape[0]):
            kernel, stride, channels = convolutions[layer, 0], convolutions[layer, 1], convolutions[layer, 2]
            height, width, outputs = convolutions[layer, 3], convolutions[layer, 4], convolutions[layer, 5]
            rows, columns = convolutions[layer, 6], convolutions[layer, 7]
            biases, place = parameters[convolutions[layer, 8] :], 0
            for c in range(channels):
                for di in range(kernel):
                    for dj in range(kernel):
                        for i in range(rows):
                            first = (c * height + i * stride + di) * width + dj
                            for j in range(columns):
                                patches[place + j] = planes[first + j * stride]
                            place += columns
            product(state, operands[run, layer, 0], operands[run, layer, 1], operands[run, layer, 2])
            size = rows * columns
            for k in range(outputs):
                for p in range(k * size, (k + 1) * size):
                    value = planes[p] + biases[k]
                    planes[p] = zero if value <= zero else value
        for j in range(dense[0, 0]):
            x[j] = planes[j]
        last = dense.shape[0] - 1
        for layer in range(last + 1):
            inputs, biases = dense[layer, 0], parameters[dense[layer, 3] :]
            for k in range(dense[layer, 1]):
                begin = dense[layer, 2] + k * inputs
                weights, sum_ = parameters[begin : begin + inputs], biases[k]
                for j in range(weights.shape[0]):
                    sum_ += weights[j] * x[j]
                y[k] = zero if layer < last and sum_ <= zero else sum_
            x, y = y, x
        for k in range(out.shape[1]):
            out[row, k] = x[k]
