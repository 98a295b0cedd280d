"""export: write a network for another runtime, run the file there, and refuse it unless it computes what PyTorch does."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError, NarrowerError
from ..extras import optional
from ..inputs import call_model, flatten_tensors, map_tensors, running_on
from ..preconditions import check_number, checked
from ..surgery.copying import moved
from ..surgery.walk import in_eval_mode
from .formats import Format, Writer, format_of
from .int8 import quantize, relative_error

Check = tuple[Any, list[Tensor]]
EXACT, ROUGH = 1e-4, 0.3  # default tolerances, of float and of int8
ROUNDINGS = 16  # of the outputs' precision, allowed to a file that becomes int8
ADVICE = "A file for one batch size may do: dynamic_batch=False, --fixed-batch 1"


@dataclass(frozen=True)
class Exported:
    """A file that computes what the network does.

    Args:
        path: the file.
        format: onnx, openvino, pt2 or torchscript.
        runtime: what ran it for the comparison.
        precision: float (that of the network) or int8.
        size: bytes of the file, and of those that belong to it.
        difference: the largest difference from PyTorch, as a fraction of the largest output; with int8 the root mean square of
            the difference, as a fraction of that of the output.
        batch: "any", or the only number of samples that it takes.
    """

    path: Path
    format: str
    runtime: str
    precision: str
    size: int
    difference: float
    batch: str

    def __str__(self) -> str:
        kind = "" if self.precision == "float" else f"{self.precision}, "
        return (f"{self.path} ({kind}{self.size / 1e6:,.2f} MB, batch size: {self.batch}): {self.runtime} = PyTorch to "
                f"{self.difference:.1e} of the output")


@checked
def export(
    module: nn.Module, example_inputs: Any, path: str | os.PathLike[str], *, dynamic_batch: bool = True,
    calibration: Iterable[Any] | None = None, tolerance: float | None = None,
) -> Exported:
    """Write `module` in eval mode to a file whose suffix names the format, and compare what the file computes with PyTorch.

    | suffix                  | written by                 | runs in      | extra      |
    |-------------------------|----------------------------|--------------|------------|
    | `.onnx`                 | `torch.onnx` (dynamo)      | onnxruntime  | `export`   |
    | `.xml` (with `.bin`)    | OpenVINO, of `torch.export`| openvino     | `openvino` |
    | `.pt2`                  | `torch.export`             | torch        |            |
    | `.ts`, `.torchscript.pt`| `torch.jit`                | torch, C++   |            |

    A network on a GPU is written and compared as a copy on the CPU where the file runs on the CPU: ONNX and OpenVINO.

    The comparison is on the example inputs and on their mirror images, in another number if the batch size is free. Give real
    inputs. A tensor of equal values shows nothing and is replaced by normal noise.

    Args:
        example_inputs: a tensor, a tuple or a dict of keyword arguments. The first dimension of each tensor is the batch.
        dynamic_batch: let the file take any batch size. Inputs that are lists (of detectors) fix it anyway.
        calibration: batches for int8 (`.onnx` only): post-training quantisation of weights and activations, to the ranges that
            activations have on these batches. A batch is what the network takes, or a pair whose first part is; some hundred
            images are enough.
        tolerance: the largest difference allowed, as a fraction of the largest value of that output; 1e-4 unless given. With
            int8 the root mean square of the difference, as a fraction of that of the output; 0.3 unless given.

    Raises:
        ExportError: no such format; the exporter fails (with the operator that it does not take, if that is why); the runtime
            cannot run the file; it computes something else; an output has no finite value; nothing can be written there. No
            file is left then, and one of before stays.
        DataError: the network does not run on the example inputs.
        MissingExtraError: a package is missing.
    """
    path = Path(path)
    format = wanted_format(path, tolerance, calibration is not None)
    inputs = telling(example_inputs)
    if format.on_cpu:  # a GPU's convolutions round more than the tolerance (TF32)
        module, inputs = moved(module, torch.device("cpu")), map_tensors(inputs, Tensor.cpu)
    dynamic = dynamic_batch and batch_size(inputs) is not None
    with in_eval_mode(module), quiet(), torch.no_grad():
        checks = expected_outputs(module, inputs, dynamic)
        traced = resized(inputs, max(2, batch_size(inputs) or 0)) if dynamic else inputs  # torch takes 1 as a fixed size
        with folder_beside(path) as folder:
            part = folder / path.name
            exact = Agreement(checks, dynamic, exactness(checks, tolerance, calibration is not None))
            difference = written(module, traced, part, format, exact)
            if calibration is not None:
                rough = Agreement(checks, dynamic, ROUGH if tolerance is None else tolerance, relative_error)
                difference = quantized(module, calibration, part, format, rough)
            size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    batch = "any" if dynamic else str(batch_size(inputs) or "as given")
    return Exported(path, format.name, format.runtime, "float" if calibration is None else "int8", size, difference, batch)


def wanted_format(path: Path, tolerance: float | None, to_int8: bool) -> Format:
    """The format of a file, if its packages are here. Raises as `export`."""
    format = format_of(path)
    if path.is_dir():
        raise ExportError(f"cannot write {path}: it is a directory, give the name of a file")
    if tolerance is not None:
        check_number("tolerance", tolerance, 0)
    if to_int8 and format.name != "onnx":
        raise ExportError(f"int8 is written as .onnx only, not as {path.name}: leave out calibration, or change the suffix")
    for package in format.packages:
        optional(package)
    return format


def exactness(checks: list[Check], tolerance: float | None, to_int8: bool) -> float:
    """The tolerance of a file in the network's precision. One that becomes int8 may round as that precision does."""
    if to_int8:
        return max(EXACT, *(ROUNDINGS * torch.finfo(dtype).eps for dtype in precisions(checks)))
    return EXACT if tolerance is None else tolerance


def precisions(checks: list[Check]) -> list[torch.dtype]:
    """The types of the floating-point outputs."""
    return list({t.dtype: None for _, outputs in checks for t in outputs if t.is_floating_point()})


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A folder that is there within. Its files are moved to where `path` is, unless an error ends it.

    Raises:
        ExportError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-")
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror}") from error
    with made as name:
        yield Path(name)
        for file in Path(name).iterdir():
            if file.is_file():
                shutil.move(file, path.parent / file.name)


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """The largest difference of two tensors of one shape, as a fraction of the largest finite magnitude of the first.

    Values that are not finite must be the same. They and whole numbers that differ give infinity or a number like any other.
    """
    if expected.numel() == 0:
        return 0.0
    a, b = expected.detach().cpu().double(), found.detach().cpu().double()
    finite = torch.isfinite(a)
    if not torch.equal(torch.nan_to_num(a[~finite]), torch.nan_to_num(b[~finite])) or not torch.isfinite(b[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    scale = a[finite].abs().max().item() or 1.0
    return (a[finite] - b[finite]).abs().max().item() / scale


class DifferenceError(ExportError):
    """A file computes something else for as many samples as it was written with: the batch is not why."""


@dataclass(frozen=True)
class Agreement:
    """What a file must compute: inputs with PyTorch's outputs for them, and how near is near enough."""

    checks: list[Check]
    dynamic: bool
    tolerance: float
    distance: Callable[[Tensor, Tensor], float] = relative_difference

    def difference(self, path: Path, format: Format) -> float:
        """The largest difference of a file, as a fraction of the largest value of that output.

        Raises ExportError if it cannot be run, or if it is over the tolerance.
        """
        largest = 0.0
        run = format.open(path, 0)
        for inputs, expected in self.checks:
            found = run(inputs)
            error = DifferenceError if inputs is self.checks[0][0] and batch_size(inputs) != 1 else ExportError
            if len(found) != len(expected):
                raise error(f"the file gives {len(found)} outputs, PyTorch {len(expected)}")
            for i, (a, b) in enumerate(zip(expected, found, strict=True)):
                if a.shape != b.shape:
                    raise error(f"output {i} has shape {tuple(b.shape)} in {format.runtime}, {tuple(a.shape)} in PyTorch")
                value = self.distance(a, b)
                if not value <= self.tolerance:
                    raise error(f"output {i} of shape {tuple(a.shape)} differs in {format.runtime} from PyTorch by "
                                f"{value:.2e} of its values (tolerance {self.tolerance:g})")
                largest = max(largest, value)
        return largest


def written(module: nn.Module, inputs: Any, path: Path, format: Format, agreement: Agreement) -> float:
    """Write the file in the first way that gives one which agrees. Returns the largest difference.

    Raises ExportError with the reason of each way.
    """
    reasons, differs = [], False
    for write in format.writers:
        try:
            write(module, inputs, path, agreement.dynamic)
            return agreement.difference(path, format)
        except Exception as error:  # whatever the exporters and runtimes raise
            reasons.append(f"{name_of(write)}: {reason(error)}")
            differs |= isinstance(error, DifferenceError)
            if isinstance(error, MemoryError):
                raise
            for file in path.parent.iterdir():
                file.unlink()
    advice = f". {ADVICE}" if agreement.dynamic and not differs else ""
    if odd := [dtype for dtype in precisions(agreement.checks) if dtype != torch.float32]:
        advice += (f". In {odd[0]} runtimes round otherwise, or lack operators: export module.float(), or give a larger "
                   "tolerance=")
    raise ExportError(f"no {format.name} file of {type(module).__name__} was written: {'; '.join(reasons)}{advice}")


def quantized(module: nn.Module, batches: Iterable[Any], path: Path, format: Format, agreement: Agreement) -> float:
    """Replace a file by one in int8. Returns the difference. Raises ExportError if it is too large."""
    source = path.replace(path.with_name("float" + path.name))
    try:
        quantize(source, path, module, batches)
        difference = agreement.difference(path, format)
    except NarrowerError:
        raise
    except Exception as error:  # whatever the tool raises
        raise ExportError(f"onnxruntime.quantization fails on {type(module).__name__}: {reason(error)}") from error
    source.unlink()
    return difference


def name_of(write: Writer) -> str:
    return write.__name__.removeprefix("write_").replace("_", " ")


OPERATOR = re.compile(r"(?:No ONNX function found for <OpOverload\(op='|No conversion rule found for operations: |"
                      r"Exporting the operator '|Unknown builtin op: )([\w.:]+)")
PLACE = re.compile(r'File "([^"]+)", line (\d+), in \w+\n\s+(.+)')


def reason(error: BaseException) -> str:
    """Why an exporter failed, in one line: the operator that it does not take, or its message and the line of the network."""
    texts = []
    at: BaseException | None = error
    while at is not None:
        texts.append(str(at))
        at = at.__cause__
    if named := next((m for text in reversed(texts) if (m := OPERATOR.search(text))), None):
        return f"the operator {named[1].rstrip('.')} is not supported"
    text = next((text for text in reversed(texts) if text.strip()), type(error).__name__)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = next((line for line in lines if not line.startswith("Exception from")), "".join(lines[:1]))  # OpenVINO says where
    first = first if len(first) <= 160 else first[:160] + " ..."
    places = PLACE.findall(text)
    where = f" (at {Path(places[-1][0]).name}:{places[-1][1]}: {places[-1][2]})" if places else ""
    return (first if isinstance(error, ExportError) else f"{type(error).__name__}: {first}") + where


def expected_outputs(module: nn.Module, inputs: Any, dynamic: bool) -> list[Check]:
    """What PyTorch gives for the inputs, and for their mirror images, in another number if `dynamic`."""
    other = map_tensors(inputs, lambda t: t.flip(-1) if t.ndim > 2 else t)
    if dynamic:
        other = resized(other, max(2, batch_size(inputs) or 0) + 1)
    with running_on("export", inputs):
        found = [(inputs, [t.clone() for t in flatten_tensors(call_model(module, inputs))])]
    try:
        found.append((other, [t.clone() for t in flatten_tensors(call_model(module, other))]))
    except Exception as error:  # whatever the network raises
        if not dynamic:
            raise
        raise ExportError(f"the network takes the example inputs, but not {batch_size(other)} samples: {reason(error)}. "
                          f"{ADVICE}") from error
    for _, outputs in found:
        for i, t in enumerate(outputs):
            if t.numel() and not torch.isfinite(t).any():
                raise ExportError(f"output {i} of {type(module).__name__} has no finite value for the example inputs, so "
                                  "nothing shows what a file computes: look at its weights, or give other inputs")
    return found


def batch_size(inputs: Any) -> int | None:
    """The first dimension that all input tensors share. None where they do not, or where they come in lists."""
    values = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
    tensors = [x for x in values if isinstance(x, Tensor)]
    if len(tensors) != len(flatten_tensors(inputs)):
        return None
    sizes = {t.shape[0] if t.ndim else None for t in tensors}
    return sizes.pop() if len(sizes) == 1 else None


def resized(inputs: Any, size: int) -> Any:
    """The inputs with `size` samples: the first of them, or all of them again and again."""
    return map_tensors(inputs, lambda t: t[torch.arange(size, device=t.device) % t.shape[0]])


def telling(inputs: Any) -> Any:
    """The inputs; normal noise of seed 0 in place of images of equal values."""
    generator = torch.Generator().manual_seed(0)

    def noise(t: Tensor) -> Tensor:
        if not t.is_floating_point() or t.numel() < 2 or bool((t != t.flatten()[0]).any()):
            return t
        return torch.randn(t.shape, generator=generator).to(t)

    return map_tensors(inputs, noise)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines or printed graphs: the exporters write pages of them, and their results are checked."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
