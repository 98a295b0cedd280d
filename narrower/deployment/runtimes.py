"""Runtimes: what makes a function that runs a network once, on given inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..inputs import call_model, device_of, flatten_tensors, map_tensors
from .exporting import export
from .formats import format_of
from .layer_times import OPEN, compiled, waiting

Call = Callable[[], Any]


@dataclass(frozen=True)
class Runtime:
    """A way to run networks.

    Args:
        name: as on the command line.
        prepare: makes, from a module in eval mode, its inputs and a number of threads, a function that runs the network on
            these inputs once and returns when it is done. It is called, and its result used, within `torch_threads(threads)`
            and without gradients.
    """

    name: str
    prepare: Callable[[nn.Module, Any, int], Call]


def prepare_eager(module: nn.Module, inputs: Any, threads: int) -> Call:
    return waiting(lambda: call_model(module, inputs), device_of(module))


def prepare_compiled(module: nn.Module, inputs: Any, threads: int) -> Call:
    """`torch.compile` for these very shapes. The first call compiles."""
    run: Any = compiled(module)
    return waiting(lambda: call_model(run, inputs), device_of(module))


def prepare_cuda_graph(module: nn.Module, inputs: Any, threads: int) -> Call:
    """The kernels of one forward, recorded and replayed without Python between them."""
    device = device_of(module)
    if device.type != "cuda":
        raise ConfigError(f"the runtime cudagraph needs a network on a CUDA device, not on {device}")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # a capture must follow a warm-up on another stream
        for _ in range(3):
            call_model(module, inputs)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # torch's own stream for captures may be one of another GPU
        call_model(module, inputs)
    return waiting(graph.replay, device)


def prepare_onnxruntime(module: nn.Module, inputs: Any, threads: int) -> Call:
    return prepare_file(module, inputs, threads, "network.onnx")


def prepare_openvino(module: nn.Module, inputs: Any, threads: int) -> Call:
    return prepare_file(module, inputs, threads, "network.xml")


def prepare_file(module: nn.Module, inputs: Any, threads: int, name: str) -> Call:
    """Export for these very shapes (and compare with PyTorch), and run the file on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = export(module, inputs, Path(folder) / name, dynamic_batch=False).path
        run = format_of(path).open(path, threads)
    given = map_tensors(inputs, lambda t: t.cpu())
    return lambda: run(given)


RUNTIMES = (
    Runtime("eager", prepare_eager),
    Runtime("compile", prepare_compiled),
    Runtime("cudagraph", prepare_cuda_graph),
    Runtime("onnxruntime", prepare_onnxruntime),
    Runtime("openvino", prepare_openvino),
)


def runtime_named(name: str) -> Runtime:
    """Raises ConfigError if there is no such runtime."""
    for runtime in RUNTIMES:
        if runtime.name == name:
            return runtime
    raise ConfigError(f"there is no runtime {name!r}: take one of {', '.join(runtime.name for runtime in RUNTIMES)}")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch computes on `count` threads inside. Raises ConfigError if that is no number from 1."""
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"threads={count!r}: give a whole number from 1")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_in(runtime: str, module: nn.Module) -> str:
    """The device on which a runtime runs the module: those that run a file do so on the CPU."""
    return "cpu" if runtime in OPEN else str(device_of(module))


def dtype_of(module: nn.Module, inputs: Any) -> str:
    tensors = (*module.parameters(), *flatten_tensors(inputs))
    return str(tensors[0].dtype).removeprefix("torch.")
