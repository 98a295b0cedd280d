"""Accuracy class by class, from the rows of a run."""

from __future__ import annotations

import pytest
from support.run_folders import ROWS, make_facts

from narrower.report.by_class import classes_of, told


def counted(stage: str, right: list[int], **more: object) -> dict[str, object]:
    return {"stage": stage, "by_class": {"images": [10, 0, 20], "right": right}, **more}


def test_the_last_network_is_compared_with_the_dense_one_in_classes_that_have_images() -> None:
    rows = [{"stage": "start", "classes": ["cat", "dog", "cow"]}, counted("evaluate dense", [9, 0, 20]),
            counted("cut", [0, 0, 0]), counted("fine-tune", [1, 0, 1], epoch=3), counted("fine-tune", [10, 0, 15]), ROWS[-1]]
    found = classes_of(make_facts(rows=rows))
    assert [tuple(one) for one in found] == [("cat", 10, 90.0, 100.0), ("cow", 20, 100.0, 75.0)]
    assert told(found) == ("Of 2 classes 1 lost and 1 gained. Most lost cow (-25.0 points) and most gained cat (+10.0). "
                           "A class has 20 images (the median): one image is 5.0 points.")


@pytest.mark.parametrize("rows", [ROWS[-1:], [counted("evaluate dense", [9, 0, 20])], [counted("cut", [9, 0, 20])]])
def test_a_run_that_has_not_counted_both_has_no_classes(rows: list[dict[str, object]]) -> None:
    assert classes_of(make_facts(rows=rows)) == []


def test_what_did_not_change_is_told_as_such() -> None:
    rows = [counted("train dense", [9, 0, 20]), counted("merge", [9, 0, 20])]
    assert told(classes_of(make_facts(rows=rows))).startswith("Of 2 classes 0 lost and 0 gained. A class has")
