"""What errors say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from narrower.errors import ConfigError, check_number, checked_numbers, similar

KNOWN = ["resnet50", "resnet56", "resnet110", "vgg16"]


def test_the_nearest_names_are_offered_and_none_that_is_far() -> None:
    assert similar("resnet57", KNOWN) == "; did you mean resnet56?"
    assert similar("resnet57", KNOWN, most=2, prefix="--") == "; did you mean --resnet56, --resnet50?"
    assert similar("mobilenet", ["vgg16"]) == ""


@pytest.mark.parametrize(("value", "options"), [
    (1, {}), (0, {}), (1.0, {}), (np.float32(0.5), {}), (np.int64(1), {"whole": True}), (0.5, {"inside": True}),
])
def test_numbers_in_range_pass_also_those_of_numpy(value: Any, options: dict[str, bool]) -> None:
    check_number("x", value, 0, 1, **options)
    assert checked_numbers("x", (value, value), 0, 1, **options) == [value, value]


@pytest.mark.parametrize(("value", "options", "message"), [
    (-1, {}, "x=-1: give a number between 0 and 1"), (float("nan"), {}, "x=nan: give"), ("1", {}, "x='1': give"),
    (None, {}, "x=None: give"), (True, {}, "x=True: give"), (0.5, {"whole": True}, "x=0.5: give a whole number between"),
    (0, {"inside": True}, "x=0: give"), (1, {"inside": True}, "x=1: give"),
])
def test_numbers_out_of_range_are_named(value: Any, options: dict[str, bool], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_number("x", value, 0, 1, **options)
    with pytest.raises(ConfigError, match=message):
        checked_numbers("x", [value], 0, 1, **options)


def test_the_bounds_are_said_in_words() -> None:
    for options, message in (({"whole": True}, "a whole number from 1$"), ({"inside": True}, "a number above 1$")):
        with pytest.raises(ConfigError, match=message):
            check_number("x", 0, 1, **options)
    for values in ((), 0.5, None):
        with pytest.raises(ConfigError, match="give a tuple of numbers"):
            checked_numbers("x", values, 0)
