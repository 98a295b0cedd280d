"""save and load: tensors as safetensors, shapes and stored numbers as JSON, no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from .errors import ConfigError, StorageError
from .narrowing.narrow import RECORD, NarrowRecord
from .preconditions import checked
from .surgery.attributes import Place, set_attributes
from .surgery.copying import parameter_like
from .surgery.resize import fit, format_of, give_bias, takes_bias
from .surgery.walk import named_tensors, tensor_shapes

FORMAT = 2  # 1 had the kept channels of each plan as well, which nothing read

WEIGHTS, META = "model.safetensors", "narrower.json"


@checked
def save(model: nn.Module, folder: str | os.PathLike[str], **extra: Any) -> Path:
    """Write `model.safetensors` and `narrower.json` into `folder` (made if missing).

    `model` comes from `narrow`, `load` or `ResRep.merge`; its parameters may have been trained since. What `torch.compile` made
    of it is saved as the network itself. `extra` (JSON values, numbers of numpy and torch) is kept under "extra". The files are
    written under other names and then renamed, so an interrupted save loses nothing.

    Raises StorageError for a model that narrower has not made, for one whose tensors have changed shape since, for other
    values in `extra`, and if the files cannot be written.
    """
    if type(model).__name__ == "OptimizedModule":  # around the network, its tensors under other names
        model = model.get_submodule("_orig_mod")
    record = getattr(model, RECORD, None)
    if not isinstance(record, NarrowRecord):
        raise StorageError("this model has no record of narrowing: save takes what narrow, load or merge returned")
    tensors = named_tensors(model)
    shapes = tensor_shapes(tensors)
    if shapes != record.shapes:
        raise StorageError(f"the network has changed since it was narrowed: {differences(record.shapes, shapes)}")
    tied = tied_names(tensors)
    data = {n: t.detach().contiguous().cpu().clone() for n, t in tensors.items() if n not in tied}
    try:
        text = json.dumps({
            "format": FORMAT, "dense": record.dense, "shapes": shapes, "tied": tied,
            "numbers": [[*place, value] for place, value in record.attributes.items()],
            "created": record.created, "extra": extra,
        }, default=plain_number)
    except (TypeError, ValueError) as e:
        raise StorageError(f"extra values must be what JSON holds: {e}") from e
    folder = Path(folder)
    write_whole({folder / WEIGHTS: serialize(data, metadata={"format": "pt"}), folder / META: text.encode()})
    return folder


def plain_number(x: Any) -> Any:
    """A number of numpy or torch as one of Python. Raises TypeError for anything else, as `json.dumps` wants it."""
    if isinstance(x, (np.generic, Tensor)) and x.ndim == 0:
        return x.item()
    raise TypeError(f"{type(x).__name__} is no such value")


def write_whole(contents: Mapping[Path, bytes]) -> None:
    """Write files beside those that they replace, then rename them: what ends the process leaves no half of a file.

    Folders are made where they are missing. Raises StorageError if something cannot be written; then nothing is replaced.
    """
    parts = {path: path.with_name(path.name + ".part") for path in contents}
    try:
        for path, part in parts.items():
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(contents[path])
        for path, part in parts.items():
            part.replace(path)
    except OSError as e:
        with suppress(OSError):  # on a full disk the room counts
            for part in parts.values():
                part.unlink(missing_ok=True)
        raise StorageError(f"cannot write {e.filename or ', '.join(map(str, contents))}: {e.strerror or e}") from e


def load(folder: str | os.PathLike[str], make_model: Callable[[], nn.Module]) -> nn.Module:
    """The narrow network that `save` wrote: `make_model()` makes the dense one, which is cut to the saved shapes.

    Devices and memory formats are those of the dense network. Parameters and buffers that it has on meta come to the CPU.

    Raises StorageError if a file is missing or damaged, of a later version, or of another network than `make_model` gives.
    """
    check_factory(make_model)
    folder = Path(folder)
    record, tied = read_meta(folder)
    try:
        data = load_file(folder / WEIGHTS)
    except FileNotFoundError as e:
        raise StorageError(f"{folder / WEIGHTS} is missing") from e
    except (SafetensorError, OSError) as e:
        raise StorageError(f"{folder / WEIGHTS} cannot be read ({e}): it is truncated or no safetensors file") from e
    model = make_model()
    if not isinstance(model, nn.Module):
        raise StorageError(f"make_model must return the dense network, not {type(model).__name__}")
    for name in record.created:
        weight = f"{name.removesuffix('bias')}weight"
        if weight in named_tensors(model) and takes_bias(model, weight):
            give_bias(model, name)
    here = named_tensors(model)
    if tensor_shapes(here) != record.dense:
        raise StorageError(f"{folder / META} is of another network than the factory makes: "
                           f"{differences(record.dense, tensor_shapes(here))}")
    if tied_names(here) != tied:
        raise StorageError(f"{folder / META} says other tensors are shared than in the factory's network")
    made: dict[str, Tensor] = {}
    for name, t in here.items():
        value = saved_value(data, tied.get(name, name), record.shapes[name], t)
        if name not in tied:
            made[name] = parameter_like(t, value)
    with torch.no_grad():
        fit(model, {name: made[tied.get(name, name)] for name in here})
    try:
        set_attributes(model, record.attributes)
    except (AttributeError, KeyError, TypeError) as e:
        raise StorageError(f"{folder / META} sets a number that the factory's network does not store: {e}") from e
    setattr(model, RECORD, record)
    return model


def check_factory(make_model: object) -> None:
    """Raise ConfigError for what is no function that makes a network."""
    if isinstance(make_model, nn.Module) or not callable(make_model):
        raise ConfigError(f"load takes a function that makes the dense network, not {type(make_model).__name__}: "
                           "load(folder, lambda: Net())")


def saved_value(data: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dense: Tensor) -> Tensor:
    """A saved tensor, on the device and in the memory format of the dense one. On the CPU if that is on meta, without values.

    Raises StorageError if it is not what description and network say.
    """
    if name not in data:
        raise StorageError(f"{WEIGHTS} lacks {name}, which {META} names")
    if tuple(data[name].shape) != shape:
        raise StorageError(f"{name}: {WEIGHTS} has shape {list(data[name].shape)}, {META} says {list(shape)}")
    if data[name].is_floating_point() != dense.is_floating_point():
        raise StorageError(f"{name}: {WEIGHTS} has {data[name].dtype}, the network {dense.dtype}")
    value = data[name] if dense.is_meta else data[name].to(device=dense.device)
    return value.contiguous(memory_format=format_of(dense))


def tied_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """{name: first name of the same tensor} for tensors that have several names."""
    first: dict[int, str] = {}
    return {name: origin for name, t in tensors.items() if (origin := first.setdefault(id(t), name)) != name}


def read_meta(folder: str | os.PathLike[str]) -> tuple[NarrowRecord, dict[str, str]]:
    """What narrower.json says, and the tied tensors: {name: first name}. Raises StorageError if it is damaged."""
    path = Path(folder) / META
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError as e:
        raise StorageError(f"{path} is missing: {folder} is not a folder that narrower.save wrote") from e
    except (OSError, ValueError) as e:
        raise StorageError(f"{path} cannot be read ({e})") from e
    if not isinstance(meta, dict) or type(meta.get("format")) is not int:
        raise StorageError(f"{path} is not a file of narrower")
    if meta["format"] > FORMAT:
        raise StorageError(f"{path} has format {meta['format']}, this version reads up to {FORMAT}: update narrower")
    for key, check in (("dense", shape_table), ("shapes", shape_table), ("tied", name_table)):
        if not check(meta.get(key)):
            raise StorageError(f"{path} is damaged: {key!r} is missing or not what save writes")
    dense, shapes, tied = meta["dense"], meta["shapes"], meta["tied"]
    if set(dense) != set(shapes) or not set(tied) <= set(shapes):
        raise StorageError(f"{path} is damaged: its tables name different tensors")
    wide = [n for n, s in shapes.items() if len(s) != len(dense[n]) or any(a > b for a, b in zip(s, dense[n], strict=True))]
    if wide:
        raise StorageError(f"{path} is damaged: {wide[0]} is {shapes[wide[0]]}, which is no part of {dense[wide[0]]}")
    numbers, created = meta.get("numbers", []), meta.get("created", [])
    if not number_table(numbers):
        raise StorageError(f"{path} is damaged: 'numbers' is not what save writes")
    if not isinstance(created, list) or not all(isinstance(n, str) and n in dense and n.endswith(".bias") for n in created):
        raise StorageError(f"{path} is damaged: 'created' is not what save writes")
    record = NarrowRecord({n: tuple(s) for n, s in dense.items()}, {n: tuple(s) for n, s in shapes.items()},
                          {Place(*place): value for *place, value in numbers}, tuple(created))
    return record, tied


def shape_table(x: Any) -> bool:
    return isinstance(x, dict) and bool(x) and all(
        isinstance(s, list) and all(type(n) is int and n >= 0 for n in s) for s in x.values())


def number_table(x: Any) -> bool:
    return isinstance(x, list) and all(
        isinstance(row, list) and len(row) == 4 and isinstance(row[0], str) and isinstance(row[1], str)
        and row[1].isidentifier() and not row[1].startswith("_") and (row[2] is None or type(row[2]) is int)
        and type(row[3]) is int and row[3] >= 0 for row in x)


def name_table(x: Any) -> bool:
    return isinstance(x, dict) and all(isinstance(v, str) for v in x.values())


def differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """The first few names and shapes that differ."""
    def show(shape: tuple[int, ...] | None) -> str:
        return "nothing" if shape is None else str(list(shape))

    odd = sorted(n for n in {*expected, *found} if expected.get(n) != found.get(n))
    some = "; ".join(f"{n}: expected {show(expected.get(n))}, found {show(found.get(n))}" for n in odd[:4])
    return some + (f"; and {len(odd) - 4} more" if len(odd) > 4 else "")
