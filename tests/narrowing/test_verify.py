"""verify: it accepts every right narrowing and notices every damage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import networks, reference
from support.networks import IMAGES, Plain
from support.resrep_training import randomised
from torch import Tensor, nn

import narrower
from narrower.narrowing.verify import largest_difference


def damage(small: Any, what: str) -> None:
    with torch.no_grad():
        if what == "weight":
            small.conv2.weight[3, 1, 0, 0] += 1e-3
        elif what == "statistics":
            small.bn3.running_mean[1] += 1e-3
        elif what == "swapped":
            small.conv3.weight.data = small.conv3.weight.flip(1)
        elif what == "infinite":
            small.conv1.weight[0] = float("nan")


def test_verify_with_a_tolerance() -> None:
    model = Plain().eval()
    small, plan = reference.pair(model)
    damage(small, "weight")
    assert narrower.verify(model, small, plan, IMAGES, tolerance=1.0).error > 1e-9
    with pytest.raises(narrower.VerifyError, match="1e-06"):
        narrower.verify(model, small, plan, IMAGES, tolerance=1e-6)


@pytest.mark.parametrize("what", ["weight", "statistics", "swapped", "infinite"])
def test_verify_notices(what: str) -> None:
    model = Plain().eval()
    small, plan = reference.pair(model)
    narrower.verify(model, small, plan, IMAGES)
    damage(small, what)
    with pytest.raises(narrower.VerifyError):
        narrower.verify(model, small, plan, IMAGES)


def test_verify_notices_another_plan_and_another_shape() -> None:
    model = Plain().eval()
    small, plan = reference.pair(model)
    other = reference.halved(model, IMAGES, seed=5)
    with pytest.raises(narrower.VerifyError, match="differs"):
        narrower.verify(model, small, other, IMAGES)
    small.fc = nn.Linear(6, 4)
    with pytest.raises(narrower.VerifyError, match="shapes"):
        narrower.verify(model, small, plan, IMAGES)


def blurred_if_wide(m: Any, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1) if x.shape[1] > 3 else x


def test_verify_names_a_branch_on_the_number_of_channels() -> None:
    """The probe keeps at least a third, and does not see what happens below."""
    model = randomised(networks.Trap(blurred_if_wide)).eval()
    small, plan = reference.pair(model, remove=0.8)
    with pytest.raises(narrower.VerifyError, match="branches on the number of channels"):
        narrower.verify(model, small, plan, IMAGES)


def test_verify_says_its_precision_and_leaves_everything_as_it_was() -> None:
    model = Plain()
    small, plan = reference.pair(model)
    before, after = reference.state(model), reference.state(small)
    result = narrower.verify(model, small, plan, IMAGES)
    assert result.dtype == torch.float64 and 0 <= result.error <= result.tolerance == 1e-9
    assert "float64" in str(result) and "1e-09" in str(result)
    own = narrower.verify(model, small, plan, IMAGES, dtype=None)
    assert own.dtype == torch.float32 and own.tolerance > result.tolerance
    assert reference.same_state(before, reference.state(model)) and reference.same_state(after, reference.state(small))
    assert model.training and small.training


def test_verify_refuses_inputs_that_show_nothing() -> None:
    model = Plain()
    small, plan = reference.pair(model)
    with pytest.raises(narrower.VerifyError, match="finite"):
        narrower.verify(model, small, plan, IMAGES * float("inf"))


class Attention(nn.Module):
    """Places attend to places: a product of activations sums over channels that no weight reads; two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.query, self.key = networks.unit(3, 8), nn.Conv2d(8, 12, 1), nn.Conv2d(8, 12, 1)
        self.linear, self.head = nn.Linear(8, 10, bias=False), networks.Head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k = (conv(x).view(len(x), 2, -1, x.shape[2] * x.shape[3]) for conv in (self.query, self.key))
        weights = (q.transpose(2, 3) @ k).softmax(3).mean(1)
        y = self.linear(x.flatten(2).transpose(1, 2))
        return self.head((weights @ y).transpose(1, 2).unflatten(2, x.shape[2:]))


@pytest.mark.parametrize("many", [1, 2, 5])
def test_verify_sees_no_removed_channels_in_products_of_activations(many: int) -> None:
    model, x = Attention().eval(), networks.images(batch=many)
    graph = narrower.trace(model, IMAGES)
    assert {"stem.0", "query", "linear"} <= {g.name for g in graph.free}
    plan = narrower.plan(graph, narrower.random(graph), remove=0.5)
    small: Any = narrower.narrow(model, plan)
    assert narrower.verify(model, small, plan, x).error < 1e-12
    small.query.weight.data[0, 1] += 1e-2
    with pytest.raises(narrower.VerifyError, match="differs"):
        narrower.verify(model, small, plan, x)


class LowRank(nn.Module):
    """A linear layer whose weight is computed in the forward, as with LoRA."""

    def __init__(self, weight: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.stem, self.linear, self.head = networks.unit(3, 9), nn.Linear(9, 10), nn.Linear(10, 3)
        self.left, self.right = nn.Parameter(torch.randn(10, 2)), nn.Parameter(torch.randn(2, 9))
        self.weight = weight

    def forward(self, x: Tensor, mask: Tensor | float = 1.0) -> Tensor:
        y = (self.stem(x) * mask).mean((2, 3))
        return self.head(F.linear(y, self.weight(self), self.linear.bias).relu())


class TiedAutoencoder(nn.Module):
    """What the encoder makes with its weight, the decoder reads with it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.code, self.out = networks.unit(3, 9), nn.Conv2d(9, 10, 3, padding=1), nn.Conv2d(9, 3, 1)

    def forward(self, x: Tensor, mask: Tensor | float = 1.0) -> Tensor:
        code = self.code(self.stem(x) * mask).relu()
        return self.out(F.conv_transpose2d(code, self.code.weight, padding=1) * mask)


WEIGHTS_BY_FORWARD: dict[str, Callable[[], nn.Module]] = {
    "added": lambda: LowRank(lambda m: m.linear.weight + m.left @ m.right),
    "added first": lambda: LowRank(lambda m: 0.5 * (m.left @ m.right) + m.linear.weight),
    "product": lambda: LowRank(lambda m: m.left @ m.right),
    "sigmoid": lambda: LowRank(lambda m: m.linear.weight.sigmoid()),
    "standardised": lambda: LowRank(lambda m: m.linear.weight - m.linear.weight.mean(0, keepdim=True)),
    "tied": TiedAutoencoder,
}


@pytest.mark.parametrize("name", WEIGHTS_BY_FORWARD)
def test_weights_that_are_computed_or_read_both_ways_read_no_removed_channel(name: str) -> None:
    model = randomised(WEIGHTS_BY_FORWARD[name]()).double().eval()
    x = IMAGES.double()
    graph = narrower.trace(model, x)
    assert len(graph.free) == 2 and graph["stem.0"].free
    whole = narrower.plan(graph, narrower.random(graph), remove=0.5)
    small = narrower.narrow(model, whole)
    assert narrower.verify(model, small, whole, x).error < 1e-12
    only = narrower.plan(graph, narrower.random(graph), remove={"stem.0": 0.5})
    mask = torch.zeros(1, 9, 1, 1, dtype=torch.float64)
    mask[:, torch.as_tensor(only.keep["stem.0"])] = 1
    with torch.no_grad():
        torch.testing.assert_close(narrower.narrow(model, only)(x), model(x, mask))


def test_only_what_makes_the_channels_of_a_computed_weight_is_their_layer() -> None:
    graph = narrower.trace(WEIGHTS_BY_FORWARD["product"]().eval(), IMAGES)
    roles = {(s.tensor, s.dim): s.role for g in graph for s in g.slices}
    assert roles["left", 0] == "out" and roles["right", 1] == "in" and graph["stem.0"].layers == ("stem.0",)


def test_verify_takes_rounding_of_large_outputs_for_what_it_is() -> None:
    """Boxes in pixels of an untrained detector hardly depend on the images."""
    model = Plain().eval()
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        last.weight *= 1e-4
        last.bias.fill_(640.0)
    small, plan = reference.pair(model)
    assert narrower.verify(model, small, plan, IMAGES).error < 1e-12
    damage(small, "swapped")
    with pytest.raises(narrower.VerifyError, match="differs"):
        narrower.verify(model, small, plan, IMAGES)


def test_a_difference_of_rounding_is_relative_to_the_largest_output_and_any_other_to_the_spread() -> None:
    out = 640 + 1e-2 * torch.randn(4, 5, dtype=torch.float64)
    spread = float((out - out[:1]).abs().max())
    assert largest_difference([out], [out + 1e-10]) == pytest.approx(1e-10 / float(out.max()), rel=1e-2)
    assert largest_difference([out], [out + 1e-8]) == pytest.approx(1e-8 / spread, rel=1e-4)
    assert largest_difference([out[0, 0]], [out[0, 0] + 1]) == pytest.approx(1 / 640, rel=1e-2), "a single number"
    assert largest_difference([out + 1j], [out + 1j + 1e-8]) == pytest.approx(1e-8 / spread, rel=1e-4)
    assert largest_difference([out.long()], [out.long()]) == 0
    other = out.long()
    other[1, 2] += 1
    assert largest_difference([out.long()], [other]) == pytest.approx(1 / 20), "the share that differs"
    assert largest_difference([out > 0], [out.long() < 640]) > 0


@pytest.mark.parametrize("outputs", [[], [torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)]])
def test_nothing_to_compare_proves_nothing(outputs: list[Tensor]) -> None:
    with pytest.raises(narrower.VerifyError, match="nothing to compare"):
        largest_difference(outputs, outputs)
    assert largest_difference([*outputs, torch.ones(2)], [*outputs, torch.ones(2)]) == 0


def test_verify_compares_whole_numbers() -> None:
    class Classes(Plain):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).argmax(1)

    model = Classes().eval()
    torch.nn.init.normal_(model.fc.weight)
    small, plan = reference.pair(model)
    narrower.verify(model, small, plan, IMAGES)
    damage(small, "swapped")
    with pytest.raises(narrower.VerifyError, match="differs"):
        narrower.verify(model, small, plan, IMAGES)


class Filtered(nn.Module):
    """A filter in the frequency domain, and one that mixes channels there (Fourier neural operators)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next, self.head = networks.unit(3, 6), networks.unit(6, 8), networks.Head(8)
        self.filter = nn.Parameter(torch.randn(8, 5, dtype=torch.cfloat))
        self.mixing = nn.Parameter(torch.randn(6, 6, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.fft.rfft2(self.stem(x))
        maps = torch.einsum("bihw,io->bohw", maps, self.mixing) * self.filter
        out: Tensor = self.head(self.next(torch.fft.irfft2(maps, s=x.shape[-2:])))
        return out


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_complex_parameters_stay_complex(dtype: torch.dtype | None) -> None:
    model, x = randomised(Filtered()).eval(), torch.randn(4, 3, 8, 8)
    small, plan = reference.pair(model, x)
    found = narrower.verify(model, small, plan, x, dtype=dtype)
    assert found.error <= found.tolerance
    with torch.no_grad():
        small.filter.imag.mul_(-3)
    with pytest.raises(narrower.VerifyError, match="differs"):
        narrower.verify(model, small, plan, x, dtype=dtype)


def test_verify_says_where_rounding_alone_changes_the_output() -> None:
    model = networks.Trap(lambda m, x: torch.sin(1e13 * x)).eval()
    small, plan = reference.pair(model)
    small.stem[0].weight.data *= 1.01
    with pytest.raises(narrower.VerifyError, match="rounded"):
        narrower.verify(model, small, plan, IMAGES)


class Keeper:
    """Calls what it was given, and is not copied with the module that holds it."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def __deepcopy__(self, memo: Any) -> Keeper:
        return self


def test_verify_notices_a_copy_that_runs_the_original() -> None:
    model: Any = Plain().eval()
    plan = reference.halved(model, IMAGES)
    narrower.verify(model, narrower.narrow(model, plan), plan, IMAGES, dtype=None)
    model.forward = Keeper(model.forward)
    with pytest.raises(narrower.VerifyError, match=r"reads conv1.weight of the original"):
        narrower.verify(model, narrower.narrow(model, plan), plan, IMAGES, dtype=None)
