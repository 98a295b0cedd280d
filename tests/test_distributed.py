"""ResRep in two processes (gloo): the same as both shards' gradients averaged by hand in one process."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import networks
from support.processes import in_two
from support.resrep_training import randomised, sgd
from torch import Tensor, nn

import narrower
from narrower.models.resnet import CifarResNet

STEPS, SHRINK = 24, 15


def network() -> tuple[narrower.ResRep, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = randomised(CifarResNet(1, 5)).double()
    resrep = narrower.ResRep(model, narrower.trace(model, shard(0, 0)[0]), macs=0.5, steps=STEPS)
    return resrep, sgd(resrep)


def shard(step: int, rank: int) -> tuple[Tensor, Tensor]:
    seed = 2 * step + rank
    g = torch.Generator().manual_seed(seed)
    return networks.images(size=12, seed=seed).double(), torch.randint(0, 5, (4,), generator=g)


def train(rank: int) -> dict[str, np.ndarray]:
    """What one of two processes has after a training on its shards."""
    dist.init_process_group("gloo")
    resrep, optimizer = network()
    wrapped = nn.parallel.DistributedDataParallel(resrep.model)
    for step in range(STEPS):
        x, y = shard(step, rank)
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        if step == SHRINK:
            resrep.shrink()
            wrapped = nn.parallel.DistributedDataParallel(resrep.model)
    dist.destroy_process_group()
    return {name: t.numpy() for name, t in resrep.model.state_dict().items()}


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_two_processes_are_two_shards_averaged() -> None:
    states = [{name: torch.as_tensor(t) for name, t in state.items()} for state in in_two(train)]
    resrep, optimizer = network()
    for step in range(STEPS):
        other = copy.deepcopy(resrep.model)  # the second process starts from the first one's buffers
        optimizer.zero_grad()
        for model, rank in ((resrep.model, 0), (other, 1)):
            x, y = shard(step, rank)
            nn.functional.cross_entropy(model(x), y).backward()
        for p, q in zip(resrep.model.parameters(), other.parameters(), strict=True):
            if p.grad is not None and q.grad is not None:  # a merged compactor has none
                p.grad = (p.grad + q.grad) / 2
        optimizer.step()
        if step == SHRINK:
            resrep.shrink()
    mine = resrep.model.state_dict()
    assert resrep.progress()["zero"] > 10
    for name, tensor in mine.items():
        assert tensor.shape == states[0][name].shape
        if name.endswith(("chosen", "gone")):
            assert torch.equal(tensor, states[0][name])
            assert torch.equal(tensor, states[1][name])
        elif name in dict(resrep.model.named_parameters()):
            for state in states:
                torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-9)
