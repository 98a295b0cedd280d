"""Random networks for hypothesis: a recipe is a list of blocks, each of which takes what the one before gives."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from support import networks
from support.networks import Head, Last, chain, unit


class Shape(NamedTuple):
    channels: int
    height: int
    width: int


class Block(NamedTuple):
    """One entry of a recipe: `width` and `option` mean what the kind makes of them."""

    kind: str
    width: int
    option: int
    inner: tuple[Any, ...] = ()


ACTIVATIONS: Sequence[Callable[[], nn.Module]] = (nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Hardswish, nn.GELU, nn.Identity, nn.Tanh)


class Apply(nn.Module):
    """A function of the maps and of the layers given by name."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **self.layers)


def divisor(n: int, option: int) -> int:
    """A divisor of n between 2 and 4, and less than n, if there is one."""
    found = [d for d in (2, 3, 4) if n % d == 0 and d < n]
    return found[option % len(found)] if found else 1


def attention(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module, heads: int) -> Tensor:
    """Every position looks at every other; the width of a head may shrink, the number of heads not."""
    b, _, h, w = x.shape
    t = x.flatten(2).transpose(1, 2)
    a, c, d = (layer(t).reshape(b, h * w, heads, -1).transpose(1, 2) for layer in (q, k, v))
    y = ((a @ c.transpose(2, 3)) * 0.3).softmax(-1) @ d
    return x + out(y.transpose(1, 2).reshape(b, h * w, -1)).transpose(1, 2).reshape(b, -1, h, w)


def make(block: Block, shape: Shape) -> tuple[nn.Module, Shape]:
    """The block as a module, and the shape that it gives."""
    kind, w, o, inner = block
    c, height, width = shape
    small, even = min(height, width), height % 2 == width % 2 == 0
    act = ACTIVATIONS[o % len(ACTIVATIONS)]
    g = divisor(c, o)
    if kind == "bare":
        return chain(nn.Conv2d(c, w, 3, padding=1, bias=o % 2 == 0), act()), shape._replace(channels=w)
    if kind == "residual_of":
        body, end = assemble(inner, shape)
        if (end.height, end.width) == (height, width):
            return Add(chain(body, unit(end.channels, c, 1, act=nn.Identity())), act()), shape
    if kind == "concatenate":
        body, end = assemble(inner, shape)
        if (end.height, end.width) == (height, width):
            return Cat(nn.Identity(), body, unit(c, w, 1)), shape._replace(channels=c + end.channels + w)
    if kind == "product":
        body, end = assemble(inner, shape)
        if (end.height, end.width) == (height, width):
            other = unit(c, end.channels, 1, act=act())
            return Apply(lambda x, a, b: a(x) * b(x) if o % 2 else torch.maximum(a(x), b(x)), a=body, b=other), end
    if kind == "option_a" and even and small >= 4:
        return networks.OptionA(c, c + w), Shape(c + w, height // 2, width // 2)
    if kind == "dense":
        block_ = networks.Dense(c, w, 1 + o % 3)
        return block_, shape._replace(channels=block_.out)
    if kind == "depthwise":
        if o % 2:
            return nn.Conv2d(c, 2 * c, 3, padding=1, groups=c), shape._replace(channels=2 * c)
        return networks.Depthwise(c, w), shape
    if kind == "grouped":
        return unit(c, g * w, 3, groups=g, act=act()), shape._replace(channels=g * w)
    if kind == "squeeze_excite":
        return networks.SqueezeExcite(c, w, linear=o % 2 == 1), shape
    if kind == "shuffle_unit" and c % 2 == 0:
        return networks.Shuffle(c), shape
    if kind == "shuffle" and g > 1:
        return Apply(lambda x: networks.shuffle(x, g)), shape
    if kind == "chunked":
        return networks.Chunked(c, w, w + 1), shape._replace(channels=w + 1)
    if kind == "glu":
        return Apply(lambda x, conv: F.glu(conv(x), 1), conv=nn.Conv2d(c, 2 * w, 1)), shape._replace(channels=w)
    if kind == "crelu":
        return Apply(lambda x: torch.cat([x, -x], 1).relu()), shape._replace(channels=2 * c)
    if kind == "pool" and small >= 4:
        pools: Sequence[nn.Module] = (nn.MaxPool2d(2), nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1))
        out = [(height // 2, width // 2), ((height + 1) // 2, (width + 1) // 2), ((height + 1) // 2, (width + 1) // 2)]
        return pools[o % 3], Shape(c, *out[o % 3])
    if kind == "up" and max(height, width) <= 8:
        if o % 3 == 0:
            return nn.Upsample(scale_factor=2, mode="bilinear"), Shape(c, 2 * height, 2 * width)
        groups = g if o % 3 == 1 else 1
        return nn.ConvTranspose2d(c, w * groups, 2, 2, groups=groups), Shape(w * groups, 2 * height, 2 * width)
    if kind == "pixels" and even:
        def there_and_back(x: Tensor, down: nn.Module, up: nn.Module) -> Tensor:
            return F.pixel_shuffle(up(down(F.pixel_unshuffle(x, 2))), 2)
        return Apply(there_and_back, down=unit(4 * c, w), up=nn.Conv2d(w, 12, 1)), shape._replace(channels=3)
    if kind == "tokens":
        def mlp(x: Tensor, fc1: nn.Module, fc2: nn.Module) -> Tensor:
            t = x.flatten(2).transpose(1, 2)
            return (t + fc2(F.gelu(fc1(t)))).transpose(1, 2).reshape(x.shape)
        return Apply(mlp, fc1=nn.Linear(c, w), fc2=nn.Linear(w, c)), shape
    if kind == "attention":
        heads = 1 + o % 2
        layers = {n: nn.Linear(c, heads * w) for n in "qkv"}
        return Apply(lambda x, **ls: attention(x, heads=heads, **ls), **layers, out=nn.Linear(heads * w, c)), shape
    if kind == "unet" and even and small >= 4:
        body, end = assemble(inner, Shape(w, height // 2, width // 2))
        if (end.height, end.width) == (height // 2, width // 2):
            inside = chain(nn.MaxPool2d(2), unit(c, w), body, nn.ConvTranspose2d(end.channels, w + 1, 2, 2))
            return Cat(nn.Identity(), inside), shape._replace(channels=c + w + 1)
    if kind == "selective":
        return networks.Selective(c), shape
    if kind == "twice":
        return Apply(lambda x, conv, n1, n2: F.relu(n2(conv(F.relu(n1(conv(x)))))), conv=nn.Conv2d(c, c, 3, padding=1),
                     n1=nn.BatchNorm2d(c), n2=nn.BatchNorm2d(c)), shape
    if kind == "prelu":
        return nn.PReLU(c), shape
    if kind == "instance_norm":
        return nn.InstanceNorm2d(c, affine=o % 2 == 0), shape
    if kind == "group_norm":
        return nn.GroupNorm(g if o % 3 else 1, c), shape
    if kind == "layer_norm":
        return Last(nn.LayerNorm(c)), shape
    if kind == "halves" and c % 2 == 0:
        def halves(x: Tensor) -> Tensor:
            a, b = x.chunk(2, 1) if o % 2 else x.view(len(x), 2, -1, *x.shape[2:]).unbind(1)
            return a + 2 * torch.sigmoid(b) if o % 3 else a * b
        return Apply(halves), shape._replace(channels=c // 2)
    if kind == "maxout" and c % 2 == 0:
        return Apply(lambda x: x.view(len(x), -1, 2, *x.shape[2:]).amax(2)), shape._replace(channels=c // 2)
    if kind == "flip":
        return Apply(lambda x: x + 2 * x.flip(1)), shape
    stride = 2 if o % 3 == 2 and small >= 4 else 1
    k = (1, 3, 5)[o % 3]
    return unit(c, w, k, stride, act=act()), Shape(w, -(-height // stride), -(-width // stride))


class Add(nn.Module):
    def __init__(self, body: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.body, self.act = body, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.body(x))


class Cat(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([b(x) for b in self.branches], 1)


def assemble(recipe: Sequence[Block], shape: Shape) -> tuple[nn.Sequential, Shape]:
    modules = []
    for block in recipe:
        if shape.channels > 64:  # what concatenates and doubles would go on without end
            block = Block("conv", block.width, 1)
        module, shape = make(block, shape)
        modules.append(module)
    return nn.Sequential(*modules), shape


class Random(nn.Module):
    """Blocks and a head: pooled, flattened, a map, or two outputs."""

    def __init__(self, recipe: Sequence[Block], head: int) -> None:
        super().__init__()
        self.body, end = assemble(recipe, Shape(3, 8, 12))
        self.kind = head
        if head == 1:
            self.head: nn.Module = networks.Flattened(end.channels, end.height * end.width)
        elif head == 2:
            self.head = nn.Conv2d(end.channels, 3, 1)
        else:
            self.head = Head(end.channels)
            self.second = nn.Conv2d(end.channels, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        return (self.head(x), self.second(x)) if self.kind == 3 else self.head(x)


LEAVES = [
    "conv", "bare", "option_a", "dense", "depthwise", "grouped", "squeeze_excite", "shuffle_unit", "shuffle", "chunked",
    "glu", "crelu", "pool", "up", "pixels", "tokens", "attention", "selective", "twice", "prelu", "instance_norm",
    "group_norm", "layer_norm", "halves", "maxout", "flip",
]
NESTED = ("residual_of", "concatenate", "product", "unet")
INEXACT = ("group_norm", "layer_norm")


def blocks(kinds: Sequence[str]) -> st.SearchStrategy[Block]:
    leaves = st.builds(Block, st.sampled_from(kinds), st.integers(2, 9), st.integers(0, 11), st.just(()))
    return st.recursive(
        leaves,
        lambda inner: st.builds(Block, st.sampled_from(NESTED), st.integers(2, 9), st.integers(0, 11),
                                st.lists(inner, min_size=1, max_size=2).map(tuple)),
        max_leaves=4,
    )


def recipes(kinds: Sequence[str] = LEAVES) -> st.SearchStrategy[list[Block]]:
    stem = st.builds(Block, st.sampled_from(("conv", "bare")), st.sampled_from((4, 6, 8, 9, 12)), st.sampled_from((0, 1, 4)),
                     st.just(()))
    return st.builds(lambda first, rest: [first, *rest], stem, st.lists(blocks(kinds), min_size=1, max_size=6))


def examples(count: int) -> settings:
    """For a property whose example takes long: so many of them, or as many as NARROWER_EXAMPLES asks for."""
    return settings(max_examples=int(os.environ.get("NARROWER_EXAMPLES") or count))
