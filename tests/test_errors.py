"""What errors say."""

from __future__ import annotations

from narrower.errors import similar

KNOWN = ["resnet50", "resnet56", "resnet110", "vgg16"]


def test_the_nearest_names_are_offered_and_none_that_is_far() -> None:
    assert similar("resnet57", KNOWN) == "; did you mean resnet56?"
    assert similar("resnet57", KNOWN, most=2, prefix="--") == "; did you mean --resnet56, --resnet50?"
    assert similar("mobilenet", ["vgg16"]) == ""
