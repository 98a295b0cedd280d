"""The recorder: the calls of a forward, with numbers for activations and names for the tensors of the model."""

from __future__ import annotations

import pytest
import torch
from support.networks import IMAGES, Branching, Plain
from torch import Tensor, nn

from narrower.surgery.copying import stage
from narrower.tracing.constraints import ConstraintCollector
from narrower.tracing.interpreter import run_forward
from narrower.tracing.labels import Axes
from narrower.tracing.recorder import NUMBER, Recorder, Unseen


def test_a_recorder_records_what_a_collector_records() -> None:
    copied = stage(Plain(), IMAGES, "meta")
    recorder, collector = Recorder(copied.model, Axes()), ConstraintCollector(copied.model, Axes(), {})
    for mode in (recorder, collector):
        copied.inputs.__dict__.clear()
        run_forward(copied.model, copied.inputs, mode)
    assert recorder.steps == [s._replace(labelled=False) for s in collector.steps] and len(recorder.steps) > 10
    assert recorder.steps[0].inputs[1:3] == ("conv1.weight", "conv1.bias") and recorder.steps[0].name == "convolution"


def test_answers_are_given_in_their_order_and_no_others() -> None:
    copied = stage(Branching(), IMAGES, "real")
    run_forward(copied.model, copied.inputs, Recorder(copied.model, Axes(), [0.5]))
    with pytest.raises(Unseen):
        run_forward(copied.model, copied.inputs, Recorder(copied.model, Axes(), []))


def test_a_weight_that_a_forward_wrote_into_has_its_name_again_in_the_next() -> None:
    class Writes(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.mul_(2)
            return super().forward(x)

    copied = stage(Writes(3, 4, 1), IMAGES, "meta")
    for _ in range(2):
        recorder = Recorder(copied.model, Axes())
        run_forward(copied.model, copied.inputs, recorder)
        assert recorder.steps[0].inputs[0] == "weight" and hasattr(copied.model.weight, NUMBER)
    assert torch.equal(IMAGES, stage(Writes(3, 4, 1), IMAGES, "real").inputs)
