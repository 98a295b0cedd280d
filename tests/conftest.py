"""What all tests share: one thread, one seed, and how many random examples hypothesis draws."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# NARROWER_EXAMPLES=2000 searches longer, from another seed each time; without it the examples are the same everywhere.
EXAMPLES = os.environ.get("NARROWER_EXAMPLES")
settings.register_profile(
    "narrower",
    max_examples=int(EXAMPLES or 100),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.load_profile("narrower")


def pytest_collection_finish() -> None:
    """What has been imported and collected stays: no later garbage collection looks at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed also notes the whole stack for each kind of device


@pytest.fixture(autouse=True)
def no_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report at the end of each run would take seconds: only the tests of `reporting` write any."""
    if request.path.parent.name == "app" and "reporting" not in request.path.name:
        from narrower.app import cli

        monkeypatch.setattr(cli, "report_at_end", lambda *_: None)
