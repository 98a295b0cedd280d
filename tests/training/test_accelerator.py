"""The device by name, mixed precision, and signals that wait for the end of a step."""

from __future__ import annotations

import os
import signal
import threading
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from support.devices import Calls
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("accelerate")
from narrower.errors import ConfigError
from narrower.training.accelerator import autocast, collect_interrupts, emulated, make_accelerator, shard_of, to_device
from narrower.training.config import TrainConfig


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(ConfigError, match="--device nonsense"):
        make_accelerator("nonsense")


@pytest.mark.parametrize(("name", "message"), [("nonsense", "Unsupported logging capability: nonsense"),
                                               ("comet_ml", "--log-with comet_ml: its package is not installed")])
def test_a_tracker_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_accelerator("cpu", [name])


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with four GPUs, without them, and what becomes the current one. accelerate chooses as it does."""
    current: list[str] = []

    def accelerator(cpu: bool, log_with: object, project_dir: object) -> Any:
        chosen = os.environ.get("ACCELERATE_TORCH_DEVICE", f"cuda:{os.environ.get('LOCAL_RANK')}")
        return SimpleNamespace(device=torch.device(chosen), num_processes=1, log_with=[])

    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "")
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    monkeypatch.setattr("accelerate.Accelerator", accelerator)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    monkeypatch.setattr(torch, "empty", lambda count, device: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    return current


def test_the_gpu_of_the_settings_becomes_the_current_one(gpus: list[str]) -> None:
    """CUDA graphs and events are of the current one. Of odd widths cuDNN knows the best algorithm by trying only."""
    assert str(make_accelerator("cuda:1").device) == "cuda:1" and gpus == ["cuda:1"]
    assert str(make_accelerator("cuda").device) == "cuda" and gpus == ["cuda:1"], "the current one is left to the caller"
    assert torch.backends.cudnn.benchmark


def test_a_computation_that_must_be_deterministic_stays_so(gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    make_accelerator("cuda")
    assert not torch.backends.cudnn.benchmark


def test_processes_that_would_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate joins processes without GPUs only where it is told that they compute on the CPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = SimpleNamespace(device=torch.device("cpu"), num_processes=1, log_with=[])
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: alone)
    with pytest.raises(ConfigError, match="2 processes were started, and on cpu they would not know of each other"):
        make_accelerator("auto")


def test_each_process_has_a_gpu_of_its_own(gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    tried: list[str] = []
    monkeypatch.setattr(torch, "empty", lambda count, device: tried.append(device))
    assert str(make_accelerator("cuda").device) == "cuda:2" and gpus == tried == ["cuda:2"]
    with pytest.raises(ConfigError, match="--device cuda:1 is one GPU for 4 processes: give --device cuda"):
        make_accelerator("cuda:1")


def test_one_process_is_the_first_of_one() -> None:
    assert shard_of(make_accelerator("cpu")) == (0, 1)


@pytest.mark.parametrize(("settings", "dtype"), [({}, torch.float32), ({"amp": True}, torch.bfloat16),
                                                 ({"amp": True, "amp_dtype": "float16"}, torch.float16)])
def test_autocast_computes_in_a_short_type_only_if_asked(settings: dict[str, Any], dtype: torch.dtype) -> None:
    with autocast(TrainConfig(**settings), torch.device("cpu")):
        out = torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3))
    assert out.dtype == dtype


def test_batches_get_the_memory_format_of_the_settings() -> None:
    x, y = torch.zeros(2, 3, 4, 4), torch.zeros(2)
    moved, _ = to_device(x, y, TrainConfig(channels_last=True), torch.device("cpu"))
    assert moved.is_contiguous(memory_format=torch.channels_last) and not moved.is_contiguous()


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_are_copied_as_they_lie_in_memory(channels_last: bool) -> None:
    """And reordered on the GPU. If the copy asks for an order, torch reorders on the CPU, in memory that is not pinned."""
    with FakeTensorMode(), Calls() as calls:
        x = torch.zeros(2, 4, 4, 3).permute(0, 3, 1, 2) if not channels_last else torch.zeros(2, 3, 4, 4)
        moved, _ = to_device(x, torch.zeros(2), TrainConfig(channels_last=channels_last), torch.device("cuda"))
    assert [call.get("memory_format") for call in calls.named("_to_copy")] == [None, None]
    assert all(call["non_blocking"] for call in calls.named("_to_copy"))
    assert moved.is_cuda and moved.is_contiguous(memory_format=torch.channels_last) is channels_last


def test_the_first_signal_is_collected_and_the_second_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), collect_interrupts() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_leave_the_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with collect_interrupts() as received:
            seen.append((received, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [([], before)]


@pytest.mark.parametrize(("dtype", "operator"), [("bfloat16", "_is_mkldnn_bf16_supported"),
                                                 ("float16", "_is_mkldnn_fp16_supported")])
def test_a_processor_without_the_short_type_emulates_it(
    monkeypatch: pytest.MonkeyPatch, dtype: Literal["bfloat16", "float16"], operator: str
) -> None:
    config = TrainConfig(amp=True, amp_dtype=dtype)
    for supported in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, operator, lambda found=supported: found)
        assert emulated(config, torch.device("cpu")) is not supported
        assert not emulated(TrainConfig(amp_dtype=dtype), torch.device("cpu"))
        assert not emulated(config, torch.device("cuda"))
