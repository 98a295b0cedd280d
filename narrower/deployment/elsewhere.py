"""Latency tables of other machines: jobs written here, timed there by one script, read back here."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError, ExportError
from ..graph.types import Graph
from ..inputs import flatten_tensors
from ..measuring import check_runs
from ..planning.latency import LatencyTable, Whole, kind_from, layer_from
from ..preconditions import checked
from . import layer_times
from .exporting import export
from .survey import Survey, sizes_in, survey
from .tabulating import check_precision, narrow_networks, place_of

JOBS, TIMES, SCRIPT = "jobs.json", "times.json", "layer_times.py"


@checked
def write_latency_jobs(model: nn.Module, graph: Graph, example_inputs: Any, folder: str | os.PathLike[str], *,
                       suffix: str = ".onnx") -> Path:
    """Write a folder with all that another machine needs to measure a latency table of this network.

    That machine needs Python, torch, and the runtime, not narrower. There: `python layer_times.py jobs.json times.json
    --runtime onnxruntime --threads 1`. With `times.json` back in the folder, `read_latency_times` gives the table.

    Args:
        model: as for `measure_latency`.
        graph: of `trace`.
        example_inputs: as for `measure_latency`.
        folder: is created. It gets the script, the jobs, and the dense network and narrow ones as files.
        suffix: of these files: `.onnx`, which ONNX Runtime and OpenVINO read, or `.ts` for torch (`--runtime eager`).

    Raises:
        ExportError, MissingExtraError: the network cannot be exported, or the script cannot make its inputs: whole numbers, or
            several of a `.ts` file.
        DataError: the network does not run on the example inputs.
    """
    check_runs("write_latency_jobs", model, example_inputs)
    tensors, place = flatten_tensors(example_inputs), place_of(model, example_inputs, "", 1)
    if not all(t.is_floating_point() for t in tensors) or (len(tensors) > 1 and suffix == ".ts"):
        raise ExportError(f"{SCRIPT} feeds networks with noise, a .ts file with one tensor of it: wrap the network in a module "
                          "that holds its other inputs")
    if suffix != ".ts":
        check_precision(place["dtype"])
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    found = survey(model, graph, example_inputs)
    networks = {f"network-{i}{suffix}": module for i, module in enumerate([model, *narrow_networks(model, graph)])}
    for name, module in networks.items():
        export(module, example_inputs, path / name, dynamic_batch=False)
    shutil.copyfile(layer_times.__file__, path / SCRIPT)
    (path / JOBS).write_text(json.dumps({
        "dtype": place["dtype"], "shape": place["shape"], "batch": place["batch"], "jobs": list(found.jobs()),
        "files": {name: sizes_in(module, found) for name, module in networks.items()},
        "kinds": [k._asdict() for k in found.kinds], "layers": [layer._asdict() for layer in found.layers],
        "points": found.points, "steps": found.steps,
    }), encoding="utf-8")
    return path


def read_latency_times(folder: str | os.PathLike[str]) -> LatencyTable:
    """The latency table of a folder from `write_latency_jobs` to which `times.json` has been added.

    Raises ConfigError if a file is missing or damaged, or if not everything was measured.
    """
    path = Path(folder)
    try:
        jobs, times = (json.loads((path / name).read_text(encoding="utf-8")) for name in (JOBS, TIMES))
        found = Survey(
            tuple(kind_from(k) for k in jobs["kinds"]), tuple(layer_from(layer) for layer in jobs["layers"]),
            tuple((kind, (n0, n1)) for kind, (n0, n1) in jobs["points"]),
            tuple((kind, dim, tuple(widths), other) for kind, dim, widths, other in jobs["steps"]))
        networks = [Whole({t: (n[0], n[1]) for t, n in sizes.items()}, *times["networks"][name])
                    for name, sizes in jobs["files"].items()]
        return found.table(times["place"], times["layers"], networks)
    except OSError as e:
        raise ConfigError(f"{path} has no {JOBS} or no {TIMES} ({e}): run {SCRIPT} on the other machine, and copy its times "
                          "here") from e
    except KeyError as e:
        raise ConfigError(f"{path / TIMES} is incomplete (no {e}): run {SCRIPT} again, it goes on where it stopped") from e
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{path} is damaged ({type(e).__name__}: {e})") from e
