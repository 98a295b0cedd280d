"""What is kept at the end: the best on images that nothing was trained on."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("accelerate")
from support.training import CONFIG, data, network, run
from torch import nn

from narrower.data.images import TensorImages, hold_out
from narrower.training.accelerator import make_accelerator
from narrower.training.evaluate import evaluate
from narrower.training.settle import AVERAGE, BEGAN, TRAINED, settle

FIT, HELD = hold_out(data(200).train, 1000, 0)
CPU = make_accelerator("cpu")


def trained() -> nn.Module:
    return run(network(), config=replace(CONFIG, held_out=0))


def spoiled(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None:
            m.running_mean += 3
    return model


def test_stale_statistics_are_renewed() -> None:
    assert HELD is not None
    model = spoiled(trained())
    before = evaluate(model, HELD, CONFIG, CPU)["loss"]
    found = settle(model, FIT, HELD, CONFIG, CPU)
    assert found.changed and found.kept == f"{TRAINED}, BatchNorm renewed"
    after = evaluate(model, HELD, CONFIG, CPU)["loss"]
    assert after == pytest.approx(found.losses[found.kept]) and after < 0.5 * before


def test_statistics_that_are_better_stay_bit_for_bit() -> None:
    """Renewed from other images, they are worse."""
    assert HELD is not None
    model = trained()
    before = copy.deepcopy(model.state_dict())
    assert isinstance(FIT, TensorImages)
    loud = replace(FIT, images=255 * (FIT.images % 2))
    found = settle(model, loud, HELD, CONFIG, CPU)
    assert found.kept == TRAINED and len(found.losses) == 2
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_difference_within_chance_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Module `settle` is hidden by its function of the same name."""
    assert HELD is not None
    for loss, kept in ((0.97, False), (0.9, True)):
        losses = iter([1.0, loss])
        monkeypatch.setattr(sys.modules["narrower.training.settle"], "evaluate", lambda *_, found=losses: {"loss": next(found)})
        assert settle(trained(), FIT, HELD, CONFIG, CPU).changed == kept


def test_an_interruption_leaves_the_values_as_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    assert HELD is not None
    model, average = spoiled(trained()), trained()
    before = copy.deepcopy(model.state_dict())
    losses = iter([1.0, 1.0, 1.0])
    others = {AVERAGE: dict(average.state_dict())}

    def interrupted(*_: object) -> dict[str, float]:
        try:
            return {"loss": next(losses)}
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(sys.modules["narrower.training.settle"], "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        settle(model, FIT, HELD, CONFIG, CPU, others=others)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_average_of_weights_is_taken_if_it_is_better() -> None:
    assert HELD is not None
    good, bad = trained(), spoiled(trained())
    bad[0].weight.data.zero_()  # type: ignore[index]
    want = {k: v.clone() for k, v in good.state_dict().items()}
    found = settle(bad, FIT, HELD, replace(CONFIG, recalibrate=0), CPU, others={AVERAGE: dict(good.state_dict())})
    assert found.kept == AVERAGE
    assert all(torch.equal(v, want[k]) for k, v in bad.state_dict().items())


@pytest.mark.parametrize(("loss", "top1", "kept"), [
    (0.9, 70.0, BEGAN), (0.9, 71.0, BEGAN), (0.97, 80.0, TRAINED), (0.5, 69.0, TRAINED),
])
def test_what_was_before_comes_back_if_its_loss_is_clearly_lower_and_its_headline_no_lower(
    loss: float, top1: float, kept: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """BatchNorm statistics of it are not renewed: it was repaired or trained with those that it has."""
    assert HELD is not None
    model, before = trained(), spoiled(trained())
    found = iter([{"top1": 70.0, "loss": 1.0}, {"top1": top1, "loss": loss}])
    monkeypatch.setattr(sys.modules["narrower.training.settle"], "evaluate", lambda *_: next(found))
    want = {k: v.clone() for k, v in (before if kept == BEGAN else model).state_dict().items()}
    settled = settle(model, FIT, HELD, replace(CONFIG, recalibrate=0), CPU, others={BEGAN: dict(before.state_dict())})
    assert settled.kept == kept and [*settled.losses] == [TRAINED, BEGAN]
    assert all(torch.equal(v, want[k]) for k, v in model.state_dict().items())


def test_what_was_before_does_not_win_over_a_higher_headline_with_renewed_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    assert HELD is not None
    model, before = trained(), dict(spoiled(trained()).state_dict())
    found = iter([{"top1": 70.0, "loss": 1.0}, {"top1": 75.0, "loss": 0.9}, {"top1": 74.0, "loss": 0.5}])
    monkeypatch.setattr(sys.modules["narrower.training.settle"], "evaluate", lambda *_: next(found))
    settled = settle(model, FIT, HELD, CONFIG, CPU, others={BEGAN: before})
    assert settled.kept == f"{TRAINED}, BatchNorm renewed" and len(settled.losses) == 3


def test_held_out_images_are_no_training_images() -> None:
    images = data(200).train
    fit, held = hold_out(images, 1000, 3)
    assert held is not None and (len(fit), len(held)) == (190, 10)
    assert hold_out(images, 1000, 3)[1].labels.equal(held.labels)  # type: ignore[union-attr]
    pixels = {bytes(x.numpy().tobytes()) for x in fit.images}  # type: ignore[union-attr]
    assert not pixels & {bytes(x.numpy().tobytes()) for x in held.images}  # type: ignore[union-attr]
    assert hold_out(images, 0, 3) == (images, None)
    assert hold_out(data(19).train, 10, 3)[1] is None
