"""save and load: tensors as safetensors, the shapes and plans as JSON, no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from .errors import StorageError
from .narrowing.narrow import RECORD
from .surgery.attributes import Place, set_attributes
from .surgery.resize import fit, give_bias, takes_bias
from .surgery.walk import named_tensors

FORMAT = 1

WEIGHTS, META = "model.safetensors", "narrower.json"


def save(model: nn.Module, folder: str | os.PathLike[str], **extra: Any) -> Path:
    """Write `model.safetensors` and `narrower.json` into `folder` (made if missing).

    `model` comes from `narrow` or `load`; its parameters may have been trained since. `extra` (JSON values) is kept under
    "extra". Files are written beside and renamed, so that an interrupted save loses nothing.

    Raises StorageError for a model that narrower has not made, or one whose tensors have changed shape since.
    """
    record = getattr(model, RECORD, None)
    if record is None:
        raise StorageError("this model has no record of narrowing: save takes what narrow, load or merge returned")
    tensors = named_tensors(model)
    now = {n: list(t.shape) for n, t in tensors.items()}
    if now != record["shapes"]:
        raise StorageError(f"the network has changed since it was narrowed: {differences(record['shapes'], now)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    first: dict[int, str] = {}
    same = {n: first.setdefault(id(t), n) for n, t in tensors.items()}
    data = {n: t.detach().contiguous().cpu().clone() for n, t in tensors.items() if same[n] == n}
    meta = {
        "format": FORMAT,
        "dense": record["dense"],
        "shapes": now,
        "tied": {n: o for n, o in same.items() if n != o},
        "plans": record["plans"],
        "numbers": record["numbers"],
        "created": record["created"],
        "extra": extra,
    }
    text = json.dumps(meta)
    (folder / (WEIGHTS + ".part")).write_bytes(serialize(data, metadata={"format": "pt"}))
    (folder / (META + ".part")).write_text(text)
    os.replace(folder / (WEIGHTS + ".part"), folder / WEIGHTS)
    os.replace(folder / (META + ".part"), folder / META)
    return folder


def load(folder: str | os.PathLike[str], make_model: Callable[[], nn.Module]) -> nn.Module:
    """The narrow network that `save` wrote: `make_model()` makes the dense one, which is cut to the saved shapes.

    Raises StorageError if a file is missing or damaged, of a later version, or of another network than `make_model` gives.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    try:
        data = load_file(folder / WEIGHTS)
    except FileNotFoundError as e:
        raise StorageError(f"{folder / WEIGHTS} is missing") from e
    except (SafetensorError, OSError) as e:
        raise StorageError(f"{folder / WEIGHTS} cannot be read ({e}): it is truncated or no safetensors file") from e
    model = make_model()
    if not isinstance(model, nn.Module):
        raise StorageError(f"make_model must return the dense network, not {type(model).__name__}")
    for name in meta["created"]:
        weight = f"{name.removesuffix('bias')}weight"
        if weight in named_tensors(model) and takes_bias(model, weight):
            give_bias(model, name)
    here = named_tensors(model)
    found = {n: list(t.shape) for n, t in here.items()}
    if found != meta["dense"]:
        raise StorageError(f"{folder / META} is of another network than the factory makes: {differences(meta['dense'], found)}")
    first: dict[int, str] = {}
    shared = {n: o for n, t in here.items() if (o := first.setdefault(id(t), n)) != n}
    if shared != meta["tied"]:
        raise StorageError(f"{folder / META} says other tensors are shared than in the factory's network")
    for n, shape in meta["shapes"].items():
        origin = meta["tied"].get(n, n)
        if origin not in data:
            raise StorageError(f"{folder / WEIGHTS} lacks {origin}, which {META} names")
        if list(data[origin].shape) != shape:
            raise StorageError(f"{n}: {WEIGHTS} has shape {list(data[origin].shape)}, {META} says {shape}")
        if data[origin].is_floating_point() != here[n].is_floating_point():
            raise StorageError(f"{n}: {WEIGHTS} has {data[origin].dtype}, the network {here[n].dtype}")
    made: dict[int, Tensor] = {}
    new: dict[str, Tensor] = {}
    for n, t in here.items():
        if id(t) not in made:
            value = data[meta["tied"].get(n, n)].to(device=t.device)
            made[id(t)] = nn.Parameter(value, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else value
        new[n] = made[id(t)]
    with torch.no_grad():
        fit(model, new)
    try:
        set_attributes(model, {Place(*place): value for *place, value in meta["numbers"]})
    except (AttributeError, KeyError, TypeError) as e:
        raise StorageError(f"{folder / META} sets a number that the factory's network does not store: {e}") from e
    setattr(model, RECORD, {k: meta[k] for k in ("dense", "shapes", "plans", "numbers", "created")})
    return model


def read_meta(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """narrower.json, checked for its form. Raises StorageError."""
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
    if set(dense) != set(shapes) or not set(tied) <= set(shapes) or not isinstance(meta.get("plans"), list):
        raise StorageError(f"{path} is damaged: its tables name different tensors")
    wide = [n for n, s in shapes.items() if len(s) != len(dense[n]) or any(a > b for a, b in zip(s, dense[n], strict=True))]
    if wide:
        raise StorageError(f"{path} is damaged: {wide[0]} is {shapes[wide[0]]}, which is no part of {dense[wide[0]]}")
    if not number_table(meta.setdefault("numbers", [])):
        raise StorageError(f"{path} is damaged: 'numbers' is not what save writes")
    created = meta.setdefault("created", [])
    if not isinstance(created, list) or not all(isinstance(n, str) and n in dense and n.endswith(".bias") for n in created):
        raise StorageError(f"{path} is damaged: 'created' is not what save writes")
    meta.setdefault("extra", {})
    return meta


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


def differences(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """The first few keys and shapes that differ."""
    odd = sorted(n for n in {*expected, *found} if expected.get(n) != found.get(n))
    some = "; ".join(f"{n}: expected {expected.get(n, 'nothing')}, found {found.get(n, 'nothing')}" for n in odd[:4])
    return some + (f"; and {len(odd) - 4} more" if len(odd) > 4 else "")
