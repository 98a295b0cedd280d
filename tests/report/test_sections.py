"""Sections: what each says of a run."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("matplotlib")
from support.run_folders import DENSE, NARROW, ROWS, make_facts, resrep_facts

from narrower.planning.latency import LatencyTable, LayerKind, Point
from narrower.planning.latency import Layer as TableLayer
from narrower.report import pictures, sections


def cells(section: sections.Section | None) -> list[tuple[str, ...]]:
    assert section is not None and section.table is not None
    return list(section.table.rows)


def test_each_stage_has_a_row_and_only_what_was_timed_a_latency() -> None:
    rows = cells(sections.stages(make_facts()))
    assert [row[0] for row in rows] == ["dense", "cut", "reconstructed", "fine-tuned", "change"]
    assert [row[1] for row in rows] == ["88.29 %", "23.93 %", "81.27 %", "86.51 %", "-1.78"]
    assert [row[5] for row in rows] == ["2.00 ms", "", "", "1.50 ms", "× 0.750"]


def test_another_headline_than_top1_is_shown_by_its_name() -> None:
    measured = {"stage": "measure", "dense": {"miou": 70.0, **{k: v for k, v in DENSE.items() if k != "top1"}},
                "narrow": {"miou": 68.5, **{k: v for k, v in NARROW.items() if k != "top1"}}, "stages": {"cut": 68.5}}
    found = sections.stages(make_facts(rows=[{"stage": "cut", "headline": "miou", "miou": 68.5, "seconds": 1.0}, measured]))
    assert found.table and found.table.header[1] == "miou"
    assert [row[1] for row in cells(found)] == ["70.00 %", "68.50 %", "-1.50"]


def test_multiply_adds_are_those_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[tuple[str, float, float]]] = []
    monkeypatch.setattr(pictures, "bars", lambda *args: given.append(args[-1]))
    sections.macs(make_facts())
    assert given[0] == [("conv1", 64 * 216 / 1e6, 64 * 162 / 1e6), ("conv2", 64 * 1152 / 1e6, 64 * 432 / 1e6),
                        ("head", 160 / 1e6, 80 / 1e6)]


def test_the_chosen_points_stand_on_the_curves() -> None:
    facts = make_facts()
    assert facts.sensitivity is not None
    assert cells(sections.damage(facts)) == [
        ("conv1", "8", "6", "25%", f"{facts.sensitivity.damage(('conv1',), 0.25):.4f}"), ("conv2", "16", "8", "50%", "0.1000")]


def test_pinned_groups_are_listed_with_their_reason() -> None:
    facts = make_facts()
    assert facts.graph is not None
    rows = cells(sections.pins(facts))
    assert [row[0] for row in rows] == [g.name for g in facts.graph if g.pinned] != []
    assert all(reason for *_, reason in rows)


def counted(number: int) -> list[dict[str, object]]:
    """Rows of a run with so many classes of 10 images: each lost one image more than the one before."""
    right = [[10] * number, [10 - k % 10 for k in range(number)]]
    return [{"stage": stage, "by_class": {"images": [10] * number, "right": found}}
            for stage, found in zip(("evaluate dense", "cut"), right, strict=True)]


@pytest.mark.parametrize(("number", "shown"), [(10, 10), (1000, pictures.FEW_CLASSES)])
def test_classes_are_shown_those_that_changed_most_where_they_are_many(number: int, shown: int) -> None:
    found = sections.classes(make_facts(rows=[*counted(number), *ROWS[-1:]]))
    rows = cells(found)
    assert found and found.picture and len(rows) == number and rows[0][2:] == ("100.00 %", "10.00 %", "-90.00")
    names = {str(k) for k in range(number) if f">{k}</text>" in found.picture.svg.decode()}
    assert rows[0][0] in names and len(names) >= shown
    assert number == shown or "percentage points" in found.picture.svg.decode()


def test_milliseconds_are_those_of_the_latency_table_where_there_is_one() -> None:
    kinds = (LayerKind("conv", (3, 3), (1, 1), (1, 1), (1, 1), 1, (8, 8)),)
    layers = (TableLayer("conv1.weight", (8, 3), 0, 1, 64), TableLayer("conv2.weight", (16, 8), 0, 1, 64))
    points = tuple(Point(0, (n, m), n * m / 100) for n in (4, 8, 16) for m in (2, 4, 8))
    table = LatencyTable({"runtime": "onnxruntime", "threads": 1}, kinds, layers, points, (), ())
    rows = cells(sections.latency(make_facts(latency=table)))
    assert [row[0] for row in rows] == ["conv1", "conv2"] and rows[1][3] == f"× {float(rows[1][2]) / float(rows[1][1]):.3f}"
    assert float(rows[1][1]) == pytest.approx(1.28, rel=0.05) and float(rows[1][2]) == pytest.approx(0.48, rel=0.05)


def test_milliseconds_without_a_table_are_those_that_the_run_measured() -> None:
    found = sections.latency(make_facts())
    assert cells(found) == [("conv1", "0.3000", "0.2000", "× 0.667"), ("conv2", "0.5000", "0.3000", "× 0.600")]
    assert found and "0.800 → 0.500 ms" in found.text and "eager PyTorch" in found.text
    found = sections.latency(make_facts(rows=[{key: value for key, value in ROWS[-1].items() if key != "layer_times"}]))
    assert found and "has timed no layers" in found.absent


def test_scores_are_shown_of_groups_that_lose_channels_along_the_network() -> None:
    some = make_facts().scores["conv1"]
    many = {f"group{k}": some._replace(kept=some.kept | (k == 3)) for k in range(20)}
    found = sections.scores(make_facts(scores=many))
    assert found and found.picture
    shown = [name for name in many if f">{name}: 6 of 8 stay</text>" in found.picture.svg.decode()]
    assert len(shown) == 6 and shown[0] == "group0" and shown[-1] == "group19"
    found = sections.scores(make_facts(settings={"method": "soft", "prior": "obs"}))
    assert found and "(obs)" in found.text and "the training which" in found.text


def test_norms_go_on_from_row_to_row(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(pictures, "norms", lambda *args: given.extend(args))
    assert sections.norms(make_facts()) is None
    assert sections.norms(resrep_facts()) is not None
    assert given[0] == [1, 2, 4] and given[1]["conv1"].tolist() == [[1.0, 0.9], [0.9, 0.4], [0.9, 0.0]]
    found = sections.norms(make_facts(settings={"method": "resrep"}))
    assert found and "has noted no norms" in found.absent


def test_an_older_run_says_that_it_has_not_counted_by_class_and_a_task_has_no_classes() -> None:
    found = sections.classes(make_facts(rows=ROWS[-1:]))
    assert found and "has not counted by class" in found.absent
    assert sections.classes(make_facts(settings={"task": "task.py:Task"})) is None


def test_resrep_has_a_section_only_in_its_own_runs() -> None:
    assert sections.resrep(make_facts()) is None
    found = sections.resrep(resrep_facts())
    assert found is not None and found.picture is not None
    rows = [row for row in resrep_facts().rows if "masked" not in row]
    found = sections.resrep(make_facts(rows=rows, settings={"method": "resrep"}))
    assert found is not None and found.picture is None and found.absent


def test_settings_and_seed_are_all_there() -> None:
    facts = make_facts()
    found = sections.made_by(facts)
    assert "Seed 7." in found.text and found.code == "narrower prune --config 'run <1>/config.yaml'"
    assert cells(found) == [(key, str(value)) for key, value in facts.settings.items()]


def test_the_command_is_shown_as_it_was_typed_with_those_that_went_on() -> None:
    start = ROWS[0] | {"typed": "narrower prune --macs '50%'", "torch": "2.14", "python": "3.12", "processes": 2}
    found = sections.made_by(make_facts(rows=[start, {"stage": "resume", "typed": "narrower prune --resume run"}, *ROWS[1:]]))
    assert found.code.splitlines()[:2] == ["narrower prune --macs '50%'", "narrower prune --resume run"]
    assert "Python 3.12, in 2 processes." in found.text


def test_a_training_has_its_accuracy() -> None:
    rows = [*[r for r in ROWS if "epoch" in r], {"stage": "train", "top1": 90.5, "seconds": 3.0}]
    assert cells(sections.stages(make_facts(rows=rows))) == [("trained", "90.50 %", "3.0")]
