"""The recorder: the calls of a forward, with numbers for activations and names for the tensors of the model."""

from __future__ import annotations

import pytest
import torch
from support.networks import IMAGES, Branching, Plain
from torch import Tensor, nn

import narrower
from narrower.surgery.copying import stage
from narrower.tracing.constraints import ConstraintCollector
from narrower.tracing.interpreter import run_forward
from narrower.tracing.labels import Axes
from narrower.tracing.recorder import NUMBER, Recorder, Unseen


def test_a_recorder_records_what_a_collector_records() -> None:
    copied = stage(Plain(), IMAGES, "meta")
    recorder, collector = Recorder(copied.model, Axes()), ConstraintCollector(copied.model, Axes(), {})
    for mode in (recorder, collector):
        run_forward(copied.model, copied.inputs, mode)
    assert recorder.steps == [s._replace(labelled=False) for s in collector.steps] and len(recorder.steps) > 10
    assert recorder.steps[0].inputs[1:3] == ("conv1.weight", "conv1.bias") and recorder.steps[0].name == "convolution"


def test_numbers_of_an_earlier_trace_mean_nothing_in_the_next() -> None:
    """Example inputs keep them: the first activation would have the number of the image."""
    copied, steps = stage(Plain(), IMAGES, "meta"), []
    for _ in range(2):
        recorder = Recorder(copied.model, Axes())
        run_forward(copied.model, copied.inputs, recorder)
        steps.append(recorder.steps)
    assert steps[0] == steps[1] and steps[0][0].inputs[0] not in steps[0][0].outputs


def test_what_a_forward_wrote_into_its_inputs_is_not_there_in_the_next() -> None:
    class Writes(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.add_(super().forward(x))

    copied = stage(Writes(3, 3, 1), IMAGES, "meta")
    counts = []
    for _ in range(2):
        axes = Axes()
        collector = ConstraintCollector(copied.model, axes, {})
        run_forward(copied.model, copied.inputs, collector)
        counts.append((axes.total, [a.tolist() for pair in collector.pairs for a in pair]))
    assert counts[0] == counts[1]


def test_no_activation_has_the_number_of_another() -> None:
    """Also where the network is traced anew, under another assumption for a view that splits channels."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 6), nn.ReLU(),
                          nn.Linear(6, 12 * 16), nn.Unflatten(1, (12, 4, 4)), nn.ConvTranspose2d(12, 3, 2))
    seen: set[int] = set()
    for step in narrower.trace(model, IMAGES).steps:
        seen |= {i for i in step.inputs if isinstance(i, int)}
        assert not seen & set(step.outputs), step
        seen |= set(step.outputs)
    assert len(seen) > 12


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
