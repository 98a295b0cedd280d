"""Times of single layers in a runtime. This file also runs by itself, on a machine without narrower:

    python layer_times.py jobs.json times.json --runtime onnxruntime --threads 1

It needs torch, and the runtime. `jobs.json` is what `narrower.write_latency_jobs` wrote, with the files beside it. `times.json`
is written as it goes; a second call goes on where the first stopped. `narrower.read_latency_times` reads it.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

Job = Mapping[str, Any]
"""A layer: operator, kernel, stride, padding, dilation, groups, size, and `sizes`, dimensions 0 and 1 of its weight."""
Prepare = Callable[[nn.Module, Any, int], Callable[[], Any]]

LEAST_MS = 1.0  # copies of small layers run together, for about so long
FEW_USES = 16  # a weight that is used less often is read from memory; it must not lie in the cache
FLUSH_BYTES = 64 << 20
LEAST_BLOCK = 10e-3  # seconds: shorter calls are timed several together
LEAST_ROUNDS = 9
SETTLE = 0.15  # seconds, longer than threads spin that have no work
CONVOLUTIONS = {"conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
                "conv_transpose": (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)}


class Copies(nn.Module):
    """So many layers of one kind, each with a weight of its own, on one input; added, and reduced to one number per channel.

    Depthwise convolutions that keep the size come one after the other: adding would take as long as they do.
    """

    def __init__(self, job: Job, count: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(layer_of(job) for _ in range(count))
        self.chained = chained(job)
        first = 1 if job["operator"] == "linear" else 2
        self.space = tuple(range(first, first + len(job["size"])))

    def forward(self, x: Tensor) -> Tensor:
        if self.chained:
            for layer in self.copies:
                x = torch.relu(layer(x))
            return x.mean(self.space)
        first, *others = self.copies
        y = first(x)
        for layer in others:
            y = y + layer(x)
        y = torch.relu(y)
        return y.mean(self.space) if self.space else y


def layer_of(job: Job) -> nn.Module:
    """The layer, without a bias."""
    if job["operator"] == "linear":
        return nn.Linear(job["sizes"][1], job["sizes"][0], bias=False)
    ends = channels(job)
    given = {name: tuple(job[name]) for name in ("stride", "padding", "dilation")}
    make: Any = CONVOLUTIONS[job["operator"]][len(job["kernel"]) - 1]
    found: nn.Module = make(*ends, tuple(job["kernel"]), groups=job["groups"] or job["sizes"][0], bias=False, **given)
    return found


def channels(job: Job) -> tuple[int, int]:
    """In and out channels."""
    n0, n1 = job["sizes"]
    groups = job["groups"] or n0
    return (n0, n1 * groups) if job["operator"] == "conv_transpose" else (n1 * groups, n0)


def chained(job: Job) -> bool:
    """Whether the layer is depthwise and gives as much as it takes."""
    if job["operator"] != "conv" or job["groups"] != 0 or job["sizes"][1] != 1 or any(n != 1 for n in job["stride"]):
        return False
    sides = zip(job["kernel"], job["padding"], job["dilation"], strict=True)
    return all(2 * p == d * (k - 1) for k, p, d in sides)


def input_of(job: Job, batch: int, dtype: torch.dtype, device: str) -> Tensor:
    size = tuple(job["size"])
    shape = (batch, *size, job["sizes"][1]) if job["operator"] == "linear" else (batch, channels(job)[0], *size)
    return torch.randn(shape, dtype=dtype, device=device)


def positions(job: Job) -> int:
    """How often each element of the weight is used for one sample, about."""
    return math.prod(max(1, n // step) for n, step in zip(job["size"], job["stride"] or [1] * len(job["size"]), strict=True))


def copies_of(job: Job) -> int:
    """How many more copies the second network has: enough to take a while at 20 billion multiply-adds per second."""
    few = 8 if job["groups"] == 0 else 2
    multiply_adds = positions(job) * math.prod(job["sizes"]) * math.prod(job["kernel"])
    return max(few, min(24, round(LEAST_MS * 20e6 / multiply_adds)))


def layer_ms(job: Job, prepare: Prepare, place: Mapping[str, Any], seconds: float) -> float:
    """Milliseconds of one layer: the difference of two networks that differ in how many copies they have.

    Of each network the shortest of many short rounds, taken in turn, so that other load on the machine matters least.
    """
    more = copies_of(job)
    x = input_of(job, place["batch"], getattr(torch, place["dtype"]), place["device"])
    calls = []
    for count in (1, 1 + more):
        network = Copies(job, count).to(x).eval()
        calls.append(prepare(network, x, place["threads"]))
    flush = x.device if positions(job) * place["batch"] < FEW_USES else None
    few, many = shortest(calls, seconds, clock_named(place["clock"]), flush)
    return max(1e3 * (many - few) / more, 1e-5)


def shortest(calls: Sequence[Callable[[], Any]], seconds: float, clock: Callable[[], float],
             flush: torch.device | None = None) -> list[float]:
    """The shortest time of each function, in turn, until `seconds` for each are spent, seven times at least.

    Each starts with other data in the caches of the device `flush`. Then rounds are few: this takes longer than most calls.
    """
    best = [float("inf")] * len(calls)
    other = torch.zeros(FLUSH_BYTES // 4, device=flush) if flush else None
    for call in calls:
        call()
    spent, rounds = 0.0, 0
    while rounds < 7 or (spent < seconds * len(calls) and rounds < (12 if flush else 200)):
        rounds += 1
        for i, call in enumerate(calls):
            if other is not None:
                other.add_(1)
                synchronize(other.device)
            start = clock()
            call()
            took = clock() - start
            best[i] = min(best[i], took)
            spent += took
    return best


def clock_named(name: str) -> Callable[[], float]:
    """`process`: processor time of this process, for one thread on the CPU; `wall`: the time that passes."""
    return time.process_time if name == "process" else time.perf_counter


def clock_for(device: str, threads: int) -> str:
    """Processor time does not count what other programs take, but says nothing of several threads or of a GPU."""
    return "process" if threads == 1 and str(device) == "cpu" else "wall"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, as `narrower.inputs.synchronize`, which is not everywhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def waiting(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`run`, and then wait for the device, where that works on after the call."""
    def run_and_wait() -> Any:
        found = run()
        synchronize(device)
        return found

    return run if device.type == "cpu" else run_and_wait


def prepare_eager(module: nn.Module, x: Any, threads: int) -> Callable[[], Any]:
    return waiting(lambda: module(x), x.device)


def prepare_compiled(module: nn.Module, x: Any, threads: int) -> Callable[[], Any]:
    run = compiled(module)
    return waiting(lambda: run(x), x.device)


def compiled(module: nn.Module) -> Callable[..., Any]:
    """The module by `torch.compile`, for the very shapes of its inputs. The first call compiles.

    torch compiles one code object, such as the `forward` of a class, eight times at most. Networks after that run eagerly, and
    nothing says so. So the module is called from a code object of its own. Where its graph breaks, `forward` is compiled by
    itself: therefore what was compiled before is forgotten.
    """
    def forward(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    forward.__code__ = forward.__code__.replace()
    torch.compiler.reset()
    return torch.compile(forward, dynamic=False)


def onnx_of(module: nn.Module, x: Any) -> bytes:
    """By the older exporter, which takes a tenth of a second; the newer one takes several."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), file, dynamo=False)  # type: ignore[arg-type]
    return file.getvalue()


def prepare_onnxruntime(module: nn.Module, x: Any, threads: int) -> Callable[[], Any]:
    return onnxruntime_session(onnx_of(module, x), threads, spin=False)


def open_session(model: bytes | str, threads: int, *, spin: bool = True) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU.

    Its threads spin for up to a tenth of a second after a call, as they do in a program with one network. With `spin=False`
    they stop at once, so that another session can be timed right after.
    """
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "0" if spin else "1")
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnxruntime_session(model: bytes | str, threads: int, *, spin: bool = True) -> Callable[[], Any]:
    session = open_session(model, threads, spin=spin)
    inputs = {i.name: torch.randn([n if isinstance(n, int) else 1 for n in i.shape]).numpy() for i in session.get_inputs()}
    return lambda: session.run(None, inputs)


def prepare_openvino(module: nn.Module, x: Any, threads: int) -> Callable[[], Any]:
    return openvino_request(onnx_of(module, x), threads)


def openvino_request(model: bytes | str, threads: int) -> Callable[[], Any]:
    openvino = importlib.import_module("openvino")
    core = openvino.Core()
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    network = core.compile_model(core.read_model(io.BytesIO(model) if isinstance(model, bytes) else model), "CPU", config)
    request = network.create_infer_request()
    inputs = {i.any_name: torch.randn([int(n) for n in i.shape]).numpy() for i in network.inputs}
    return lambda: request.infer(inputs, share_inputs=True)


PREPARE: dict[str, Prepare] = {"eager": prepare_eager, "compile": prepare_compiled, "onnxruntime": prepare_onnxruntime,
                               "openvino": prepare_openvino}
OPEN = {"onnxruntime": onnxruntime_session, "openvino": openvino_request}
BY_FILE = ("eager", *OPEN)
"""The runtimes that time whole networks from files: TorchScript (.ts) in PyTorch, ONNX in the others."""


def open_file(path: str, place: Mapping[str, Any]) -> Callable[[], Any]:
    """A call of the network in a file, on one tensor of noise in PyTorch."""
    if place["runtime"] in OPEN:
        return OPEN[place["runtime"]](path, place["threads"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that newer versions of torch prefer another format
        module: nn.Module = torch.jit.load(path, map_location=place["device"])
    x = torch.randn(place["shape"], dtype=getattr(torch, place["dtype"]), device=place["device"])
    return prepare_eager(module.eval(), x, place["threads"])


def machine() -> str:
    """The processor, as far as the system says."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def key_of(job: Job) -> str:
    """The job as text, under which its time is kept."""
    return json.dumps({name: job[name] for name in sorted(job)}, sort_keys=True)


def measure_layers(jobs: Sequence[Job], prepare: Prepare, place: Mapping[str, Any], known: dict[str, float], *,
                   seconds: float = 0.1, after_each: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Add the time of each job that is not `known` yet. `after_each` is told how many of how many jobs are done."""
    waiting_jobs = {key: job for job in jobs if (key := key_of(job)) not in known}
    total = len({key_of(job) for job in jobs})
    for key, job in waiting_jobs.items():
        known[key] = layer_ms(job, prepare, place, seconds)
        after_each(total - len(waiting_jobs.keys() - known.keys()), total)


def in_turn(calls: Sequence[Callable[[], Any]], seconds: float, clock: Callable[[], float], settle: float = 0.0,
            ) -> list[list[float]]:
    """Seconds of one call of each function, round by round, until about `seconds` for each are spent.

    Each first runs untimed, as long as it is timed and `settle` seconds at least: the caches hold what the others have left,
    and threads of theirs may still spin. Short calls are timed several together.
    """
    once = []
    for call in calls:
        call()
        start = clock()
        call()
        once.append(max(clock() - start, 1e-7))
    timed = [max(1, round(LEAST_BLOCK / t)) for t in once]
    untimed = [max(n, round(settle / t)) for n, t in zip(timed, once, strict=True)]
    times: list[list[float]] = [[] for _ in calls]
    end = clock() + seconds * len(calls)
    while len(times[0]) < LEAST_ROUNDS or clock() < end:
        for i in range(len(calls)) if len(times[0]) % 2 == 0 else reversed(range(len(calls))):
            for _ in range(untimed[i]):
                calls[i]()
            start = clock()
            for _ in range(timed[i]):
                calls[i]()
            times[i].append((clock() - start) / timed[i])
    return times


def measure_networks(calls: Sequence[Callable[[], Any]], clock: str, seconds: float) -> list[tuple[float, float]]:
    """Milliseconds of each network, the shortest of many rounds in turn, and the spread: quartiles over median."""
    out = []
    for own in in_turn(calls, seconds, clock_named(clock), SETTLE if clock == "wall" else 0.0):
        low, _, high = quantiles(own, n=4)
        out.append((1e3 * min(own), (high - low) / median(own)))
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("times", type=Path)
    parser.add_argument("--runtime", choices=sorted(BY_FILE), default="onnxruntime")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.1, help="for each layer")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    data = json.loads(given.jobs.read_text())
    place = {"runtime": given.runtime, "device": given.device, "threads": given.threads, "dtype": data["dtype"],
             "shape": data["shape"], "batch": data["batch"], "clock": clock_for(given.device, given.threads),
             "machine": machine()}
    if wrong := [name for name in data["files"] if name.endswith(".ts") != (given.runtime == "eager")]:
        raise SystemExit(f"{wrong[0]} is no file for {given.runtime}: write the jobs with suffix='.ts' for eager, with '.onnx' "
                         "for onnxruntime and openvino")
    known = json.loads(given.times.read_text()) if given.times.exists() else {"place": place, "layers": {}, "networks": {}}
    if known["place"] != place:
        raise SystemExit(f"{given.times} has times of {known['place']}, not of {place}: give another file")

    def keep(done: int, total: int) -> None:
        part = given.times.with_suffix(".part")
        part.write_text(json.dumps(known))
        part.replace(given.times)
        sys.stderr.write(f"\r{done} of {total}")

    with torch.no_grad():
        measure_layers(data["jobs"], PREPARE[given.runtime], place, known["layers"], seconds=given.seconds, after_each=keep)
        if not known["networks"] and data["files"]:
            calls = [open_file(str(given.jobs.parent / name), place) for name in data["files"]]
            times = measure_networks(calls, place["clock"], 20 * given.seconds)
            known["networks"] = dict(zip(data["files"], times, strict=True))
    keep(len(data["jobs"]), len(data["jobs"]))
    sys.stderr.write("\n")


if __name__ == "__main__":
    main()
