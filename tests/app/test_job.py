"""What a run is told about its images before it begins."""

from __future__ import annotations

import pytest

from narrower.app.job import note_order
from narrower.app.terminal import Terminal


@pytest.mark.parametrize("classes, said", [
    (("1", "2", "10"), "class 1 is '2' here (timm's order: 2 before 10, capitals as small letters) and '10' in"),
    (("apple", "Banana"), "class 0 is 'apple' here"),
    (("01", "02", "10"), ""),
    ((), ""),
])  # fmt: skip
def test_class_folders_that_torchvision_would_number_otherwise_are_a_warning(
    classes: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    note_order(classes, Terminal())
    err = " ".join(capsys.readouterr().err.split())
    assert (said in err) if said else not err
