"""Small networks, one for each pattern that real ones are made of, and hypothesis' random ones.

Widths are odd sizes that differ from each other, so that a wrong index shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint


def images(channels: int = 3, size: int = 8, batch: int = 4, seed: int = 0) -> Tensor:
    """Random images of growing contrast, so that samples differ even behind a global pooling."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, size, size, generator=g) + torch.randn(batch, channels, 1, 1, generator=g)
    return x * torch.linspace(0.5, 2, batch).view(-1, 1, 1, 1)


def unit(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    """Convolution, BatchNorm, activation."""
    conv = nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), act or nn.ReLU())


def in_one_memory(model: nn.Module) -> nn.Module:
    """The model with all parameters as parts of one vector, as flat optimizers and averaging keep them."""
    parameters = list(model.parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters).detach(), parameters)
    assert len({p.untyped_storage()._cdata for p in parameters}) == 1
    return model


class Head(nn.Module):
    def __init__(self, c: int, classes: int = 5) -> None:
        super().__init__()
        self.fc = nn.Linear(c, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


def chain(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(*blocks)


# ------------------------------------------------------------------------------------------------ patterns


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.conv2 = nn.Conv2d(10, 14, 3, padding=1)
        self.conv3, self.bn3 = nn.Conv2d(14, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(torch.sigmoid(self.conv2(x)), 2)
        x = F.silu(self.bn3(self.conv3(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Residual(nn.Module):
    def __init__(self, i: int, inner: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = unit(i, inner, 3, stride)
        self.conv2 = unit(inner, o, 3, act=nn.Identity())
        self.project = unit(i, o, 1, stride, act=nn.Identity()) if stride > 1 or i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(self.conv1(x)) + self.project(x))


class OptionA(nn.Module):
    """The shortcut of the CIFAR ResNets: every second pixel, and channels padded with zeros on both sides."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = unit(i, o, 3, 2), unit(o, o, 3, act=nn.Identity())
        self.before, self.after = (o - i) // 2, o - i - (o - i) // 2

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))
        return F.relu(self.conv2(self.conv1(x)) + shortcut)


class Dense(nn.Module):
    """Pre-activation and concatenation, as in DenseNet."""

    def __init__(self, i: int, growth: int, layers: int = 2) -> None:
        super().__init__()
        self.norms = nn.ModuleList()
        self.convs = nn.ModuleList()
        for k in range(layers):
            self.norms.append(nn.BatchNorm2d(i))
            self.convs.append(nn.Conv2d(i, growth + k, 3, padding=1, bias=False))
            i += growth + k
        self.out = i

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return x


class Inception(nn.Module):
    def __init__(self, i: int) -> None:
        super().__init__()
        self.a, self.b = unit(i, 5, 1), chain(unit(i, 4, 1), unit(4, 6))
        self.c = chain(nn.MaxPool2d(3, 1, 1), unit(i, 7, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.c(x), self.a(x), self.b(x)], 1)


class Depthwise(nn.Module):
    """Inverted residual."""

    def __init__(self, c: int, wide: int) -> None:
        super().__init__()
        self.expand, self.depth = unit(c, wide, 1, act=nn.ReLU6()), unit(wide, wide, 3, groups=wide, act=nn.Hardswish())
        self.project = unit(wide, c, 1, act=nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depth(self.expand(x)))


class SqueezeExcite(nn.Module):
    def __init__(self, c: int, reduced: int, linear: bool = False) -> None:
        super().__init__()
        self.linear = linear
        self.fc1 = nn.Linear(c, reduced) if linear else nn.Conv2d(c, reduced, 1)
        self.fc2 = nn.Linear(reduced, c) if linear else nn.Conv2d(reduced, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.linear:
            b, c = x.shape[:2]
            return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3)))))).view(b, c, 1, 1)
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


def shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


class Shuffle(nn.Module):
    """The unit of ShuffleNet v2 as torchvision has it: halves, one through a branch, shuffled together again."""

    def __init__(self, c: int) -> None:
        super().__init__()
        half = c // 2
        self.branch = chain(unit(half, half, 1), unit(half, half, 3, groups=half, act=nn.Identity()), unit(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return shuffle(torch.cat((a, self.branch(b)), dim=1), 2)


class Chunked(nn.Module):
    """YOLO's C2f: the halves of one convolution, a chain behind the second, everything concatenated."""

    def __init__(self, i: int, half: int, o: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = unit(i, 2 * half, 1, act=nn.SiLU()), unit(4 * half, o, 1, act=nn.SiLU())
        self.m = nn.ModuleList(chain(unit(half, half), unit(half, half)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        for k, m in enumerate(self.m):
            y.append(y[-1] + m(y[-1]) if k == 0 else m(y[-1]))
        return self.cv2(torch.cat(y, 1))


class Flattened(nn.Module):
    """A linear layer behind a flatten reads each channel at every position."""

    def __init__(self, c: int, pixels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c * pixels, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = unit(3, 6), unit(6, 10), unit(10, 14)
        self.up2, self.up1 = nn.ConvTranspose2d(14, 9, 2, 2), nn.ConvTranspose2d(11, 7, 2, 2)
        self.join2, self.join1 = unit(19, 11), unit(13, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        x = self.join2(torch.cat([b, self.up2(c)], 1))
        return self.out(self.join1(torch.cat([self.up1(x), a], 1)))


class Transposed(nn.Module):
    """Grouped and depthwise transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8)
        self.up = nn.ConvTranspose2d(8, 12, 2, 2, groups=2)
        self.bn = nn.BatchNorm2d(12)
        self.wide = nn.ConvTranspose2d(12, 12, 4, 2, 1, groups=12, bias=False)
        self.last = nn.ConvTranspose2d(12, 6, 3)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(self.wide(F.relu(self.bn(self.up(self.stem(x))))))))


class Shared(nn.Module):
    """One convolution used twice, and two that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = unit(3, 9), nn.Conv2d(9, 9, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(9), nn.BatchNorm2d(9)
        self.left, self.right = nn.Conv2d(9, 7, 1), nn.Conv2d(9, 7, 1)
        self.right.weight = self.left.weight
        self.head = Head(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.bn1(self.twice(x)))
        x = F.relu(self.bn2(self.twice(x)))
        return self.head(self.left(x) * torch.sigmoid(self.right(x)))


class ManyEnds(nn.Module):
    """Two inputs, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = unit(3, 6), unit(2, 9)
        self.mix = unit(15, 8)
        self.classes, self.boxes = Head(8), nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor, depth: Tensor, scale: float = 2.0) -> dict[str, Any]:
        x = self.mix(torch.cat([self.a(image), self.b(depth)], 1)) * scale
        return {"classes": self.classes(x), "boxes": [self.boxes(x)]}


class Gated(nn.Module):
    """glu, a negative copy (CReLU), PReLU per channel and a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.prelu = nn.Conv2d(3, 14, 3, padding=1), nn.PReLU(7)
        self.gamma = nn.Parameter(torch.ones(1, 7, 1, 1))
        self.next, self.head = unit(14, 7), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(F.glu(self.wide(x), 1))
        return self.head(x + self.gamma * self.next(torch.cat([x, -x], 1).relu()))


class Pixels(nn.Module):
    """Space to depth and back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = unit(3, 6), unit(24, 10)
        self.up, self.out = nn.Conv2d(10, 20, 1), nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(F.pixel_shuffle(self.up(self.down(F.pixel_unshuffle(self.stem(x), 2))), 2)))


class Tokens(nn.Module):
    """Image to tokens, an MLP on each, back to an image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc1, self.fc2, self.head = unit(3, 8), nn.Linear(8, 13), nn.Linear(13, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        t = x.flatten(2).transpose(1, 2)
        t = t + self.fc2(F.gelu(self.fc1(t)))
        return self.head(t.permute(0, 2, 1).reshape(b, c, h, w))


class Selective(nn.Module):
    """SKNet: two branches stacked in a new dimension, weighted by a softmax over the branches, added."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = unit(c, c), unit(c, c, 1)
        self.squeeze, self.weigh = nn.Conv2d(c, 5, 1), nn.Conv2d(5, 2 * c, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([self.a(x), self.b(x)], 1)
        b, n, c = x.shape[:3]
        w = self.weigh(F.relu(self.squeeze(x.sum(1).mean((2, 3), keepdim=True)))).view(b, n, c, 1, 1).softmax(1)
        return (x * w).sum(1)


class Volume(nn.Module):
    """A video network beside a sound network."""

    def __init__(self) -> None:
        super().__init__()
        self.video, self.vbn = nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.sound, self.sbn = nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6)
        self.video2, self.sound2, self.fc = nn.Conv3d(8, 5, 1), nn.Conv1d(6, 5, 1), nn.Linear(5, 4)

    def forward(self, video: Tensor, sound: Tensor) -> Tensor:
        v = self.video2(F.max_pool3d(F.relu(self.vbn(self.video(video))), 2)).mean((2, 3, 4))
        s = self.sound2(F.relu(self.sbn(self.sound(sound)))).mean(2)
        return self.fc(torch.tanh(v) * s)


class Case(NamedTuple):
    """A network, its inputs, and the groups that must be free, with their widths."""

    make: Callable[[], nn.Module]
    inputs: Any
    free: dict[str, int]


def video_and_sound() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 4, 6, 6, generator=g), torch.randn(4, 2, 16, generator=g)


IMAGES = images()
PATTERNS: dict[str, Case] = {
    "plain": Case(Plain, IMAGES, {"conv1": 10, "conv2": 14, "conv3": 12}),
    "residual": Case(lambda: chain(unit(3, 8), Residual(8, 6, 8), Residual(8, 10, 14, 2), Head(14)), IMAGES,
                     {"0.0": 8, "1.conv1.0": 6, "2.conv1.0": 10, "2.conv2.0": 14}),
    "option_a": Case(lambda: chain(unit(3, 6), OptionA(6, 13), Head(13)), IMAGES, {"0.0": 6, "1.conv1.0": 13}),
    "dense": Case(lambda: chain(unit(3, 6), Dense(6, 4, 3), unit(21, 7), Head(7)), IMAGES,
                  {"0.0": 6, "1.convs.0": 4, "1.convs.1": 5, "1.convs.2": 6, "2.0": 7}),
    "inception": Case(lambda: chain(unit(3, 8), Inception(8), unit(18, 9), Head(9)), IMAGES,
                      {"0.0": 8, "1.c.1.0": 7, "1.a.0": 5, "1.b.0.0": 4, "1.b.1.0": 6, "2.0": 9}),
    "depthwise": Case(lambda: chain(unit(3, 7), Depthwise(7, 12), nn.Conv2d(7, 14, 3, groups=7), Head(14)), IMAGES,
                      {"0.0": 7, "1.expand.0": 12}),
    "grouped": Case(lambda: chain(unit(3, 12), unit(12, 8, 3, groups=4), unit(8, 6, 3, groups=2), Head(6)), IMAGES,
                    {"0.0": 12, "1.0": 8, "2.0": 6}),
    "regrouped": Case(lambda: chain(unit(3, 6), unit(6, 12, 3, groups=3), unit(12, 8, 3, groups=2), Head(8)), IMAGES,
                      {"0.0": 6, "1.0": 12, "2.0": 8}),
    "squeeze_excite": Case(
        lambda: chain(unit(3, 8), SqueezeExcite(8, 5), unit(8, 9), SqueezeExcite(9, 4, linear=True), Head(9)), IMAGES,
        {"0.0": 8, "1.fc1": 5, "2.0": 9, "3.fc1": 4}),
    "shuffle": Case(lambda: chain(unit(3, 12), Shuffle(12), Shuffle(12), unit(12, 9, 1), Head(9)), IMAGES,
                    {"0.0": 3, "0.0#2": 3, "0.0#3": 6, "1.branch.0.0": 6, "2.branch.0.0": 6, "3.0": 9}),
    "chunked": Case(lambda: chain(unit(3, 8), Chunked(8, 6, 10), Head(10)), IMAGES,
                    {"0.0": 8, "1.cv1.0": 6, "1.cv1.0#2": 6, "1.m.0.0.0": 6, "1.m.1.0.0": 6, "1.m.1.1.0": 6, "1.cv2.0": 10}),
    "flattened": Case(lambda: chain(unit(3, 6, stride=2), unit(6, 7, stride=2), Flattened(7, 4)), IMAGES,
                      {"0.0": 6, "1.0": 7, "2.fc1": 9}),
    "unet": Case(UNet, IMAGES, {"down1.0": 6, "down2.0": 10, "bottom.0": 14, "up2": 9, "join2.0": 11, "up1": 7, "join1.0": 8}),
    "transposed": Case(Transposed, images(size=4), {"stem.0": 8, "up": 12, "last": 6}),
    "shared": Case(Shared, IMAGES, {"stem.0": 9, "left": 7}),
    "many_ends": Case(ManyEnds, (IMAGES, images(2)), {"a.0": 6, "b.0": 9, "mix.0": 8}),
    "dict_inputs": Case(ManyEnds, {"depth": images(2), "image": IMAGES}, {"a.0": 6, "b.0": 9, "mix.0": 8}),
    "gated": Case(Gated, IMAGES, {"wide": 7}),
    "pixels": Case(Pixels, IMAGES, {"stem.0": 6, "down.0": 10, "up": 5}),
    "tokens": Case(Tokens, IMAGES, {"stem.0": 8, "fc1": 13}),
    "selective": Case(lambda: chain(unit(3, 8), Selective(8), unit(8, 6), Head(6)), IMAGES,
                      {"0.0": 8, "1.a.0": 8, "1.squeeze": 5, "2.0": 6}),
    "volume": Case(Volume, video_and_sound(), {"video": 8, "sound": 6, "video2": 5}),
}


# ------------------------------------------------------------------------------------------------ traps


class Trick(nn.Module):
    """A function of the maps and of this module, which holds the function's tensors and layers."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], held: dict[str, Any]) -> None:
        super().__init__()
        self.function = function
        for name, value in held.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Trap(nn.Module):
    """A stem of 12 channels, something unusual, a convolution that reads `width` channels, a head."""

    def __init__(self, trick: Callable[[Any, Tensor], Tensor], width: int = 12, **held: Any) -> None:
        super().__init__()
        self.stem, self.trick = unit(3, 12), Trick(trick, held)
        self.next, self.head = unit(width, 9), Head(9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.next(self.trick(self.stem(x))))


class HardCoded(nn.Module):
    """`view(-1, 512)` as many hand-written networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = unit(3, 10), unit(10, 32)
        self.fc = nn.Linear(512, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.max_pool2d(self.last(self.stem(x)), 2).view(-1, 512))


class TrainingOnly(nn.Module):
    """An auxiliary head, as in GoogLeNet, that the eval forward never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next = unit(3, 12), unit(12, 9)
        self.aux, self.aux_fc, self.head = unit(12, 8), nn.Linear(8, 5), Head(9)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        out = self.head(self.next(x))
        if self.training:
            return out, self.aux_fc(self.aux(x).mean((2, 3)))
        return out


class TiedFault(nn.Module):
    """A fixed size that meets two groups, of which a grouped convolution wants equally many channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = unit(3, 12), unit(12, 6), unit(12, 6)
        self.grouped, self.head = unit(12, 8, groups=2), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.a(x), self.b(x)], 1)
        return self.head(self.grouped(x.view(-1, 12, 64).relu().view(-1, 12, 8, 8)))


class OwnWeights(nn.Module):
    """Weights that are made from parameters in the forward (weight standardisation within each filter, scaled)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = unit(3, 12), Head(9)
        self.weight, self.gain = nn.Parameter(torch.randn(9, 12, 3, 3)), nn.Parameter(torch.ones(9, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((2, 3), keepdim=True)
        return self.head(F.relu(F.conv2d(self.stem(x), w * self.gain, padding=1)))


def by_mean_and_std(w: Tensor) -> Tensor:
    return (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)


def by_var_mean(w: Tensor) -> Tensor:
    v, m = torch.var_mean(w, dim=(1, 2, 3), keepdim=True, unbiased=False)
    return (w - m) / torch.sqrt(v + 1e-10)


def by_steps(w: Tensor) -> Tensor:
    """As the paper's authors wrote it."""
    w = w - w.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
    return w / (w.view(len(w), -1).std(1).view(-1, 1, 1, 1) + 1e-5)


def by_batch_norm(w: Tensor) -> Tensor:
    """As timm does."""
    return F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(w)


STANDARDISED: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (by_mean_and_std, by_var_mean, by_steps, by_batch_norm)
}


class Standardised(nn.Module):
    """Weight standardisation: each filter is normalised over all that it reads."""

    def __init__(self, standardise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.conv, self.head = unit(3, 12, act=nn.Sigmoid()), nn.Conv2d(12, 9, 3), Head(9)
        self.standardise = standardise

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.conv2d(self.stem(x), self.standardise(self.conv.weight), self.conv.bias)))


class Branching(nn.Module):
    """The forward asks for values, which fake tensors cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = unit(3, 12), unit(12, 9), unit(12, 9), Head(9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.a(x) if float(x.abs().mean()) >= 0 else self.b(x))


def outer_halves(m: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    a, z = x.view(b, 2, c // 2, h, w).unbind(1)
    return a * z


def inner_halves(m: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return (x.view(b, c // 2, 2, h, w) * m.pair.view(1, 1, 2, 1, 1)).sum(2)


def transpose_added(m: Any, x: Tensor) -> Tensor:
    x = F.interpolate(x, (12, 12))
    return x + x.transpose(1, 2)


def half_activated(m: Any, x: Tensor) -> Tensor:
    """Halves by a slice, not by chunk: nothing says that they stay equal."""
    k = x.shape[1] // 2
    return torch.cat([x[:, :k] * 2, torch.sigmoid(x[:, k:])], 1)


def uneven_chunks(m: Any, x: Tensor) -> Tensor:
    return torch.cat([p * (k + 1) for k, p in enumerate(x.chunk(5, 1))], 1)


def split_by_size(m: Any, x: Tensor) -> Tensor:
    return torch.cat([p * (k + 1) for k, p in enumerate(x.split(4, 1))], 1)


def half_mask(m: Any, x: Tensor) -> Tensor:
    mask = torch.zeros(1, x.shape[1], 1, 1, dtype=x.dtype, device=x.device)
    mask[:, : x.shape[1] // 2] = 1
    return x * mask


def every_second_mask(m: Any, x: Tensor) -> Tensor:
    mask = torch.ones_like(x)
    mask[:, ::2].mul_(3)
    return x * mask


def filled(m: Any, x: Tensor) -> Tensor:
    mask = torch.ones_like(x)
    mask[:, 4:].fill_(0.5)
    return x * mask


def pixels_by_width(m: Any, x: Tensor) -> Tensor:
    return x[..., : x.shape[1] - 4]


def pooled_by_width(m: Any, x: Tensor) -> Tensor:
    k = x.shape[1] // 4
    return F.avg_pool2d(x, 2 * k + 1, 1, k)


def branch_by_width(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(x) if x.shape[1] > 10 else x


def groups_by_width(m: Any, x: Tensor) -> Tensor:
    return F.group_norm(x, x.shape[1] // 4)


def one_by_one(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for k in range(x.shape[1]):
        out = out + x[:, k:k + 1] * (k + 1)
    return out


def loop_by_width(m: Any, x: Tensor) -> Tensor:
    for _ in range(x.shape[1] // 4):
        x = F.avg_pool2d(x, 3, 1, 1)
    return x


def own_statistics(m: Any, x: Tensor) -> Tensor:
    """A norm written by hand, with statistics of its own."""
    if m.training:
        m.mean = 0.9 * m.mean + 0.1 * x.detach().mean((0, 2, 3))
    return x - m.mean.view(1, -1, 1, 1)


def sums_by_cumsum(m: Any, x: Tensor) -> Tensor:
    return x * torch.ones(x.shape[1], dtype=x.dtype, device=x.device).cumsum(0).view(1, -1, 1, 1)


def index_filled(m: Any, x: Tensor) -> Tensor:
    mask = torch.ones(1, x.shape[1], 1, 1, dtype=x.dtype, device=x.device)
    return x * mask.index_fill_(1, torch.arange(4, device=x.device), 3.0)


def index_put(m: Any, x: Tensor) -> Tensor:
    mask = torch.ones(1, x.shape[1], 1, 1, dtype=x.dtype, device=x.device)
    mask[:, torch.arange(2, 5, device=x.device)] = 3.0
    return x * mask


def masked_by_itself(m: Any, x: Tensor) -> Tensor:
    c = x.shape[1]
    mask = torch.ones(c, c, dtype=x.dtype, device=x.device).tril_().sum(1)
    return x * mask.view(1, c, 1, 1)


def even_summed(m: Any, x: Tensor) -> Tensor:
    """The mean over everything but the image, as often as there are channels."""
    return torch.tanh(x * x.mean((2, 3), keepdim=True)) * x.new_ones(1, x.shape[1], 1, 1).expand(len(x), -1, 1, 1).sum(1, True)


def accumulated(m: Any, x: Tensor) -> Tensor:
    """Written piece by piece into a list of numbers on the way."""
    parts = [x[:, k::2] * (k + 1) for k in range(2)]
    return torch.stack(parts, 2).flatten(1, 2)


def blurred(m: Any, x: Tensor) -> Tensor:
    """The same small filter on every map, made as wide as the maps are."""
    return F.conv2d(x, m.kernel.to(x.dtype).repeat(x.shape[1], 1, 1, 1), padding=1, groups=x.shape[1])


def blurred_in_part(m: Any, x: Tensor) -> Tensor:
    """The first four maps less."""
    kernel = m.kernel.to(x.dtype).expand(x.shape[1], 1, 3, 3).clone()
    kernel[:4] *= 0.5
    return F.conv2d(x, kernel, padding=1, groups=x.shape[1])


def edges(m: Any, x: Tensor) -> Tensor:
    """Two filters for each channel, one after the other."""
    return F.conv2d(x, m.kernel.to(x.dtype).repeat(x.shape[1], 1, 1, 1), padding=1, groups=x.shape[1])


def smoothed(m: Any, x: Tensor) -> Tensor:
    """One learned filter in each direction for all channels, over its sum, and a second one that doubles the channels."""
    c, kernel = x.shape[1], (m.kernel.exp() / m.kernel.exp().sum()).view(1, 1, 3)
    x = F.conv2d(x, kernel[..., None].expand(c, -1, -1, -1), torch.ones(c, dtype=x.dtype), padding=(1, 0), groups=c)
    return F.conv_transpose2d(x, kernel[:, :, None].repeat(c, 2, 1, 1), padding=(0, 1), groups=c)


def gate(m: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(m.gate(x))


def gated_twice(m: Any, x: Tensor) -> Tensor:
    """A map repeated for each channel, times its mean, expanded; the channels last."""
    wide = gate(m, x).repeat(1, x.shape[1], 1, 1) + gate(m, x).mean((2, 3), keepdim=True).expand_as(x)
    return (x.permute(0, 2, 3, 1) * wide.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def gated_coarsely(m: Any, x: Tensor) -> Tensor:
    """A map put side by side as often as there are channels, pooled and enlarged."""
    return x * F.interpolate(F.max_pool2d(torch.cat([gate(m, x)] * x.shape[1], 1), 2), scale_factor=2)


def recurrent(m: Any, x: Tensor) -> Tensor:
    """Two steps of a ConvLSTM without gates, from a state of zeros."""
    state = torch.zeros(len(x), 6, 8, 8, dtype=x.dtype, device=x.device)
    for _ in range(2):
        state = torch.tanh(m.step(torch.cat([x, state], 1)))
    return state


def modulated(m: Any, x: Tensor) -> Tensor:
    """StyleGAN2: a filter for each sample, normalised over what it reads, as one grouped convolution."""
    b, c, h, w = x.shape
    weight = m.weight * m.style(x.mean((2, 3))).view(b, 1, c, 1, 1)
    weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    return F.conv2d(x.reshape(1, b * c, h, w), weight.view(-1, c, 3, 3), padding=1, groups=b).view(b, -1, h, w)


def conditional(m: Any, x: Tensor) -> Tensor:
    """CondConv: a mixture of filters for each sample."""
    b, c, h, w = x.shape
    mixed = torch.sigmoid(m.route(x.mean((2, 3)))) @ m.experts.flatten(1)
    return F.conv2d(x.reshape(1, b * c, h, w), mixed.view(-1, c, 3, 3), padding=1, groups=b).view(b, -1, h, w)


def above_the_median(m: Any, x: Tensor) -> Tensor:
    s = x.mean((2, 3))
    return x * (s > s.median(1, keepdim=True).values)[:, :, None, None]


def written_slices(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :5] = x[:, 7:]
    y[:, 5:] = x[:, :7] * 2
    return y


def scaled_in_place(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :4] *= 3.0
    return x


def channels_as_space(m: Any, x: Tensor) -> Tensor:
    return x + F.max_pool2d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2)


def shifted(m: Any, x: Tensor) -> Tensor:
    """Part of the channels moves by a pixel (TSM, S2-MLP)."""
    k = x.shape[1] // 4
    return torch.cat([F.pad(x[:, :k, :, 1:], (0, 1)), F.pad(x[:, k:2 * k, :, :-1], (1, 0)), x[:, 2 * k:]], 1)


def gram(m: Any, x: Tensor) -> Tensor:
    """Bilinear pooling: channels against channels."""
    y = x.flatten(2)
    return (y @ y.transpose(1, 2)).unsqueeze(1).expand(-1, 12, -1, -1)


def spatial_to_batch(m: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b * 4, c, h // 2, w // 2)
    return x.view(b, 2, 2, c, h // 2, w // 2).permute(0, 3, 4, 1, 5, 2).reshape(b, c, h, w)


def channels_to_batch(m: Any, x: Tensor) -> Tensor:
    """Every map through the same filter."""
    b, c, h, w = x.shape
    kernel = torch.ones(1, 1, 3, 3, dtype=x.dtype, device=x.device) / 9
    return F.conv2d(x.reshape(b * c, 1, h, w), kernel, padding=1).view(b, c, h, w)


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The shuffle of ShuffleNetV2 as its authors wrote it."""
    b, c, h, w = x.shape
    x = x.reshape(b * c // 2, 2, h * w).permute(1, 0, 2).reshape(2, -1, c // 2, h, w)
    return x[0], x[1]


def of_fours(x: Tensor) -> Tensor:
    assert x.shape[1] % 4 == 0
    return x


def filtered(m: Any, x: Tensor) -> Tensor:
    """A filter for each channel in the frequencies (GFNet), and parts of complex numbers (fast Fourier convolution)."""
    spectrum = torch.fft.rfft2(x.permute(0, 2, 3, 1), dim=(1, 2)) * torch.view_as_complex(m.filter)
    return torch.fft.irfft2(torch.complex(spectrum.real, spectrum.imag.relu()), s=(8, 8), dim=(1, 2)).permute(0, 3, 1, 2)


def involution(m: Any, x: Tensor) -> Tensor:
    """A kernel for each pixel and each of three groups of channels, made from the channels."""
    b, c, h, w = x.shape
    kernel = m.span(x).view(b, 3, 1, 9, h, w)
    return (kernel * F.unfold(x, 3, padding=1).view(b, 3, c // 3, 9, h, w)).sum(3).view(b, c, h, w)


class TrapCase(NamedTuple):
    """A network with a trap, the groups that must be free, with their sizes, and why others are pinned (`PinReason.code`).

    `text`: an expression that one of the reasons matches. The groups of the network's outputs are not listed.
    """

    make: Callable[[], nn.Module]
    free: dict[str, int]
    pinned: Mapping[str, str] = MappingProxyType({})
    text: str = ""


def adapted(m: Any, x: Tensor) -> Tensor:
    """A low-rank change of a kernel, whose view splits rows and columns over several dimensions, each its own way."""
    return F.conv2d(x, m.conv.weight + (m.up @ m.down).view(m.conv.weight.shape), padding=1)


NEXT = {"next.0": 9}
BOTH = {"stem.0": 12, **NEXT}

# What each does to the 12 channels of the stem.
TRAPS: dict[str, TrapCase] = {
    "view_2_half": TrapCase(lambda: Trap(outer_halves, 6), {"stem.0": 6, "next.0": 9}),
    "view_half_2": TrapCase(lambda: Trap(inner_halves, 6, pair=torch.randn(2)), {"stem.0": 6, "next.0": 9}),
    "shuffle_by_3": TrapCase(lambda: Trap(lambda m, x: shuffle(x, 3)), {"stem.0": 4, "next.0": 9}),
    "shuffle_fixed_width": TrapCase(
        lambda: Trap(lambda m, x: x.view(len(x), 2, 6, 8, 8).transpose(1, 2).reshape(len(x), 12, 8, 8)),
        NEXT, {"stem.0": "fails"}, "fails when narrow"),
    "low_rank_change": TrapCase(
        lambda: Trap(adapted, 7, conv=nn.Conv2d(12, 7, 3, bias=False), down=nn.Parameter(torch.randn(6, 36)),
                     up=nn.Parameter(torch.randn(21, 6))),
        NEXT, {"stem.0": "differs", "trick.conv": "operand"}),
    "hard_coded_view": TrapCase(HardCoded, {"stem.0": 10}, {"last.0": "differs"}, "HardCoded"),
    "split_by_numbers": TrapCase(
        lambda: Trap(lambda m, x: torch.cat([x.split([5, 7], 1)[1].relu(), x.split([5, 7], 1)[0]], 1)),
        NEXT, {"stem.0": "fails"}, "split"),
    "slices_by_numbers": TrapCase(
        lambda: Trap(lambda m, x: torch.cat([x[:, 7:], x[:, :7] * 2], 1)), NEXT, {"stem.0": "differs"}),
    "first_three": TrapCase(lambda: Trap(lambda m, x: x[:, :3], 3), {"stem.0#2": 9, "next.0": 9}, {"stem.0": "differs"}),
    "one_channel": TrapCase(lambda: Trap(lambda m, x: x[:, 3:4] * x), NEXT, {"stem.0": "together"}),
    "selected_channel": TrapCase(lambda: Trap(lambda m, x: x[:, 3].unsqueeze(1) + x), NEXT, {"stem.0": "index"}, "one channel"),
    "selected_of_pairs": TrapCase(
        lambda: Trap(lambda m, x: x.view(len(x), -1, 2, 8, 8)[:, :, 0] - x.view(len(x), -1, 2, 8, 8)[:, :, 1].relu(), 6),
        {"stem.0": 6, "next.0": 9}),
    "unbound_pairs": TrapCase(
        lambda: Trap(lambda m, x: torch.cat([t * (k + 1) for k, t in enumerate(x.view(len(x), -1, 2, 8, 8).unbind(2))], 1)),
        {"stem.0": 6, "next.0": 9}),
    "unbound_halves": TrapCase(
        lambda: Trap(lambda m, x: torch.cat(x.view(len(x), 2, -1, 8, 8).flip(1).unbind(1), 1)), BOTH),
    "first_of_each_four": TrapCase(
        lambda: Trap(lambda m, x: x.view(len(x), -1, 4, 8, 8)[:, :, ::3].flatten(1, 2), 6), {"stem.0": 3, "next.0": 9}),
    "first_of_six_pairs": TrapCase(
        lambda: Trap(lambda m, x: x.view(len(x), 6, 2, 8, 8)[:, :, 0], 6), NEXT, {"stem.0": "position"}, "one channel"),
    "neighbours": TrapCase(
        lambda: Trap(lambda m, x: torch.cat([neighbours(x)[0], neighbours(x)[1].relu()], 1)), {"stem.0": 6, "next.0": 9}),
    "neighbours_of_fours": TrapCase(
        lambda: Trap(lambda m, x: torch.cat([neighbours(of_fours(x))[0], neighbours(x)[1].relu()], 1)),
        NEXT, {"stem.0": "position"}, "one channel"),
    "pairs_of_fours": TrapCase(
        lambda: Trap(lambda m, x: of_fours(x).view(len(x), -1, 2, 8, 8).softmax(2).reshape(len(x), -1, 8, 8)),
        NEXT, {"stem.0": "fails"}, "AssertionError"),
    "odd_channels": TrapCase(lambda: Trap(lambda m, x: x[:, 1::2], 6), NEXT, {"stem.0": "index", "stem.0#2": "index"}),
    "picked_by_list": TrapCase(lambda: Trap(lambda m, x: x[:, [3, 1, 2, 0]], 4), NEXT, {"stem.0": "index"}, "index"),
    "picked_by_buffer": TrapCase(
        lambda: Trap(lambda m, x: x.index_select(1, m.order), order=torch.randperm(12)), NEXT, {"stem.0": "index"}, "index"),
    "constant_added": TrapCase(lambda: Trap(lambda m, x: x + m.offset, offset=torch.randn(1, 12, 1, 1)), BOTH),
    "constant_made": TrapCase(
        lambda: Trap(lambda m, x: x + torch.arange(12.0, dtype=x.dtype).view(1, 12, 1, 1)),
        NEXT, {"stem.0": "operand"}, "cannot shrink"),
    "mask_made": TrapCase(
        lambda: Trap(lambda m, x: x.masked_fill(torch.arange(12).view(1, 12, 1, 1) > 6, 0)), NEXT, {"stem.0": "operand"}),
    "written_slices": TrapCase(lambda: Trap(written_slices), NEXT, {"stem.0": "position"}, "in place"),
    "scaled_in_place": TrapCase(lambda: Trap(scaled_in_place), {"stem.0#2": 8, "next.0": 9}, {"stem.0": "position"}),
    "shifted": TrapCase(lambda: Trap(shifted), NEXT, {"stem.0": "differs"}),
    "transpose_added": TrapCase(lambda: Trap(transpose_added), NEXT, {"stem.0": "operand"}),
    "flipped": TrapCase(lambda: Trap(lambda m, x: x + x.flip(1)), {"stem.0": 6, "next.0": 9}),
    "rolled": TrapCase(lambda: Trap(lambda m, x: x * x.roll(1, 1)), NEXT, {"stem.0": "together"}),
    "repeated": TrapCase(lambda: Trap(lambda m, x: x.repeat(1, 2, 1, 1), 24), BOTH),
    "interleaved": TrapCase(lambda: Trap(lambda m, x: x.repeat_interleave(2, 1), 24), BOTH),
    "with_itself": TrapCase(lambda: Trap(lambda m, x: torch.cat([x, x.relu(), x], 1), 36), BOTH),
    "zeros_appended": TrapCase(
        lambda: Trap(lambda m, x: torch.cat([x, torch.zeros_like(x[:, :4])], 1), 16),
        {"stem.0#2": 8, "next.0": 9}, {"stem.0": "differs"}),
    "space_to_batch": TrapCase(lambda: Trap(spatial_to_batch), BOTH),
    "channels_to_batch": TrapCase(lambda: Trap(channels_to_batch), BOTH),
    "einsum_gate": TrapCase(lambda: Trap(lambda m, x: torch.einsum("bchw,bc->bchw", x, x.mean((2, 3)))), BOTH),
    "sorted": TrapCase(lambda: Trap(lambda m, x: x.sort(1).values), NEXT, {"stem.0": "operator"}, "sort"),
    "cosine": TrapCase(lambda: Trap(lambda m, x: x * F.cosine_similarity(x, x.roll(1, 2), dim=2).unsqueeze(2)), BOTH),
    "complex": TrapCase(lambda: Trap(lambda m, x: torch.fft.rfft2(x).abs()), BOTH),
    "filtered": TrapCase(lambda: Trap(filtered, filter=nn.Parameter(torch.randn(8, 5, 12, 2))), BOTH),
    "transformed_channels": TrapCase(
        lambda: Trap(lambda m, x: torch.fft.fft(x, dim=1).real), NEXT, {"stem.0": "operator"}, "Fourier"),
    "half_activated": TrapCase(lambda: Trap(half_activated), NEXT, {"stem.0": "differs"}),
    "uneven_chunks": TrapCase(lambda: Trap(uneven_chunks), BOTH),
    "split_by_size": TrapCase(lambda: Trap(split_by_size), NEXT, {"stem.0": "differs"}),
    "half_mask": TrapCase(lambda: Trap(half_mask), NEXT, {"stem.0": "operand"}),
    "every_second_mask": TrapCase(lambda: Trap(every_second_mask), NEXT, {"stem.0": "index"}),
    "filled": TrapCase(lambda: Trap(filled), NEXT, {"stem.0": "differs"}),
    "pixels_by_width": TrapCase(lambda: Trap(pixels_by_width), NEXT, {"stem.0": "differs"}),
    "pooled_by_width": TrapCase(lambda: Trap(pooled_by_width), NEXT, {"stem.0": "differs"}),
    "branch_by_width": TrapCase(lambda: Trap(branch_by_width), NEXT, {"stem.0": "differs"}),
    "scaled_by_width": TrapCase(lambda: Trap(lambda m, x: x * x.shape[1] ** -0.5), NEXT, {"stem.0": "differs"}),
    "divided_by_width": TrapCase(lambda: Trap(lambda m, x: torch.tanh(x / x.shape[1])), NEXT, {"stem.0": "differs"}),
    "summed_then_divided": TrapCase(
        lambda: Trap(lambda m, x: x + x.sum((2, 3), keepdim=True) / x.shape[1]), NEXT, {"stem.0": "differs"}),
    "loop_by_width": TrapCase(lambda: Trap(loop_by_width), NEXT, {"stem.0": "differs"}),
    "one_by_one": TrapCase(lambda: Trap(one_by_one), NEXT, {"stem.0": "together"}),
    "made_by_cumsum": TrapCase(lambda: Trap(sums_by_cumsum), NEXT, {"stem.0": "operand"}),
    "made_by_linspace": TrapCase(
        lambda: Trap(lambda m, x: x * torch.linspace(0, 1, x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)),
        NEXT, {"stem.0": "operand"}),
    "index_filled": TrapCase(lambda: Trap(index_filled), NEXT, {"stem.0": "operand"}),
    "index_put": TrapCase(lambda: Trap(index_put), NEXT, {"stem.0": "operand"}),
    "lower_triangle": TrapCase(lambda: Trap(masked_by_itself), NEXT, {"stem.0": "operand"}),
    "even_summed": TrapCase(lambda: Trap(even_summed), NEXT, {"stem.0": "differs"}),
    "sum_of_ones": TrapCase(
        lambda: Trap(lambda m, x: x.tanh() * torch.ones(x.shape[1], dtype=x.dtype).sum()), NEXT, {"stem.0": "differs"}),
    "norm_of_ones": TrapCase(
        lambda: Trap(lambda m, x: x.tanh() / torch.ones(x.shape[1], dtype=x.dtype).norm()), NEXT, {"stem.0": "differs"}),
    "full_of_width": TrapCase(
        lambda: Trap(lambda m, x: x.tanh() / torch.full((1,), float(x.shape[1]), dtype=x.dtype)), NEXT, {"stem.0": "differs"}),
    "arange_by_width": TrapCase(  # as long as the maps are high: the counts of a norm that is cumulative along them
        lambda: Trap(lambda m, x: x / torch.arange(x.shape[1], 9 * x.shape[1], x.shape[1], dtype=x.dtype)[:, None]),
        NEXT, {"stem.0": "differs"}, "arange gets other numbers"),
    "tensor_of_width": TrapCase(
        lambda: Trap(lambda m, x: x.tanh() / torch.sqrt(torch.tensor(float(x.shape[1])))), NEXT, {"stem.0": "differs"},
        "torch.tensor makes another number from a width when narrow"),
    "new_tensor_of_width": TrapCase(
        lambda: Trap(lambda m, x: x.tanh() / x.new_tensor(x.shape[1])), NEXT, {"stem.0": "differs"}),
    "power_of_width": TrapCase(lambda: Trap(lambda m, x: x.abs().add(1) ** (1 / x.shape[1])), NEXT, {"stem.0": "differs"}),
    "added_by_width": TrapCase(
        lambda: Trap(lambda m, x: torch.add(x, x.relu(), alpha=1 / x.shape[1])), NEXT, {"stem.0": "differs"}, "other numbers"),
    "clamped_by_width": TrapCase(lambda: Trap(lambda m, x: x.clamp(max=x.shape[1] / 24)), NEXT, {"stem.0": "differs"}),
    "rolled_flat": TrapCase(lambda: Trap(lambda m, x: x + x.roll(1)), NEXT, {"stem.0": "operator"}),
    "rolled_by_width": TrapCase(lambda: Trap(lambda m, x: x + x.roll(x.shape[1] // 4, 2)), NEXT, {"stem.0": "differs"}),
    "even_channels": TrapCase(lambda: Trap(lambda m, x: x[:, ::2], 6), NEXT, {"stem.0": "index", "stem.0#2": "index"}),
    "every_second_turn": TrapCase(lambda: Trap(accumulated), NEXT, {"stem.0": "index"}),
    "last_four": TrapCase(lambda: Trap(lambda m, x: x[:, -4:], 4), {"stem.0": 8, "next.0": 9}, {"stem.0#2": "differs"}),
    "padded_and_cut": TrapCase(
        lambda: Trap(lambda m, x: F.pad(x, (0, 0, 0, 0, 2, -2))), {"stem.0": 10, "next.0": 9}, {"stem.0#2": "differs"}),
    "padded_by_width": TrapCase(
        lambda: Trap(lambda m, x: F.pad(x, (0, 0, 0, 0, 0, x.shape[1] // 2)), 18), NEXT, {"stem.0": "differs"}),
    "doubled_and_cut": TrapCase(lambda: Trap(lambda m, x: torch.cat([x, x], 1)[:, 6:18]), NEXT, {"stem.0": "differs"}),
    "meshed": TrapCase(
        lambda: Trap(lambda m, x: torch.cat([x, torch.linspace(-1, 1, 8).view(1, 1, 1, 8).expand(len(x), 1, 8, 8)
                                             .to(x.dtype)], 1), 13), BOTH),
    "looked_up": TrapCase(
        lambda: Trap(lambda m, x: x * m.table(torch.arange(2)).sum(0).view(1, -1, 1, 1), table=nn.Embedding(5, 12)), BOTH),
    "looked_up_by_channel": TrapCase(
        lambda: Trap(lambda m, x: x * m.table(torch.arange(x.shape[1])).view(1, -1, 1, 1), table=nn.Embedding(12, 1)),
        NEXT, {"stem.0": "operand"}),
    "blurred": TrapCase(lambda: Trap(blurred, kernel=torch.rand(1, 1, 3, 3)), BOTH),
    "blurred_by_ones": TrapCase(
        lambda: Trap(lambda m, x: F.conv2d(x, x.new_ones(x.shape[1], 1, 3, 3) / 9, groups=x.shape[1])), BOTH),
    "blurred_at_fixed_width": TrapCase(
        lambda: Trap(lambda m, x: F.conv2d(x, m.kernel.expand(12, 1, 3, 3), groups=12), kernel=torch.rand(1, 1, 3, 3)),
        NEXT, {"stem.0": "fails"}),
    "blurred_in_part": TrapCase(lambda: Trap(blurred_in_part, kernel=torch.rand(1, 1, 3, 3)), NEXT, {"stem.0": "operand"}),
    "smoothed": TrapCase(lambda: Trap(smoothed, 24, kernel=nn.Parameter(torch.randn(3))), BOTH),
    "gated_twice": TrapCase(lambda: Trap(gated_twice, gate=nn.Conv2d(12, 1, 1)), BOTH, {"trick.gate": "together"}),
    "gated_coarsely": TrapCase(lambda: Trap(gated_coarsely, gate=nn.Conv2d(12, 1, 1)), BOTH, {"trick.gate": "together"}),
    "gated_in_part": TrapCase(
        lambda: Trap(lambda m, x: x * torch.cat([gate(m, x).repeat(1, x.shape[1], 1, 1)[:, 4:], x[:, :4]], 1),
                     gate=nn.Conv2d(12, 1, 1)), NEXT, {"stem.0": "padding", "stem.0#2": "padding", "trick.gate": "together"}),
    "summed_by_product": TrapCase(
        lambda: Trap(lambda m, x: x.tanh() * (gate(m, x).mean((2, 3)).expand(-1, x.shape[1])
                                              @ x.new_ones(x.shape[1], 1)).view(-1, 1, 1, 1),
                     gate=nn.Conv2d(12, 1, 1)), NEXT, {"stem.0": "differs", "trick.gate": "together"}),
    "summed_ones_by_product": TrapCase(
        lambda: Trap(lambda m, x: x.tanh() * (x.new_ones(1, x.shape[1]) @ x.new_ones(x.shape[1], 1))),
        NEXT, {"stem.0": "differs"}),
    "summed_by_convolution": TrapCase(
        lambda: Trap(lambda m, x: x.tanh() * F.conv2d(gate(m, x).expand_as(x), x.new_ones(1, x.shape[1], 1, 1)),
                     gate=nn.Conv2d(12, 1, 1)), NEXT, {"stem.0": "differs", "trick.gate": "together"}),
    "summed_beside_the_channels": TrapCase(
        lambda: Trap(lambda m, x: x.tanh() * x.mean((2, 3)).unsqueeze(2).expand(-1, -1, x.shape[1]).sum(2)[..., None, None]),
        NEXT, {"stem.0": "differs"}),
    "recurrent": TrapCase(
        lambda: Trap(recurrent, 6, step=nn.Conv2d(18, 6, 3, padding=1)), BOTH, {"trick.step": "padding"}, "first state"),
    "edges": TrapCase(lambda: Trap(edges, 24, kernel=torch.randn(2, 1, 3, 3)), NEXT, {"stem.0": "together"}),
    "blurred_by_buffer": TrapCase(
        lambda: Trap(lambda m, x: F.conv2d(x, m.kernel, padding=1, groups=len(m.kernel)), kernel=torch.rand(12, 1, 3, 3)),
        BOTH),
    "conditional": TrapCase(
        lambda: Trap(conditional, 7, route=nn.Linear(12, 3), experts=nn.Parameter(torch.randn(3, 7, 12, 3, 3))),
        {"trick.route": 3, "next.0": 9},
        {"stem.0": "differs", "trick": "differs", "trick#2": "position", "trick#3": "position"}),
    "circular": TrapCase(
        lambda: Trap(lambda m, x: m.conv(x), 7, conv=nn.Conv2d(12, 7, 3, padding=1, padding_mode="circular")),
        {"trick.conv": 7, "next.0": 9}, {"stem.0": "position"}),
    "reflected": TrapCase(
        lambda: Trap(lambda m, x: m.conv(x), 7, conv=nn.Conv2d(12, 7, 3, padding=1, padding_mode="reflect")),
        {"stem.0": 12, "trick.conv": 7, "next.0": 9}),
    "channel_shuffle_module": TrapCase(
        lambda: chain(unit(3, 12), nn.ChannelShuffle(3), unit(12, 9), Head(9)), {"0.0": 4, "2.0": 9}),
    "batch_statistics": TrapCase(
        lambda: chain(unit(3, 12), nn.BatchNorm2d(12, track_running_stats=False), unit(12, 9), Head(9)), {"0.0": 12, "2.0": 9}),
    "norm_of_vectors": TrapCase(
        lambda: chain(unit(3, 12), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 5)), {"0.0": 12}),
    "tensordot": TrapCase(
        lambda: Trap(lambda m, x: torch.tensordot(x, m.fc.weight, ([1], [1])).permute(0, 3, 1, 2), 7,
                     fc=nn.Linear(12, 7, bias=False)), {"stem.0": 12, "trick.fc": 7, "next.0": 9}),
    "above_the_median": TrapCase(lambda: Trap(above_the_median), NEXT, {"stem.0": "operator"}),
    "dropped_channels": TrapCase(
        lambda: chain(unit(3, 12), nn.Dropout2d(0.2), nn.AlphaDropout(0.1), unit(12, 9), Head(9)), {"0.0": 12, "3.0": 9}),
    "modulated": TrapCase(
        lambda: Trap(modulated, 7, style=nn.Linear(12, 12), weight=nn.Parameter(torch.randn(1, 7, 12, 3, 3))),
        {"stem.0": 12, "trick": 7, "next.0": 9}),
    "own_statistics": TrapCase(lambda: Trap(own_statistics, mean=torch.zeros(12)), BOTH),
    "view_minus_one_4": TrapCase(lambda: Trap(lambda m, x: x.view(len(x), -1, 4, 8, 8).sum(2), 3), {"stem.0": 3, "next.0": 9}),
    "view_4_minus_one": TrapCase(lambda: Trap(lambda m, x: x.view(len(x), 4, -1, 8, 8).sum(1), 3), {"stem.0": 3, "next.0": 9}),
    "softmax_of_pairs": TrapCase(
        lambda: Trap(lambda m, x: x.view(len(x), -1, 2, 8, 8).softmax(2).reshape(len(x), -1, 8, 8)),
        {"stem.0": 6, "next.0": 9}),
    "instance_norm": TrapCase(
        lambda: chain(unit(3, 12), nn.InstanceNorm2d(12, affine=True), unit(12, 9), Head(9)), {"0.0": 12, "2.0": 9}),
    "instance_statistics": TrapCase(
        lambda: chain(unit(3, 12), nn.InstanceNorm2d(12, affine=True, track_running_stats=True), Head(12)), {"0.0": 12}),
    "channels_last_flatten": TrapCase(
        lambda: Trap(lambda m, x: m.fc(x.permute(0, 2, 3, 1).flatten(1))[:, :, None, None], 6, fc=nn.Linear(768, 6)),
        {"stem.0": 12, "trick.fc": 6, "next.0": 9}),
    "rows_of_channels": TrapCase(
        lambda: Trap(lambda m, x: m.fc(x.transpose(1, 2).reshape(len(x), 8, -1)).transpose(1, 2).unsqueeze(3), 6,
                     fc=nn.Linear(96, 6)), {"stem.0": 12, "trick.fc": 6, "next.0": 9}),
    "sliced_weight": TrapCase(
        lambda: Trap(lambda m, x: F.conv2d(x, m.conv.weight[:9, :12]), 9, conv=nn.Conv2d(16, 14, 1, bias=False)),
        NEXT, {"stem.0": "differs"}),
    "einsum_weight": TrapCase(
        lambda: Trap(lambda m, x: torch.einsum("bchw,dc->bdhw", x, m.fc.weight), 7, fc=nn.Linear(12, 7, bias=False)),
        {"stem.0": 12, "trick.fc": 7, "next.0": 9}),
    "positions": TrapCase(lambda: Trap(lambda m, x: x + m.table, table=torch.randn(1, 12, 8, 8)), BOTH),
    "unfolded": TrapCase(
        lambda: Trap(lambda m, x: F.unfold(x, 3, padding=1).view(len(x), -1, 8, 8), 108), BOTH),
    "unfolded_and_folded": TrapCase(
        lambda: Trap(lambda m, x: F.fold(F.unfold(x, 3, padding=1).relu(), (8, 8), 3, padding=1)), BOTH),
    "folded": TrapCase(
        lambda: Trap(lambda m, x: F.fold(x[..., ::2, ::2].flatten(2), (8, 8), 2, stride=2), 3), {"stem.0": 3, "next.0": 9}),
    "involution": TrapCase(
        lambda: Trap(involution, span=nn.Conv2d(12, 27, 1)),
        {"stem.0": 12, "next.0": 9}, {"trick.span": "operand"}),
    "windows": TrapCase(lambda: Trap(lambda m, x: x.unfold(2, 2, 2).unfold(3, 3, 2).amax((4, 5))), BOTH),
    "sorted_rows": TrapCase(lambda: Trap(lambda m, x: x.sort(3, descending=True)[0] + x.cummax(2)[0]), BOTH),
    "largest_pixels": TrapCase(
        lambda: Trap(lambda m, x: x * x.flatten(2).topk(3)[0].mean(2)[:, :, None, None]
                     - x.flatten(2).median(2, keepdim=True)[0][..., None]), BOTH),
    "places_of_the_largest": TrapCase(
        lambda: Trap(lambda m, x: x * (x.flatten(2).topk(3)[1].sum(2) % 3)[:, :, None, None]), BOTH),
    "diagonal": TrapCase(
        lambda: Trap(lambda m, x: (torch.diag_embed(x.mean((2, 3))) @ x.flatten(2)).view(x.shape)), BOTH),
    "spectral_norm": TrapCase(
        lambda: Trap(lambda m, x: F.conv2d(x, m.weight / torch.dot(m.u, m.weight.flatten(1) @ m.v)), 7,
                     weight=nn.Parameter(torch.randn(7, 12, 1, 1)), u=torch.randn(7), v=torch.randn(12)),
        BOTH, {"trick": "operator"}, "spectral norm"),
    "lstm": TrapCase(
        lambda: Trap(lambda m, x: m.rnn(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).unsqueeze(3), 7,
                     rnn=nn.LSTM(12, 7, batch_first=True)), NEXT, {"stem.0": "fails", "trick.rnn": "operator"}, "gates"),
    "gathered": TrapCase(lambda: Trap(lambda m, x: x.gather(1, x.argsort(1))), NEXT, {"stem.0": "operator"}),
    "topk": TrapCase(lambda: Trap(lambda m, x: x.topk(6, 1).values, 6), NEXT, {"stem.0": "operator"}, "topk"),
    "scattered": TrapCase(
        lambda: Trap(lambda m, x: torch.zeros_like(x).scatter(1, x.argmax(1, keepdim=True), 1.0) * x),
        NEXT, {"stem.0": "index"}, "argmax"),
    "smallest": TrapCase(lambda: Trap(lambda m, x: x * (x.argmin(1, keepdim=True) != 3)), NEXT, {"stem.0": "index"}, "argmin"),
    "number_of_the_largest": TrapCase(
        lambda: Trap(lambda m, x: x * (x.max(1, keepdim=True)[1] != 3)), NEXT, {"stem.0": "index"}, "maximum"),
    "bilinear": TrapCase(
        lambda: Trap(lambda m, x: m.both(x.mean((2, 3)), x.amax((2, 3)))[:, :, None, None], 6, both=nn.Bilinear(12, 12, 6)),
        NEXT, {"stem.0": "operator"}, "trilinear"),
    "checkpointed": TrapCase(
        lambda: Trap(lambda m, x: checkpoint.checkpoint(m.inner, x, use_reentrant=False), 7, inner=unit(12, 7)),
        {"stem.0": 12, "trick.inner.0": 7, "next.0": 9}),
    "training_only": TrapCase(TrainingOnly, {"stem.0": 12, "next.0": 9, "aux.0": 8}),
    "scaled_in_training": TrapCase(
        lambda: Trap(lambda m, x: x * m.scale if m.training else x, scale=torch.rand(1, 12, 1, 1)), BOTH),
    "constant_in_training": TrapCase(
        lambda: Trap(lambda m, x: x * torch.arange(12, device=x.device).view(-1, 1, 1) if m.training else x),
        NEXT, {"stem.0": "operand"}),
    "width_in_training": TrapCase(lambda: Trap(lambda m, x: x / x.shape[1] if m.training else x), NEXT, {"stem.0": "differs"}),
    "tied_fault": TrapCase(TiedFault, {"stem.0": 12, "b.0": 6, "grouped.0": 8}, {"a.0": "differs"}, "TiedFault"),
    "own_weights": TrapCase(OwnWeights, {"weight": 9, "stem.0": 12}),
    "branching": TrapCase(Branching, {"stem.0": 12, "a.0": 9}),
}

# Layers that mix the channels: inexact, and pinned with allow_inexact=False.
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "softmax": lambda: Trap(lambda m, x: x.softmax(1)),
    "mean": lambda: Trap(lambda m, x: x * x.mean(1, keepdim=True)),
    "max": lambda: Trap(lambda m, x: x - x.amax(1, keepdim=True)),
    "max_and_min": lambda: Trap(lambda m, x: x - x.max(1, keepdim=True)[0] - x.min(1, keepdim=True)[0]),
    "normalize": lambda: Trap(lambda m, x: F.normalize(x, dim=1)),
    "group_norm": lambda: chain(unit(3, 12), nn.GroupNorm(3, 12), unit(12, 9), Head(9)),
    "layer_norm": lambda: chain(unit(3, 12), Last(nn.LayerNorm(12)), unit(12, 9), Head(9)),
    "channels_as_space": lambda: Trap(channels_as_space),
    "cumsum": lambda: Trap(lambda m, x: x.cumsum(1)),
    "groups_by_width": lambda: Trap(groups_by_width),
    "local_response": lambda: chain(unit(3, 12), nn.LocalResponseNorm(3), unit(12, 9), Head(9)),
    "maps_norm": lambda: chain(unit(3, 12), nn.LayerNorm([12, 8, 8]), unit(12, 9), Head(9)),
    "attention": lambda: Trap(
        lambda m, x: m.att(*[x.flatten(2).transpose(1, 2)] * 3)[0].transpose(1, 2).reshape(x.shape),
        att=nn.MultiheadAttention(12, 3, batch_first=True)),
    "gram": lambda: Trap(gram),
    "spatial_attention": lambda: Trap(
        lambda m, x: x * torch.sigmoid(m.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))),
        conv=nn.Conv2d(2, 1, 3, padding=1)),
    "channel_attention": lambda: Trap(
        lambda m, x: x * torch.sigmoid(m.conv(x.mean((2, 3)).unsqueeze(1))).squeeze(1)[:, :, None, None],
        conv=nn.Conv1d(1, 1, 3, padding=1)),
    "spread": lambda: Trap(lambda m, x: x / (1 + x.var(1, keepdim=True))),
    "everything": lambda: Trap(lambda m, x: x / (1 + x.abs().mean())),
}


class Last(nn.Module):
    """A layer that works on the last dimension."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Blurred(nn.Module):
    """Anti-aliasing: a buffer made for so many channels."""

    kernel: Tensor

    def __init__(self, c: int) -> None:
        super().__init__()
        self.channels = c
        self.register_buffer("kernel", torch.full((c, 1, 3, 3), 1 / 9), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, stride=2, padding=1, groups=self.channels)
