"""benchmark: networks take turns, ratios are within a round, noise is reported, memory is that of live tensors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from support import reference
from support.networks import Plain, images
from torch import Tensor, nn

import narrower
from narrower.deployment.benchmarking import Benchmark, Timing, live_bytes, ratio_and_error
from narrower.deployment.runtimes import Runtime


def test_rows_say_what_was_measured_where() -> None:
    model = Plain().train()
    x = images(batch=1)
    small = narrower.narrow(model, reference.halved(model, x))
    found = narrower.benchmark({"dense": model, "narrow": small}, x, batch_sizes=(1, 3), seconds=0.0)
    assert [(row.network, row.shape) for row in found.rows] == [
        ("dense", (1, 3, 8, 8)), ("narrow", (1, 3, 8, 8)), ("dense", (3, 3, 8, 8)), ("narrow", (3, 3, 8, 8))]
    dense, narrow = found.rows[:2]
    assert (dense.runtime, dense.device, dense.dtype, dense.threads) == ("eager", "cpu", "float32", 1)
    assert dense.ratio == 1.0 and dense.ratio_error == 0.0 and 0 < dense.least_ms <= dense.median_ms
    assert found.rows[2].samples_per_second == pytest.approx(3e3 / found.rows[2].median_ms)
    assert narrow.macs == narrower.measure(small, x, seconds=0)["macs"] < dense.macs and found.rows[2].macs == dense.macs
    assert narrow.params == reference.params(small) and 4 * narrow.params < narrow.size < narrow.memory < dense.memory
    assert model.training and all(text in str(found) for text in ("runtime", "1x3x8x8", "MACs", "samples/s"))


def test_a_runtime_of_ones_own_is_called_with_threads_in_eval_mode() -> None:
    seen: list[tuple[object, ...]] = []

    def prepare(module: nn.Module, inputs: Tensor, threads: int) -> Callable[[], Any]:
        seen.append((module.training, threads, torch.get_num_threads(), torch.is_grad_enabled()))
        return lambda: seen.append((module.training, torch.get_num_threads()))

    found = narrower.benchmark({"a": Plain().train()}, images(), runtime=Runtime("mine", prepare), threads=(2,), seconds=0.0)
    assert found.rows[0].runtime == "mine" and found.rows[0].threads == 2 and torch.get_num_threads() == 1
    assert seen[0] == (False, 2, 2, False) and set(seen[1:]) == {(False, 2)}


def test_runtimes_that_run_a_file_do_so_on_the_cpu() -> None:
    """Wherever the network is. The other runtimes run it there."""
    model, x = Plain().to("meta"), images().to("meta")
    chosen = [Runtime(name, lambda module, inputs, threads: lambda: None) for name in ("eager", "onnxruntime", "openvino")]
    found = narrower.benchmark({"a": model}, x, runtime=chosen, seconds=0.0)
    assert [row.device for row in found.rows] == ["meta", "cpu", "cpu"]


def test_the_interval_of_a_ratio_holds_the_true_one() -> None:
    """In nearly all of 200 noisy measurements, and it is as narrow as four times the rounds make it."""
    rng, widths = np.random.default_rng(0), []
    for rounds in (40, 640):
        found = [ratio_and_error(*([*(scale * rng.lognormal(0, 0.1, rounds))] for scale in (1.0, 0.7))) for _ in range(200)]
        assert 180 <= sum(abs(ratio - 0.7) <= error for ratio, error in found) < 200
        widths.append(sum(error for _, error in found))
    assert widths[0] == pytest.approx(4 * widths[1], rel=0.1)


def test_noise_is_reported_with_its_spread() -> None:
    found = narrower.benchmark({"a": Plain()}, images(), seconds=0.0).rows[0]
    calm = found.__class__(**{**vars(found), "spread": 0.02, "ratio_error": 0.01})
    wild = found.__class__(**{**vars(found), "network": "b", "spread": 0.6})
    unsure = found.__class__(**{**vars(calm), "ratio_error": 0.06})
    assert not Benchmark((calm,)).noisy and "noisy" not in str(Benchmark((calm,)))
    assert Benchmark((calm, wild, unsure)).noisy == (wild, unsure)
    assert "too noisy: 2 of 3 rows (!), worst b in eager with a spread of 60%" in str(Benchmark((calm, wild, unsure)))


def test_noise_that_hides_which_is_faster_is_an_error() -> None:
    first = narrower.benchmark({"a": Plain()}, images(), seconds=0.0).rows[0]

    def row(ratio: float, error: float) -> Timing:
        return first.__class__(**{**vars(first), "network": "b", "ratio": ratio, "ratio_error": error, "spread": 0.6})

    for decided in (row(0.7, 0.2), row(1.3, 0.2), row(0.99, 0.04)):  # the last: as fast, to a few hundredths
        Benchmark((first, decided)).check()
    for open_ in (row(0.9, 0.2), row(1.1, 0.2), row(1.0, 0.06)):
        with pytest.raises(narrower.NoiseError, match=r"whether b is faster than a in eager \(1 thr.*\+- 0\..*spread 60%"):
            Benchmark((first, open_)).check()


def test_memory_is_that_of_tensors_alive_at_once() -> None:
    convs = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 4, 1)]
    x = torch.zeros(1, 3, 10, 10)
    held = [c * 400 for c in (8, 2, 4)]
    assert live_bytes(nn.Sequential(*convs), x) == max(a + b for a, b in pairwise(held))
    assert live_bytes(nn.Sequential(convs[0], nn.ReLU(inplace=True)), x) == held[0]
    assert live_bytes(nn.Identity(), x) == 0


def test_bad_requests() -> None:
    with pytest.raises(narrower.ConfigError, match="at least one network"):
        narrower.benchmark({}, images())
    with pytest.raises(narrower.ConfigError, match="there is no runtime 'tensorrt': take one of eager"):
        narrower.benchmark({"a": Plain()}, images(), runtime="tensorrt")
