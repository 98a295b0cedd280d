"""What all tests share: one thread, one seed, and how many random examples hypothesis draws."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first, so that the other processes do not wait for it at the end."""
    items.sort(key=lambda item: "test_commands_run_in_the_order" not in item.nodeid)


def pytest_collection_finish() -> None:
    """What has been imported and collected stays: no later garbage collection looks at it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionstart() -> None:
    """Autograd starts its threads: one for each kind of device, also of stand-ins, and with any no test could fork."""
    torch.zeros(1, requires_grad=True).backward()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed also notes the whole stack for each kind of device


@pytest.fixture(autouse=True, scope="module")  # some tests run their commands in a fixture of the module
def quick_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs without what takes seconds and has tests of its own: reports, and stop-watches."""
    commands = request.path.parent.name == "app"
    if not commands and request.path.name != "test_pages.py":
        yield
        return
    from narrower.app import cli, networks, prune

    with pytest.MonkeyPatch.context() as patch:
        if commands and "reporting" not in request.path.name:
            patch.setattr(cli, "report_at_end", lambda *_: None)
        patch.setattr(networks, "SECONDS", 0.0)
        patch.setattr(networks, "ROUNDS", 1)
        patch.setattr(prune, "LAYER_SECONDS", 0.0)
        yield
