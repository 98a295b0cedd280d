"""The Trainer of Hugging Face transformers: ResRep on a timm network, by a TrainerCallback. Random images stand in for data.

    pip install -e '.[examples]' && python examples/huggingface_trainer.py
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import narrower


class Classifier(nn.Module):
    """What the Trainer wants of a network: keyword arguments in, a dict with the loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("resnet10t", num_classes=4)  # in earnest: pretrained=True

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Images(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, number: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(number)
        return {"pixel_values": torch.randn(3, 32, 32, generator=g), "labels": number % 4}


class NarrowingCallback(TrainerCallback):
    """Keeps ResRep's state beside the Trainer's checkpoints, and shows its progress."""

    def __init__(self, resrep: narrower.ResRep) -> None:
        self.resrep = resrep

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            torch.save(self.resrep.state_dict(), Path(args.output_dir) / f"checkpoint-{state.global_step}" / "resrep.pt")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(self.resrep)


def main(folder: str | Path | None = None, epochs: int = 2, stop_after: int = -1) -> nn.Module | None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        args = TrainingArguments(output_dir=str(folder or temporary), num_train_epochs=epochs, per_device_train_batch_size=8,
                                 learning_rate=0.02, save_strategy="epoch", report_to="none", use_cpu=True,
                                 disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False)
        model, data = Classifier(), Images()
        # Trace the bare network, before the Trainer wraps anything. The compactors go in, then the optimizer is made.
        graph = narrower.trace(model.net, torch.randn(2, 3, 32, 32))
        steps = epochs * math.ceil(len(data) / args.train_batch_size)
        resrep = narrower.ResRep(model.net, graph, macs=0.7, steps=steps)
        optimizer = torch.optim.SGD(resrep.param_groups(lr=args.learning_rate, momentum=0.9, weight_decay=1e-4))
        resrep.attach(optimizer)
        # Going on after an interruption: ResRep's state comes first, then the Trainer loads weights and optimizer.
        last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        if last is not None:
            resrep.load_state_dict(torch.load(Path(last) / "resrep.pt", weights_only=True))
        callbacks: list[TrainerCallback] = [NarrowingCallback(resrep)]
        if stop_after > 0:
            callbacks.append(StopAfter(stop_after))
        trainer = Trainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=last)
        return None if stop_after > 0 else resrep.merge()


class StopAfter(TrainerCallback):
    """An interruption, for show."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = round(state.epoch) >= self.epoch


if __name__ == "__main__":
    main()
