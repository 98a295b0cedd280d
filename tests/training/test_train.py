"""The loop: what it learns, and that interrupted and uninterrupted runs are the same run."""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate")
pytest.importorskip("timm")
from support.devices import Calls, without_float64
from support.training import CONFIG, data, network, run

import narrower
from narrower.data.images import TensorImages, hold_out
from narrower.data.sources import ImageData
from narrower.distillation import Distillation
from narrower.errors import ConfigError, StorageError
from narrower.training.accelerator import make_accelerator
from narrower.training.evaluate import evaluate
from narrower.training.methods import Methods
from narrower.training.settle import BEGAN, TRAINED
from narrower.training.train import TrainContext, TrainLoop, train


def test_training_learns_and_logs_every_epoch() -> None:
    rows: list[dict[str, Any]] = []
    model = run(network(), config=replace(CONFIG, held_out=0), log=rows.append)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["top1"] > 90 and rows[-1]["loss"] < 1
    assert rows[-1]["top1"] == evaluate(model, data().val, accelerator=make_accelerator("cpu"))["top1"]
    assert all(row["images_per_second"] > 0 and row["seconds"] > 0 for row in rows)


def test_evaluate_is_top1_and_mean_loss_in_eval_mode() -> None:
    model = network()
    model[4].eval()  # a frozen part keeps its mode
    images = data().val
    assert isinstance(images, TensorImages)
    x, y = images.__getitems__(range(len(images)))
    result = evaluate(model, images, replace(CONFIG, batch_size=7), make_accelerator("cpu"))
    assert model.training and model[0].training and not model[4].training
    logits = model.eval()(x)
    assert result["top1"] == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item())
    assert result["loss"] == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-5)


def test_an_evaluation_waits_for_no_copies_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that becomes a tensor lies on the CPU first: the GPU would have to end each batch before the next begins."""
    model, images = network(), data().val
    assert isinstance(images, TensorImages)
    held = [images.__getitems__(range(k, k + 30)) for k in (0, 30)]
    monkeypatch.setattr(sys.modules["narrower.training.evaluate"], "batches", lambda *given, **options: held)
    with Calls() as calls:
        evaluate(model, images, CONFIG, make_accelerator("cpu"))
    assert len(calls.named("conv2d")) == 2 and not calls.named("lift_fresh")


def test_a_device_without_float64_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = []
    with without_float64(monkeypatch, "training.train", "training.evaluate"):
        run(network(), config=replace(CONFIG, epochs=1), log=rows.append)
    assert 0 < rows[0]["loss"] < 1 and 0 < rows[0]["val_loss"] < 1


def interrupting(at: int, number: signal.Signals = signal.SIGINT) -> Any:
    """A `watch` that presses Ctrl-C, or sends another signal, before the batch `at`, counted over all epochs."""
    count = 0

    def watch(batches: Any, description: str, total: int) -> Iterator[Any]:
        nonlocal count
        for batch in batches:
            if "epoch" in description:
                if count == at:
                    os.kill(os.getpid(), number)
                count += 1
            yield batch

    return watch


def test_processes_wait_for_each_others_interrupts_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they are asked at a step they answer during the next."""
    asked: list[bool] = []

    def anywhere(here: bool) -> bool:
        asked.append(here)
        return here

    monkeypatch.setattr(sys.modules["narrower.training.train"], "anywhere", anywhere)
    run(network())
    assert len(asked) == 1 + CONFIG.epochs


@pytest.mark.parametrize("at", [0, 7, 11, 17])  # first step, middle of an epoch, last step of an epoch, very last step
@pytest.mark.parametrize("options", [{}, {"amp": True, "channels_last": True, "smoothing": 0.1, "clip_grad": 1.0},
                                     {"model_ema": True, "model_ema_decay": 0.8},
                                     {"mixup": 0.8, "cutmix": 1.0, "reprob": 0.3, "grad_accum_steps": 2, "opt": "adamw",
                                      "opt_kwargs": {"eps": 1e-6}, "sched": "step", "decay_epochs": 1.0},
                                     {"amp": True, "amp_dtype": "float16", "torchcompile": "eager"}])
def test_resumed_is_uninterrupted(at: int, options: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, with dropout, augmentation and momentum; and each epoch is logged once."""
    config = replace(CONFIG, **options)
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background of a shell
    rows: list[dict[str, Any]] = []
    whole = run(network(), config=config, log=rows.append).state_dict()

    pieces: list[dict[str, Any]] = []
    file = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        run(network(), file, config, log=pieces.append, watch=interrupting(at))
    assert signal.getsignal(signal.SIGINT) is before
    torch.manual_seed(99)
    resumed = run(network(), file, config, log=pieces.append).state_dict()

    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    timeless = [[{k: v for k, v in row.items() if "second" not in k} for row in part] for part in (rows, pieces)]
    assert timeless[0] == timeless[1]


def test_the_best_epoch_is_that_with_the_lowest_loss_on_images_held_out(tmp_path: Path) -> None:
    """It is found alike by a run that was interrupted; the validation images have no say."""
    rows: list[dict[str, Any]] = []
    saved: list[dict[str, torch.Tensor]] = []
    model, file = network(), tmp_path / "checkpoint.pt"
    config = replace(CONFIG, epochs=5, lr=0.4, model_ema=False)

    def save() -> None:
        saved.append({key: t.clone() for key, t in model.state_dict().items()})

    whole = run(model, config=config, log=rows.append, best=save)
    assert whole is model
    losses = [row["held_loss"] for row in rows if "held_loss" in row]
    best = rows[-1]["best_epoch"]
    assert len(losses) == 5 and losses[best - 1] == min(losses) and rows[-1]["stage"] == "settle"
    assert len(saved) == sum(loss < min(losses[:k], default=9e9) for k, loss in enumerate(losses))
    other = network()
    other.load_state_dict(saved[-1])
    held = hold_out(data().train, config.held_out, 1)[1]
    assert held is not None
    assert evaluate(other, held, config, make_accelerator("cpu"))["loss"] == pytest.approx(min(losses))

    pieces: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        run(network(), file, config, log=pieces.append, watch=interrupting(24))
    run(network(), file, config, log=pieces.append)
    assert pieces[-1]["best_epoch"] == best


def test_images_held_out_are_not_trained_on() -> None:
    """Black ones, with wrong labels, in their place change their loss and no weight."""
    config, states, losses = replace(CONFIG, epochs=1, recalibrate=0, model_ema=False), [], []
    for spoiled in (False, True):
        images = data()
        assert isinstance(images.train, TensorImages)
        held = hold_out(replace(images.train, labels=torch.arange(90)), config.held_out, 1)[1]
        assert isinstance(held, TensorImages)
        if spoiled:
            images.train.images[held.labels] = 0
            images.train.labels[held.labels] = 1 - images.train.labels[held.labels]
        rows: list[dict[str, Any]] = []
        context = TrainContext(make_accelerator("cpu"), log=rows.append)
        states.append(train(network(), images, config, context, seed=1).state_dict())
        losses.append(rows[0]["held_loss"])
    assert losses[0] != losses[1]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_accumulated_batches_are_one_large_batch() -> None:
    """Also the last step of an epoch, of fewer batches: 90 images are 6 batches of 16, or 12 of 8."""

    def plain() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))

    config = replace(CONFIG, held_out=0, recalibrate=0)
    large, small = run(plain(), config=config), run(plain(), config=replace(config, batch_size=8, grad_accum_steps=2))
    for one, two in zip(large.parameters(), small.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-5)
    every = run(plain(), config=replace(config, batch_size=8))
    assert not torch.allclose(next(every.parameters()), next(large.parameters()), atol=1e-3)


def test_a_compiled_training_leaves_the_network_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    compile = torch.compile

    def noted(model: nn.Module, **kwargs: Any) -> Any:
        compiled.append((model, kwargs))
        return compile(model, **kwargs)

    monkeypatch.setattr(torch, "compile", noted)
    model = network()
    assert run(model, config=replace(CONFIG, epochs=1, torchcompile="eager")) is model
    assert [kwargs for _, kwargs in compiled] == [{"backend": "eager"}] and type(model) is nn.Sequential
    assert model.state_dict().keys() == network().state_dict().keys()


def test_each_of_many_trainings_in_a_process_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of `--schedule layer`, runs of `compare`. After eight networks of a class torch compiles no more."""
    seen, kept = list[nn.Module](), list[TrainLoop]()

    def backend(graph: nn.Module, _: Any) -> Any:
        seen.append(graph)
        return graph

    class Layer(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: compile(model, backend=backend))
    for width in range(1, 11):
        context = TrainContext(make_accelerator("cpu"))
        loop = TrainLoop(Layer(1, width, 3), data(), replace(CONFIG, torchcompile="eager"), context, 0, Methods())
        with torch._dynamo.config.patch(cache_size_limit=8):  # as it is, but one of timm's optimizers changes it
            loop.wrapped(torch.zeros(2, 1, 8, 8))
        kept.append(loop)  # torch forgets what it compiled of networks that are gone
        assert len(seen) == width


def test_mixed_targets_have_as_many_classes_as_the_network_has_outputs() -> None:
    wide = nn.Sequential(*network()[:-1], nn.Linear(144, 5))
    run(wide, config=replace(CONFIG, epochs=1, mixup=0.5))


def test_sigterm_saves_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(network(), tmp_path / "checkpoint.pt", watch=interrupting(2, signal.SIGTERM))
    assert (tmp_path / "checkpoint.pt").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    whole = run(network(), file).state_dict()
    again = run(network(), file).state_dict()
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_of_other_settings_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    run(network(), file, replace(CONFIG, epochs=1))
    with pytest.raises(ConfigError, match="batch_size was 16, is 8"):
        run(network(), file, replace(CONFIG, batch_size=8))
    content = file.read_bytes()
    with pytest.raises(StorageError, match="cannot go on"):
        run(nn.Linear(3, 3), file)
    assert file.read_bytes() == content
    file.write_bytes(content[:1000])
    with pytest.raises(StorageError, match="cannot go on"):
        run(network(), file)


def test_a_loss_that_explodes_is_an_error_and_nothing_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train has diverged: the loss is .* in epoch 1; try a lower --lr"):
        run(network(), tmp_path / "checkpoint.pt", replace(CONFIG, lr=1e30))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_loss_that_is_finite_but_absurd_is_an_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[TrainContext.__module__], "DIVERGED", 1e-3)  # the package has a function of that name
    with pytest.raises(ConfigError, match=r"train has diverged: the loss is 0\.\d+ in epoch 1"):
        run(network(), tmp_path / "checkpoint.pt")
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_training_goes_on_with_more_epochs_not_with_fewer(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    rows: list[dict[str, Any]] = []
    run(network(), file, replace(CONFIG, epochs=2))
    with pytest.raises(ConfigError, match="is of epoch 2: --epochs 1 has passed already"):
        run(network(), file, replace(CONFIG, epochs=1))
    run(network(), file, replace(CONFIG, epochs=3), log=rows.append)
    assert [row["epoch"] for row in rows if "epoch" in row][-1] == 3


def test_distillation_draws_the_network_to_its_teacher(tmp_path: Path) -> None:
    """With weight 1 labels do not count: wrong ones change nothing. Resumed is uninterrupted here too."""
    teacher = run(network())
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    wrong = data()
    wrong.train.labels.copy_(1 - wrong.train.labels)  # type: ignore[union-attr]

    def distilled(images: ImageData, file: Path | None = None, **kwargs: Any) -> nn.Module:
        student = network()
        context = TrainContext(make_accelerator("cpu"), checkpoint=file, **kwargs)
        return train(student, images, replace(CONFIG, held_out=0), context, seed=1,
                     methods=Methods(distillation=Distillation(teacher, student, weight=1.0)))

    whole = distilled(data())
    x = torch.stack([data().val[k][0] for k in range(90)])
    agree = (whole.eval()(x).argmax(1) == teacher.eval()(x).argmax(1)).float().mean()
    assert agree > 0.9
    other = distilled(wrong)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in whole.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    with pytest.raises(KeyboardInterrupt):
        distilled(data(), tmp_path / "checkpoint.pt", watch=interrupting(7))
    resumed = distilled(data(), tmp_path / "checkpoint.pt")
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


@pytest.mark.parametrize("interrupt", [None, 3, 11])
def test_a_training_that_ruins_a_network_leaves_it_as_it_was(interrupt: int | None, tmp_path: Path) -> None:
    """The loss of the epochs tells what happened. Resumed, what was before is that of the first sitting."""
    model, file, rows = run(network()), tmp_path / "checkpoint.pt", list[Any]()
    before = copy.deepcopy(model.state_dict())
    ruinous = replace(CONFIG, lr=5.0, epochs=2, recalibrate=0)
    if interrupt:
        with pytest.raises(KeyboardInterrupt):
            run(model, file, ruinous, watch=interrupting(interrupt))
        assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])
        model = network()
    run(model, file, ruinous, log=rows.append)
    settled = rows[-1]
    assert settled["kept"] == BEGAN and settled["losses"][BEGAN] < settled["losses"][TRAINED]
    assert "the network stays as it was; give a lower --lr" in settled["text"]
    assert settled["top1"] == evaluate(model, data().val, accelerator=make_accelerator("cpu"))["top1"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_average_of_weights_is_no_match_for_resrep() -> None:
    model = network()
    resrep = narrower.ResRep(model, narrower.trace(model, torch.zeros(1, 1, 8, 8)), macs=0.5, steps=10)
    with pytest.raises(ConfigError, match="--model-ema: the network becomes narrower"):
        train(model, data(), replace(CONFIG, model_ema=True), methods=Methods(resrep=resrep))


def test_an_average_of_weights_needs_images_that_decide() -> None:
    with pytest.raises(ConfigError, match="--model-ema with --held-out 0"):
        replace(CONFIG, model_ema=True, held_out=0)
    with pytest.raises(ConfigError, match="--model-ema: of 19 training images none are held out"):
        train(network(), data(19), replace(CONFIG, model_ema=True))


@pytest.mark.parametrize("torchcompile", [None, "eager"])
def test_a_network_is_compiled_anew_after_a_shrink(torchcompile: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled for other shapes counts towards a limit, after which torch compiles no more."""
    model, widths = network(), list[Any]()
    resrep = narrower.ResRep(model, narrower.trace(model, torch.zeros(1, 1, 8, 8)), macs=0.5, steps=10)
    config = replace(CONFIG, torchcompile=torchcompile)
    loop = TrainLoop(model, data(), config, TrainContext(make_accelerator("cpu")), 0, Methods(resrep=resrep))
    monkeypatch.setattr(torch.compiler, "reset", lambda: widths.append(model[0].out_channels))
    loop.shrink()  # nothing is zero yet
    (compactor,) = resrep.compactors().values()
    with torch.no_grad():
        compactor.weight[0], compactor.gone[0] = 0, 1
    loop.shrink()
    assert model[0].out_channels == 3 and widths == ([3] if torchcompile else [])
