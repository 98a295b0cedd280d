"""What the search assumes of a network, and how a failed probe changes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..graph.types import PinCode, PinReason
from ..surgery.attributes import Place
from .labels import Ids
from .probe import Failure

Attempt = tuple[PinCode, str, frozenset[tuple[Place, bytes]]]
"""A kind of failure (its code and the operator that fails), and stored sizes that did not mend it."""


@dataclass(frozen=True)
class Hypotheses:
    """What the search assumes until a probe shows that it is wrong.

    `view_dims`: the dimension that shrinks, by the source line of a view that splits channels. `pins`: why groups cannot go,
    by their names. `stored_sizes`: for numbers that modules store, the ids that they count. `failed_attempts`: how often
    stored sizes did not mend a failure. `spare_ends`: the pattern of the trials (see `trials.trial_pattern`). `repeatable`:
    the forward has been seen to do the same twice.
    """

    view_dims: Mapping[str, int] = field(default_factory=dict)
    pins: Mapping[str, PinReason] = field(default_factory=dict)
    stored_sizes: Mapping[Place, Ids] = field(default_factory=dict)
    failed_attempts: Mapping[Attempt, int] = field(default_factory=dict)
    spare_ends: bool = False
    repeatable: bool = False

    def with_view_dims(self, view_dims: Mapping[str, int]) -> Hypotheses:
        """Other dimensions of views make other groups: what was found of those before is forgotten."""
        return Hypotheses({**self.view_dims, **view_dims}, repeatable=self.repeatable)


@dataclass(frozen=True)
class Diagnosis:
    """What further probes have told of a failure.

    `stored_sizes`: numbers that mend it if they follow the widths. `groups`: if there are none, the groups at fault.
    `failed_attempts`: stored sizes that did not mend it. `repeatable`: as in `Hypotheses`.
    """

    stored_sizes: Mapping[Place, Ids] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    failed_attempts: tuple[Attempt, ...] = ()
    repeatable: bool = False


def asks_for_view_dim(hypotheses: Hypotheses, failure: Failure) -> bool:
    """Whether the failure tells which dimension of a view shrinks, where nothing was assumed but the default."""
    return failure.view_dim is not None and failure.view_dim[0] not in hypotheses.view_dims


def refine(hypotheses: Hypotheses, failure: Failure, diagnosis: Diagnosis) -> Hypotheses:
    """The hypotheses without what the failure has shown to be wrong."""
    if failure.view_dim is not None and asks_for_view_dim(hypotheses, failure):
        return hypotheses.with_view_dims(dict([failure.view_dim]))
    failed = dict(hypotheses.failed_attempts)
    for attempt in diagnosis.failed_attempts:
        failed[attempt] = failed.get(attempt, 0) + 1
    return replace(
        hypotheses,
        pins={**hypotheses.pins, **dict.fromkeys(diagnosis.groups, failure.reason)},
        stored_sizes={**diagnosis.stored_sizes, **hypotheses.stored_sizes},
        failed_attempts=failed,
        repeatable=hypotheses.repeatable or diagnosis.repeatable,
    )
