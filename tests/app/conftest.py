"""Runs without what takes seconds and has tests of its own: reports, and stop-watches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from narrower.app import cli, networks, prune


@pytest.fixture(autouse=True)
def no_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the tests of `reporting` write any."""
    if "reporting" not in request.path.name:
        monkeypatch.setattr(cli, "report_at_end", lambda *_: None)


@pytest.fixture(autouse=True, scope="session")  # some tests run their commands in a fixture of the module
def quick_measurements() -> Iterator[None]:
    """Latency of a few forwards, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "SECONDS", 0.0)
        patch.setattr(networks, "ROUNDS", 1)
        patch.setattr(prune, "LAYER_SECONDS", 0.0)
        yield
