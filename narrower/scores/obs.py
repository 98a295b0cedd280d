"""obs: what cannot be repaired when a channel goes (optimal brain surgeon on channels)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.types import ChannelGroup, Graph, Scores
from ..preconditions import checked
from ..repair.held_out import checked_inputs
from ..repair.patches import as_matrix
from ..repair.readers import images_wanted, input_counts
from ..repair.second_moments import SecondMoments, ridge_factor, second_moments
from ..surgery.copying import independent_copy, same_tensors, where_float64_is
from ..surgery.walk import in_eval_mode, named_tensors, outer_modes_off
from .weights import magnitude

SAMPLES_PER_INPUT = 10  # from few samples, errors look smaller than they are
PORTION = 16  # one in so many of the channels left goes at a time
LEAST_VARIANCE = 1e-20  # a layer whose output varies less has nothing to lose


@checked
@outer_modes_off()
@torch.no_grad()
def obs(model: nn.Module, graph: Graph, batches: Iterable[Any], *, images: int | None = None) -> Scores:
    """The error that is left when a channel and all cheaper ones go and the other weights are repaired optimally.

    Hassibi et al., "Optimal Brain Surgeon and General Network Pruning" (ICNN 1993), for all inputs that belong to a channel, as
    Frantar and Alistarh, "Optimal Brain Compression" (NeurIPS 2022), do it for blocks of weights.

    Each group alone loses its channels, the cheapest first: those that the layers which read them can best make up for, by new
    weights for their other inputs and an intercept. The score of a channel is the error when it goes: the squared error of a
    layer's output, relative to the variance of its dense output, summed over the layers that read the group. A layer that has
    lost all inputs adds one. Costs are computed anew whenever a sixteenth of the remaining channels has gone. Of channels with
    equal scores, the one with the lower index is removed first.

    Only convolutions and linear layers count that use a parameter as it is and have no more than 12,288 inputs. A group that
    none of them reads gets its L2 magnitude. One forward pass collects the second moments of what all layers read, at random
    positions where a layer has more of them than it needs.

    `batches` gives what the model takes, or pairs whose first part is; no labels are needed. All of them are used, or the first
    `images` samples. Raises DataError if there are none, for batches without tensors or of several shapes, or if an activation
    is not finite, PlanError if the model is not the one that was traced.
    """
    same_tensors(model, graph)
    model = where_float64_is(model)
    counts = input_counts(graph)
    inputs = checked_inputs("obs", batches, model, images, 1, images_wanted(graph, counts))
    copy = independent_copy(model)  # layers are told apart by memory
    with in_eval_mode(copy):
        moments = second_moments(copy, counts, inputs, SAMPLES_PER_INPUT)
    named = named_tensors(model)
    layers = {name: layer_of(named[name].detach(), moments.pop(name)) for name in list(moments)}
    found = {g.name: removal_errors(reads, g.size) for g in graph.free if (reads := reads_of(g, layers))}
    return Scores({**({} if len(found) == len(graph.free) else magnitude(model, graph)), **found})


class Layer(NamedTuple):
    """A layer that reads channels, with `I` inputs in each of `G` conv groups.

    `inverse` `(G, I, I)`: the inverse of the inputs' second moments, an intercept allowed for. `weight` `(G, O, I)`: divided by
    the root of the variance of the output. `taps`: how many inputs one position along the weight's channels has.
    """

    inverse: Tensor
    weight: Tensor
    taps: int


def layer_of(weight: Tensor, m: SecondMoments) -> Layer:
    """From a layer's weight and the second moments of what it reads."""
    h, w = m.mean.double(), as_matrix(weight, m.geometry).double()
    inverse = torch.stack([torch.cholesky_inverse(ridge_factor(block))[1:, 1:] for block in h])
    covariance = h[:, 1:, 1:] - h[:, 1:, :1] * h[:, :1, 1:]
    variance = ((w @ covariance) * w).sum()
    scaled = w / variance.sqrt() if variance > LEAST_VARIANCE else torch.zeros_like(w)
    return Layer(inverse, scaled, prod(m.geometry.kernel))


class Read(NamedTuple):
    """What one layer, or one group of a grouped convolution, still reads of a channel group: `n` of its inputs.

    `inverse` `(n, n)`: their rows and columns in the inverse second moments of all inputs left. `weight` `(O, n)`: the repaired
    weights. `channel` `(n,)`: the channel that each input belongs to.
    """

    inverse: Tensor
    weight: Tensor
    channel: Tensor


def reads_of(group: ChannelGroup, layers: Mapping[str, Layer]) -> list[Read]:
    """Everything that reads the channels of a group."""
    found = []
    for name in dict.fromkeys(s.tensor for s in group.slices if s.reads and s.tensor in layers):
        inverse, weight, taps = layers[name]
        owner = np.full(len(weight) * weight.shape[2] // taps, -1)
        for s in group.slices:
            if s.tensor == name and s.reads:
                owner[s.positions] = s.channels
        for k, channels in enumerate(np.repeat(owner, taps).reshape(len(weight), -1)):
            own = torch.as_tensor(np.nonzero(channels >= 0)[0], device=weight.device)
            if len(own):
                channel = torch.as_tensor(channels, device=weight.device)[own]
                found.append(Read(inverse[k][own][:, own], weight[k][:, own], channel))
    return found


def costs(read: Read, size: int) -> Tensor:
    """By how much the error grows when each channel alone goes, the others repaired. Shape `(size,)`, zero without inputs.

    With the inputs S of a channel, the weights W and the inverse A: trace(W_S (A_SS)^-1 W_S^T).
    """
    counts = torch.bincount(read.channel, minlength=size)
    order, place = read.channel.argsort(stable=True), torch.arange(int(counts.max()), device=counts.device)
    inside = place < counts[:, None]  # (size, most inputs): channels with fewer inputs are filled up with the identity
    index = torch.zeros_like(inside, dtype=torch.long)
    index[inside] = order
    blocks = read.inverse[index[:, :, None], index[:, None, :]] * (inside[:, :, None] & inside[:, None, :])
    factor = torch.linalg.cholesky(blocks + torch.diag_embed((~inside).to(blocks.dtype)))
    w = read.weight.T[index] * inside[..., None]
    return torch.linalg.solve_triangular(factor, w, upper=False).square().sum((1, 2))


def without(read: Read, channels: Tensor, size: int) -> tuple[Tensor, Read]:
    """By how much the error grows as each of `channels` goes, in this order, `(size,)`; and what is read then.

    With A_SS = L L^T, the square of row k of L^-1 W_S^T is what input k adds: the rows before are those of the inputs before.
    """
    rank = torch.full((size,), len(channels), device=channels.device)
    rank[channels] = torch.arange(len(channels), device=channels.device)
    order = rank[read.channel].argsort(stable=True)
    count = int((rank[read.channel] < len(channels)).sum())
    gone, stay = order[:count], order[count:]
    factor = torch.linalg.cholesky(read.inverse[gone][:, gone])
    lost = torch.linalg.solve_triangular(factor, read.weight[:, gone].T, upper=False)
    coupling = torch.linalg.solve_triangular(factor, read.inverse[gone][:, stay], upper=False)
    growth = lost.new_zeros(size).index_add(0, read.channel[gone], lost.square().sum(1))
    return growth, Read(read.inverse[stay][:, stay] - coupling.T @ coupling, read.weight[:, stay] - lost.T @ coupling,
                        read.channel[stay])


def removal_errors(reads: Sequence[Read], size: int) -> Tensor:
    """The error when each channel goes, the cheapest first: never less than that of one before. Shape `(size,)`, float32."""
    errors = reads[0].weight.new_zeros(size)
    total = errors.new_zeros(())
    rest = torch.arange(size, device=errors.device)
    while len(rest):
        cost = torch.stack([costs(read, size) for read in reads]).sum(0)
        count = -(-len(rest) // PORTION)
        chosen = rest[cost[rest].argsort(stable=True)[:count]]
        steps = [without(read, chosen, size) for read in reads]
        reads = [read for _, read in steps]
        errors[chosen] = total + torch.stack([growth for growth, _ in steps]).sum(0)[chosen].cumsum(0)
        total = errors[chosen[-1]]
        rest = rest[~torch.isin(rest, chosen)]
    return errors.float().cpu()
