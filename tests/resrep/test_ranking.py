"""Which channels ResRep chooses and which remain: the lowest, within the budget, as far as ties let them go."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.networks import PATTERNS

import narrower
from narrower.errors import BudgetError, PlanError
from narrower.graph.cost import CostModel
from narrower.graph.equal_counts import components
from narrower.graph.selection import Kept
from narrower.planning.requests import Budget
from narrower.resrep.placement import place, without_groups
from narrower.resrep.ranking import Candidates, NormDescent, priors, tied_parts
from narrower.resrep.schedule import Ranking

RANKINGS: tuple[Ranking, ...] = ("norm", "share")


def candidates(name: str = "plain", macs: float | None = 0.5, params: float | None = None,
               ranking: Ranking = "norm") -> Candidates:
    graph = narrower.trace(PATTERNS[name].make(), PATTERNS[name].inputs)
    cost = CostModel(graph)
    parts, placement = tied_parts(graph, place(graph, "all"))
    assert placement.rows
    targets = Budget(macs, params).targets({k: cost.cost(k, cost.dense) for k in ("macs", "params")})
    return Candidates(cost, placement, parts, targets, ranking)


def norms(of: Candidates, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {g: rng.random(of.graph[g].size) for g in of.placement.rows}


def kept_without(of: Candidates, chosen: dict[str, np.ndarray]) -> Kept:
    return Kept(of.graph, {g.name: np.nonzero(~chosen.get(g.name, np.zeros(g.size, dtype=bool)))[0] for g in of.graph.free})


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "inception"])
def test_the_chosen_channels_are_the_lowest_of_their_cells_and_meet_the_budget(name: str, ranking: Ranking) -> None:
    of = candidates(name, ranking=ranking)
    values = norms(of)
    chosen, costs = of.choose(values)
    kept = kept_without(of, chosen)
    assert of.meets_budget(kept) and costs == pytest.approx(of.costs(kept))
    for part in of.parts:
        for cell in part.cells:
            gone, mine = chosen[cell.group][cell.channels], values[cell.group][cell.channels]
            assert not gone.all(), "one channel of every cell stays"
            assert not gone.any() or mine[gone].max() <= mine[~gone].min()
        lost = np.array([chosen[c.group][c.channels].sum() for c in part.cells])
        assert not len(part.equations) or not (part.equations @ lost).any(), "ties hold"


def test_the_share_lost_by_a_step_is_relative_to_the_norms_that_remain() -> None:
    of = candidates("plain")
    (part,) = [p for p in of.parts if {c.group for c in p.cells} == {"conv2"}]
    d = NormDescent(part, of.cost, {"conv2": np.array([3.0, *[1.0] * 13])})
    factor, one = len(of.graph["conv2"].layers) * math.sqrt(14), np.array([1])
    assert d.share_lost(one) == pytest.approx(-factor * math.log(15 / 16))
    assert (found := d.lowest_step()) is not None and found[0] == 1.0
    d.take(one)
    assert d.share_lost(one) == pytest.approx(-factor * math.log(14 / 15))


def test_by_norm_the_lowest_of_all_groups_go_first() -> None:
    of = candidates("plain")
    values = norms(of)
    chosen, _ = of.choose(values)
    gone = np.concatenate([values[g][chosen[g]] for g in values])
    spare = [np.sort(values[g][~chosen[g]]) for g in values]
    least = min(s[0] for s in spare if len(s) > 1)  # the last channel of a group stays, however low
    assert gone.max() < least


@pytest.mark.parametrize("ranking", RANKINGS)
def test_no_more_are_chosen_than_allowed_and_more_are_a_superset(ranking: Ranking) -> None:
    of = candidates("plain", 0.3, ranking=ranking)
    values, before = norms(of), np.zeros(0, dtype=bool)
    for most in (0, 1, 3, 7, 12):
        chosen, _ = of.choose(values, most)
        flat = np.concatenate([chosen[g] for g in values])
        assert flat.sum() == most
        assert not len(before) or (flat >= before).all()
        before = flat


def test_the_count_is_about_what_the_budget_asks_for() -> None:
    counts = [candidates("plain", budget).count() for budget in (0.8, 0.5, 0.3)]
    assert counts == sorted(counts) and counts[0] > 0
    assert counts[-1] < sum(g.size for g in candidates("plain").graph.free)


def test_a_budget_below_the_smallest_network_is_refused() -> None:
    of = candidates("plain")
    ones = {g: np.array([0]) for g in of.placement.rows}
    least = of.costs(Kept(of.graph, {g.name: ones.get(g.name, np.arange(g.size)) for g in of.graph.free}))["macs"]
    dense = of.cost.cost("macs", of.cost.dense)
    candidates("plain", 1.0001 * least / dense).check_reachable()
    with pytest.raises(BudgetError, match=f"the least is {least:,.0f}"):
        candidates("plain", 0.9999 * least / dense).check_reachable()


def test_the_first_limited_cost_is_the_kind() -> None:
    assert candidates("plain").kind == "macs"
    assert candidates("plain", None, 0.5).kind == "params"
    of = candidates("plain", 0.5, 0.9)
    assert of.kind == "macs" and set(of.targets) == {"macs", "params"}
    whole = Kept(of.graph, {})
    everything = Kept(of.graph, {g.name: np.arange(g.size) for g in of.graph.free})
    assert of.share(everything) == 1.0 and not of.meets_budget(everything) and whole.mask("conv1").all()


def alive_but(of: Candidates, dead: dict[str, list[int]]) -> dict[str, np.ndarray]:
    alive = {g: np.ones(of.graph[g].size, dtype=bool) for g in of.placement.rows}
    for group, channels in dead.items():
        alive[group][channels] = False
    return alive


def test_without_ties_exactly_the_dead_channels_are_removed() -> None:
    of = candidates("plain")
    first, second = list(of.placement.rows)[:2]
    everything = Kept(of.graph, {g.name: np.arange(g.size) for g in of.graph.free})
    left = of.remaining(alive_but(of, {first: [1, 3], second: [0]}), everything)
    for g in of.graph.free:
        gone = {first: [1, 3], second: [0]}.get(g.name, [])
        assert sorted(set(range(g.size)) - set(left.keep[g.name].tolist())) == gone


def test_tied_channels_are_removed_equally_many_and_those_gone_before_first() -> None:
    of = candidates("grouped")
    part = next(p for p in of.parts if len(p.equations))
    cells = [c for c in part.cells if c.group == part.cells[0].group]
    group, some = cells[0].group, {len(c.channels) for c in cells}
    assert len(cells) > 1 and min(some) > 1
    everything = Kept(of.graph, {g.name: np.arange(g.size) for g in of.graph.free})
    uneven = [*cells[0].channels[:2].tolist()]
    assert len(of.remaining(alive_but(of, {group: uneven}), everything).keep[group]) == of.graph[group].size
    even = [int(c.channels[-1]) for c in cells]  # the last of each cell are gone already
    before = Kept.without(of.graph, [(group, np.array(even))])
    dead = alive_but(of, {group: [*even, int(cells[0].channels[0])]})
    left = of.remaining(dead, before)
    assert sorted(set(range(of.graph[group].size)) - set(left.keep[group].tolist())) == sorted(even)


def test_values_of_rows_become_values_of_channels() -> None:
    of = candidates("residual")
    rng = np.random.default_rng(0)
    rows = {name: np.sort(rng.permutation(site.size)[: site.size // 2 + 1]) for name, site in of.placement.sites.items()}
    values = {name: rng.random(len(r)) for name, r in rows.items()}
    found = of.by_channel(values, rows, -1.0)
    assert found.keys() == of.placement.rows.keys()
    for group, arrays in found.items():
        for (site, m), array in zip(of.placement.rows[group].items(), arrays, strict=True):
            dense = {int(row): float(v) for row, v in zip(rows[site], values[site], strict=True)}
            for channel in range(of.graph[group].size):
                mine = [dense.get(int(p), -1.0) for p in m.positions[m.channels == channel]]
                assert array[channel] == max(mine) if mine else np.isnan(array[channel])


def test_tied_groups_are_compacted_together_or_not_at_all() -> None:
    of = candidates("shuffle")
    tied = next({c.group for c in p.cells} for p in components(of.graph) if len({c.group for c in p.cells}) > 1)
    lost, *others = sorted(tied)
    parts, placement = tied_parts(of.graph, without_groups(of.placement, {lost: "excluded"}))
    assert not tied & placement.rows.keys()
    assert placement.reasons[lost] == "excluded"
    assert all(placement.reasons[g] == f"tied to {lost}, which has no compactor" for g in others)
    assert {c.group for p in parts for c in p.cells} == placement.rows.keys()


def test_sites_that_no_group_needs_are_left_out() -> None:
    of = candidates("plain")
    first, *others = of.placement.rows
    less = without_groups(of.placement, {first: "a reason"})
    assert list(less.rows) == others and less.reasons[first] == "a reason"
    assert less.sites.keys() == {site for maps in less.rows.values() for site in maps} < of.placement.sites.keys()
    same = without_groups(of.placement, {})
    assert same.sites == of.placement.sites and same.constants == of.placement.constants


def test_priors_have_a_mean_of_one_in_each_group() -> None:
    of = candidates("plain")
    scores = narrower.random(of.graph)
    found = priors(of.graph, of.placement, scores)
    assert found.keys() == of.placement.rows.keys()
    for group, values in found.items():
        assert values.mean() == pytest.approx(1)
        assert np.allclose(values * float(scores[group].mean()), scores[group])
    assert all((v == 1).all() for v in priors(of.graph, of.placement, None).values())
    with pytest.raises(PlanError):
        priors(of.graph, of.placement, {g: torch.ones(1) for g in of.placement.rows})
