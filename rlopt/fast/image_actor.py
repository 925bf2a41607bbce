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
            convolutions.append([
                layer.kernel_size[0], layer.stride[0], shape[0], shape[2], layer.out_channels, rows, columns,
                _place(layer.weight), _place(layer.bias),
            ])  # fmt: skip
            sizes.append((layer.out_channels, layer.weight[0].numel(), rows * columns))
            shape = (layer.out_channels, rows, columns)
        self.convolutions = np.array(convolutions)
        pixels = torch.zeros(max(math.prod(first.pixels.size), *(o * p for o, _, p in sizes)))
        patches = torch.zeros(max(k * p for _, k, p in sizes))
        # The weights as they were when they were last put in order, (R, W), and in order.
        self.kept = np.full((len(modules), sum(o * k for o, k, _ in sizes)), np.nan, np.float32)
        ordered = torch.zeros(self.kept.shape)
        self.products = Products()
        operands = [
            (pixels[: o * p].view(p, o), patches[: k * p].view(p, k), weights.view(o, k).t())
            for row in ordered
            for weights, (o, k, p) in zip(row.split([o * k for o, k, _ in sizes]), sizes, strict=True)
        ]
        numbers = [[self.products.add(x) for x in three] for three in operands]
        self.operands = np.array(numbers).reshape(len(modules), len(sizes), 3)
        self.ordered, self.floats, self.patches = array(ordered), array(pixels), array(patches)
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
                self.convolutions, self.kept, self.ordered, self.operands, self.products.state, self.floats,
                self.patches, self.dense, array(out),
            )  # fmt: skip
        self.products.check()
        outputs = self.module.head(out.view(len(out), -1, self.module.form.size), obs)
        explores = noise is not None and bool((noise.numpy()[..., 0] < 0).any())
        return self.module.choose(outputs, noise if explores else None)


def _convolutions(cnn: CNN) -> list[Conv]:
    return [layer for layer in cnn.body if isinstance(layer, Conv)]


def _place(parameter: Tensor | None) -> int:
    """Return where among the parameters of the first run one begins."""
    assert parameter is not None
    return int(parameter.storage_offset())


@compiled
def put_in_order(parameters: Array, convolutions: Array, kept: Array, ordered: Array) -> None:
    """Put weights (out, channels, k, k) of one network into ``ordered`` as (out, k, k, channels) where they are not
    those that were ``kept`` (W,) when this was last done."""
    begin = 0
    for layer in range(convolutions.shape[0]):
        area, channels = convolutions[layer, 0] * convolutions[layer, 0], convolutions[layer, 2]
        size, outputs = area * channels, convolutions[layer, 4]
        stop = begin + outputs * size
        weights = parameters[convolutions[layer, 7] : convolutions[layer, 7] + outputs * size]
        before, after = kept[begin:stop], ordered[begin:stop]
        changed = 0
        for i in range(weights.shape[0]):
            changed += before[i] != weights[i]
        if changed:
            for i in range(weights.shape[0]):
                before[i] = weights[i]
            for k in range(outputs):
                for c in range(channels):
                    place = k * size + c
                    for i in range(area):
                        after[place + i * channels] = weights[k * size + c * area + i]
        begin = stop


@compiled
def image_rows(
    images: Array, scale: Any, flat: Array, convolutions: Array, kept: Array, ordered: Array, operands: Array,
    state: Array, pixels: Array, patches: Array, dense: Array, out: Array,
) -> None:  # fmt: skip
    """Compute outputs (R·N, K·Z) at images (R·N, C, H, W) of R networks with parameters (R, P): convolutions without
    padding and linear layers, a ReLU behind each but the last.

    Inside, the channels of a pixel lie side by side, so that a patch is a few long pieces of an image.
    ``convolutions`` (L, 9): kernel, stride, channels, width of what comes in; channels, height and width of what goes
    out; places of weights and biases. ``kept``, ``ordered`` (R, W): of ``put_in_order``. ``operands`` (R, L, 3):
    numbers of the products, ``patches`` (p, k) times weights (k, out) into ``pixels``. ``dense`` (D, 4): inputs,
    outputs, places of weights and biases.
    """
    each, zero = images.shape[0] // flat.shape[0], np.float32(0)
    wide = dense[:, :2].max()
    x, y = np.empty(wide, np.float32), np.empty(wide, np.float32)
    for row in range(images.shape[0]):
        run = row // each
        parameters, channels = flat[run], images.shape[1]
        if row % each == 0:
            put_in_order(parameters, convolutions, kept[run], ordered[run])
        for i in range(images.shape[2]):
            for c in range(channels):
                line, place = images[row, c, i], i * images.shape[3] * channels + c
                for j in range(line.shape[0]):
                    pixels[place + j * channels] = np.float32(line[j]) * scale
        outputs, size = channels, images.shape[2] * images.shape[3]
        for layer in range(convolutions.shape[0]):
            kernel, stride, channels = convolutions[layer, 0], convolutions[layer, 1], convolutions[layer, 2]
            width, outputs = convolutions[layer, 3], convolutions[layer, 4]
            rows, columns = convolutions[layer, 5], convolutions[layer, 6]
            piece, place = kernel * channels, 0
            for i in range(rows):
                for j in range(columns):
                    for di in range(kernel):
                        first = ((i * stride + di) * width + j * stride) * channels
                        # Views of what is short: so the compiler copies many numbers at a time.
                        patch, seen = patches[place : place + piece], pixels[first : first + piece]
                        for k in range(patch.shape[0]):
                            patch[k] = seen[k]
                        place += piece
            product(state, operands[run, layer, 0], operands[run, layer, 1], operands[run, layer, 2])
            size, biases = rows * columns, parameters[convolutions[layer, 8] : convolutions[layer, 8] + outputs]
            for p in range(size):
                values = pixels[p * outputs : (p + 1) * outputs]
                for k in range(outputs):
                    value = values[k] + biases[k]
                    values[k] = zero if value <= zero else value
        for k in range(outputs):
            for p in range(size):
                x[k * size + p] = pixels[p * outputs + k]
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
