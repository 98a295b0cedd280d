"""hrank against a slow one written by hand: every forward spelt out, one `torch.linalg.matrix_rank` for each map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support import networks
from support.networks import IMAGES, PATTERNS, Head, Plain, chain, images, unit
from torch import Tensor, nn

import narrower
from narrower.scores.hrank import Averages, scores_of


class Read(NamedTuple):
    """A tensor, how many layers read it, and whose channels it holds, in order: (group, how many)."""

    maps: Tensor
    consumers: int
    channels: Sequence[tuple[str, int]]


def slow(reads: Sequence[Read]) -> dict[str, Tensor]:
    """The average rank of each channel's maps, over images and consumers."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for maps, consumers, channels in reads:
        at = 0
        for group, n in channels:
            ranks = [[float(torch.linalg.matrix_rank(m)) for m in image[at:at + n]] for image in maps]
            sums[group] = sums.get(group, torch.zeros(n)) + consumers * torch.tensor(ranks).mean(0)
            counts[group] = counts.get(group, 0) + consumers
            at += n
        assert at == maps.shape[1]
    return {g: s / counts[g] for g, s in sums.items()}


def plain(m: Any, x: Tensor) -> list[Read]:
    a = F.relu(m.bn1(m.conv1(x)))
    b = torch.sigmoid(m.conv2(a))  # before the pooling
    c = F.silu(m.bn3(m.conv3(F.max_pool2d(b, 2))))
    return [Read(a, 1, [("conv1", 10)]), Read(b, 1, [("conv2", 14)]), Read(c, 1, [("conv3", 12)])]


def residual(m: Any, x: Tensor) -> list[Read]:
    a = m[0](x)
    inner = m[1].conv1(a)
    b = F.relu(m[1].conv2(inner) + a)
    second = m[2].conv1(b)
    c = F.relu(m[2].conv2(second) + m[2].project(b))
    return [Read(a, 1, [("0.0", 8)]), Read(inner, 1, [("1.conv1.0", 6)]), Read(b, 2, [("0.0", 8)]),
            Read(second, 1, [("2.conv1.0", 10)]), Read(c, 1, [("2.conv2.0", 14)])]


def dense(m: Any, x: Tensor) -> list[Read]:
    """Pre-activation: each consumer has a BatchNorm of its own."""
    owners, out = [("0.0", 6)], []
    x = m[0](x)
    for k in range(3):
        y = F.relu(m[1].norms[k](x))
        out.append(Read(y, 1, list(owners)))
        x = torch.cat([x, m[1].convs[k](y)], 1)
        owners.append((f"1.convs.{k}", 4 + k))
    return [*out, Read(x, 1, owners), Read(m[2](x), 1, [("2.0", 7)])]


def depthwise(m: Any, x: Tensor) -> list[Read]:
    a = m[0](x)
    e = m[1].expand(a)
    d = m[1].depth(e)
    b = a + m[1].project(d)
    return [Read(a, 1, [("0.0", 7)]), Read(e, 1, [("1.expand.0", 12)]), Read(d, 1, [("1.expand.0", 12)]),
            Read(b, 1, [("0.0", 7)]), Read(m[2](b)[:, 0::2], 1, [("0.0", 7)]), Read(m[2](b)[:, 1::2], 1, [("0.0", 7)])]


def squeeze_excite(m: Any, x: Tensor) -> list[Read]:
    """The gate pools what it reads; what it makes are single numbers."""
    a = m[0](x)
    squeezed = F.relu(m[1].fc1(F.adaptive_avg_pool2d(a, 1)))
    b = m[1](a)
    c = m[2](b)
    return [Read(a, 1, [("0.0", 8)]), Read(squeezed, 1, [("1.fc1", 5)]), Read(b, 1, [("0.0", 8)]),
            Read(c, 1, [("2.0", 9)]), Read(m[3](c), 1, [("2.0", 9)])]


def unet(m: Any, x: Tensor) -> list[Read]:
    a = m.down1(x)
    b = m.down2(F.max_pool2d(a, 2))
    c = m.bottom(F.max_pool2d(b, 2))
    skip = torch.cat([b, m.up2(c)], 1)
    d = m.join2(skip)
    last = torch.cat([m.up1(d), a], 1)
    e = m.join1(last)
    return [Read(a, 1, [("down1.0", 6)]), Read(b, 1, [("down2.0", 10)]), Read(c, 1, [("bottom.0", 14)]),
            Read(skip, 1, [("down2.0", 10), ("up2", 9)]), Read(d, 1, [("join2.0", 11)]),
            Read(last, 1, [("up1", 7), ("down1.0", 6)]), Read(e, 1, [("join1.0", 8)])]


def inception(m: Any, x: Tensor) -> list[Read]:
    a = m[0](x)
    bottleneck = m[1].b[0](a)
    y = m[1](a)
    # read by two 1x1 convolutions, and by a pooling that a third reads
    return [Read(a, 3, [("0.0", 8)]), Read(bottleneck, 1, [("1.b.0.0", 4)]),
            Read(y, 1, [("1.c.1.0", 7), ("1.a.0", 5), ("1.b.1.0", 6)]), Read(m[2](y), 1, [("2.0", 9)])]


BY_HAND: dict[str, Callable[[Any, Tensor], list[Read]]] = {
    "plain": plain, "residual": residual, "dense": dense, "depthwise": depthwise, "squeeze_excite": squeeze_excite,
    "unet": unet, "inception": inception,
}


def batches(n: int = 3, size: int = 4, seed: int = 0) -> list[Tensor]:
    """Images that are smooth in part, so that ranks differ."""
    out = []
    for k in range(n):
        coarse = images(size=2, batch=size, seed=seed + k)
        out.append(F.interpolate(coarse, size=8) + 0.1 * images(batch=size, seed=k).round())
    return out


def lively(model: nn.Module) -> nn.Module:
    """Biases such that some maps are mostly zero."""
    g = torch.Generator().manual_seed(1)
    for n, p in model.named_parameters():
        if p.ndim == 1 and n.endswith("bias"):
            p.data = torch.randn(p.shape, generator=g)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", BY_HAND)
def test_ranks_are_those_of_the_slow_way(name: str) -> None:
    case = PATTERNS[name]
    model = lively(case.make()).eval()
    graph = narrower.trace(model, case.inputs)
    found = narrower.hrank(model, graph, batches())
    want = slow(BY_HAND[name](model, torch.cat(batches())))
    assert set(want) <= set(found) and set(found) - set(want) <= {"3.fc1"}, "a linear layer reads no maps"
    for g, ranks in want.items():
        assert torch.allclose(found[g], ranks, atol=1e-5), g
    assert max(float(s.std()) for s in found.values()) > 0.1, "all ranks alike: this shows nothing"


@torch.no_grad()
def test_of_a_weight_that_several_convolutions_have_each_reads_its_own_maps() -> None:
    """A decoder by the encoder's weights: they read one group there and make it here."""
    def forward(m: Any, x: Tensor) -> Tensor:
        back = F.relu(F.conv_transpose2d(F.relu(m.second(F.relu(m.first(x)))), m.second.weight, padding=1))
        return F.conv_transpose2d(back, m.first.weight, padding=1)

    layers = {"first": nn.Conv2d(3, 9, 3, padding=1), "second": nn.Conv2d(9, 9, 3, padding=1)}
    model = lively(networks.Trick(forward, layers)).eval()
    found = narrower.hrank(model, narrower.trace(model, IMAGES), batches())
    net: Any = model
    a = F.relu(net.first(torch.cat(batches())))
    b = F.relu(net.second(a))
    c = F.relu(F.conv_transpose2d(b, net.second.weight, padding=1))
    want = slow([Read(a, 1, [("first", 9)]), Read(b, 1, [("second", 9)]), Read(c, 1, [("first", 9)])])
    assert found.keys() == want.keys() and all(torch.allclose(found[name], ranks, atol=1e-5) for name, ranks in want.items())


@torch.no_grad()
@pytest.mark.parametrize("name", networks.STANDARDISED)
def test_what_a_convolution_with_a_computed_weight_reads(name: str) -> None:
    model = lively(chain(networks.Standardised(networks.STANDARDISED[name]))).eval()
    found = narrower.hrank(model, narrower.trace(model, IMAGES), batches())
    x = torch.cat(batches())
    net: Any = next(model.children())
    maps = F.relu(F.conv2d(net.stem(x), net.standardise(net.conv.weight), net.conv.bias))
    want = slow([Read(net.stem(x), 1, [("0.stem.0", 12)]), Read(maps, 1, [("0.conv", 9)])])
    assert found.keys() == {"0.stem.0", "0.conv"}
    assert torch.allclose(found["0.stem.0"], want["0.stem.0"], atol=1e-5)
    assert torch.allclose(found["0.conv"], want["0.conv"], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("last", [nn.Flatten(), nn.Conv2d(6, 4, 1)])
def test_where_poolings_follow_each_other_the_map_is_what_enters_the_last(last: nn.Module) -> None:
    """As in max_pool -> relu -> global average: neither what enters the first, nor the single pixels that the layer reads."""
    head = [last, nn.Linear(6, 4)] if isinstance(last, nn.Flatten) else [last, nn.Flatten()]
    stem, pools = nn.Conv2d(3, 6, 3, padding=1), [nn.MaxPool2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    model = lively(nn.Sequential(stem, *pools, *head)).eval()
    graph, x = narrower.trace(model, IMAGES), torch.cat(batches())
    found, first, entering = narrower.hrank(model, graph, batches())["0"], stem(x), F.relu(F.max_pool2d(stem(x), 2))
    assert torch.allclose(found, slow([Read(entering, 1, [("0", 6)])])["0"], atol=1e-5)
    assert not torch.allclose(found, slow([Read(first, 1, [("0", 6)])])["0"], atol=1e-2)


@torch.no_grad()
def test_a_pooling_of_single_pixels_does_not_hide_the_map() -> None:
    """Where the last pooling reads single pixels, the map is what enters the pooling before it."""
    stem = nn.Conv2d(3, 6, 3, padding=1)
    model = lively(nn.Sequential(stem, nn.AdaptiveMaxPool2d(1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 1))).eval()
    found = narrower.hrank(model, narrower.trace(model, IMAGES), batches())["0"]
    assert torch.allclose(found, slow([Read(stem(torch.cat(batches())), 1, [("0", 6)])])["0"], atol=1e-5)


def test_batches_may_be_of_any_size() -> None:
    model = lively(Plain())
    graph = narrower.trace(model, IMAGES)
    x = torch.cat(batches())
    whole = narrower.hrank(model, graph, [x])
    for sizes in (1, 5):
        parts = narrower.hrank(model, graph, x.split(sizes))
        assert all(torch.allclose(parts[n], whole[n], atol=1e-5) for n in whole)


@pytest.mark.parametrize("limit", [1, 4, 6, 12, 100])
def test_a_number_of_images(limit: int) -> None:
    """Exactly the first ones, wherever a batch ends."""
    model = lively(Plain())
    graph = narrower.trace(model, IMAGES)
    found = narrower.hrank(model, graph, batches(), images=limit)
    want = narrower.hrank(model, graph, [torch.cat(batches())[:limit]])
    assert all(torch.allclose(found[n], want[n], atol=1e-5) for n in want)


@pytest.mark.parametrize("budget", [{"macs": 0.7}, {"params": 0.7}], ids=str)
def test_it_stops_when_the_kept_channels_have_settled(budget: dict[str, Any]) -> None:
    model = lively(Plain())
    graph = narrower.trace(model, IMAGES)
    taken = 0

    def endless() -> Iterator[Tensor]:
        nonlocal taken
        while taken < 200:
            taken += 1
            yield batches(1, 8, seed=taken)[0]

    early = narrower.hrank(model, graph, endless(), **budget)
    assert taken * 8 in (256, 512, 1024), "it looks again after twice as many images"
    taken = 0
    late = narrower.hrank(model, graph, endless())
    assert taken == 200
    a, b = (narrower.plan(graph, s, **budget).keep for s in (early, late))
    same = sum(len(set(a[n].tolist()) & set(b[n].tolist())) for n in a)
    assert same >= 0.9 * sum(len(k) for k in b.values())


def test_a_dead_channel_has_rank_zero_and_goes_first() -> None:
    model = Plain().eval()
    model.bn1.weight.data[4] = 0
    model.bn1.bias.data[4] = -1
    graph = narrower.trace(model, IMAGES)
    scores = narrower.hrank(model, graph, batches())
    assert scores["conv1"][4] == 0 and scores["conv1"].count_nonzero() == 9
    assert 4 not in narrower.plan(graph, scores, remove=0.1).keep["conv1"]


def test_equal_ranks_are_told_apart_by_their_place() -> None:
    model = chain(unit(3, 6), unit(6, 8), Head(8)).eval()
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.data[:] = m.weight.data[:1]
    graph = narrower.trace(model, IMAGES)
    scores = narrower.hrank(model, graph, batches())
    assert len(scores["0.0"].unique()) == 1
    assert narrower.plan(graph, scores, remove=0.5).keep["0.0"].tolist() == [3, 4, 5]


def test_maps_of_one_pixel_are_taken_before_the_pooling() -> None:
    """Between a global pooling and a 1x1 convolution the maps are those that enter the pooling."""
    model: Any = lively(chain(unit(3, 7), nn.AdaptiveAvgPool2d(1), unit(7, 5, 1), nn.Flatten(), nn.Linear(5, 3))).eval()
    graph = narrower.trace(model, IMAGES)
    scores = narrower.hrank(model, graph, batches())
    assert torch.allclose(scores["0.0"], slow([Read(model[0](torch.cat(batches())), 1, [("0.0", 7)])])["0.0"])
    assert float(scores["0.0"].max()) > 1


def test_groups_without_maps_get_their_magnitude() -> None:
    case = PATTERNS["flattened"]
    model = case.make().eval()
    graph = narrower.trace(model, case.inputs)
    scores, norms = narrower.hrank(model, graph, batches()), narrower.magnitude(model, graph)
    assert torch.equal(scores["2.fc1"], norms["2.fc1"]) and torch.equal(scores["1.0"], norms["1.0"])
    assert not torch.equal(scores["0.0"], norms["0.0"])


def test_a_group_of_which_some_channels_have_no_maps_gets_its_magnitude() -> None:
    model = PATTERNS["flattened"].make().eval()
    graph = narrower.trace(model, PATTERNS["flattened"].inputs)
    averages = Averages(graph)
    for weights in averages.weights.values():
        weights[1:] = 5
    scores, norms = scores_of(model, graph, averages), narrower.magnitude(model, graph)
    assert all(torch.equal(scores[name], norms[name]) for name in averages.weights)


def test_sound_and_video() -> None:
    """A map of a sound is a row (rank 0 or 1), each frame of a video is a map."""
    case = PATTERNS["volume"]
    model: Any = case.make().eval()
    video, sound = case.inputs
    graph = narrower.trace(model, case.inputs)
    scores = narrower.hrank(model, graph, [((video, sound), None)])
    assert bool((scores["sound"] <= 1).all()) and bool((scores["video"] <= 6).all())
    maps = F.relu(model.vbn(model.video(video)))
    ranks = torch.tensor([[[float(torch.linalg.matrix_rank(f)) for f in c] for c in image] for image in maps.detach()])
    assert torch.allclose(scores["video"], ranks.mean((0, 2)), atol=1e-5)


@pytest.mark.parametrize("kind", ["tensor", "pair", "dict", "pair of dict", "tuple", "pair of tuple", "generator"])
def test_any_batch(kind: str) -> None:
    """A batch is whatever the model takes, or a pair whose first part is."""
    model = networks.ManyEnds() if kind not in ("tensor", "pair", "generator") else Plain()
    pairs = [(x, images(2, seed=k)) for k, x in enumerate(batches())]
    given: dict[str, Any] = {
        "tensor": batches(), "pair": [(x, torch.zeros(4)) for x in batches()], "generator": iter(batches()),
        "dict": [{"image": a, "depth": b} for a, b in pairs],
        "pair of dict": [({"image": a, "depth": b}, torch.zeros(4)) for a, b in pairs],
        "tuple": pairs, "pair of tuple": [(p, torch.zeros(4)) for p in pairs],
    }
    graph = narrower.trace(model, pairs[0] if isinstance(model, networks.ManyEnds) else IMAGES)
    scores = narrower.hrank(model, graph, given[kind])
    assert set(scores) == {g.name for g in graph.free} and all(bool((s > 0).any()) for s in scores.values())


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = Plain().train(training)
    model.bn3.eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    graph = narrower.trace(model, IMAGES)
    narrower.hrank(model, graph, batches())
    assert model.training == training and not model.bn3.training and model.bn1.training == training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()


def test_the_mode_comes_back_after_an_error() -> None:
    model = Plain().train()
    graph = narrower.trace(model, IMAGES)
    with pytest.raises(narrower.DataError, match=r"conv2\.weight.*not finite"):
        narrower.hrank(model, graph, [IMAGES, IMAGES * float("nan")])
    assert model.training
    with pytest.raises(narrower.DataError, match="no batches"):
        narrower.hrank(model, graph, [])


def test_a_narrow_network_is_scored_again() -> None:
    model = lively(PATTERNS["residual"].make()).eval()
    graph = narrower.trace(model, IMAGES)
    small = narrower.narrow(model, narrower.plan(graph, narrower.hrank(model, graph, batches()), macs=0.5))
    again = narrower.trace(small, IMAGES)
    scores = narrower.hrank(small, again, batches())
    want = {g: r for g, r in slow(residual_like(small, torch.cat(batches()))).items() if g in scores}
    assert want and all(torch.allclose(scores[g], r, atol=1e-5) for g, r in want.items())


@torch.no_grad()
def residual_like(m: Any, x: Tensor) -> list[Read]:
    return [Read(r.maps, r.consumers, [(g, r.maps.shape[1]) for g, _ in r.channels]) for r in residual(m, x)]
