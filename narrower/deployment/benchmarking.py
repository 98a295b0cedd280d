"""benchmark: how long networks take side by side, in turn, on one machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ConfigError, NoiseError
from ..inputs import call_model, flatten_tensors, sample_count
from ..measuring import check_runs, macs_of
from ..preconditions import checked, checked_numbers
from ..surgery.walk import in_eval_mode, named_tensors
from .exporting import batch_size, resized
from .layer_times import SETTLE, in_turn
from .runtimes import Runtime, device_in, dtype_of, runtime_named, torch_threads

NOISY_SPREAD, NOISY_RATIO = 0.25, 0.05


@dataclass(frozen=True)
class Timing:
    """One network in one runtime with one batch size and number of threads.

    Args:
        network: its name.
        runtime: what ran it.
        device: where it ran.
        dtype: of its weights.
        threads: of the CPU.
        shape: of the first input.
        median_ms: milliseconds of one forward, median over the rounds.
        least_ms: the shortest, which other load on the machine disturbs least.
        spread: from the first to the third quartile, as a fraction of the median.
        rounds: how many times were measured.
        ratio: median over the rounds of its time divided by that of the first network in the same round.
        ratio_error: half the width of the 95 % interval of that median, from the quartiles.
        samples_per_second: by the median.
        macs: multiply-adds for one sample.
        params: number of parameters.
        size: bytes of parameters and buffers.
        memory: the most bytes of tensors alive at once in an eager forward, with `size`.
    """

    network: str
    runtime: str
    device: str
    dtype: str
    threads: int
    shape: tuple[int, ...]
    median_ms: float
    least_ms: float
    spread: float
    rounds: int
    ratio: float
    ratio_error: float
    samples_per_second: float
    macs: float
    params: int
    size: int
    memory: int

    @property
    def noisy(self) -> bool:
        """The times say little: they spread too far, or their ratio is not known well enough."""
        return self.spread > NOISY_SPREAD or self.ratio_error > NOISY_RATIO * self.ratio

    @property
    def undecided(self) -> bool:
        """Noise hides whether it is faster than the first network: the interval of the ratio is wide, and 1 lies in it."""
        return self.ratio_error > NOISY_RATIO * self.ratio and abs(self.ratio - 1) <= self.ratio_error


@dataclass(frozen=True)
class Benchmark:
    """A row for each network, runtime, batch size and number of threads."""

    rows: tuple[Timing, ...]

    @property
    def noisy(self) -> tuple[Timing, ...]:
        """The rows whose times say little."""
        return tuple(row for row in self.rows if row.noisy)

    def check(self) -> None:
        """Raises NoiseError if of some row cannot be said whether it is faster than the first network."""
        for row in self.rows:
            if row.undecided:
                raise NoiseError(
                    f"too noisy to say whether {row.network} is faster than {self.rows[0].network} in {row.runtime} "
                    f"({row.threads} threads, {'x'.join(map(str, row.shape))}): {row.ratio:.2f} +- {row.ratio_error:.2f} of "
                    f"its time, spread {row.spread:.0%}; stop other programs, or measure longer than {row.rounds} rounds"
                )

    def __str__(self) -> str:
        head = ("network", "runtime", "device", "threads", "dtype", "shape", "median", "least", "spread", "ratio", "samples/s",
                "MACs", "parameters", "size", "memory")
        lines = [head, *(shown(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, tuple("-" * width for width in widths))
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        if self.noisy:
            worst = max(self.noisy, key=lambda row: row.spread)
            text.append(f"too noisy: {len(self.noisy)} of {len(self.rows)} rows (!), worst {worst.network} in {worst.runtime} "
                        f"with a spread of {worst.spread:.0%} and a ratio of {worst.ratio:.2f} +- {worst.ratio_error:.2f}; "
                        "stop other programs, or measure longer")
        return "\n".join(text)


def shown(row: Timing) -> tuple[str, ...]:
    return (
        row.network, row.runtime, row.device, str(row.threads), row.dtype, "x".join(map(str, row.shape)),
        f"{row.median_ms:.3f} ms", f"{row.least_ms:.3f} ms", f"{row.spread:.0%}{' !' if row.noisy else ''}",
        f"{row.ratio:.3f} +- {row.ratio_error:.3f}", f"{row.samples_per_second:,.0f}", f"{row.macs / 1e6:,.2f} M",
        f"{row.params / 1e6:,.3f} M", f"{row.size / 1e6:,.2f} MB", f"{row.memory / 1e6:,.2f} MB",
    )  # fmt: skip


@checked
def benchmark(
    modules: Mapping[str, nn.Module], example_inputs: Any, *, runtime: str | Runtime | Sequence[str | Runtime] = "eager",
    batch_sizes: Sequence[int] = (1,), threads: Sequence[int] = (1,), seconds: float = 2.0,
    progress: Callable[[str], None] | None = None,
) -> Benchmark:
    """Time networks that take the same inputs, in turn, so that a slower or busier machine slows all of them.

    In each round every network runs once untimed, which fills the caches, and then once (short ones several times). The first
    network is first in one round and last in the next. The ratio to the first network is taken round by round.

    Args:
        modules: {name: network}, the dense one first. They run in eval mode, on their device.
        example_inputs: a tensor, a tuple or a dict of keyword arguments. Inputs with a batch are repeated to each batch size.
        runtime: eager, compile (`torch.compile`), cudagraph (CUDA), onnxruntime, openvino, a `Runtime`, or several.
        batch_sizes: samples in a forward.
        threads: numbers of threads.
        seconds: for each network, in each combination.
        progress: is told what is measured.

    Raises:
        ConfigError: no network, no such runtime, or what is no number of samples or threads.
        DataError: a network does not run on the example inputs.
        ExportError, MissingExtraError: a network cannot be exported for a runtime, or computes something else there.
    """
    if not modules:
        raise ConfigError("benchmark needs at least one network: {name: module}")
    batch_sizes = checked_numbers("batch_sizes", batch_sizes, 1, whole=True)
    threads = checked_numbers("threads", threads, 1, whole=True)
    given = [runtime] if isinstance(runtime, (str, Runtime)) else runtime
    chosen = [runtime_named(r) if isinstance(r, str) else r for r in given]
    for module in modules.values():
        check_runs("benchmark", module, example_inputs)
    rows: list[Timing] = []
    for size in batch_sizes:
        inputs = example_inputs if batch_size(example_inputs) is None else resized(example_inputs, size)
        for place in chosen:
            for count in threads:
                if progress:
                    progress(f"{place.name}, batch {size}, {count} threads")
                rows += compared(modules, inputs, place, count, seconds)
    return Benchmark(tuple(rows))


def compared(modules: Mapping[str, nn.Module], inputs: Any, runtime: Runtime, threads: int, seconds: float) -> list[Timing]:
    """The rows of one runtime, batch size and number of threads."""
    calls = []
    with torch_threads(threads), torch.no_grad(), ExitStack() as modes:
        for module in modules.values():
            modes.enter_context(in_eval_mode(module))
            calls.append(runtime.prepare(module, inputs, threads))
        times = in_turn(calls, seconds, time.perf_counter, SETTLE if threads > 1 else 0.0)
    first = flatten_tensors(inputs)[0]
    samples = max(1, sample_count(inputs))
    rows = []
    for (name, module), own in zip(modules.items(), times, strict=True):
        middle, spread = middle_and_spread(own)
        ratio, error = ratio_and_error(times[0], own)
        size = sum(t.numel() * t.element_size() for t in {id(t): t for t in named_tensors(module).values()}.values())
        rows.append(Timing(
            name, runtime.name, device_in(runtime.name, module), dtype_of(module, inputs), threads, tuple(first.shape),
            1e3 * middle, 1e3 * min(own), spread, len(own), ratio, error, samples / middle, macs_of(module, inputs),
            sum(p.numel() for p in module.parameters()), size, size + live_bytes(module, inputs),
        ))  # fmt: skip
    return rows


def middle_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median, and the distance from the first to the third quartile as a fraction of it."""
    low, _, high = quantiles(values, n=4)
    return median(values), (high - low) / median(values)


def ratio_and_error(first: Sequence[float], own: Sequence[float]) -> tuple[float, float]:
    """Median ratio of the times of two networks in the same rounds, and half the width of its 95 % interval.

    The standard error of the median of n normal values is 0.93 of the distance of their quartiles, divided by the root of n.
    """
    ratio, spread = middle_and_spread([b / a for a, b in zip(first, own, strict=True)])
    return ratio, 1.96 * 0.93 * spread * ratio / len(own) ** 0.5


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators make, while they are alive."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = WeakIdKeyDictionary()
        for t in known:
            self.seen[t.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for t in flatten_tensors(found):
            storage = t.untyped_storage()
            if storage not in self.seen:
                self.seen[storage] = Freed(self, storage.nbytes())
        return found


class Freed:
    """Counts bytes now, and takes them off when it goes."""

    def __init__(self, counter: LiveBytes, size: int) -> None:
        self.counter, self.size = counter, size
        counter.now += size
        counter.most = max(counter.most, counter.now)

    def __del__(self) -> None:
        self.counter.now -= self.size


def live_bytes(module: nn.Module, inputs: Any) -> int:
    """The most bytes that tensors take at once during a forward, without parameters, buffers and inputs."""
    counter = LiveBytes([*named_tensors(module).values(), *flatten_tensors(inputs)])
    with in_eval_mode(module), torch.no_grad(), counter:
        call_model(module, inputs)
    return counter.most
