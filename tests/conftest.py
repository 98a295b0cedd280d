"""What all tests share: one thread, one seed, and how many random examples hypothesis draws."""

from __future__ import annotations

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


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
