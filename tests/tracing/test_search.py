"""The search: how many forwards it takes, how it finds what is at fault, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from support.networks import IMAGES, MIXERS, TRAPS, Blurred, Head, Plain, Trap, chain, unit
from torch import Tensor, nn

from narrower.errors import TraceError
from narrower.graph.selection import Kept
from narrower.graph.types import PinReason
from narrower.surgery.attributes import Place
from narrower.surgery.copying import stage
from narrower.tracing.dense import DenseRun
from narrower.tracing.grouping import solve
from narrower.tracing.hypotheses import Hypotheses
from narrower.tracing.labels import Ids
from narrower.tracing.probe import Failure
from narrower.tracing.search import MAX_ATTEMPTS, Progress, State, TraceSearch


class Recorded(TraceSearch):
    """A search that records its dense runs and probes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(stage(model, IMAGES, "meta"), Progress(lambda line: None))
        self.traced: list[Hypotheses] = []
        self.probed: list[Failure | None] = []
        self.tried_sizes: list[Mapping[Place, Ids]] = []

    def trace(self, hypotheses: Hypotheses) -> DenseRun:
        self.traced.append(hypotheses)
        return super().trace(hypotheses)

    def probe(self, state: State, kept: Kept, stored_sizes: Mapping[Place, Ids] | None = None) -> Failure | None:
        self.tried_sizes += [stored_sizes] if stored_sizes else []
        self.probed.append(super().probe(state, kept, stored_sizes))
        return self.probed[-1]

    def first_state(self) -> State:
        """What is assumed before any probe."""
        dense = self.trace(Hypotheses())
        return State(Hypotheses(), dense, solve(dense, {}, {}))


def free(search: TraceSearch) -> dict[str, int]:
    return {g.name: g.size for g in search.graph(True).free}


# ------------------------------------------------------------------------------------------------ progress


def test_progress_is_reported_after_2_4_and_8_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("narrower.tracing.search.perf_counter", lambda: now)
    lines: list[str] = []
    progress = Progress(lines.append)
    found = Hypotheses(pins={"a": PinReason("fails", "")}, stored_sizes={Place("m", "n"): np.arange(3)})
    seconds: list[float] = []
    for _ in range(1000):
        now += 1 / 64
        progress.count(2, found)
        seconds += [now - 100] * (len(lines) > len(seconds))
    assert [round(s, 1) for s in seconds] == [2.0, 4.0, 8.1]
    assert lines[0] == "tracing since 2 s: 256 forwards, 1 groups found to be fixed, 1 stored numbers that follow"


# ------------------------------------------------------------------------------------------------ forwards


def test_a_right_network_takes_one_dense_run_and_one_probe() -> None:
    search = Recorded(Plain())
    assert free(search) == {"conv1": 10, "conv2": 14, "conv3": 12}
    assert len(search.traced) == 1 and search.probed == [None]
    assert search.progress.forwards == 2


def gated_halves(m: Any, x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return x[:, :half] * x[:, half:].sigmoid()


def test_slices_of_channels_take_a_second_probe_with_the_other_pattern() -> None:
    search = Recorded(Trap(gated_halves, 6))
    state = search.settle(Hypotheses())
    assert state.hypotheses == Hypotheses(spare_ends=True)
    assert len(search.traced) == 1 and search.probed == [None, None]


def test_a_forward_that_only_training_uses_is_probed_too() -> None:
    search = Recorded(TRAPS["training_only"].make())
    search.graph(True)
    assert search.probed == [None] and search.progress.forwards == 3


# ------------------------------------------------------------------------------------------------ views


def test_a_view_that_splits_the_other_way_is_found_by_its_failure() -> None:
    search = Recorded(TRAPS["view_minus_one_4"].make())
    assert free(search) == TRAPS["view_minus_one_4"].free
    ((where, dim),) = search.traced[1].view_dims.items()
    assert dim == 1 and where.startswith("trick, ")
    assert len(search.traced) == 2 and [f is None for f in search.probed] == [False, True, True], "the last: one row less"


def test_the_smallest_steps_are_tried_of_views_that_are_read_otherwise() -> None:
    """The trial keeps 8 of 12 channels: a multiple of four, by chance."""
    search = Recorded(TRAPS["pairs_of_fours"].make())
    ((_, _, where),) = search.first_state().dense.collectors["eval"].splits.values()
    state = search.settle(Hypotheses(view_dims={where: 1}))
    assert {name: reason.code for name, reason in state.hypotheses.pins.items()} == {"stem.0": "fails"}
    assert [f is None for f in search.probed] == [True, False, True], "the trial, one pair less, and what is left"


def weighted_fours(m: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return (x.view(b, c // 4, 4, h, w) * torch.arange(1.0, 5.0, device=x.device).view(1, 1, 4, 1, 1)).sum(2)


def test_a_view_that_pins_its_channels_is_tried_the_other_way() -> None:
    """The four weights cannot shrink, so that the dense run pins what the view splits; no probe fails."""
    search = Recorded(Trap(weighted_fours, 3))
    first = search.first_state().solution.graph
    assert [g.pinned.code for g in first if g.pinned and g.name.startswith("stem.0")] == ["operand"]
    assert free(search) == {"stem.0": 3, "next.0": 9}


# ------------------------------------------------------------------------------------------------ what is at fault


class Deep(nn.Module):
    """Eight blocks. The second output has the shape that `width` gives for the channels of the third and the sixth."""

    def __init__(self, width: Callable[[int, int], int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(unit(3 if k == 0 else 8, 8) for k in range(8))
        self.head, self.width = Head(8), width

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        channels = []
        for block in self.blocks:
            x = block(x)
            channels.append(x.shape[1])
        return self.head(x), torch.zeros(self.width(channels[2], channels[5]))


def of_sixth(third: int, sixth: int) -> int:
    return sixth


def of_wider(third: int, sixth: int) -> int:
    return max(third, sixth)


BLOCKS = [f"blocks.{k}.0" for k in range(8)]


@pytest.mark.parametrize("width, fault, probes", [(of_sixth, ["blocks.5.0"], 6), (of_wider, BLOCKS, 3)])
def test_bisection_finds_the_group_at_fault(width: Callable[[int, int], int], fault: list[str],
                                                    probes: int) -> None:
    """Groups that fail only together cannot be told apart by halves: all of them stay suspects."""
    search = Recorded(Deep(width))
    state = search.first_state()
    assert [g.name for g in state.solution.graph.free] == BLOCKS
    assert search.bisect(state, BLOCKS) == fault
    assert len(search.probed) == probes, "all of them, then the halves until one fails"


def test_bisection_leaves_suspects_that_do_not_fail() -> None:
    search = Recorded(Deep(of_sixth))
    assert search.bisect(search.first_state(), BLOCKS[:2]) == BLOCKS[:2]
    assert search.probed == [None]


def test_bisection_removes_tied_groups_together() -> None:
    """A grouped convolution reads two groups, which must keep equally many channels."""
    search = Recorded(TRAPS["tied_fault"].make())
    assert search.bisect(search.first_state(), ["a.0"]) == ["a.0"]
    (failure,) = search.probed
    assert failure is not None and failure.reason.code == "differs"


def test_only_the_group_at_fault_is_pinned_with_the_reason() -> None:
    search = Recorded(Deep(of_sixth))
    state = search.settle(Hypotheses())
    assert state.hypotheses.pins == {"blocks.5.0": PinReason("output", "the output changes its shape when narrow")}
    assert [g.name for g in state.solution.graph.free] == [name for name in BLOCKS if name != "blocks.5.0"]
    assert state.hypotheses.repeatable, "asked, because the failure names no channels"


def test_a_stored_number_that_mends_a_failure_becomes_an_edit() -> None:
    search = Recorded(chain(unit(3, 10), Blurred(10), unit(10, 6), Head(6)))
    graph = search.graph(True)
    (edit,) = graph.edits
    assert (edit.module, edit.attribute, edit.entry, edit.size) == ("1", "channels", None, 10)
    assert [(m.group, m.positions.tolist()) for m in edit.members] == [("0.0", list(range(10)))]
    assert graph["0.0"].free and search.probed[0] is not None and search.probed[-1] is None


class Fixed(nn.Module):
    """Views 12 channels by a number in its code. It stores the same number, but does not use it."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = 12

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 12, 64).relu().view(-1, 12, 8, 8)


def test_stored_numbers_that_did_not_mend_three_layers_are_not_tried_again() -> None:
    search = Recorded(chain(unit(3, 12), *(chain(Fixed(), unit(12, 12)) for _ in range(5)), Head(12)))
    state = search.settle(Hypotheses())
    assert len(search.tried_sizes) == MAX_ATTEMPTS == 3
    assert len(state.hypotheses.pins) == 5 and not state.hypotheses.stored_sizes


# ------------------------------------------------------------------------------------------------ what it refuses


class Unsteady(nn.Module):
    """All forwards but the first return another shape. The count is kept where no copy of the module restores it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = chain(*layers)
        calls: list[int] = []

        def number() -> int:
            calls.append(1)
            return len(calls)

        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        return out if self.number() == 1 else out[:1]


@pytest.mark.parametrize("layers, probes", [([unit(3, 6), Head(6)], 2), ([nn.Conv2d(3, 6, 1)], 1)], ids=["free", "pinned"])
def test_a_forward_that_does_not_do_the_same_twice_is_refused(layers: list[nn.Module], probes: int) -> None:
    """Found by a probe that removes nothing. Where nothing is free, every probe is one."""
    search = Recorded(Unsteady(*layers))
    with pytest.raises(TraceError, match="the forward does not do the same twice: "):
        search.graph(True)
    assert len(search.probed) == probes


def test_a_network_without_convolution_or_linear_layer_is_refused() -> None:
    with pytest.raises(TraceError, match="no convolution or linear layer"):
        Recorded(nn.BatchNorm2d(3)).graph(True)


@pytest.mark.parametrize("name", ["softmax", "group_norm", "everything"])
def test_inexact_groups_are_pinned_on_request(name: str) -> None:
    loose, strict = (Recorded(MIXERS[name]()).graph(allow_inexact) for allow_inexact in (True, False))
    mixed = [g.name for g in loose.free if not g.exact]
    assert mixed and {g.name: g.pinned.code for g in strict if g.name in mixed and g.pinned} == dict.fromkeys(mixed, "mixing")
    assert [g.name for g in strict.free] == [g.name for g in loose.free if g.exact] != []
