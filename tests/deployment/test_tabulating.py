"""measure_latency: one table from layers and whole networks, kept as it is measured."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.networks import PATTERNS, images
from support.plans import graph_of
from torch import Tensor, nn

import narrower
from narrower.deployment import layer_times, tabulating


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are not looked at here: no 64 MB before each call, no dozens of copies."""
    monkeypatch.setattr(layer_times, "FLUSH_BYTES", 64)
    monkeypatch.setattr(layer_times, "copies_of", lambda job: 1)


def measured(**options: Any) -> narrower.LatencyTable:
    return narrower.measure_latency(PATTERNS["residual"].make(), graph_of("residual"), images(batch=1), runtime="eager",
                                    seconds=0.0, **options)


def test_a_table_says_where_it_was_measured_and_plans_with_it() -> None:
    before = torch.get_num_threads()
    table = measured()
    assert torch.get_num_threads() == before
    assert table.place["runtime"] == "eager" and table.place["shape"] == [1, 3, 8, 8] and table.place["clock"] == "process"
    assert len(table.layers) == 7 and len(table.networks) == 5
    assert all(p.ms > 0 for p in table.points) and all(n.ms > 0 for n in table.networks)
    dense, *narrow = (sum(a * b for a, b in n.sizes.values()) for n in table.networks)
    assert dense > narrow[0] > narrow[1]


def test_a_second_call_measures_nothing_and_an_interrupted_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "deep" / "times.json"

    class Interrupted(Exception):
        pass

    def stop(text: str) -> None:
        if text.startswith("layer 3 "):
            raise Interrupted

    with pytest.raises(Interrupted):
        measured(cache=cache, progress=stop)
    assert len(json.loads(cache.read_text())["layers"]) == 3
    told: list[str] = []
    first = measured(cache=cache, progress=told.append)
    assert told[0].startswith("layer 4 ") and told[-1] == "5 whole networks"
    monkeypatch.setattr(tabulating, "time_networks", None)
    assert measured(cache=cache) == first


class Repeats(nn.Module):
    """Prints the same whatever it does."""

    def __init__(self, times: int, width: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.times, self.scale = times, scale
        self.conv, self.table = nn.Conv2d(3, 3, 3, padding=1), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = F.leaky_relu(self.conv(x), self.scale)
        return x + self.table.sum()


def test_whole_networks_are_known_by_their_forward_and_tensors_and_not_by_what_they_print() -> None:
    x = images(batch=1)
    kinds: list[tuple[tuple[Any, ...], Tensor]] = [((1,), x), ((4,), x), ((1, 9), x), ((1, 8, 0.5), x), ((1,), images(batch=2))]
    models = [Repeats(*options).eval() for options, _ in kinds]
    assert len(set(map(repr, models))) == 1
    keys = [tabulating.networks_key([m], narrower.trace(m, x), x) for m, (_, x) in zip(models, kinds, strict=True)]
    assert len(set(keys)) == len(kinds)
    again = Repeats(4).eval()
    assert tabulating.networks_key([again], narrower.trace(again, x), x) == keys[1]


def test_times_of_another_machine_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    cache = tmp_path / "times.json"
    cache.write_text(json.dumps({"place": {"runtime": "onnxruntime"}, "layers": {}, "networks": {}}))
    with pytest.raises(narrower.ConfigError, match="name another file"):
        measured(cache=cache)
    cache.write_text("{")
    with pytest.raises(narrower.ConfigError, match="has no times of layers"):
        measured(cache=cache)
    where: dict[str, Any] = {}
    for networks in ({"a": 3}, {"a": [3]}, 3):
        cache.write_text(json.dumps({"place": where, "layers": {}, "networks": networks}))
        with pytest.raises(narrower.ConfigError, match="has no times of layers"):
            tabulating.Times.read(cache, where)
    with pytest.raises(narrower.ConfigError, match="cannot be read .*name a file"):
        tabulating.Times.read(tmp_path, where)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_are_timed_in_single_precision(dtype: torch.dtype, runtime: str) -> None:
    model, x = PATTERNS["plain"].make().to(dtype), images(batch=1).to(dtype)
    with pytest.raises(narrower.ExportError, match=f"this network is in {dtype}".replace("torch.", "")):
        narrower.measure_latency(model, graph_of("plain"), x, runtime=runtime)


def test_times_that_cannot_be_written_are_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old file stays, and no half of a new one."""
    times = tabulating.Times({}, tmp_path / "times.json", {"a": 1.0})
    times.write()
    before = times.path.read_bytes()  # type: ignore[union-attr]

    def full(path: Path, content: Any, **how: Any) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(narrower.StorageError, match=r"cannot write .*times.json.*No space left"):
        times.write()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_a_runtime_of_ones_own_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Any] = []

    def prepare(module: torch.nn.Module, inputs: Any, threads: int) -> Any:
        prepared.append(module)
        return lambda: module(inputs)

    def fake(calls: Sequence[Any], clock: str, seconds: float) -> list[tuple[float, float]]:
        return [(1.0, 0.0) for _ in calls]

    monkeypatch.setattr(tabulating, "measure_networks", fake)
    model = PATTERNS["plain"].make()
    table = narrower.measure_latency(model, graph_of("plain"), images(batch=1), runtime=narrower.Runtime("mine", prepare),
                                     seconds=0.0)
    assert prepared[-5] is model and table.place["runtime"] == "mine" and len(prepared) > 10


def test_exported_networks_run_on_the_cpu_wherever_the_model_is() -> None:
    model, x = PATTERNS["plain"].make().to("meta"), images(batch=1).to("meta")
    places = {runtime: tabulating.place_of(model, x, runtime, 1) for runtime in ("eager", "onnxruntime", "openvino")}
    assert [place["device"] for place in places.values()] == ["meta", "cpu", "cpu"]
    assert places["eager"]["clock"] == "wall" and places["openvino"]["clock"] == "process"


def test_the_whole_networks_are_even_and_uneven() -> None:
    graph = graph_of("plain")
    widths = [[m.out_channels for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
              for network in tabulating.narrow_networks(PATTERNS["plain"].make(), graph)]
    dense = [m.out_channels for m in PATTERNS["plain"].make().modules() if isinstance(m, torch.nn.Conv2d)]
    shares = [[n / d for n, d in zip(own, dense, strict=True)] for own in widths]
    assert len(set(map(tuple, widths))) == 4, widths
    assert any(max(own) - min(own) > 0.3 for own in shares[2:])
