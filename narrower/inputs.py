"""Inputs and outputs of models: nested tensors, batches, devices."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from contextlib import contextmanager
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from .errors import DataError, NarrowerError, first_line
from .preconditions import check_number


def model_inputs(batch: Any, model: nn.Module) -> Any:
    """The model's inputs from a batch, on the model's device.

    Of a pair (inputs, targets) it is the first part, as `paired_inputs` gives it. A pair of tensors is taken whole if `forward`
    needs two arguments. Any other batch is taken whole.
    """
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    if pair and (arguments_needed(model) < 2 or not isinstance(batch[0], Tensor)):
        return paired_inputs(batch, model)
    return on_device(tuple(batch) if isinstance(batch, list) else batch, model)


def paired_inputs(pair: Sequence[Any], model: nn.Module) -> Any:
    """The model's inputs from a pair (inputs, targets), on the model's device. Detectors take a list of images as one argument:
    so are images understood that stand in a list or tuple, beside a list of targets."""
    inputs, targets = pair
    if are_images(inputs) and isinstance(targets, (tuple, list)) and arguments_needed(model) < 2:
        inputs = (list(inputs),)
    return on_device(tuple(inputs) if isinstance(inputs, list) else inputs, model)


def arguments_needed(model: nn.Module) -> int:
    """How many positional arguments `forward` needs."""
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
               for p in inspect.signature(model.forward).parameters.values())


def on_device(inputs: Any, model: nn.Module) -> Any:
    device = device_of(model)
    return map_tensors(inputs, lambda t: move_to(ordinary(t), device))


def are_images(argument: Any) -> bool:
    """Whether an argument is a list (or tuple) of images, each a tensor `(C, H, W)` of its own size."""
    return isinstance(argument, (tuple, list)) and len(argument) > 0 and all(
        isinstance(t, Tensor) and t.ndim == 3 for t in argument)


def arguments_of(inputs: Any) -> tuple[Any, ...]:
    """The arguments of a call of the model: see `call_model`."""
    return tuple(inputs.values()) if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)


def sample_count(inputs: Any) -> int:
    """How many samples the model's inputs hold: the images of the first argument if it is a list of them, else the first
    dimension of the first tensor that has dimensions. 1 if none has, 0 without tensors."""
    first: Any = next((x for x in arguments_of(inputs) if any(t.ndim for t in flatten_tensors(x))), None)
    if are_images(first):
        return len(first)
    return next((t.shape[0] for t in flatten_tensors(first) if t.ndim), min(1, len(flatten_tensors(inputs))))


def first_samples(inputs: Any, count: int) -> Any:
    """The model's inputs with the first `count` samples alone."""
    def first(argument: Any) -> Any:
        return argument[:count] if are_images(argument) else map_tensors(argument, lambda t: t[:count] if t.ndim else t)

    if isinstance(inputs, dict):
        return {k: first(v) for k, v in inputs.items()}
    return tuple(map(first, inputs)) if isinstance(inputs, tuple) else first(inputs)


def samples(what: str, batches: Iterable[Any], model: nn.Module, images: int | None = None) -> Iterator[tuple[Any, int]]:
    """The model's inputs from each batch, and their number of samples; at most `images` samples in total.

    Raises DataError, in the name of `what`, for a batch that has no tensor of images, and for a tensor in place of the batches:
    its rows would be taken for them. Raises ConfigError if `images` is no whole number from 1.
    """
    if images is not None:
        check_number(f"{what}: images", images, 1, whole=True)
    if isinstance(batches, Tensor):
        raise DataError(f"{what}: the batches are one tensor of shape {shapes_of(batches)}: give a list of batches, [images]")
    seen = 0
    for k, batch in enumerate(batches):
        inputs = model_inputs(batch, model)
        if not any(t.ndim for t in flatten_tensors(inputs)):
            raise DataError(f"{what}: batch {k} is a {type(batch).__name__} without a tensor of images in it{advice(inputs)}")
        count = sample_count(inputs)
        if images is not None and seen + count > images:
            count = images - seen
            inputs = first_samples(inputs, count)
        if count:
            yield inputs, count
        seen += count
        if images is not None and seen >= images:
            return


@contextmanager
def running_on(what: str, inputs: Any) -> Iterator[None]:
    """A forward runs inside. What it raises becomes a DataError, in the name of `what`, but for a lack of memory."""
    try:
        yield
    except (NarrowerError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as e:
        raise DataError(f"{what}: the model does not run on inputs of shape {shapes_of(inputs)} ({first_line(e)})"
                        f"{advice(inputs)}") from e


def advice(inputs: Any) -> str:
    """How inputs are given that a model does not take as they are: the end of an error message."""
    if any(isinstance(x, np.ndarray) for x in leaves(inputs)):
        return ". A numpy array becomes a tensor by torch.from_numpy(...)"
    if not flatten_tensors(inputs):
        return ". Give a tensor, such as images (N, C, H, W)"
    if isinstance(inputs, dict):
        return ". A dict has keyword arguments of the model, without labels: give batch['image'] if it takes images alone"
    if isinstance(inputs, tuple):
        return ". A tuple has positional arguments of the model, without labels: give the images if it takes them alone"
    if isinstance(inputs, list):
        return ". A list is one argument of the model: give the tensor in it, or a tuple of positional arguments"
    if any(t.dtype == torch.uint8 for t in flatten_tensors(inputs)):
        return ". Images of whole numbers are given as in training: as floating-point numbers, normalised"
    return ""


def device_of(model: nn.Module) -> torch.device:
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


WITHOUT_FLOAT64 = frozenset({"mps"})  # types of devices: Apple's GPUs


def has_float64(device: torch.device) -> bool:
    return device.type not in WITHOUT_FLOAT64


def move_to(t: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. Only copies to CUDA are not waited for.

    One to Apple's GPUs may read memory that is free again, and one to the CPU may be read before it is there.
    """
    return t.to(device, non_blocking=device.type == "cuda")


def ordinary(t: Tensor) -> Tensor:
    """The tensor, or a copy if it was made in inference mode: autograd cannot store such tensors, and dispatch modes see their
    operators undivided."""
    return t.clone() if t.is_inference() and not torch.is_inference_mode_enabled() else t


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given. On the CPU, and on devices that are not known, there is no waiting."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def precise(t: Tensor) -> Tensor:
    """A tensor in float64, for long sums and for merging weights. In float32 where its device has no float64. Complex numbers
    stay complex."""
    kind = torch.float64 if has_float64(t.device) else torch.float32
    return t.to(kind.to_complex() if t.is_complex() else kind)


def real_rows(rows: Tensor) -> Tensor:
    """Rows `(n, k)`; of complex numbers as `(n, 2k)` real ones, with the same norms and distances."""
    return torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows


def as_float64(t: Tensor) -> Tensor:
    """A tensor in float64, on the CPU where its device has no float64."""
    return (t if has_float64(t.device) else t.cpu()).double()


def map_tensors(x: Any, f: Callable[[Tensor], Any]) -> Any:
    """Apply `f` to every tensor in nested tuples, lists and dicts. Other values stay as they are."""
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, dict):
        return {k: map_tensors(v, f) for k, v in x.items()}
    return type(x)(map_tensors(v, f) for v in x) if type(x) in (list, tuple) else x


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call the model with a tensor, a tuple of positional arguments, or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def shapes_of(x: Any) -> str:
    return ", ".join(str(tuple(t.shape)) for t in flatten_tensors(x)) or type(x).__name__


def flatten_tensors(x: Any) -> list[Tensor]:
    """All tensors in nested containers and objects, in order."""
    return [leaf for leaf in leaves(x) if isinstance(leaf, Tensor)]


# What holds no tensors that a network computes, and what does not show whether it does.
HARMLESS = (nn.Module, ModuleType, type, Enum, int, float, complex, str, bytes, bytearray, range, slice, type(None), type(...),
            torch.dtype, torch.device, torch.layout, torch.memory_format, ref)
OPAQUE = (FunctionType, BuiltinFunctionType, MethodType, partial, Iterator, np.ndarray)


def leaves(x: Any, within: tuple[int, ...] = ()) -> Iterator[Any]:
    """Everything in nested tuples, lists, dicts, their kin, and the attributes of objects that is none of these, in order."""
    held = contents(x)
    if held is None:
        yield x
    elif id(x) not in within:
        for value in held:
            yield from leaves(value, (*within, id(x)))


def contents(x: Any) -> list[Any] | None:
    """What a container or object holds. None for what is neither, or cannot be seen into."""
    if isinstance(x, (Tensor, *HARMLESS, *OPAQUE)):
        return None
    if isinstance(x, Mapping):
        return list(x.values())
    if isinstance(x, (list, tuple, set, frozenset, deque, ValuesView, ItemsView)):
        return list(x)
    slots = [n for c in type(x).__mro__ if "__slots__" in vars(c)
             for n, slot in vars(c).items() if isinstance(slot, MemberDescriptorType)]
    names = dict.fromkeys([*getattr(x, "__dataclass_fields__", ()), *getattr(x, "__dict__", ()), *slots])
    return [getattr(x, n) for n in names if hasattr(x, n)] if slots or hasattr(x, "__dict__") else None


def opaque(x: Any) -> str | None:
    """The type of the first thing in `x` that may hold tensors which `flatten_tensors` does not see. None if there is none."""
    kind = next((type(leaf) for leaf in leaves(x) if not isinstance(leaf, (Tensor, *HARMLESS))), None)
    return None if kind is None else f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
