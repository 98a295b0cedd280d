"""refine: a pure step from hypotheses and a failure to the next hypotheses."""

from __future__ import annotations

import numpy as np

from narrower.graph.types import PinReason
from narrower.surgery.attributes import Place
from narrower.tracing.hypotheses import Attempt, Diagnosis, Hypotheses, refine
from narrower.tracing.probe import Failure

REASON = PinReason("differs", "slice gives other channels when narrow", "block, model.py:3")
FAILURE = Failure(REASON, np.array([1, 2]), module="block", place=5)
SIZES = {Place("block", "width", None): np.arange(3)}
ATTEMPT: Attempt = "differs", "slice", frozenset({(Place("block", "width", None), b"")})
OLD = Hypotheses({"a view": 1}, {"stem": REASON}, {Place("old", "n", None): np.arange(2)}, {ATTEMPT: 1}, spare_ends=True)


def test_groups_at_fault_are_pinned_with_the_reason_of_the_failure() -> None:
    new = refine(OLD, FAILURE, Diagnosis(groups=("a", "b")))
    assert new.pins == {"stem": REASON, "a": REASON, "b": REASON} and OLD.pins == {"stem": REASON}
    assert (new.view_dims, new.stored_sizes, new.spare_ends) == (OLD.view_dims, OLD.stored_sizes, True)


def test_stored_sizes_that_mend_are_added_to_those_found_before() -> None:
    new = refine(OLD, FAILURE, Diagnosis(stored_sizes=SIZES, failed_attempts=(ATTEMPT,)))
    assert set(new.stored_sizes) == {*OLD.stored_sizes, *SIZES} and new.pins == OLD.pins
    assert new.failed_attempts == {ATTEMPT: 2} and OLD.failed_attempts == {ATTEMPT: 1}


def test_a_size_found_before_stays() -> None:
    (place,) = OLD.stored_sizes
    assert refine(OLD, FAILURE, Diagnosis(stored_sizes={place: np.arange(9)})).stored_sizes[place] is OLD.stored_sizes[place]


def test_another_dimension_of_a_view_forgets_what_was_found_of_the_groups() -> None:
    failure = Failure(REASON, np.array([1]), view_dim=("another view", 2))
    assert refine(OLD, failure, Diagnosis()) == Hypotheses({"a view": 1, "another view": 2})


def test_a_dimension_that_was_assumed_is_not_changed_again() -> None:
    failure = Failure(REASON, np.array([1]), view_dim=("a view", 2))
    new = refine(OLD, failure, Diagnosis(groups=("a",)))
    assert new.view_dims == {"a view": 1} and "a" in new.pins


def test_that_the_forward_is_repeatable_is_asked_once() -> None:
    new = refine(OLD, FAILURE, Diagnosis(repeatable=True))
    assert new.repeatable and refine(new, FAILURE, Diagnosis()).repeatable
    assert new.with_view_dims({"b": 1}).repeatable


def test_a_failure_is_after_another_if_the_probe_got_further() -> None:
    here, later = (Failure(REASON, np.array([]), place=place) for place in (3, 4))
    training = Failure(REASON, np.array([]), "train", place=0)
    assert later.is_after(here) and not here.is_after(later) and not here.is_after(here)
    assert training.is_after(later) and not later.is_after(training)
