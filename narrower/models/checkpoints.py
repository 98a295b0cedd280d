"""Read checkpoints that others wrote: a state dict, alone or nested, with or without prefixes, never code.

`.safetensors` files and what `torch.save` wrote are read, the latter with `weights_only=True`. The settings that the training
scripts of timm and torchvision keep beside the weights (`argparse.Namespace`, plain data) do not stand in the way.
"""

from __future__ import annotations

import argparse
import pickle
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import StorageError, first_few

NESTS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "module", "net")
BEGINNINGS = (b"PK", b"\x80")  # of a zip archive, and of a pickle, which torch.save wrote before 1.6
PREFIXES = ("module.", "_orig_mod.")  # DataParallel, DDP and AveragedModel; torch.compile
COUNTER = "n_averaged"  # of AveragedModel


def load_checkpoint(model: nn.Module, path: str | Path) -> nn.Module:
    """Load the weights in `path` into `model` and return it; either all of them are loaded or none.

    Averaged weights (`state_dict_ema`, `model_ema`) go before plain ones, as in timm. `num_batches_tracked` may be
    absent: PyTorch before 0.4.1 had no such counter.

    Raises:
        StorageError: the file is missing, damaged, contains code, is of another network (keys and shapes are named), or has
            values that are not finite.
    """
    own = model.state_dict()
    found = without_attribute(read_state_dict(path), own)
    counters = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    _check(own, counters | found, str(path), type(model).__name__)
    model.load_state_dict(counters | found)
    return model


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, unnested and without prefixes, on the CPU.

    Raises:
        StorageError: the file is missing, damaged, contains code, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise StorageError(f"checkpoint {path} {kind}")
    content = _read(path)
    state = _unnest(content)
    if state is None:
        keys = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        raise StorageError(f"checkpoint {path} holds no state dict (name -> tensor); found: {keys or 'nothing'}")
    return without_prefixes(state)


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            begins = file.read(4)
        if begins and not begins.startswith(BEGINNINGS):
            raise StorageError(f"checkpoint {path} is no checkpoint, nor what is left of one: it begins with {begins!r}, which "
                               "torch.save never writes; files of safetensors are told by their name, .safetensors")
        with warnings.catch_warnings(), namespaces_allowed():
            warnings.simplefilter("ignore", UserWarning)  # of unusual pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except StorageError:
        raise
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "unsupported" not in str(error).lower():
            raise _damaged(path, error) from error
        raise StorageError(
            f"checkpoint {path} contains more than tensors (a pickled module or other code), which is not run. "
            "If you trust its source, save the weights alone: "
            f"state = torch.load({str(path)!r}, map_location='cpu', weights_only=False), then "
            "torch.save(state['state_dict'], 'weights.pt'); its keys may have other names, such as 'model', and of a module "
            "take .state_dict()"
        ) from error
    except Exception as error:  # the unpickler raises anything on damaged bytes: struct.error, EOFError, KeyError, ...
        raise _damaged(path, error) from error


def namespaces_allowed() -> AbstractContextManager[Any]:
    """In which `torch.load` takes an `argparse.Namespace`. Before torch 2.5 it cannot be told so."""
    allowed = getattr(torch.serialization, "safe_globals", None)
    return allowed([argparse.Namespace]) if allowed else nullcontext()


def _damaged(path: Path, error: Exception) -> StorageError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return StorageError(f"checkpoint {path} is damaged, truncated or no checkpoint at all: fetch it again ({reason})")


def _unnest(content: Any) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping) or not content:
        return None
    if all(isinstance(value, Tensor) for value in content.values()):
        return {str(key): value for key, value in content.items()}
    for nest in NESTS:
        inner = _unnest(content.get(nest))
        if inner is not None:
            return inner
    return None


def without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the network in its wrappers, also in torch's `AveragedModel`, which has a counter beside it."""
    inside = {key: value for key, value in state.items() if key != COUNTER}
    prefix = next((prefix for prefix in PREFIXES if inside and all(key.startswith(prefix) for key in inside)), None)
    return state if prefix is None else without_prefixes({key.removeprefix(prefix): value for key, value in inside.items()})


def without_attribute(found: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names without the attribute of a trainer's module that held the network, such as `model.` of a LightningModule.

    It is taken off, with the prefixes behind it, where the network then has all names, and not all before.
    """
    inner = without_prefixes({key.partition(".")[2]: value for key, value in found.items()})
    held = len({key.partition(".")[0] for key in found}) == 1 and inner.keys() <= own.keys() and not found.keys() <= own.keys()
    return inner if held else found


def _check(own: Mapping[str, Tensor], found: Mapping[str, Tensor], path: str, network: str) -> None:
    missing = [key for key in own if key not in found]
    unexpected = [key for key in found if key not in own]
    shapes = [
        f"{key} is {tuple(found[key].shape)}, the network has {tuple(own[key].shape)}"
        for key in own
        if key in found and found[key].shape != own[key].shape
    ]
    parts = [
        _some("missing from the file", missing),
        _some("not in the network", unexpected),
        _some("of another shape", shapes, "; "),
    ]
    if is_narrow(own, found):
        raise StorageError(
            f"checkpoint {path} is of a narrow network, and here the dense one is needed. The folder that it was saved in "
            "(with narrower.json) is read by `narrower eval FOLDER`, and in Python by narrower.load"
        )
    if any(parts):
        if not missing and not unexpected and (classes := other_outputs(own, found)):
            parts.append(f"only the number of outputs differs: give --num-classes {classes}")
        lines = "\n".join(f"  {part}" for part in parts if part)
        raise StorageError(f"checkpoint {path} is of another network (nothing was loaded) than the {network} that it is for "
                           f"(--model):\n{lines}")
    if broken := [key for key in own if not found[key].isfinite().all() and own[key].isfinite().all()]:  # masks may have some
        raise StorageError(f"checkpoint {path} has values that are not finite (nothing was loaded), as after a training that "
                           f"diverged: {_some('tensors', broken)}")


def is_narrow(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> bool:
    """Whether `found` has the tensors of `own` with fewer channels, and biases at most besides.

    A layer reads fewer channels then: a head for fewer classes has fewer rows alone.
    """
    if any(key not in found for key in own) or any(key not in own and not key.endswith(".bias") for key in found):
        return False
    shapes = [(found[key].shape, t.shape) for key, t in own.items()]
    if any(len(a) != len(b) or any(x > y for x, y in zip(a, b, strict=True)) for a, b in shapes):
        return False
    return any(len(a) > 1 and a[1] < b[1] for a, b in shapes)


def other_outputs(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> int | None:
    """The number of outputs of `found`, where nothing else differs from `own`: nothing reads these channels.

    There may be several heads, of the same number.
    """
    shapes = [(found[key].shape, t.shape) for key, t in own.items() if found[key].shape != t.shape]
    numbers = {(a[:1], b[:1]) for a, b in shapes}
    return shapes[0][0][0] if len(numbers) == 1 and all(a[1:] == b[1:] and len(a) and len(b) for a, b in shapes) else None


def _some(label: str, names: list[str], separator: str = ", ") -> str:
    return f"{len(names)} {label}: {first_few(names, 5, separator)}" if names else ""
