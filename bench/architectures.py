"""Models of the benchmark as lists of layers, so that every contender runs the same net.

One description has four readers: `as_module` (an `nn.Module` for metafast, learn2learn, higher and the
oracle), `forward` (plain functional PyTorch, the leanest form a hand-written loop can have),
`bench.jax_peers.forward`, and `bench.flops` (the analytic count). Parameter names are those of the module.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5  # of batch normalisation: PyTorch's default


@dataclass(frozen=True)
class Layer:
    """One layer, named as the submodule; `fan_in`, `fan_out` are features or channels, 0 where it has none.

    Kinds: linear, conv (3×3, padding 1), norm (batch statistics of `fan_in` channels), relu, pool (2×2
    maximum) and flatten.
    """

    kind: str
    name: str
    fan_in: int = 0
    fan_out: int = 0


def mlp(*widths: int, norm: bool = False) -> tuple[Layer, ...]:
    """Fully connected net with ReLU between layers; `norm=True` puts batch normalisation before each ReLU."""
    layers = [] if len(widths) == 2 else [Layer("flatten", "flatten")]
    for depth, (fan_in, fan_out) in enumerate(itertools.pairwise(widths[:-1])):
        layers.append(Layer("linear", f"linear{depth}", fan_in, fan_out))
        if norm:
            layers.append(Layer("norm", f"norm{depth}", fan_out))
        layers.append(Layer("relu", f"relu{depth}"))
    return (*layers, Layer("linear", "head", *widths[-2:]))


def conv4(channels: int, side: int, hidden: int, ways: int) -> tuple[Layer, ...]:
    """Four blocks of 3×3 convolution, BatchNorm, ReLU, 2×2 max-pool; a linear head (Finn et al. 2017)."""
    layers = []
    for depth in range(4):
        layers += [
            Layer("conv", f"conv{depth}", channels if depth == 0 else hidden, hidden),
            Layer("norm", f"norm{depth}", hidden),
            Layer("relu", f"relu{depth}"),
            Layer("pool", f"pool{depth}"),
        ]
    flat = hidden * (side // 16) ** 2
    return (*layers, Layer("flatten", "flatten"), Layer("linear", "head", flat, ways))


def _module_of(layer: Layer, flat: bool) -> nn.Module:
    match layer.kind:
        case "linear":
            return nn.Linear(layer.fan_in, layer.fan_out)
        case "conv":
            return nn.Conv2d(layer.fan_in, layer.fan_out, 3, padding=1)
        case "norm":
            kind = nn.BatchNorm1d if flat else nn.BatchNorm2d
            return kind(layer.fan_in, track_running_stats=False)
        case "relu":
            return nn.ReLU()
        case "pool":
            return nn.MaxPool2d(2)
        case "flatten":
            return nn.Flatten()
    raise ValueError(f"layer '{layer.name}': got kind '{layer.kind}', expected one that `Layer` lists")


def as_module(layers: tuple[Layer, ...]) -> nn.Sequential:
    """The net as an `nn.Sequential` with named parts; norms use the batch's statistics and keep none."""
    flat = all(layer.kind != "conv" for layer in layers)
    return nn.Sequential(OrderedDict((layer.name, _module_of(layer, flat)) for layer in layers))


def composed_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch normalisation over all but axis 1, from means and products alone.

    For torch.func: under `vmap`, the second derivative of `F.batch_norm` is wrong by about one percent, in
    float64 as well (torch 2.13).
    """
    axes, shape = (0, *range(2, x.dim())), (1, -1, *(1,) * (x.dim() - 2))
    centred = x - x.mean(axes, keepdim=True)
    rstd = torch.rsqrt((centred * centred).mean(axes, keepdim=True) + EPS)
    return centred * (rstd * weight.view(shape)) + bias.view(shape)


def fused_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same by `F.batch_norm`."""
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)


Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def forward(
    layers: tuple[Layer, ...], params: Mapping[str, Tensor], x: Tensor, norm: Norm = fused_norm
) -> Tensor:
    """The net on rows `(rows, *features)` with the parameters given: `(rows, outputs)`."""
    for layer in layers:
        weight, bias = params.get(f"{layer.name}.weight"), params.get(f"{layer.name}.bias")
        match layer.kind:
            case "linear":
                x = F.linear(x, weight, bias)
            case "conv":
                x = F.conv2d(x, weight, bias, padding=1)
            case "norm":
                x = norm(x, weight, bias)
            case "relu":
                x = torch.relu(x)
            case "pool":
                x = F.max_pool2d(x, 2)
            case "flatten":
                x = x.flatten(1)
    return x
