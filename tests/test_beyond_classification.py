"""Detection, segmentation, video, optical flow, sound, generators, several inputs: traced, narrowed and verified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrower

torchvision = pytest.importorskip("torchvision")
NO_WEIGHTS: dict[str, Any] = {"weights": None, "weights_backbone": None}
DETECTORS = ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"]


def halved(model: nn.Module, inputs: Any, **options: Any) -> tuple[narrower.Graph, narrower.Plan, nn.Module]:
    """The network with half of its free channels, verified."""
    graph = narrower.trace(model, inputs)
    plan = narrower.plan(graph, narrower.random(graph), remove=0.5)
    small = narrower.narrow(model, plan)
    narrower.verify(model, small, plan, inputs, **options)
    return graph, plan, small


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_narrow_though_their_forward_asks_for_values(name: str) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=7, **NO_WEIGHTS).eval()
    images = ([torch.rand(3, 96, 128), torch.rand(3, 128, 96)],)
    graph, plan, small = halved(model, images)
    assert plan.params[1] < 0.4 * plan.params[0]
    pinned = [g for g in graph if not g.free]
    assert sum(g.size for g in pinned) < 0.05 * sum(g.size for g in graph), [g.pinned for g in pinned]
    small.train()
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 60.0, 60.0]]), "labels": torch.tensor([1])} for _ in images[0]]
    losses = small(images[0], targets)
    sum(losses.values()).backward()
    assert all(bool(v.isfinite()) for v in losses.values())


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "fcn_resnet50"])
def test_segmentation_narrows(name: str) -> None:
    torch.manual_seed(0)
    aux = {"aux_loss": True} if name.startswith("fcn") else {}
    model = torchvision.models.get_model(name, num_classes=7, **NO_WEIGHTS, **aux).eval()
    _, plan, small = halved(model, torch.rand(2, 3, 64, 64))
    assert plan.params[1] < 0.3 * plan.params[0]
    assert small(torch.rand(1, 3, 64, 64))["out"].shape == (1, 7, 64, 64)


def test_video_networks_narrow() -> None:
    torch.manual_seed(0)
    _, plan, _ = halved(torchvision.models.video.mc3_18(num_classes=7).eval(), torch.rand(2, 3, 4, 32, 32))
    assert plan.params[1] < 0.3 * plan.params[0]


def test_optical_flow_narrows() -> None:
    """RAFT asks for 96 hidden channels by name: that much stays, and the rest narrows."""
    torch.manual_seed(0)
    frames = {"image1": torch.rand(1, 3, 128, 128), "image2": torch.rand(1, 3, 128, 128), "num_flow_updates": 2}
    graph, plan, _ = halved(torchvision.models.optical_flow.raft_small().eval(), frames, dtype=None)
    assert plan.params[1] < 0.65 * plan.params[0]
    assert any("96" in str(g.pinned) for g in graph)


class Sound(nn.Module):
    """Raw audio: a strided 1-D stem, dilated residual blocks, attention pooling over time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(1, 16, 9, 4, 4), nn.BatchNorm1d(16), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(16, 24, 3, padding=d, dilation=d), nn.BatchNorm1d(24), nn.GELU(), nn.Conv1d(24, 16, 1))
            for d in (1, 2, 4))
        self.attend = nn.Conv1d(16, 1, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        weight = self.attend(x).softmax(-1)
        mean = (x * weight).sum(-1)
        return self.head(torch.cat([mean, x.amax(-1)], 1))


class Generator(nn.Module):
    """Noise to an image: a linear layer viewed as maps, transposed convolutions, PixelShuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(12, 32 * 4 * 4)
        self.up = nn.Sequential(nn.BatchNorm2d(32), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.wide = nn.Conv2d(16, 32, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.start(z)
        x = self.up(x.view(len(z), -1, 4, 4))
        return self.out(self.shuffle(self.wide(x)).relu()).tanh()


class TwoViews(nn.Module):
    """An image and a vector; the vector modulates the maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SyncBatchNorm(16), nn.ReLU())
        self.scale, self.shift = nn.Linear(6, 16), nn.Linear(6, 16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        x = self.conv(image)
        x = x * self.scale(vector)[:, :, None, None] + self.shift(vector)[:, :, None, None]
        return self.head(x).mean((2, 3))


OTHERS: dict[str, tuple[Callable[[], nn.Module], Any, float]] = {
    "sound": (Sound, torch.randn(3, 1, 256), 0.35),
    "generator": (Generator, torch.randn(3, 12), 0.35),
    "two_views": (TwoViews, (torch.randn(3, 3, 8, 8), torch.randn(3, 6)), 0.6),
}


@pytest.mark.parametrize("name", OTHERS)
def test_sound_generators_and_two_inputs_narrow(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, share = OTHERS[name]
    _, plan, _ = halved(make().eval(), inputs)
    assert plan.params[1] < share * plan.params[0]


class Stateful(nn.Module):
    """Keeps a tensor that it made in the first forward, as anchor generators do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)
        self.grid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device) / 8
        return self.head(self.conv(x).relu() + self.grid)


def test_what_a_forward_stores_does_not_confuse_the_next_one() -> None:
    model = Stateful().eval()
    graph, _, _ = halved(model, torch.randn(2, 3, 8, 8))
    assert [g.name for g in graph.free] == ["conv"]


CALLS: list[int] = []  # kept where no copy of a module holds it


class Restless(nn.Module):
    """Another number at each call, whatever is narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(1)
        return self.head(self.conv(x) * float(len(CALLS)))


def test_a_forward_that_does_not_repeat_itself_is_refused() -> None:
    with pytest.raises(narrower.TraceError, match="does not do the same twice"):
        narrower.trace(Restless().eval(), torch.randn(2, 3, 8, 8))


class Masked(nn.Module):
    """A different number of positions for other values; a branch on the data; a count that becomes a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean(1) > 0
        x = self.conv(x).movedim(1, -1)
        out = torch.zeros_like(x)
        out[bright] = x[bright].relu() if int(bright.sum()) > 3 else x[bright]
        return self.head(out.sum((1, 2)) / bright.sum().item())


def test_masks_and_branches_are_taken_as_they_were() -> None:
    graph, _, _ = halved(Masked().eval(), torch.randn(2, 3, 8, 8))
    assert [g.name for g in graph.free] == ["conv"]


class Whitening(nn.Module):
    """Asks for a value, and inverts a matrix that would be singular if the values were zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        pixels = torch.relu(x + 1).flatten(2)
        inverse = torch.linalg.inv(pixels @ pixels.mT + torch.eye(3, dtype=x.dtype) * (x.abs().max().item() > 0) * 0.1)
        return self.head(self.conv((inverse @ pixels).view_as(x)).relu())


def test_where_zeros_will_not_do_values_are_used() -> None:
    graph, _, _ = halved(Whitening().eval(), torch.randn(2, 3, 8, 8))
    assert [g.name for g in graph.free] == ["conv"]


class Caching(nn.Module):
    """Keeps what it has computed in a dictionary, as LeViT its position biases: the second forward runs other operators."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 12, 3), nn.Linear(12, 4)
        self.scale = nn.Parameter(torch.ones(2))
        self.cache: dict[str, Any] = {}
        self.order: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.cache:
            self.cache["scale"] = self.scale.exp().sum()
            self.order.append(1)
        return self.head(self.conv(x).relu().mean((2, 3)) * self.cache["scale"])


def test_what_a_forward_caches_does_not_change_the_next() -> None:
    model = Caching().eval()
    x = torch.randn(2, 3, 8, 8)
    graph = narrower.trace(model, x)
    assert [g.name for g in graph.free] == ["conv"]
    assert not model.cache
    assert not model.order
    plan = narrower.plan(graph, narrower.random(graph), remove=0.5)
    assert narrower.verify(model, narrower.narrow(model, plan), plan, x).error < 1e-12


class Hooking(nn.Module):
    """Hangs a hook onto its convolution in the first forward, as transformers' models do to collect hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.hooked = nn.Conv2d(3, 12, 3), nn.Linear(12, 4), False
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.hooked:
            self.conv.register_forward_hook(lambda module, args, out: self.seen.append(out))
            self.hooked = True
        self.seen = []
        return self.head(self.conv(x).relu().mean((2, 3))) + sum(t.mean() for t in self.seen)


def test_hooks_that_a_forward_registers_are_taken_away_again() -> None:
    model = Hooking().eval()
    assert "output" in str(narrower.trace(model, torch.randn(2, 3, 8, 8))["head"].pinned)
    assert not model.conv._forward_hooks


class Forgetting(nn.Module):
    """Keeps a table of its channels until it is trained, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.offset = nn.Conv2d(3, 12, 3), nn.Linear(12, 4), nn.Parameter(torch.randn(12))
        self.cache: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> Forgetting:
        if mode:
            self.cache = {}
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        offset = self.cache.setdefault("offset", self.offset.detach() * 2).view(1, -1, 1, 1)
        return self.head((self.conv(x) + offset).relu().mean((2, 3)))


def test_a_model_that_was_run_before_is_narrowed_without_what_it_keeps() -> None:
    model = Forgetting().eval()
    x = torch.randn(2, 3, 8, 8)
    model(x)
    graph = narrower.trace(model, x)
    assert [g.name for g in graph.free] == ["conv"]
    plan = narrower.plan(graph, narrower.random(graph), remove=0.5)
    small = narrower.narrow(model, plan)
    assert narrower.verify(model, small, plan, x).error < 1e-12
    assert model.cache and not model.training and not small.training
