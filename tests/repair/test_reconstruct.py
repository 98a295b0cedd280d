"""reconstruct: what can be repaired is, what cannot stays as it was, and the models that were given are untouched."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.devices import APPLE, Apple
from support.networks import PATTERNS, Head, in_one_memory, unit
from support.resrep_training import randomised
from torch import Tensor, nn

import narrower
from narrower.inputs import call_model, flatten_tensors, map_tensors, model_inputs
from narrower.repair.patches import Positions
from narrower.repair.reconstruct import RepairWatch
from narrower.repair.targets import Target
from narrower.repair.watching import Stream
from narrower.surgery.copying import moved
from narrower.surgery.walk import named_tensors

IMAGES = 96


def batches(size: int = 8, channels: int = 3) -> list[Tensor]:
    return list(torch.randn(IMAGES, channels, size, size, generator=torch.Generator().manual_seed(1)).split(32))


def difference(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((a.eval()(x) - b.eval()(x)).square().mean())


def network() -> nn.Module:
    return randomised(nn.Sequential(unit(3, 12), unit(12, 10), unit(10, 8), Head(8))).eval()


def cut(model: nn.Module, remove: float = 0.4) -> tuple[narrower.Plan, nn.Module]:
    graph = narrower.trace(model, batches()[0][:1])
    plan = narrower.plan(graph, narrower.magnitude(model, graph), remove=remove)
    return plan, narrower.narrow(model, plan)


def duplicated(model: nn.Module) -> tuple[nn.Module, dict[str, float]]:
    """Channel 11 of the first layer is channel 0 again, and the score of the group says that it goes."""
    with torch.no_grad():
        for name in ("0.0.weight", "0.1.weight", "0.1.bias", "0.1.running_mean", "0.1.running_var"):
            named_tensors(model)[name][11] = named_tensors(model)[name][0]
    return model, {}


def test_outputs_are_compared_by_the_measure_that_is_given() -> None:
    model = network()
    plan, small = cut(model)
    found = [narrower.reconstruct(model, small, plan, batches(), measure=measure) for measure in (None, "relative")]
    assert [f.measure for f in found] == ["kl", "relative"] and "relative from the dense outputs" in str(found[1])
    assert found[0].divergences["cut"] != found[1].divergences["cut"]


def test_targets_move_to_the_device_of_the_layer_when_they_are_used() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
    at = Positions(torch.arange(5), (torch.zeros(5), torch.zeros(5)), torch.arange(5))
    for stream in (None, Stream("1", 3, 5)):
        target = Target(at, torch.randn(5, 4), stream, None if stream is None else torch.randn(5, 4))
        other, found = torch.randn(5, 4), []
        for device in (torch.device("cpu"), APPLE):
            with Apple():
                watch = RepairWatch(moved(model, device), {"0.weight": target}, {}, True)
                watch.others["0.weight"] = other.to(device)
                values = watch.wanted("0.weight", target)
                assert {t.device for t in values} == {device} and (not watch.others) == (stream is not None)
                found.append([t.cpu() for t in values])
        torch.testing.assert_close(found[1], found[0])


def test_a_duplicated_channel_goes_at_no_error() -> None:
    model, _ = duplicated(network())
    graph = narrower.trace(model, batches()[0][:1])
    scores = narrower.random(graph)
    scores["0.0"] = torch.arange(12.0, 0, -1)
    plan = narrower.plan(graph, scores, remove={"0.0": 1 / 12})
    assert 11 not in plan.keep["0.0"]
    small = narrower.narrow(model, plan)
    repaired = narrower.reconstruct(model, small, plan, batches()).model
    x = torch.randn(8, 3, 8, 8)
    assert difference(model, repaired, x) < 1e-4 * difference(model, small, x)


def test_parameters_in_one_memory_are_told_apart() -> None:
    model = network()
    plan, small = cut(model)
    want, found = (narrower.reconstruct(m, small, plan, batches()) for m in (model, in_one_memory(model)))
    assert found.layers == want.layers and found.divergences == want.divergences and not found.left
    assert found.kept != "cut"


def test_nothing_removed_changes_nothing() -> None:
    model = network()
    graph = narrower.trace(model, batches()[0][:1])
    plan = narrower.plan(graph, narrower.random(graph), remove={"0.0": 0.0})
    small = narrower.narrow(model, plan)
    found = narrower.reconstruct(model, small, plan, batches())
    assert not found.layers and not found.left and found.kept == "cut" and "no layer to repair" in str(found)
    assert all(torch.equal(a, b) for a, b in zip(found.model.state_dict().values(), small.state_dict().values(), strict=True))


def test_new_images_are_nearer_to_the_dense_outputs_and_the_models_are_untouched() -> None:
    model = network()
    plan, small = cut(model)
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in (model, small)]
    found = narrower.reconstruct(model, small, plan, batches())
    for m, was in zip((model, small), before, strict=True):
        assert all(torch.equal(t, was[n]) for n, t in m.state_dict().items())
    x = torch.randn(64, 3, 8, 8)
    assert difference(model, found.model, x) < 0.5 * difference(model, small, x)
    assert [r.weight for r in found.layers] == ["1.0.weight", "2.0.weight", "3.fc.weight"]  # in the order of the forward
    assert all(r.error <= 1 for r in found.layers)
    assert "1.0.weight" in str(found) and all(line in found._repr_html_() for line in found.footer)


def test_the_images_that_judge_are_never_fitted() -> None:
    model, x, found = network(), torch.cat(batches()), []
    plan, small = cut(model)
    for factor in (1.0, 1.5):
        x[7::8] *= factor
        found.append(narrower.reconstruct(model, small, plan, x.split(32)))
    assert found[0].kept == found[1].kept != "cut"
    assert all(v != found[1].divergences[way] for way, v in found[0].divergences.items())
    states = [repaired.model.state_dict() for repaired in found]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_no_more_images_judge_than_it_says() -> None:
    model = network()
    plan, small = cut(model)
    assert narrower.reconstruct(model, small, plan, [torch.randn(8 * 66, 3, 4, 4)], stream_targets=False).images == 64


def shaken(inputs: Any) -> list[Any]:
    """Batches like the given inputs."""
    return [map_tensors(inputs, lambda t: t + torch.randn_like(t) if t.is_floating_point() else t) for _ in range(24)]


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_are_measured_planned_and_repaired_or_left_with_a_reason(name: str) -> None:
    case = PATTERNS[name]
    model = randomised(case.make()).eval()
    graph = narrower.trace(model, case.inputs)
    scores = narrower.random(graph)
    plan = narrower.plan(graph, scores, macs=0.7, sensitivity=narrower.sensitivity(model, graph, scores, shaken(case.inputs)))
    small = narrower.narrow(model, plan)
    narrower.verify(model, small, plan, case.inputs)
    found = narrower.reconstruct(model, small, plan, shaken(case.inputs))
    assert found.layers or found.left
    new = shaken(case.inputs)[:4]
    with torch.no_grad():
        dense, cut, repaired = ([t for x in new for t in flatten_tensors(call_model(m.eval(), model_inputs(x, m)))]
                                for m in (model, small, found.model))
    errors = [sum(float((a - b).square().sum()) for a, b in zip(dense, other, strict=True)) for other in (cut, repaired)]
    assert errors[1] <= 1.2 * errors[0]


class Blocks(nn.Module):
    """Two residual blocks whose shortcut loses channels as well: the sum of the second has an error from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = unit(3, 12), Head(12)
        self.a, self.b = (nn.Sequential(unit(12, 24), nn.Conv2d(24, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12))
                          for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.a(x))
        return self.head(torch.relu(x + self.b(x)))


def test_a_sum_makes_up_for_what_its_other_summand_has_lost() -> None:
    """Stream targets reach the dense sum more nearly than each branch's own targets."""
    torch.manual_seed(0)
    model = randomised(Blocks()).eval()
    plan, small = cut(model, 0.5)
    x = torch.randn(256, 3, 8, 8)
    errors = [difference(model, narrower.reconstruct(model, small, plan, batches(), stream_targets=s).model, x)
              for s in (True, False)]
    assert errors[0] < 0.97 * errors[1] and max(errors) < difference(model, small, x)


def test_images_that_nothing_was_fitted_on_decide_about_the_targets() -> None:
    kept = set()
    for seed in range(3):  # 14 % and 9 % for the stream, 1.7 % for the layers: rounding decides none
        torch.manual_seed(seed)
        model = randomised(Blocks()).eval()
        plan, small = cut(model, 0.5)
        found = narrower.reconstruct(model, small, plan, batches())
        assert list(found.divergences) == ["cut", "layer targets", "stream targets"] and found.images == IMAGES // 8
        assert found.divergences[found.kept] == min(found.divergences.values()) and f"kept: {found.kept}" in str(found)
        asked = narrower.reconstruct(model, small, plan, batches(), stream_targets=found.kept == "stream targets")
        assert list(asked.divergences) == ["cut", found.kept]
        for a, b in zip(found.model.state_dict().values(), asked.model.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        judges = torch.cat(batches())[7::8]
        with torch.no_grad():
            p, q = (m.eval()(judges).log_softmax(1) for m in (model, found.model))
        assert found.divergences[found.kept] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3, abs=1e-7)
        kept.add(found.kept)
    assert kept == {"layer targets", "stream targets"}


def test_judges_are_not_fitted() -> None:
    """Other images in their place: the same repair."""
    model = network()
    plan, small = cut(model)
    x = torch.cat(batches())
    found = []
    for factor in (1, 3):
        x[7::8] *= factor
        found.append(narrower.reconstruct(model, small, plan, x.split(40)))
    assert found[0].divergences != found[1].divergences
    assert all(torch.equal(a, b) for a, b in zip(*(f.model.state_dict().values() for f in found), strict=True))


def test_no_repair_that_is_not_nearer_is_kept() -> None:
    """What is fitted to images of another kind does not help those that judge."""
    model = network()
    plan, small = cut(model, 0.1)
    x = torch.cat(batches())
    x[torch.arange(IMAGES) % 8 != 7] += 30
    found = narrower.reconstruct(model, small, plan, [x])
    assert found.kept == "cut" and found.divergences["cut"] < found.divergences["layer targets"]
    assert not found.layers and "no repair" in found.left["1.0.weight"] and "kept: cut" in str(found)
    same = zip(found.model.state_dict().values(), small.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_a_new_bias_is_saved_and_loaded(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.ReLU(),
                             Head(8)).eval()

    model = make()
    plan, small = cut(model)
    found = narrower.reconstruct(model, small, plan, batches()).model
    assert found.get_parameter("2.bias").any()
    narrower.save(found, tmp_path)
    again = narrower.load(tmp_path, make)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(again.eval()(x), found.eval()(x))


def test_bad_images_are_errors() -> None:
    model = network()
    plan, small = cut(model)
    with pytest.raises(narrower.DataError, match="got 0 images"):
        narrower.reconstruct(model, small, plan, [])
    with pytest.raises(narrower.DataError, match="got 4 images"):
        narrower.reconstruct(model, small, plan, batches(), images=4)
    with pytest.raises(narrower.DataError, match="not finite"):
        narrower.reconstruct(model, small, plan, [torch.full((16, 3, 8, 8), float("nan"))])
    with pytest.raises(narrower.PlanError, match="not the one that was traced"):
        narrower.reconstruct(small, small, plan, batches())
    with pytest.raises(narrower.DataError, match=r"does not run on inputs of shape \(1, 5, 8, 8\)"):
        narrower.reconstruct(model, small, plan, batches(channels=5))
    with pytest.raises(narrower.PlanError, match=r"not what this plan leaves: 0.0.weight is \(12, 3, 3, 3\), should be \(8,"):
        narrower.reconstruct(model, model, plan, batches())


def test_modes_are_put_back_and_the_repaired_network_has_those_of_the_cut_one() -> None:
    model: Any = network()
    plan, built = cut(model)
    small: Any = built
    want = narrower.reconstruct(model, small, plan, batches()).model
    model.train()
    small.train()[1].eval()
    found = narrower.reconstruct(model, small, plan, batches()).model
    assert model.training and model[1].training and small.training and not small[1].training
    assert [m.training for m in found.modules()] == [m.training for m in small.modules()]
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), want.state_dict().values(), strict=True))


def test_a_norm_that_hides_a_channel_does_not_ask_for_infinite_targets() -> None:
    """Behind a BatchNorm weight of zero, no output of the layer reaches the sum."""
    model = randomised(Blocks()).eval()
    hidden = named_tensors(model)["b.2.weight"]
    hidden.data[::2] = 0
    plan, small = cut(model, 0.5)
    found = narrower.reconstruct(model, small, plan, batches(), stream_targets=True)
    x = torch.randn(64, 3, 8, 8)
    assert found.kept == "stream targets" and difference(model, found.model, x) < difference(model, small, x)


def test_an_overflow_inside_the_network_is_an_error() -> None:
    model = network()
    named_tensors(model)["0.1.bias"].data.fill_(3e38)
    named_tensors(model)["1.1.running_var"].data.fill_(float("inf"))  # hides it from the outputs
    plan, small = cut(model)
    with pytest.raises(narrower.DataError, match=r"what 1\.0\.weight reads or makes is not finite"):
        narrower.reconstruct(model, small, plan, batches())


class Upsampled(nn.Module):
    """A transposed convolution that gets its first bias from the repair."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.up = unit(3, 16), nn.ConvTranspose2d(16, 9, 2, 2, bias=False)
        self.norm, self.head = nn.GroupNorm(3, 9), nn.Conv2d(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(torch.relu(self.norm(self.up(torch.relu(self.body(x)))))))


def test_a_transposed_layer_gets_a_bias_for_its_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomised(Upsampled()).eval()
    graph = narrower.trace(model, batches()[0][:1])
    plan = narrower.plan(graph, narrower.magnitude(model, graph), remove={"body*": 0.5})
    small = narrower.narrow(model, plan)
    found = narrower.reconstruct(model, small, plan, batches()).model
    assert found.get_parameter("up.bias").shape == (9,) and found.get_parameter("up.bias").any()
    x = torch.randn(16, 3, 8, 8)
    assert difference(model, found, x) < difference(model, small, x)
    narrower.save(found, tmp_path)
    assert torch.equal(narrower.load(tmp_path, Upsampled).eval()(x), found.eval()(x))


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}], ids=str)
def test_a_sum_behind_a_norm_without_scale_or_statistics_is_no_target(options: dict[str, bool]) -> None:
    model: Any = randomised(Blocks())
    model.b[2] = nn.BatchNorm2d(model.b[2].num_features, **options)
    plan, small = cut(model.eval(), 0.5)
    found = narrower.reconstruct(model, small, plan, batches(), stream_targets=True)
    x = torch.randn(64, 3, 8, 8)
    assert found.kept == "stream targets" and difference(model, found.model, x) < difference(model, small, x)


class Prepares(nn.Module):
    """Writes into its input."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.body(x.sub_(0.5).div_(3)))


def test_a_forward_that_writes_into_its_input_is_repaired_like_any_other() -> None:
    body = network()
    pure, changed = nn.Sequential(Shifted(), body), Prepares(body)
    found = []
    for model in (pure, changed):
        images = [b.clone() for b in batches()]
        graph = narrower.trace(model, images[0][:1].clone())
        plan = narrower.plan(graph, narrower.magnitude(model, graph), remove=0.4)
        found.append(narrower.reconstruct(model, narrower.narrow(model, plan), plan, images).divergences)
        assert all(torch.equal(a, b) for a, b in zip(images, batches(), strict=True))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


class OwnForward(nn.Conv2d):
    """Has no place for an intercept: a bias that it is given would not be read."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight)


def test_the_error_that_is_left_is_that_of_the_weights_as_they_are() -> None:
    """Also where a layer has no place for an intercept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Sigmoid(), OwnForward(12, 6, 1, bias=False), nn.ReLU(), Head(6)).eval()
    graph = narrower.trace(model, batches()[0][:1])
    plan = narrower.plan(graph, narrower.magnitude(model, graph), remove={"0": 0.5})
    small = narrower.narrow(model, plan)
    found = narrower.reconstruct(model, small, plan, batches())
    (layer,) = found.layers
    assert layer.weight == "2.weight" and found.kept == "layer targets"
    x = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        dense, cut_out, repaired_out = (m[:3](x) for m in (model, small, found.model))  # type: ignore[index]
    left = float((repaired_out - dense).square().mean() / (cut_out - dense).square().mean())
    assert left == pytest.approx(layer.error, rel=0.05)


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) / 3


def test_layers_with_too_many_inputs_keep_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("narrower.repair.reconstruct"), "MOST_INPUTS", 60)
    plan, small = cut(network(), 0.25)
    found = narrower.reconstruct(network(), small, plan, batches())
    assert found.left["1.0.weight"].startswith("it has 81 inputs, more than can be solved for (60)")
    assert [r.weight for r in found.layers if r.inputs > 60] == []


class Scaled(nn.Module):
    """Images, times a single number that comes with them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(unit(3, 12), Head(12))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.as_tensor(self.net(x * t))


@pytest.mark.parametrize("order", [("x", "t"), ("t", "x")])
def test_a_single_number_among_the_inputs_goes_with_all_images(order: tuple[str, str]) -> None:
    model = Scaled().eval()
    number = torch.tensor(1.0)
    given = [{"x": x, "t": number} for x in batches()]
    given = [{name: batch[name] for name in order} for batch in given]
    graph, plain = narrower.trace(model, given[0]), narrower.trace(model.net, batches()[0])
    scores, others = narrower.obs(model, graph, given), narrower.obs(model.net, plain, batches())
    assert all(torch.equal(scores[f"net.{name}"], others[name]) for name in others)
    damage = narrower.sensitivity(model, graph, scores, given)
    assert [c.damages for c in damage.curves] == [c.damages for c in narrower.sensitivity(
        model.net, plain, others, batches()).curves]
    plan = narrower.plan(graph, scores, macs=0.5)
    small = narrower.narrow(model, plan)
    found = narrower.reconstruct(model, small, plan, given)
    assert min(found.divergences.values()) < found.divergences["cut"]
    assert narrower.tune(model, found.model, plan, given, steps=2).steps == 2
    with pytest.raises(narrower.DataError, match="single numbers beside them must be the same"):
        narrower.obs(model, graph, [*given, {"x": batches()[0], "t": torch.tensor(2.0)}])
