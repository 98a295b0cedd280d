"""Latency tables of machines whose times are known functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import narrower
from narrower.deployment.layer_times import key_of
from narrower.deployment.survey import Survey, sizes_in, survey
from narrower.planning.latency import Whole
from support.networks import PATTERNS
from support.plans import graph_of

Machine = Callable[[Mapping[str, Any]], float]
"""Milliseconds of a layer, as `layer_times` describes it."""


@cache
def survey_of(name: str) -> Survey:
    return survey(PATTERNS[name].make(), graph_of(name), PATTERNS[name].inputs)


def table_of(name: str, machine: Machine, rest: float = 0.0) -> narrower.LatencyTable:
    """The table of one of the PATTERNS as measured on a machine; its whole network takes the sum of its layers, and `rest`."""
    found = survey_of(name)
    times = {key_of(job): machine(job) for job in found.jobs()}
    sizes = sizes_in(PATTERNS[name].make(), found)
    return found.table({"runtime": "eager"}, times, [Whole(sizes, truth(found, machine, sizes) + rest, 0.0)])


def truth(found: Survey, machine: Machine, sizes: Mapping[str, tuple[int, int]]) -> float:
    """Milliseconds of all layers with weights of these sizes."""
    return sum(layer.calls * machine({**found.kinds[layer.kind]._asdict(), "sizes": sizes[layer.tensor]})
               for layer in found.layers)
