"""measure_latency: a table of times of a network on this machine, from which a plan predicts milliseconds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import ConfigError, ExportError
from ..graph.types import Graph, Scores
from ..inputs import flatten_tensors, sample_count, shapes_of
from ..measuring import check_runs
from ..narrowing import narrow
from ..planning import plan
from ..planning.latency import LatencyTable, Whole
from ..preconditions import checked
from ..storage import write_whole
from ..surgery.walk import in_eval_mode, named_tensors
from .layer_times import OPEN, PREPARE, clock_for, machine, measure_layers, measure_networks
from .runtimes import Runtime, device_in, dtype_of, runtime_named, torch_threads
from .survey import sizes_in, survey

RATES = (0.35, 0.65)  # channels that the even narrow networks lose which the table is compared with
UNEVEN, MOST_RATE = 2, 0.8  # how many uneven ones, and the most channels that a group of theirs loses
NARROW_ROUND = 8

Progress = Callable[[str], None]


def narrow_networks(model: nn.Module, graph: Graph) -> list[nn.Module]:
    """The network at some rates, the same for each group, and at random ones from fixed seeds.

    In even networks all layers shrink alike: they do not tell the parts of the time apart that plans trade for each other.
    """
    order = Scores({g.name: torch.arange(g.size, dtype=torch.float64) for g in graph.free})
    rates: list[float | dict[str, float]] = [*RATES]
    for seed in range(UNEVEN):
        rng = np.random.default_rng(seed)
        rates.append({g.name: float(rng.uniform(0, MOST_RATE)) for g in graph.free})
    return [narrow(model, plan(graph, order, remove=rate, round_to=NARROW_ROUND)) for rate in rates]


@checked
def measure_latency(
    model: nn.Module, graph: Graph, example_inputs: Any, *, runtime: str | Runtime = "onnxruntime", threads: int = 1,
    cache: str | os.PathLike[str] | None = None, seconds: float = 0.1, progress: Progress | None = None,
) -> LatencyTable:
    """Measure on this machine what a network's time depends on: for `plan(..., latency_ms=, latency=)`.

    Every kind of layer (kernel, stride, groups, image size) is timed by itself at some widths, as the difference of networks
    with more and fewer copies of it, and one of each family at neighbouring widths, which show the multiples that the runtime
    likes. Then the dense network and four narrow ones are timed whole. With one thread on the CPU all times are processor time
    of this process, which other programs disturb little. Of each the shortest of many counts.

    Args:
        model: the dense network.
        graph: what `trace` found.
        example_inputs: as for `trace`, with the batch size that the times are for.
        runtime: eager, compile, onnxruntime, openvino, or a `Runtime`.
        threads: how many the runtime has.
        cache: a JSON file that keeps every time as it is measured. A second call goes on where the first stopped, and other
            networks take the layers that they share from it.
        seconds: for each layer; for a whole network twenty times as long.
        progress: is told what is measured.

    Raises:
        ConfigError: no such runtime or number of threads, or `cache` has times of another machine or runtime.
        ExportError, MissingExtraError: the network cannot be exported for the runtime, or is not in single precision.
        StorageError: `cache` cannot be written.
        DataError: the network does not run on the example inputs.
    """
    check_runs("measure_latency", model, example_inputs)
    place = runtime if isinstance(runtime, Runtime) else runtime_named(runtime)
    where = place_of(model, example_inputs, place.name, threads)
    if place.name in OPEN:
        check_precision(where["dtype"])
    times = Times.read(Path(cache) if cache else None, {k: v for k, v in where.items() if k != "shape"})
    found = survey(model, graph, example_inputs)

    def after_each(done: int, total: int) -> None:
        times.write()
        if progress:
            progress(f"layer {done} of {total}")

    with torch_threads(threads), torch.no_grad():
        measure_layers(list(found.jobs()), PREPARE.get(place.name, place.prepare), where, times.layers, seconds=seconds,
                       after_each=after_each)
        if progress:
            progress(f"{1 + len(RATES) + UNEVEN} whole networks")
        modules = [model, *narrow_networks(model, graph)]
        key = networks_key(modules, graph, example_inputs)
        if key not in times.networks:
            times.networks[key] = time_networks(modules, example_inputs, place, where, 20 * seconds)
            times.write()
        networks = times.networks[key]
    return found.table(where, times.layers, [Whole(sizes_in(m, found), *t) for m, t in zip(modules, networks, strict=True)])


def check_precision(dtype: str) -> None:
    """Raise ExportError for a network whose layers runtimes of files do not run or compare."""
    if dtype != "float32":
        raise ExportError(f"files are timed in single precision, this network is in {dtype}: measure model.float(), with such "
                          'inputs, or in PyTorch (runtime="eager")')


def networks_key(modules: Sequence[nn.Module], graph: Graph, example_inputs: Any) -> str:
    """By what the times of a dense network (with its graph) and of narrow ones are found again.

    What modules print does not show what a forward does with them, nor how often: so shapes and the dense calls are part of it.
    """
    tensors = [[(n, tuple(t.shape)) for n, t in named_tensors(m).items()] for m in modules]
    calls = [(s.name, s.inputs, s.rest, s.options) for s in graph.steps if not s.training]
    said = [*map(repr, modules), *map(repr, tensors), *map(repr, calls), shapes_of(example_inputs)]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


def time_networks(modules: Sequence[nn.Module], example_inputs: Any, runtime: Runtime, where: Mapping[str, Any],
                  seconds: float) -> list[tuple[float, float]]:
    """Milliseconds and spread of networks, in turn."""
    with torch_threads(where["threads"]), torch.no_grad(), ExitStack() as modes:
        for module in modules:
            modes.enter_context(in_eval_mode(module))
        calls = [runtime.prepare(module, example_inputs, where["threads"]) for module in modules]
        return measure_networks(calls, where["clock"], seconds)


def place_of(model: nn.Module, example_inputs: Any, runtime: str, threads: int) -> dict[str, Any]:
    """What the times of a table hold for."""
    device = device_in(runtime, model)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else machine()
    return {"runtime": runtime, "device": device, "threads": threads, "dtype": dtype_of(model, example_inputs),
            "shape": list(flatten_tensors(example_inputs)[0].shape), "batch": max(1, sample_count(example_inputs)),
            "clock": clock_for(device, threads), "machine": name}


@dataclass
class Times:
    """Measured times, and the file that keeps them."""

    place: Mapping[str, Any]
    path: Path | None
    layers: dict[str, float] = field(default_factory=dict)
    networks: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @staticmethod
    def read(path: Path | None, place: Mapping[str, Any]) -> Times:
        """Those in the file, if there is one. Raises ConfigError for damaged ones, or of another place."""
        times = Times(place, path)
        if path is None or not path.exists():
            return times
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            old, layers = data["place"], dict(data["layers"])
            networks = {k: [(ms, spread) for ms, spread in v] for k, v in data["networks"].items()}
        except OSError as e:
            raise ConfigError(f"{path} cannot be read ({e.strerror or e}): name a file") from e
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ConfigError(f"{path} has no times of layers ({type(e).__name__}: {e}): name another file") from e
        if old != place:
            raise ConfigError(f"{path} has times of {old}, not of {place}: name another file, or remove it")
        times.layers, times.networks = layers, networks
        return times

    def write(self) -> None:
        """Replace the file, whole or not at all. Raises StorageError if it cannot be written."""
        if self.path is None:
            return
        found = {"place": dict(self.place), "layers": self.layers, "networks": self.networks}
        write_whole({self.path: json.dumps(found).encode()})
