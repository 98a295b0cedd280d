"""The dense run: units, the forwards that are traced, and what is noted of the rest."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.networks import IMAGES, Head, ManyEnds, Plain, TrainingOnly, chain, images, unit
from torch import Tensor, nn

import narrower
from narrower.errors import TraceError
from narrower.surgery.copying import Stage, stage
from narrower.tracing.constraints import ConstraintCollector
from narrower.tracing.dense import DenseForwardError, DenseRun, run_dense
from narrower.tracing.labels import Axes, Axis


def staged(model: nn.Module, inputs: Any = IMAGES) -> Stage:
    return stage(model, inputs, "meta")


class Sum(nn.Module):
    """`first` and `second` are added, and `third` reads the sum. They are defined in the opposite order."""

    def __init__(self) -> None:
        super().__init__()
        self.third, self.second, self.first = nn.Conv2d(7, 4, 1), nn.Conv2d(3, 7, 1), nn.Conv2d(3, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.first(x) + self.second(x))


class FailsInTraining(TrainingOnly):
    def __init__(self, error: type[Exception] = RuntimeError) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        if self.training:
            raise self.error("needs targets")
        return out


def test_united_axes_are_one_unit_per_channel() -> None:
    dense = run_dense(staged(Sum()), {})
    units = dense.units_of(Axis("first.weight", 0))
    assert len(set(units.tolist())) == 7
    for tensor, dim in [("first.bias", 0), ("second.weight", 0), ("second.bias", 0), ("third.weight", 1)]:
        assert np.array_equal(dense.units_of(Axis(tensor, dim)), units), tensor
    others = dense.units_of(Axis("third.weight", 0))
    assert np.array_equal(dense.units_of(Axis("third.bias", 0)), others) and not set(others.tolist()) & set(units.tolist())


def test_units_are_numbered_in_the_order_of_execution() -> None:
    dense = run_dense(staged(Sum()), {})
    _, first = np.unique(dense.unit_of, return_index=True)
    assert (np.diff(first) > 0).all(), "by their first id"
    assert dense.units_of(Axis("first.weight", 0)).max() < dense.units_of(Axis("third.weight", 0)).min()
    assert dense.unit_count == len(first) < dense.axes.total


def test_without_constraints_each_id_is_a_unit() -> None:
    axes = Axes()
    axes.ids(Axis("weight", 0), 5)
    dense = DenseRun({}, {"eval": ConstraintCollector(nn.Identity(), axes, {})}, axes, {}, frozenset())
    assert dense.unit_of.tolist() == [0, 1, 2, 3, 4] and dense.unit_count == 5


def test_the_train_forward_is_not_traced_where_it_does_the_same() -> None:
    class Noisy(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.1, self.training))

    for model in (Plain(), Noisy()):
        dense = run_dense(staged(model), {})
        assert [*dense.collectors] == ["eval"] and dense.notes == ()


def test_channels_that_are_returned_in_training_only_are_pinned() -> None:
    class Returning(Sum):
        def forward(self, x: Tensor) -> Any:
            y = self.first(x) + self.second(x)
            return (self.third(y), y) if self.training else self.third(y)

    dense = run_dense(staged(Returning()), {})
    assert [*dense.collectors] == ["eval", "train"] and len(dense.output_shapes) == 1
    (ids, reason), *_ = (pin for pin in dense.collectors["train"].pins if pin[0].size == 7)
    assert str(reason) == "network output in training (model)"
    assert np.array_equal(np.unique(dense.unit_of[ids]), dense.units_of(Axis("first.weight", 0)))


def test_constants_do_not_hide_what_only_training_returns() -> None:
    class Returning(Plain):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x - torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
            return (y, y) if self.training else y

    dense = run_dense(stage(Returning(), torch.randn(2, 3, 8, 8), "real"), {})
    assert [*dense.collectors] == ["eval", "train"] and dense.notes == ()


def test_a_buffer_that_only_training_reads_goes_with_the_channels() -> None:
    class Scaled(Sum):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.rand(1, 7, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x) + self.second(x)
            return self.third(y * self.scale if self.training else y)

    dense = run_dense(staged(Scaled()), {})
    assert np.array_equal(dense.units_of(Axis("scale", 1)), dense.units_of(Axis("first.weight", 0)))


def test_blocks_that_training_skips_by_chance_are_the_same_in_each_forward_and_leave_the_generators() -> None:
    class Skipping(Plain):
        def forward(self, x: Tensor) -> Tensor:
            for chance in (random.random, np.random.rand, lambda: float(torch.rand(()))):
                if self.training and chance() < 0.5:
                    x = 2 * x + 1
            return super().forward(x)

    model = Skipping()
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    dense = [run_dense(staged(model), {}) for _ in range(9)]
    assert len({len(d.collectors) for d in dense}) == 1 and not any(d.notes for d in dense)
    now = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    assert states[:2] == now[:2] and torch.equal(states[2], now[2])


def test_a_train_forward_that_is_not_the_same_twice_is_noted() -> None:
    calls = itertools.count()

    class Alternating(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x if self.training and next(calls) % 2 else x + 1 if self.training else x)

    dense = run_dense(staged(Alternating()), {})
    assert [*dense.collectors] == ["eval"]
    assert dense.notes == ("what only training does could not be traced (RuntimeError: it is not the same twice)",)


def test_the_train_forward_of_one_image_is_traced_with_global_pooling_before_batchnorm() -> None:
    """BatchNorm refuses one value per channel in training, as that of DeepLab's pooled features."""
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.aux = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 3, 1)
            self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
            self.head = nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.features(x)
            y = self.head(self.pooled(x))
            return (y, self.aux(x)) if self.training else y

    model, images = Pooled().eval(), torch.randn(4, 3, 8, 8)
    graph = narrower.trace(model, images[:1])
    assert graph.notes == ()
    assert {g.name: g.size for g in graph.free} == {g.name: g.size for g in narrower.trace(model, images).free}
    small = narrower.narrow(model, narrower.plan(graph, narrower.magnitude(model, graph), remove=0.5))
    assert small.train()(images)[1].shape == (4, 3, 6, 6) and small.get_parameter("aux.weight").shape[1] == 8


def test_an_auxiliary_head_is_traced_in_the_train_forward() -> None:
    class Either(TrainingOnly):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.aux_fc(self.aux(x).mean((2, 3))) if self.training else self.head(self.next(x))

    copied = staged(Either())
    dense = run_dense(copied, {})
    assert [*dense.collectors] == ["eval", "train"] and dense.notes == ()
    assert not any(m.training for m in copied.model.modules())
    assert [m for m, c in dense.collectors.items() if (Axis("aux.0.weight", 0), "out") in c.roles] == ["train"]
    stem = dense.units_of(Axis("stem.0.weight", 0))
    for reader in ("next.0.weight", "aux.0.weight"):
        assert np.array_equal(dense.units_of(Axis(reader, 1)), stem), "both forwards tell which ids are one channel"


def test_a_train_forward_that_fails_is_noted() -> None:
    copied = staged(FailsInTraining())
    dense = run_dense(copied, {})
    assert [*dense.collectors] == ["eval"] and not any(m.training for m in copied.model.modules())
    assert dense.notes == ("what only training does could not be traced (RuntimeError: needs targets)",)


def test_parameters_that_are_never_used_are_noted() -> None:
    class Spare(Plain):
        def __init__(self, spare: int) -> None:
            super().__init__()
            self.spare = nn.ParameterList(torch.zeros(2) for _ in range(spare))

    note = "never used in the forward, left as they are: spare.0"
    assert run_dense(staged(Spare(1)), {}).notes == (note,)
    assert run_dense(staged(Spare(6)), {}).notes == (f"{note}, spare.1, spare.2, spare.3 and 2 more",)


def test_a_forward_that_fails_is_an_error_with_its_cause() -> None:
    class Broken(Plain):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("needs values")

    with pytest.raises(DenseForwardError) as caught:
        run_dense(staged(Broken()), {})
    assert repr(caught.value.__cause__) == "ValueError('needs values')"


def test_errors_of_the_trace_itself_pass() -> None:
    class Refused(Plain):
        def forward(self, x: Tensor) -> Tensor:
            raise TraceError("refused")

    with pytest.raises(TraceError, match="refused"):
        run_dense(staged(Refused()), {})
    with pytest.raises(TraceError, match="needs targets"):
        run_dense(staged(FailsInTraining(TraceError)), {})


def test_the_shapes_of_outputs_parameters_and_buffers() -> None:
    model = ManyEnds()
    dense = run_dense(staged(model, (IMAGES, images(2))), {})
    assert dense.output_shapes == [(4, 5), (4, 4, 8, 8)], "of every tensor in the output"
    assert dense.shapes == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert dense.parameters == {n for n, _ in model.named_parameters()}


def test_a_shared_parameter_has_one_name() -> None:
    model = chain(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1))
    first, last = model[1], model[2]
    assert isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d)
    last.weight = first.weight
    assert run_dense(staged(model), {}).parameters == {"0.weight", "0.bias", "1.weight", "1.bias", "2.bias"}


def test_the_channels_of_outputs_are_pinned() -> None:
    dense = run_dense(staged(Sum()), {})
    pinned = [ids for ids, reason in dense.collectors["eval"].pins if reason.code == "output"]
    assert np.array_equal(np.unique(dense.unit_of[np.concatenate(pinned)]), dense.units_of(Axis("third.weight", 0)))


@pytest.mark.parametrize("hold", [
    lambda x: SimpleNamespace(logits=x), lambda x: {"a": x}.values(),
    lambda x: torch.distributions.Normal(x, x, validate_args=False)])
def test_the_channels_of_outputs_are_pinned_in_every_container(hold: Callable[[Tensor], Any]) -> None:
    class Holding(Sum):
        def forward(self, x: Tensor) -> Any:
            return hold(super().forward(x))

    dense = run_dense(staged(Holding()), {})
    assert (4, 4, 8, 8) in dense.output_shapes
    pinned = [ids for ids, reason in dense.collectors["eval"].pins if reason.code == "output"]
    assert np.array_equal(np.unique(dense.unit_of[np.concatenate(pinned)]), dense.units_of(Axis("third.weight", 0)))


def test_an_output_that_hides_its_tensors_is_refused() -> None:
    class Hiding(Sum):
        def forward(self, x: Tensor) -> Any:
            return iter([super().forward(x)])

    with pytest.raises(TraceError, match="returns a list_iterator"):
        run_dense(staged(Hiding()), {})


@pytest.mark.parametrize("returned", [
    lambda x: x.max(1)[1], lambda x: x.softmax(1).max(1), lambda x: x.max(1)[0], lambda x: torch.sigmoid(x.amax((1, 2))) * 2,
    lambda x: -(x.logsumexp(1) - x.min(1)[0])])
def test_channels_are_pinned_if_the_network_returns_their_maximum_or_its_number(returned: Callable[[Tensor], Any]) -> None:
    class Returning(Sum):
        def forward(self, x: Tensor) -> Any:
            return returned(super().forward(x))

    dense = run_dense(staged(Returning()), {})
    pinned = [ids for ids, reason in dense.collectors["eval"].pins if reason.code == "output"]
    assert np.array_equal(np.unique(dense.unit_of[np.concatenate(pinned)]), dense.units_of(Axis("third.weight", 0)))


def test_channels_are_not_pinned_by_a_maximum_that_a_layer_reads() -> None:
    class Gated(Sum):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x) + self.second(x)
            return self.third(x * x.amax(1, keepdim=True)).mean(1)

    assert "output" not in {reason.code for _, reason in run_dense(staged(Gated()), {}).collectors["eval"].pins}


def test_the_batch_is_the_number_of_samples() -> None:
    assert run_dense(staged(Plain(), images(batch=7)), {}).batch == 7
    assert run_dense(staged(Plain(), images()[:0]), {}).batch == 1, "costs are per sample, so it is never zero"

    class Scaled(Plain):
        def forward(self, scale: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x * scale)

    assert run_dense(staged(Scaled(), (torch.tensor(2.0), IMAGES)), {}).batch == len(IMAGES), "a number has no samples"


def test_what_the_forward_stores_in_its_modules_is_taken_back() -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head, self.seen = unit(3, 6), Head(6), 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            self.maps = self.stem(x)
            return self.head(self.maps)

    copied = staged(Remembering())
    run_dense(copied, {})
    assert copied.model.seen == 0 and not hasattr(copied.model, "maps")
