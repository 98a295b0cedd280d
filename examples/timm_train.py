"""timm's pieces around ResRep: create_optimizer_v2, create_scheduler_v2, Mixup, ModelEmaV3. Random images stand in for data."""

from __future__ import annotations

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

import narrower

CLASSES, EPOCHS, UPDATES = 4, 2, 5


def main() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=CLASSES)  # in earnest: pretrained=True
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(CLASSES, (8,))) for _ in range(UPDATES)]
    dense_macs = narrower.measure(model, batches[0][0][:1])["macs"]

    # The compactors go in first: the optimizer, the scheduler and the average are made of a model that has them.
    graph = narrower.trace(model, batches[0][0][:2])
    resrep = narrower.ResRep(model, graph, macs=0.7, steps=EPOCHS * UPDATES)
    # timm's weight decay is the network's: the compactors' group has its own, which is zero.
    optimizer = create_optimizer_v2(resrep.param_groups(lr=0.02, momentum=0.9), opt="sgd", momentum=0.9, lr=0.02,
                                    weight_decay=5e-5)
    resrep.attach(optimizer)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS, updates_per_epoch=UPDATES,
                                            step_on_epochs=False)
    average = ModelEmaV3(model, decay=0.99)
    mixup, loss_of = Mixup(mixup_alpha=0.2, num_classes=CLASSES), SoftTargetCrossEntropy()

    for epoch in range(epochs):
        model.train()
        for number, batch in enumerate(batches):
            images, targets = mixup(*batch)
            loss_of(model(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            updates = epoch * UPDATES + number + 1
            average.update(model, step=updates)
            scheduler.step_update(updates)  # timm's schedulers multiply by the group's lr_scale
        resrep.shrink(ema=[average.module])  # the average loses the same channels, and the optimizer's state is cut along
        print(resrep)

    small, small_average = resrep.merge(), resrep.merge(average.module)
    for name, network in (("trained", small), ("averaged", small_average)):
        macs = narrower.measure(network, batches[0][0][:1])["macs"]
        print(f"{name}: multiply-adds {dense_macs:,.0f} -> {macs:,.0f}")
    return small, small_average


if __name__ == "__main__":
    main()
