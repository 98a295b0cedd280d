"""Trial patterns, and what a probe says of right and of wrong hypotheses."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.networks import IMAGES, PATTERNS, TRAPS, Head, Trap, chain, unit
from torch import Tensor, nn

from narrower.graph.selection import Kept
from narrower.surgery.attributes import Place
from narrower.surgery.copying import Stage, stage
from narrower.tracing.dense import DenseRun, run_dense
from narrower.tracing.grouping import Solution, solve
from narrower.tracing.labels import Axis, Ids
from narrower.tracing.probe import Failure
from narrower.tracing.trials import indexes_channels, probe, trial_pattern


def staged(model: nn.Module, inputs: Any = IMAGES,
           view_dims: Mapping[str, int] | None = None) -> tuple[Stage, DenseRun, Solution]:
    copied = stage(model, inputs, "meta")
    dense = run_dense(copied, view_dims or {})
    return copied, dense, solve(dense, {}, {})


def probed(model: nn.Module, inputs: Any = IMAGES, *, view_dims: Mapping[str, int] | None = None,
           stored_sizes: Mapping[Place, Ids] | None = None) -> tuple[Failure | None, Solution]:
    copied, dense, solution = staged(model, inputs, view_dims)
    return probe(copied, dense, solution, trial_pattern(solution.graph), stored_sizes or {}), solution


def failure_of(model: nn.Module, **options: Any) -> tuple[Failure, list[str]]:
    """The failure, and the names of the groups at fault."""
    failure, solution = probed(model, **options)
    assert failure is not None
    return failure, sorted(g.name for g in solution.groups_of(failure.units))


# ------------------------------------------------------------------------------------------------ patterns


@pytest.mark.parametrize("spare_ends", [False, True])
def test_a_trial_removes_a_part_of_each_group_and_another_share_of_its_neighbour(spare_ends: bool) -> None:
    graph = staged(nn.Sequential(unit(3, 24), *(unit(24, 24) for _ in range(8)), Head(24)))[2].graph
    kept = trial_pattern(graph, spare_ends).keep
    counts = [len(kept[g.name]) for g in graph.free]
    assert len(counts) == 9 and all(8 <= n <= 18 for n in counts)
    assert all(a != b for a, b in pairwise(counts))


def test_one_pattern_removes_the_ends_and_one_keeps_them() -> None:
    graph = staged(chain(unit(3, 24), unit(24, 30), Head(30)))[2].graph
    removing, sparing = trial_pattern(graph).keep, trial_pattern(graph, spare_ends=True).keep
    for g in graph.free:
        assert not {0, g.size - 1} & set(removing[g.name]) and {0, g.size - 1} <= set(sparing[g.name])
        assert 1 not in sparing[g.name], "those behind the first go"


def test_small_groups_lose_a_channel_and_keep_one() -> None:
    graph = staged(chain(unit(3, 2), unit(2, 3), Head(3)))[2].graph
    for spare_ends in (False, True):
        assert [len(k) for k in trial_pattern(graph, spare_ends).keep.values()] == [1, 2]


def test_only_slices_of_channels_ask_for_the_second_pattern() -> None:
    def asks(function: Any, width: int = 12) -> bool:
        return indexes_channels(staged(Trap(function, width))[1].collectors["eval"])

    assert asks(lambda m, x: torch.cat([x[:, :5], x[:, 5:]], 1)) and asks(lambda m, x: F.pad(x, (0, 0, 0, 0, 0, -2)), 10)
    assert not asks(lambda m, x: x[:, :, 1:]) and not asks(lambda m, x: F.pad(x, (1, 1)))


# ------------------------------------------------------------------------------------------------ probes


@pytest.mark.parametrize("name", PATTERNS)
def test_a_right_graph_has_no_failure(name: str) -> None:
    failure, solution = probed(PATTERNS[name].make(), PATTERNS[name].inputs)
    assert failure is None and solution.graph.free


def test_nothing_removed_fails_nowhere() -> None:
    copied, dense, solution = staged(TRAPS["slices_by_numbers"].make())
    assert probe(copied, dense, solution, Kept(solution.graph, {}), {}) is None


def test_a_view_split_the_wrong_way_names_the_dimension_that_shrinks() -> None:
    """`view(b, -1, 4, h, w)`: the last of the dimensions is taken to shrink first."""
    failure, _ = failure_of(TRAPS["view_minus_one_4"].make())
    assert failure.reason.code == "differs" and failure.view_dim is not None
    where, dim = failure.view_dim
    assert dim == 1 and where.startswith("trick, ")
    assert probed(TRAPS["view_minus_one_4"].make(), view_dims={where: 1})[0] is None
    assert probed(TRAPS["view_4_minus_one"].make())[0] is None


def test_channels_taken_by_number_are_at_fault() -> None:
    failure, groups = failure_of(TRAPS["slices_by_numbers"].make())
    assert (failure.reason.code, failure.mode, failure.module, failure.view_dim) == ("differs", "eval", "trick", None)
    assert groups == ["stem.0"] and "slice gives other channels" in failure.reason.text
    assert "networks.py:" in failure.reason.where


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.at = 5

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, : self.at] * 2, x[:, self.at:]], 1)


def test_a_stored_number_fails_until_it_follows_the_channels_that_it_counts() -> None:
    model = chain(unit(3, 12), Halves(), unit(12, 7), Head(7))
    failure, groups = failure_of(model)
    assert (failure.reason.code, failure.module, groups) == ("differs", "1", ["0.0"])
    copied, dense, solution = staged(model)
    ids = np.arange(12) + dense.axes.start[Axis("0.0.weight", 0)]
    kept = trial_pattern(solution.graph)
    stays = kept.mask("0.0")
    right = [stays[k:k + 5].sum() == stays[:5].sum() for k in range(8)]
    found = [probe(copied, dense, solution, kept, {Place("1", "at"): ids[k:k + 5]}) for k in range(8)]
    assert [f is None for f in found] == right and not all(right)
    module: Any = copied.model.get_submodule("1")
    assert module.at == 5, "a probe puts it back"


def test_a_forward_that_fails_gives_the_error_and_the_channels_that_it_read() -> None:
    failure, groups = failure_of(TRAPS["split_by_numbers"].make())
    assert (failure.reason.code, failure.module, groups) == ("fails", "trick", ["stem.0"])
    assert failure.reason.text.startswith("the forward fails when narrow: split_with_sizes expects")


def test_an_output_that_changes_its_shape() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = unit(3, 12), Head(12)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.stem(x)
            return self.head(x), torch.zeros(x.shape[1])

    failure, groups = failure_of(Counting())
    assert failure.reason.code == "output" and not groups


def only_when_narrow(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, m.weight) if x.shape[1] < 12 else x.relu()


def test_the_module_of_a_failure_is_known_however_the_probe_finds_it() -> None:
    """A parameter that only the narrow forward reads is found before any operator has run on it."""
    failure, _ = failure_of(Trap(only_when_narrow, weight=nn.Parameter(torch.rand(9, 9, 1, 1))))
    assert "is used in another way" in failure.reason.text
    assert failure.module == "trick" and failure.reason.where.startswith("trick, support/networks.py")


def test_a_failure_within_modules_of_torch_alone_names_the_innermost() -> None:
    failure, _ = failure_of(chain(unit(3, 12), nn.Unflatten(1, (3, 4)), nn.Flatten(1, 2), unit(12, 7), Head(7)))
    assert failure.module == failure.reason.where == "1"


def test_failures_of_the_train_forward_say_so() -> None:
    class Training(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.aux, self.head = unit(3, 12), unit(12, 8), Head(12)

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            return (self.head(x), self.aux(x.view(-1, 12, 8, 8)).mean()) if self.training else self.head(x)

    failure, _ = failure_of(Training())
    assert failure.mode == "train" and failure.module == ""


@pytest.mark.parametrize("name", ["plain", "split_by_numbers", "slices_by_numbers", "training_only"])
def test_a_probe_leaves_the_staged_model_as_it_was(name: str) -> None:
    copied, dense, solution = staged((TRAPS[name] if name in TRAPS else PATTERNS[name]).make())
    before = {n: (id(t), t.shape) for n, t in copied.model.state_dict(keep_vars=True).items()}
    probe(copied, dense, solution, trial_pattern(solution.graph), {})
    assert {n: (id(t), t.shape) for n, t in copied.model.state_dict(keep_vars=True).items()} == before
    assert not any(m.training for m in copied.model.modules())
