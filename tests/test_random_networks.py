"""Networks that nobody thought of: whatever trace calls free narrows exactly, at the cost that the plan says."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import networks, random_networks, reference
from support.random_networks import LEAVES, Block, Random, examples

import narrower
from narrower.allocation import measure
from narrower.repair.comparison import divergences

INPUTS = networks.images(size=12)[:, :, :8]

# What may be pinned in these networks; anything else has been given up for nothing.
RIGHTLY = r"network output|zero-padded|single channel|can only go together"

requests = st.one_of(
    st.fixed_dictionaries({"remove": st.sampled_from([0.2, 0.34, 0.5, 0.8, 0.95])}),
    st.fixed_dictionaries({"macs": st.floats(0.3, 0.95), "round_to": st.sampled_from([1, 1, 2, 4])}),
    st.fixed_dictionaries({"params": st.floats(0.3, 0.95), "min_channels": st.sampled_from([1, 2])}),
    st.fixed_dictionaries({"macs": st.floats(0.4, 0.95), "params": st.floats(0.4, 0.95)}),
)


def examine(model: Random, request: dict[str, Any], seed: int, strict: bool = True) -> None:
    """All that must hold of one network and one request for it; `strict`: nothing is pinned without need."""
    torch.manual_seed(seed)
    graph = narrower.trace(model, INPUTS)
    for g in graph:  # of a few channels the probe may leave one, and a dimension of size one does not tell what it holds
        rightly = g.pinned is None or g.size <= 6 or re.search(RIGHTLY, str(g.pinned))
        assert rightly or not strict, f"{g.name} is pinned: {g.pinned}"
    if not graph.free:
        return
    try:
        plan = narrower.plan(graph, narrower.random(graph, seed=seed), **request)
    except narrower.BudgetError:
        return
    small = narrower.narrow(model, plan)
    assert reference.params(small) == plan.params[1] <= plan.params[0] == reference.params(model)
    assert reference.macs(model, INPUTS) == pytest.approx(plan.macs[0])
    assert reference.macs(small, INPUTS) == pytest.approx(plan.macs[1])
    for kind in ("macs", "params"):
        if kind in request:
            dense, narrow = getattr(plan, kind)
            assert narrow <= request[kind] * dense * (1 + 1e-9)
    with contextlib.suppress(reference.Dull):  # a mean of what an instance norm has normalised
        reference.exact(model, plan, INPUTS)
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]


@given(random_networks.recipes(), st.integers(0, 3), requests, st.integers(0, 999))
@examples(50)
def test_random_network_narrows_exactly(recipe: list[Block], head: int, request: dict[str, Any], seed: int) -> None:
    # which dimension of a maxout's view is the channels' is not always found out behind a concatenation
    examine(Random(recipe, head), request, seed, strict="maxout" not in str(recipe))


@given(random_networks.recipes(), st.integers(0, 999))
@examples(25)
def test_random_network_narrows_twice(recipe: list[Block], seed: int) -> None:
    model = Random(recipe, 0)
    dense = narrower.trace(model, INPUTS)
    assume(dense.free)
    first = narrower.plan(dense, narrower.random(dense, seed), remove=0.3)
    small = narrower.narrow(model, first)
    graph = narrower.trace(small, INPUTS)
    assume(graph.free)
    second = narrower.plan(graph, narrower.random(graph, seed), remove=0.4)
    try:
        error = reference.difference(model, lambda m: narrower.narrow(narrower.narrow(m, first), second), INPUTS)
    except reference.Dull:
        assume(False)
    assert error < reference.EXACT


@pytest.mark.parametrize("option", range(3))
@pytest.mark.parametrize("kind", [*LEAVES, *random_networks.NESTED])
def test_each_block_by_itself_is_free_and_exact(kind: str, option: int) -> None:
    """Between two convolutions: free, and exact."""
    inner = (Block("conv", 5, 1),) if kind in random_networks.NESTED else ()
    model = Random([Block("conv", 12, 1), Block(kind, 6, option, inner), Block("conv", 7, 1)], option % 2)
    examine(model, {"remove": 0.5}, option)
    graph = narrower.trace(model, INPUTS)
    assert graph.free and any(not g.exact for g in graph.free) == (kind in random_networks.INEXACT)


@given(random_networks.recipes(), st.integers(0, 999))
@examples(8)
def test_the_damage_of_a_random_network_is_that_of_what_narrow_returns(recipe: list[Block], seed: int) -> None:
    """Without repair, for each curve: the cut network replayed call by call is the one that `narrow` makes."""
    torch.manual_seed(seed)
    model = Random(recipe, 0).double().eval()
    images = torch.randn(12, *INPUTS.shape[1:], dtype=torch.float64)
    graph = narrower.trace(model, images[:2])
    scores = narrower.random(graph, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "second_moments", lambda *_: {})
        found = narrower.sensitivity(model, graph, scores, images.split(6), shares=(0.5,), measure="relative")
    judges = images[measure.MEASURED - 1 :: measure.MEASURED]
    for curve in (c for c in found.curves if len(c.groups) == 1):  # groups with tied counts round together
        plan = narrower.plan(graph, scores, remove=dict.fromkeys(curve.groups, curve.shares[0] + 1e-9))
        want = divergences(model, [narrower.narrow(model, plan)], [(judges, len(judges))], "relative")[0][0]
        assert curve.damages[0] == pytest.approx(want, rel=1e-6, abs=1e-15), curve.groups
