"""Notes of row norms: evenly over the training, in little space, and whole after a break."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import narrower
from narrower.resrep.history import CHANNELS, TIMES, NormHistory


def training(steps: int) -> tuple[narrower.ResRep, NormHistory]:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 8, 3), nn.BatchNorm2d(8),
                          nn.ReLU(), nn.Conv2d(8, 4, 3))
    resrep = narrower.ResRep(model, narrower.trace(model, torch.zeros(1, 3, 9, 9)), macs=0.5, steps=steps)
    return resrep, NormHistory(resrep)


def run(history: NormHistory, first: int, last: int, of: int) -> None:
    for number in range(first, last + 1):
        history.after_step(number, of)


def test_notes_are_spread_over_the_steps_with_the_last_and_hold_what_the_rows_are() -> None:
    resrep, history = training(1000)
    run(history, 1, 999, 1000)
    first = history.take()
    with torch.no_grad():
        resrep.compactors()["1"].weight[0] *= 0.5
    history.after_step(1000, 1000)
    found = history.take()
    assert len(first["steps"]) == TIMES - 1 and found["steps"] == [1000] and not history.take()
    assert found["norms"].keys() == resrep.placement.rows.keys()
    assert found["norms"]["0"][0][0] == 0.5 and set(found["norms"]["0"][0][1:]) == {1.0}
    assert [len(rows[0]) for rows in found["norms"].values()] == [CHANNELS, 8]
    assert max(later - before for before, later in zip(first["steps"], first["steps"][1:], strict=False)) <= 21


def test_what_was_not_taken_is_there_after_a_break() -> None:
    whole, halves = (training(20)[1] for _ in range(2))
    run(whole, 1, 20, 20)
    run(halves, 1, 10, 20)
    state: dict[str, Any] = halves.state_dict()
    run(halves, 11, 20, 20)  # a state is what it was, whatever follows
    again = training(20)[1]
    again.load_state_dict(state)
    run(again, 11, 20, 20)
    found = again.take()
    assert found["steps"] == list(range(1, 21)) and found.keys() == whole.take().keys()
    assert all(len(rows) == 20 for rows in found["norms"].values())


def test_nothing_is_noted_once_the_compactors_are_merged_for_good() -> None:
    resrep, history = training(10)
    resrep.phase = "frozen"
    run(history, 1, 10, 10)
    assert not history.take()
