"""The methods that narrow in the training, as the commands see them. What each does is tested in `test_cli.py`."""

from __future__ import annotations

from narrower.app.config import METHODS_WITH, TRAINED
from narrower.app.narrowing_methods import NARROWING_METHODS


def test_every_method_that_trains_is_there_and_no_other() -> None:
    """Settings know their names without loading what trains."""
    assert tuple(NARROWING_METHODS) == TRAINED
    assert {name for names in METHODS_WITH.values() for name in names if name in NARROWING_METHODS} == {*TRAINED}
