"""The values of `--method` that narrow a network while it trains, and what the commands ask of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn

from ..graph.types import Graph
from ..planning.plan import Plan
from . import centripetal_run, resrep_run, soft_run
from .job import Job


class NarrowingMethod(NamedTuple):
    """One of them. Each function takes the job, the dense network and its graph.

    Attributes:
        check: raises ConfigError or PlanError where the method is not possible, before anything is trained.
        plan: what goes, before the training.
        train: trains a copy of the network. Returns the narrow one, and the plan where there is one.
    """

    check: Callable[[Job, nn.Module, Graph], None]
    plan: Callable[[Job, nn.Module, Graph], Plan | None]
    train: Callable[[Job, nn.Module, Graph], tuple[nn.Module, Plan | None]]


NARROWING_METHODS: Mapping[str, NarrowingMethod] = {
    "resrep": NarrowingMethod(resrep_run.check, lambda *given: resrep_run.choose(*given).plan, resrep_run.train_resrep),
    "soft": NarrowingMethod(soft_run.check, soft_run.choose, soft_run.train_soft),
    "centripetal": NarrowingMethod(centripetal_run.check, centripetal_run.choose, centripetal_run.train_centripetal),
}
