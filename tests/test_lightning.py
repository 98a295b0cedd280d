"""The Lightning callback: a fit ends with the narrow network, and a resumed fit is the uninterrupted one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.networks import Head, unit
from torch import nn

import narrower

lightning = pytest.importorskip("lightning.pytorch", reason="needs the extra examples")
tools = pytest.importorskip("narrower.lightning")
X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 5
EPOCHS = 4
NETWORK = "parts.net"  # of the module below


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(unit(3, 12), unit(12, 10, stride=2), unit(10, 8), Head(8))


class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined, unused-ignore]
    """The network lies deeper, and a parameter of the module is no part of it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.parts, self.scale = nn.ModuleDict({"net": net}), nn.Parameter(torch.ones(5))
        self.loaded: list[int] = []

    @property
    def net(self) -> nn.Module:
        return self.parts["net"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded.append(checkpoint["epoch"])

    def training_step(self, batch: Any, number: int) -> Any:
        out = self.scale * self.net(batch[0])
        return tools.distilled(self, batch, out, nn.functional.cross_entropy(out, batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(tools.param_groups(self, lr=0.05, momentum=0.9, weight_decay=1e-4))


def resrep(net: nn.Module, trainer: Any) -> narrower.ResRep:
    return narrower.ResRep(net, narrower.trace(net, X[:1]), macs=0.6, steps=int(trainer.estimated_stepping_batches))


def soft(net: nn.Module, trainer: Any) -> narrower.SoftPruning:
    return narrower.SoftPruning(net, narrower.trace(net, X[:1]), macs=0.6, steps=trainer.max_epochs)


class Stop(lightning.Callback):  # type: ignore[misc, name-defined, unused-ignore]
    """Save a checkpoint after some epochs and leave."""

    def __init__(self, path: Path, epochs: int) -> None:
        self.path, self.epochs = path, epochs

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch + 1 == self.epochs:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def fit(narrowing: Any, *others: Any, net: nn.Module | None = None, checkpoint: Path | None = None) -> Any:
    module = Classifier(net or network())
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4)
    trainer = lightning.Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                                enable_progress_bar=False, enable_model_summary=False, callbacks=[narrowing, *others])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data, ckpt_path=checkpoint)
    return module


@pytest.mark.parametrize("make", [resrep, soft])
def test_a_fit_ends_with_the_narrow_network(make: Callable[..., Any], tmp_path: Path) -> None:
    narrowing = tools.Narrowing(make, network=NETWORK, output=tmp_path / "out")
    module = fit(narrowing)
    assert module.net is narrowing.small and narrowing.method.model is not module.net
    assert narrowing.method.optimizer is module.trainer.optimizers[0] and not module.scale.equal(torch.ones(5))
    logged = {name.removeprefix("narrowing/"): float(value) for name, value in module.trainer.callback_metrics.items()}
    assert logged == pytest.approx(narrowing.method.progress(), rel=1e-6)
    assert narrower.measure(module.net, X[:1])["macs"] <= 0.6 * narrower.measure(network(), X[:1])["macs"]
    trained = narrowing.method.model.eval()
    assert torch.allclose(trained(X), module.net.eval()(X), atol=1e-4)
    again = narrower.load(tmp_path / "out", network).eval()
    assert torch.equal(again(X), module.net(X))
    assert "on_load_checkpoint" not in vars(module)


@pytest.mark.parametrize("epochs", [EPOCHS, 2])
def test_a_fit_is_over_after_its_steps_also_if_a_scaler_has_skipped_some(
    epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    merge, over = narrower.ResRep.merge, []

    def noted(self: narrower.ResRep, **options: Any) -> nn.Module:
        self.step -= 2
        over.append(options["over"])
        return merge(self, **options)

    monkeypatch.setattr(narrower.ResRep, "merge", noted)
    fit(tools.Narrowing(resrep, network=NETWORK), Stop(tmp_path / "some.ckpt", epochs))
    assert over == [epochs == EPOCHS]


@pytest.mark.parametrize(("make", "shrink"), [(resrep, True), (soft, False)])
def test_a_resumed_fit_is_the_uninterrupted_one(make: Callable[..., Any], shrink: bool, tmp_path: Path) -> None:
    def narrowing() -> Any:
        return tools.Narrowing(make, network=NETWORK, shrink=shrink)

    whole = fit(narrowing())
    fit(narrowing(), Stop(tmp_path / "half.ckpt", EPOCHS - 1))
    half = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    dense = Classifier(network()).state_dict()
    assert any(half[name].numel() < t.numel() for name, t in dense.items() if name in half) == shrink
    resumed = fit(narrowing(), checkpoint=tmp_path / "half.ckpt")
    assert resumed.loaded == [EPOCHS - 2] and whole.loaded == []
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_the_loss_is_that_of_distillation_if_there_is_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = network().eval()
    graph = narrower.trace(dense, X[:1])
    small = narrower.narrow(dense, narrower.plan(graph, narrower.magnitude(dense, graph), macs=0.6))
    narrowing, closed = tools.Narrowing(teacher=dense, network=NETWORK, weight=0.7), list[Any]()
    monkeypatch.setattr(narrower.Distillation, "close", lambda self: closed.append(self))
    module, before = fit(narrowing, net=small), copy.deepcopy(dense.state_dict())
    out = module.net.eval()(X)
    task = nn.functional.cross_entropy(out, Y)
    loss = tools.distilled(module, (X, Y), out, task)
    assert loss == narrower.Distillation(dense, small, weight=0.7).loss(X, out, task) != task
    assert closed == [narrowing.distillation]
    assert module.net is small is narrowing.small and not any("teacher" in key for key in module.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


def test_the_module_trains_without_the_callback_too(tmp_path: Path) -> None:
    module = fit(Stop(tmp_path / "plain.ckpt", 1))
    (group,) = module.trainer.optimizers[0].param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.9, 1e-4)
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}
    with pytest.raises(narrower.ConfigError, match="no state of Narrowing"):
        fit(tools.Narrowing(soft, network=NETWORK), checkpoint=tmp_path / "plain.ckpt")


@pytest.mark.parametrize(("make", "decays"), [(soft, [0.3]), (resrep, [0.3, 0.0])])
def test_what_is_not_given_to_the_groups_is_the_optimizers_own(make: Callable[..., Any], decays: list[float]) -> None:
    module, narrowing = Classifier(network()), tools.Narrowing(make, network=NETWORK)
    trainer: Any = SimpleNamespace(world_size=1, max_epochs=EPOCHS, estimated_stepping_batches=9, callbacks=[narrowing])
    module._trainer = trainer
    narrowing.setup(trainer, module, "fit")
    optimizer = torch.optim.SGD(tools.param_groups(module, lr=0.05), momentum=0.8, weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == decays
    assert optimizer.param_groups[0]["momentum"] == 0.8


def test_what_does_not_go_together_is_refused_and_other_stages_make_nothing() -> None:
    with pytest.raises(narrower.ConfigError, match="needs make=, teacher= or both"):
        tools.Narrowing()
    module, narrowing = Classifier(network()), tools.Narrowing(soft, network=NETWORK, shrink=True)
    narrowing.setup(SimpleNamespace(world_size=2), module, "validate")
    assert narrowing.method is None and narrowing.state_dict() == {}
    with pytest.raises(narrower.ConfigError, match="DistributedDataParallel does not follow"):
        narrowing.setup(SimpleNamespace(world_size=2), module, "fit")
    trainer = SimpleNamespace(world_size=1, max_epochs=EPOCHS, optimizers=[None, None])
    narrowing.setup(trainer, module, "fit")
    with pytest.raises(narrower.ConfigError, match="works with one optimizer, and this module has 2"):
        narrowing.on_fit_start(trainer, module)
