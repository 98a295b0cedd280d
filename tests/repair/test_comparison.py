"""Outputs are compared as their kind asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import narrower
from narrower.repair.comparison import Comparison, Measure, divergences, measure_of


def compared(dense: list[Any], *others: list[Any], measure: Measure | None = None) -> tuple[list[float], Measure]:
    """Outputs chunk by chunk."""
    found = Comparison(len(others), measure)
    for k, out in enumerate(dense):
        found.dense(out)
        for n, other in enumerate(others):
            found.other(n, other[k])
    return found.values(), found.measure


@pytest.mark.parametrize(("shape", "measure"), [((7,), None), ((7, 2, 3), "kl"), ((7, 4), "kl")])
def test_class_scores_are_compared_by_the_divergence_of_torch(shape: tuple[int, ...], measure: Measure | None) -> None:
    p, q = torch.randn(5, *shape), torch.randn(5, *shape)
    want = nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="none", log_target=True).sum(1).mean()
    (value, same), kind = compared([p[:3], p[3:]], [q[:3], q[3:]], [p[:3], p[3:]], measure=measure)
    assert kind == "kl" and value == pytest.approx(float(want), rel=1e-5) and same == 0


def test_other_outputs_are_compared_by_squared_error_relative_to_the_variance() -> None:
    boxes, count = torch.randn(6, 3, 4), torch.randn(6, 1) * 5 + 2
    dense = [{"boxes": boxes[k], "count": count[k], "index": torch.arange(3)} for k in (slice(4), slice(4, 6))]
    other = [{"boxes": boxes[k], "count": count[k] + 1, "index": torch.arange(3) + 1} for k in (slice(4), slice(4, 6))]
    (value,), kind = compared(dense, other)
    assert kind == "relative" and value == pytest.approx(float(1 / count.double().var(unbiased=False)) / 2, rel=1e-6)


def test_an_offset_of_a_regression_counts_where_it_is_said_to_be_one() -> None:
    """Class probabilities do not see it."""
    dense = torch.randn(8, 4)
    assert compared([dense], [dense + 3])[0][0] == pytest.approx(0, abs=1e-6)
    (value,), measure = compared([dense], [dense + 3], measure="relative")
    assert measure == "relative" and value == pytest.approx(9 / float(dense.var(correction=0)), rel=1e-5)


def test_without_a_wish_only_what_a_classifier_returns_is_taken_for_class_scores() -> None:
    scores, map_ = torch.zeros(3, 7), torch.zeros(3, 7, 2, 2)
    assert [measure_of(out) for out in (scores, {"out": scores}, (scores, torch.zeros(3).long()),
                                             {"loss": torch.tensor(1.0), "logits": scores})] == ["kl"] * 4
    assert [measure_of(out) for out in (map_, torch.zeros(3, 1), torch.zeros(3), (scores, scores))] == ["relative"] * 4
    assert measure_of(scores, "relative") == "relative" and measure_of({"out": map_}, "kl") == "kl"
    for out in (torch.zeros(3, 1), torch.zeros(3), (scores, scores)):
        with pytest.raises(narrower.DataError, match=r"measure='kl' compares class scores, .* give 'relative'"):
            measure_of(out, "kl")
    with pytest.raises(narrower.ConfigError, match="measure='mse': give 'kl'"):
        measure_of(scores, "mse")  # type: ignore[arg-type]


def test_what_cannot_be_compared_is_an_error() -> None:
    with pytest.raises(narrower.DataError, match="returns tuple without floating-point"):
        compared([(torch.arange(3), "text")], [(torch.arange(3), "text")])
    with pytest.raises(narrower.DataError, match=r"shapes \(2, 4\), the dense ones \(2, 3\)"):
        compared([torch.randn(2, 3)], [torch.randn(2, 4)])
    with pytest.raises(narrower.DataError, match="not finite"):
        compared([torch.randn(2, 3)], [torch.full((2, 3), float("nan"))])


def test_networks_are_compared_in_eval_mode_and_get_their_modes_back() -> None:
    dense = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)).train()
    other = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)).train()
    x = torch.randn(8, 3)
    found = [divergences(dense, [other, dense], [(x[:5], 5), (x[5:], 3)]) for _ in range(2)]
    assert found[0] == found[1] and found[0][0][1] == 0 < found[0][0][0]
    assert dense.training and other.training and dense[0].training


def test_networks_that_write_into_their_inputs_see_the_same_images() -> None:
    writes, reads = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten()), nn.Flatten()
    x = torch.randn(8, 3, 2, 2)
    before = x.clone()
    (same, other), _ = divergences(writes, [writes, reads], [(x, 8)])
    (again,), _ = divergences(reads, [reads], [(x, 8)])
    assert same == again == 0 < other and torch.equal(x, before)
