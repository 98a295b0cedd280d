"""Modules and tensors by name, and modes that are put back."""

from __future__ import annotations

import pytest
import torch
from support import networks
from support.networks import Plain

from narrower.surgery.walk import in_eval_mode, modules_of, named_tensors, outer_modes_off


def test_named_tensors_have_every_name_of_a_tied_one() -> None:
    model = networks.Shared()
    found = named_tensors(model)
    assert found["left.weight"] is found["right.weight"] and "bn1.running_mean" in found
    assert set(found) == set(model.state_dict())


def test_modules_are_those_of_torch_under_every_name() -> None:
    model = Plain()
    model.alias = model.conv2
    assert modules_of(model) == list(model.named_modules(remove_duplicate=False))


def test_modes_come_back_after_an_error() -> None:
    model = Plain().train()
    model.bn3.eval()
    with pytest.raises(KeyError), in_eval_mode(model):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert model.training and model.conv1.training and not model.bn3.training


def test_the_modes_of_the_caller_are_off_inside_and_come_back() -> None:
    x = torch.ones(2, 2)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        with outer_modes_off():
            y = x @ x
            assert torch.is_grad_enabled() and not y.is_inference() and y.dtype == torch.float32
        z = x @ x
    assert z.is_inference() and z.dtype == torch.bfloat16
