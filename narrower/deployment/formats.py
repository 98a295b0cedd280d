"""The file formats: how each is written from a module, and how the file runs.

A writer takes the module in eval mode, its inputs, the path and whether the batch size stays free. It raises whatever the
exporter raises. An opener gives a function from inputs, as the module takes them, to a flat list of output tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..extras import optional
from ..inputs import call_model, flatten_tensors
from .layer_times import OPEN, open_session

Writer = Callable[[nn.Module, Any, Path, bool], None]
Run = Callable[[Any], list[Tensor]]


@dataclass(frozen=True)
class Format:
    """A file format.

    Args:
        name: as on the command line.
        suffixes: endings of file names; files are named with the first where nothing else is said.
        runtime: what runs the file.
        packages: the optional packages that writing and running need.
        writers: ways to write it. A later one is tried where an earlier one fails or computes something else.
        open: makes the function that runs a file, on so many threads (0: the runtime's own choice).
    """

    name: str
    suffixes: tuple[str, ...]
    runtime: str
    packages: tuple[str, ...]
    writers: tuple[Writer, ...]
    open: Callable[[Path, int], Run]

    @property
    def on_cpu(self) -> bool:
        """Whether files run on the CPU only. torch runs its own on the device of the inputs."""
        return self.runtime in OPEN


def format_of(path: Path) -> Format:
    """The format that a file name asks for. Raises ExportError if none does."""
    for format in FORMATS:
        if path.name.endswith(format.suffixes):
            return format
    known = ", ".join(suffix for format in FORMATS for suffix in format.suffixes)
    raise ExportError(f"{path.name} names no format: give a file name that ends in one of {known}")


def exported_program(module: nn.Module, inputs: Any, dynamic: bool) -> torch.export.ExportedProgram:
    """`torch.export` of a module, for one batch size or for any. It has no stack traces: they hold paths of this machine."""
    args, kwargs = arguments(inputs)
    shapes = batch_dimensions(inputs, torch.export.Dim("batch")) if dynamic else None
    program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments of a call with these inputs."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def batch_dimensions(inputs: Any, batch: Any) -> Any:
    """What `dynamic_shapes` of torch takes: the first dimension of each tensor is `batch`."""
    args, kwargs = arguments(inputs)
    if kwargs:
        return {name: {0: batch} if isinstance(x, Tensor) else None for name, x in kwargs.items()}
    return tuple({0: batch} if isinstance(x, Tensor) else None for x in args)


def write_onnx(module: nn.Module, inputs: Any, path: Path, dynamic: bool) -> None:
    program = exported_program(module, inputs, dynamic)
    names = batch_dimensions(inputs, "batch") if dynamic else None
    found = torch.onnx.export(program, dynamo=True, dynamic_shapes=names, verbose=False)
    assert found is not None  # None comes from the older exporter only
    found.save(path)


def write_onnx_by_tracing(module: nn.Module, inputs: Any, path: Path, dynamic: bool) -> None:
    """The older exporter of torch, which knows the operators of torchvision's detectors. The batch size is fixed."""
    if dynamic:
        raise ExportError("the older exporter, which knows more operators, fixes the batch size (dynamic_batch=False)")
    args, kwargs = arguments(inputs)
    torch.onnx.export(module, args, str(path), kwargs=kwargs, dynamo=False)


def write_pt2(module: nn.Module, inputs: Any, path: Path, dynamic: bool) -> None:
    torch.export.save(exported_program(module, inputs, dynamic), path)


def write_traced(module: nn.Module, inputs: Any, path: Path, dynamic: bool) -> None:
    """TorchScript of the operators that these inputs run. Sizes stay free by themselves where the code computes with them."""
    args, kwargs = arguments(inputs)
    given = {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}
    torch.jit.save(torch.jit.trace(module, strict=False, check_trace=False, **given), path)


def write_scripted(module: nn.Module, inputs: Any, path: Path, dynamic: bool) -> None:
    """TorchScript of the source: branches and loops over values stay."""
    torch.jit.save(torch.jit.script(module), path)


def write_openvino(module: nn.Module, inputs: Any, path: Path, dynamic: bool) -> None:
    openvino = optional("openvino")
    network = openvino.convert_model(exported_program(module, inputs, dynamic))
    tensors = flatten_tensors(inputs)
    if len(tensors) == len(network.inputs):  # conversion forgets sizes that are known
        network.reshape({i: [-1 if dynamic else t.shape[0], *t.shape[1:]] for i, t in enumerate(tensors) if t.ndim})
    openvino.save_model(network, path, compress_to_fp16=False)


def write_openvino_by_tracing(module: nn.Module, inputs: Any, path: Path, dynamic: bool) -> None:
    """By way of the older ONNX exporter."""
    openvino = optional("openvino")
    file = path.with_name(path.name + ".onnx")
    write_onnx_by_tracing(module, inputs, file, dynamic)
    openvino.save_model(openvino.convert_model(file), path, compress_to_fp16=False)
    file.unlink()


def open_pt2(path: Path, threads: int) -> Run:
    module = torch.export.load(path).module()
    return lambda inputs: flatten_tensors(call_model(module, inputs))


def open_torchscript(path: Path, threads: int) -> Run:
    module = torch.jit.load(path)
    return lambda inputs: flatten_tensors(call_model(module, inputs))


def open_onnx(path: Path, threads: int) -> Run:
    optional("onnxruntime")
    session = open_session(str(path), threads)
    names = [i.name for i in session.get_inputs()]

    def run(inputs: Any) -> list[Tensor]:
        return [torch.from_numpy(array) for array in session.run(None, by_name(inputs, names))]

    return run


def open_openvino(path: Path, threads: int) -> Run:
    openvino = optional("openvino")
    config = {"PERFORMANCE_HINT": "LATENCY"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    # The plugin may compute in bfloat16 where the processor has it, unless told.
    network = openvino.Core().compile_model(path, "CPU", config | {"INFERENCE_PRECISION_HINT": "f32"})
    request = network.create_infer_request()
    names = [i.any_name for i in network.inputs]

    def run(inputs: Any) -> list[Tensor]:
        found = request.infer(by_name(inputs, names), share_inputs=True)
        return [torch.from_numpy(found[output]) for output in network.outputs]

    return run


def by_name(inputs: Any, names: list[str]) -> dict[str, Any]:
    """The tensors of the inputs as arrays, under the names that a file has for them: the keywords, else the order."""
    if isinstance(inputs, dict) and set(names) <= set(inputs):
        return {name: as_array(inputs[name]) for name in names}
    tensors = flatten_tensors(inputs)
    if len(tensors) != len(names):
        raise ExportError(f"the file takes {len(names)} inputs ({', '.join(names)}), the network {len(tensors)}: "
                          "an input that the network does not use is lost in the export")
    return dict(zip(names, map(as_array, tensors), strict=True))


def as_array(t: Tensor) -> Any:
    return t.detach().cpu().numpy()


FORMATS = (
    Format("onnx", (".onnx",), "onnxruntime", ("onnx", "onnxscript", "onnxruntime"), (write_onnx, write_onnx_by_tracing),
           open_onnx),
    Format("openvino", (".xml",), "openvino", ("openvino",), (write_openvino, write_openvino_by_tracing), open_openvino),
    Format("pt2", (".pt2",), "torch.export", (), (write_pt2,), open_pt2),
    Format("torchscript", (".ts", ".torchscript.pt"), "TorchScript", (), (write_traced, write_scripted), open_torchscript),
)
