"""layer_times: differences of copies, the shortest of several counts, and a script that goes on where it stopped."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from support.latency import survey_of
from torch import nn

from narrower.deployment import layer_times

PLACE = {"runtime": "x", "device": "cpu", "threads": 1, "dtype": "float32", "shape": [4, 3, 8, 8], "batch": 4, "clock": "fake"}


def conv(n0: int, n1: int, **changed: Any) -> dict[str, Any]:
    sides = {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    return {"operator": "conv", **sides, "groups": 1, "size": [8, 8], "sizes": [n0, n1], **changed}


class Machine:
    """A runtime whose layers take a known time, on a clock that only they move."""

    def __init__(self, per_copy: float, start: float) -> None:
        self.now, self.per_copy, self.start = 0.0, per_copy, start
        self.prepared = 0

    def prepare(self, module: nn.Module, x: Any, threads: int) -> Callable[[], None]:
        self.prepared += 1
        assert isinstance(module, layer_times.Copies)
        count = len(module.copies)

        def run() -> None:
            self.now += self.start + count * self.per_copy

        return run


def test_a_layer_takes_the_difference_of_more_and_fewer_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(per_copy=0.002, start=0.5)
    monkeypatch.setattr(layer_times, "clock_named", lambda name: lambda: machine.now)
    for job in (conv(8, 8), conv(16, 1, groups=0), conv(8, 4, stride=[2, 2])):
        assert layer_times.layer_ms(job, machine.prepare, PLACE, 0.0) == pytest.approx(2.0)


def test_what_disturbs_some_rounds_does_not_count() -> None:
    now, count = [0.0], [0]

    def run() -> None:
        count[0] += 1
        now[0] += 1.0 + (count[0] % 3 > 0)

    assert layer_times.shortest([run, run], 0.0, lambda: now[0]) == [1.0, 1.0]


def test_other_data_fills_the_cache_before_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """In those of the device, which is waited for."""
    class Other:
        def __init__(self, count: int, device: torch.device) -> None:
            self.device = device

        def add_(self, number: int) -> None:
            seen.append("other")

    seen: list[str] = []
    monkeypatch.setattr(torch, "zeros", Other)
    monkeypatch.setattr(layer_times, "synchronize", lambda device: seen.append(str(device)))
    calls = [lambda: seen.append("a"), lambda: seen.append("b")]
    layer_times.shortest(calls, 0.0, lambda: 0.0, torch.device("mps"))
    assert seen == ["a", "b"] + 7 * ["other", "mps", "a", "other", "mps", "b"], "after a call of each"


@pytest.mark.parametrize(("name", "waits"), [("cuda:1", ["cuda:1"]), ("mps", ["mps"]), ("cpu", [])])
def test_a_call_ends_when_the_device_has_done_it(name: str, waits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(layer_times, "synchronize", lambda device: waited.append(str(device)))
    assert layer_times.waiting(lambda: 7, torch.device(name))() == 7 and waited == waits


def test_only_unknown_layers_are_measured_and_each_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(per_copy=0.002, start=0.0)
    monkeypatch.setattr(layer_times, "clock_named", lambda name: lambda: machine.now)
    jobs = [conv(8, 8), conv(4, 8), conv(8, 8), conv(2, 8)]
    known = {layer_times.key_of(jobs[1]): 7.0}
    told: list[tuple[int, int]] = []
    layer_times.measure_layers(jobs, machine.prepare, PLACE, known, seconds=0.0, after_each=lambda *n: told.append(n))
    assert told == [(2, 3), (3, 3)] and machine.prepared == 4
    assert known[layer_times.key_of(jobs[1])] == 7.0 and known[layer_times.key_of(jobs[0])] == pytest.approx(2.0)


def test_depthwise_copies_are_a_chain_and_others_a_sum() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 8, 8)
    for job, chained in ((conv(6, 1, groups=0), True), (conv(6, 6), False), (conv(6, 1, groups=0, stride=[2, 2]), False)):
        two = layer_times.Copies(job, 2)
        a, b = two.copies
        inner = torch.relu(b(torch.relu(a(x)))) if chained else torch.relu(a(x) + b(x))
        assert torch.allclose(two(x), inner.mean((2, 3)), atol=1e-6)


def test_the_clock_is_that_of_the_process_only_where_that_means_something() -> None:
    assert layer_times.clock_for("cpu", 1) == "process"
    assert layer_times.clock_for("cpu", 2) == layer_times.clock_for("cuda:0", 1) == "wall"


@pytest.mark.parametrize(("breaks", "together", "times"), [(False, 10, 1), (True, 3, 3)])
def test_each_of_many_networks_of_a_class_is_compiled(
    breaks: bool, together: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch compiles one code eight times at most, and runs it eagerly after that."""
    seen: list[int] = []

    def backend(module: Any, inputs: Any) -> Any:
        seen.append(len(seen))
        return module

    class Broken(nn.Linear):
        def forward(self, x: Any) -> Any:
            if breaks:
                torch._dynamo.graph_break()
            return super().forward(x)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    x = torch.zeros(1, 2)
    for _ in range(times):
        calls = [layer_times.prepare_compiled(Broken(2, width), x, 1) for width in range(1, 1 + together)]
        with torch._dynamo.config.patch(cache_size_limit=8):  # as it is, but one of timm's optimizers changes it
            assert [call().shape[1] for call in calls + calls] == 2 * [*range(1, 1 + together)]
    assert len(seen) == times * together


def test_the_script_needs_nothing_of_narrower() -> None:
    tree = ast.parse(Path(layer_times.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    assert {name.partition(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}


def test_the_script_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_times, "FLUSH_BYTES", 64)
    jobs = list(survey_of("plain").jobs())[:2]
    (tmp_path / "jobs.json").write_text(json.dumps(
        {"dtype": "float32", "shape": [1, 3, 8, 8], "batch": 1, "jobs": jobs, "files": {}}))
    arguments = [str(tmp_path / "jobs.json"), str(tmp_path / "times.json"), "--runtime", "eager", "--seconds", "0"]
    layer_times.main(arguments)
    times = json.loads((tmp_path / "times.json").read_text())
    assert set(times["layers"]) == {layer_times.key_of(job) for job in jobs} and times["place"]["runtime"] == "eager"
    times["layers"] = dict.fromkeys(times["layers"], 5.0)
    (tmp_path / "times.json").write_text(json.dumps(times))
    layer_times.main(arguments)
    assert json.loads((tmp_path / "times.json").read_text()) == times, "nothing is measured twice"
    with pytest.raises(SystemExit, match="give another file"):
        layer_times.main([*arguments, "--threads", "2"])


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_whole_networks_are_timed_from_their_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In PyTorch from TorchScript. A file that the runtime cannot read, or a runtime without files, is an error at once."""
    network, jobs = nn.Conv2d(3, 4, 3).eval(), tmp_path / "jobs.json"
    torch.jit.trace(network, torch.zeros(1, 3, 8, 8)).save(str(tmp_path / "network-0.ts"))

    def write(name: str) -> None:
        jobs.write_text(json.dumps({"dtype": "float32", "shape": [1, 3, 8, 8], "batch": 1, "jobs": [], "files": {name: {}}}))

    write("network-0.ts")
    arguments = [str(jobs), str(tmp_path / "times.json"), "--seconds", "0", "--runtime"]
    layer_times.main([*arguments, "eager"])
    ms, spread = json.loads((tmp_path / "times.json").read_text())["networks"]["network-0.ts"]
    assert 0 < ms < 1000 and spread >= 0
    with pytest.raises(SystemExit, match="is no file for onnxruntime"):
        layer_times.main([*arguments, "onnxruntime"])
    write("network-0.onnx")
    with pytest.raises(SystemExit, match="is no file for eager"):
        layer_times.main([*arguments, "eager"])
    with pytest.raises(SystemExit):
        layer_times.main([*arguments, "compile"])
    assert "invalid choice: 'compile'" in capsys.readouterr().err


class Clock:
    """Time that passes only when a function spends it, faster and faster: a machine that drifts."""

    def __init__(self, drift: float = 1.0) -> None:
        self.now, self.pace, self.drift = 0.0, 1.0, drift
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def spend(self, name: str, seconds: float) -> None:
        self.calls.append(name)
        self.now += seconds * self.pace
        self.pace *= self.drift


def test_networks_take_turns_and_drift_cancels() -> None:
    clock = Clock(drift=1.02)
    slow, fast = layer_times.in_turn([lambda: clock.spend("a", 0.1), lambda: clock.spend("b", 0.05)], 5.0, clock)
    assert len(slow) == len(fast) >= 9 and max(slow) > 1.2 * min(slow)
    order = clock.calls[4:]
    assert order[:8] == ["a", "a", "b", "b", "b", "b", "a", "a"], "one of each in a round, not always in the same order"
    assert order == order[:8] * (len(order) // 8) + order[:len(order) % 8]
    assert median(b / a for a, b in zip(slow, fast, strict=True)) == pytest.approx(0.5, rel=0.05)


def test_what_the_caches_hold_of_another_network_is_not_timed() -> None:
    clock, last = Clock(), [""]

    def run(name: str) -> None:
        clock.spend(name, 0.1 if last[0] == name else 0.2)
        last[0] = name

    times = layer_times.in_turn([lambda: run("a"), lambda: run("b")], 1.0, clock)
    assert times == [pytest.approx([0.1] * len(own)) for own in times]


def test_short_calls_are_timed_together() -> None:
    clock = Clock()
    (times,) = layer_times.in_turn([lambda: clock.spend("a", 1e-4)], 0.0, clock)
    assert len(times) == 9 and len(clock.calls) == 2 + 9 * 200 and times[0] == pytest.approx(1e-4)


def test_of_a_network_the_shortest_time_counts_and_the_spread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside others: each has its own times."""
    times = [[0.011, 0.012, 0.010, 0.013, 0.014, 0.012, 0.012, 0.011, 0.013], [0.02] * 9]
    monkeypatch.setattr(layer_times, "in_turn", lambda *given: times)
    (least, spread), other = layer_times.measure_networks([], "wall", 0.0)
    assert least == pytest.approx(10.0) and spread == pytest.approx(0.002 / 0.012)
    assert other[0] == pytest.approx(20.0) and other[1] == 0.0


def test_threads_that_still_spin_are_waited_for() -> None:
    clock, last, spins_until = Clock(), [""], [0.0]

    def run(name: str) -> None:
        if last[0] != name:
            last[0], spins_until[0] = name, clock.now + 0.1
        clock.spend(name, 0.02 if clock.now < spins_until[0] else 0.01)

    calls = [lambda: run("a"), lambda: run("b")]
    assert layer_times.in_turn(calls, 0.0, clock, 0.15) == [pytest.approx([0.01] * 9)] * 2
    assert max(layer_times.in_turn(calls, 0.0, clock)[0]) > 0.015
