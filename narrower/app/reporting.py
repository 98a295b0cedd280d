"""`narrower report`: a page for each run, written into its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import narrower

from ..data.images import batches
from ..errors import ConfigError, MissingExtraError, NarrowerError
from ..models.checkpoints import load_checkpoint
from ..planning.damage import Sensitivity
from ..report import Facts, Layer, Scored, render
from ..report.facts import START
from ..report.feature_maps import FeatureMap, feature_maps
from ..storage import read_meta, write_whole
from . import run_folder
from .config import DataConfig, ModelConfig, part
from .job import Reporter, Settings, open_images
from .networks import dense_network, input_size, with_weights
from .oneshot import read_scores
from .resuming import ENDS
from .run_folder import PICTURES
from .timing import read_table


def write_reports(folders: Sequence[Path], *, svg: bool = False) -> list[Path]:
    """Write `report.html` into each run folder, and on request its pictures into `report/`. Returns the pages.

    Raises:
        ConfigError: one of them is no run, or one that has not ended. Then nothing is written.
        MissingExtraError: the extra `report` is not installed.
    """
    contents: dict[Path, bytes] = {}
    stale: list[Path] = []
    pages = []
    for folder in folders:
        page, drawn = render(facts_of(folder))
        pages.append(folder / run_folder.REPORT)
        contents[pages[-1]] = page.encode()
        if svg:
            places = {folder / PICTURES / name: picture for name, picture in drawn.items()}
            contents |= places
            stale += {folder / name for name in run_folder.DRAWN} - places.keys()
    write_whole(contents)
    for path in stale:
        path.unlink(missing_ok=True)
    return pages


def report_at_end(folder: Path, tell: Callable[[str], None]) -> None:
    """Write the report of a run that has just ended, and tell where it is. Without the extra there is none."""
    try:
        tell(f"report: {write_reports([folder])[0]}")
    except MissingExtraError:
        return
    except NarrowerError as error:
        tell(f"no report: {error}")


def facts_of(folder: Path) -> Facts:
    """What the folder of a run knows. What cannot be read is absent, with the reason.

    Raises:
        ConfigError: it is no run, or one that has not ended.
    """
    settings, run = ended_run(folder)
    parts: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for name, read in PARTS.items():
        try:
            parts[name] = read(folder)
        except (NarrowerError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # a damaged file
            absent[name] = reason(error)
    try:
        parts["graph"] = graph_of(folder, settings)
    except Exception as error:  # whatever the factory of a network raises
        absent["graph"] = f"the network cannot be made again ({reason(error)})"
    if settings.get("method") == "hrank" and "graph" in parts and "widths" in parts:
        try:
            parts["maps"] = maps_of(folder, settings, parts["graph"])
        except Exception as error:  # whatever images and networks raise
            absent["maps"] = f"the maps cannot be computed ({reason(error)})"
    agreement = not run.last(START).get("labelled", True)
    return Facts(folder.absolute().name, settings, run.rows(), **parts, absent=absent, agreement=agreement)


def ended_run(folder: Path) -> tuple[dict[str, Any], run_folder.Run]:
    """The settings of a run that has ended, and the run. Raises ConfigError for another folder."""
    settings = run_folder.read_settings(folder)
    run = run_folder.Run(folder, resume=True, writes=False)
    if not any(run.last(stage) for stage in ENDS):
        command = run.last(START).get("command", "prune")
        if command == "sensitivity":
            raise ConfigError(f"{folder} is a measurement of damage, not a run that narrowed or trained: nothing to report")
        raise ConfigError(f"the run in {folder} has not ended: go on with it by narrower {command} --resume "
                          f"{run_folder.quoted(folder)}")
    return settings, run


def reason(error: Exception) -> str:
    """One line of an error."""
    text = " ".join(str(error).split())
    return text if isinstance(error, NarrowerError) else f"{type(error).__name__}: {text}"[:300]


def layers_of(folder: Path) -> list[Layer]:
    """The weights of convolutions and linear layers. Raises StorageError where the network is not narrow."""
    if not (folder / run_folder.NARROW).is_file():
        raise ConfigError("the network was not narrowed")
    record = read_meta(folder)[0]
    return [Layer(name, tuple(shape), tuple(record.shapes[name])) for name, shape in record.dense.items()
            if len(shape) > 1 and name.endswith("weight")]


def widths_of(folder: Path) -> dict[str, tuple[int, int]]:
    """The widths of the plan."""
    if not (folder / run_folder.PLAN).is_file():
        raise ConfigError("the run has no plan")
    plan = json.loads((folder / run_folder.PLAN).read_text(encoding="utf-8"))
    return {str(name): (int(size), len(plan["keep"].get(name, range(size)))) for name, size in plan["groups"].items()}


def sensitivity_of(folder: Path) -> Sensitivity:
    """The damage curves."""
    if not (folder / run_folder.SENSITIVITY).is_file():
        raise ConfigError("no damage was measured in this run")
    return Sensitivity.from_json((folder / run_folder.SENSITIVITY).read_text(encoding="utf-8"))


def scores_of(folder: Path) -> dict[str, Scored]:
    """The scores along the network, with what the plan keeps."""
    if not (folder / run_folder.SCORES).is_file():
        raise ConfigError("the run has kept no scores")
    plan, scores = json.loads((folder / run_folder.PLAN).read_text(encoding="utf-8")), read_scores(folder / run_folder.SCORES)
    found = {}
    for name in plan["groups"]:  # in the order of the network, which the file of scores has not
        if name in scores:
            kept = np.full(len(scores[name]), name not in plan["keep"])
            kept[plan["keep"].get(name, [])] = True
            found[name] = Scored(scores[name].double().numpy(), kept)
    return found


def latency_of(folder: Path) -> narrower.LatencyTable | None:
    """The latency table, where the run has one."""
    file = folder / run_folder.LATENCY
    return read_table(file) if file.is_file() else None


PARTS: dict[str, Callable[[Path], Any]] = {
    "layers": layers_of, "widths": widths_of, "scores": scores_of, "sensitivity": sensitivity_of, "latency": latency_of,
}  # fmt: skip


def maps_of(folder: Path, settings: dict[str, Any], graph: narrower.Graph) -> dict[str, list[FeatureMap]]:
    """Feature maps of the first image that the run evaluated on, in the dense network with its weights."""
    model, data = part(ModelConfig, settings), part(DataConfig, settings)
    if (folder / run_folder.DENSE).is_file():
        dense = load_checkpoint(dense_network(model), folder / run_folder.DENSE)
    elif model.checkpoint or model.pretrained:
        dense = with_weights(model)
    else:
        raise ConfigError("the dense weights are not there")
    images = open_images(Settings(model=model, data=data), Reporter())[0].val
    image = next(iter(batches(images, 1, workers=0)))[0]
    keep = json.loads((folder / run_folder.PLAN).read_text(encoding="utf-8"))["keep"]
    return feature_maps(dense, graph, image, keep)


def graph_of(folder: Path, settings: dict[str, Any]) -> narrower.Graph:
    """The graph of the dense network: its weights do not matter."""
    config = part(ModelConfig, settings)
    image = torch.zeros(1, *input_size(config, settings.get("img_size"), folder))
    return narrower.trace(dense_network(config), image, allow_inexact=settings.get("allow_inexact", True))
