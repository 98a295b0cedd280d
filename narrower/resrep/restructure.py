"""Take channels out of a network with compactors in place, and merge the compactors into it.

A `Layout` knows which of the dense positions every tensor dimension still has, so that removal can go on from any state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.selection import Keep, Kept
from ..graph.types import Graph
from ..narrowing.constant_propagation import Reader, Site, absorb_constants
from ..narrowing.optimizer import Swap
from ..surgery.attributes import attribute_values, set_attributes
from ..surgery.resize import fit, format_of, slice_tensor
from ..surgery.walk import named_tensors
from .compactor import NAME, Compactor, behind, diagonal, row_norms
from .merging import merge_tensors

End = tuple[str, int]  # a tensor and one of its dimensions

PARTS = {"gamma": "weight", "beta": "bias", "mean": "running_mean", "var": "running_var"}


@dataclass
class Layout:
    """Dense positions that are left: of the dimensions that were cut `(blocks, n)`, and of each compactor's rows."""

    ends: dict[End, np.ndarray] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)

    def left(self, graph: Graph, end: End, blocks: int = 1) -> np.ndarray:
        size = graph.shapes[end[0]][end[1]]
        return self.ends.get(end, np.broadcast_to(np.arange(size), (blocks, size)))


def made_by(site: Site) -> dict[str, End]:
    """The tensors that a full or block-diagonal compactor is merged into, with the dimension of its channels."""
    out: dict[str, End] = {}
    if site.weight is not None:
        out["weight"] = site.weight, int(site.transposed)
    if site.bias is not None:
        out["bias"] = site.bias, 0
    if site.norm is not None:
        out |= {part: (f"{site.norm}.{leaf}", 0) for part, leaf in PARTS.items()}
    return out


def relative(now: np.ndarray, later: np.ndarray) -> np.ndarray:
    """Where the positions `later` stand among those of `now`, row by row."""
    return np.stack([np.searchsorted(a, b) for a, b in zip(now, later, strict=True)])


def tensors_of(model: nn.Module, site: Site) -> dict[str, Tensor]:
    """What a site's compactor is merged into, in float64; a diagonal one behind a BatchNorm needs its scale and shift alone."""
    named = named_tensors(model)
    ends = made_by(site)
    if site.norm is not None and site.kind == "diagonal":
        ends = {k: ends[k] for k in ("gamma", "beta")}
    return {part: named[end[0]].detach().double() for part, end in ends.items()}


@torch.no_grad()
def restructure(model: nn.Module, graph: Graph, sites: Mapping[str, Site], layout: Layout, keep: Keep,
                constants: Sequence[tuple[Reader, str, float]], *, fold: bool, idle: bool = False,
                merge: bool = False) -> tuple[Layout, list[Swap]]:
    """Cut `model` (with compactors, in place) down to the channels `keep` of the dense network.

    `fold`: full and block-diagonal compactors are merged into their layer and stand anew as diagonals of their row norms, so
    that the layer gets narrower too; else only their rows go. `idle`: all are merged, and stand on as the identity; `merge`:
    and are taken away. `constants`: what channels are, when they are zero, where a layer reads them: what goes of it moves into
    that layer. Returns the new layout and what was replaced, for an optimizer.
    """
    for reader, group, number in constants:
        gone = np.full(graph[group].size, number)
        gone[keep[group]] = 0
        absorb_constants(named_tensors(model), graph, reader, group, gone, layout.ends)
    kept = Kept(graph, keep)
    later = Layout({(t, dim): positions for t, cut in kept.cuts.items() for dim, positions in cut.items()})
    values: dict[str, Tensor] = {}  # merged tensors
    from_rows: dict[End, np.ndarray] = {}  # dimensions of merged tensors that have the compactor's rows now
    compactors: dict[str, tuple[np.ndarray, np.ndarray, Tensor]] = {}
    for name, site in sites.items():
        compactor: Compactor = getattr(model.get_submodule(name), NAME)
        rows = layout.rows[name]
        stay = later.left(graph, site.rows, site.blocks if site.transposed else 1)
        stay = (stay + (np.arange(len(stay)) * graph.shapes[site.rows[0]][site.rows[1]])[:, None]).reshape(-1)
        later.rows[name] = stay
        within = columns = np.searchsorted(rows, stay)
        q = compactor.weight.detach().double()
        whole = site.kind != "diagonal"
        if compactor.idle:
            new = diagonal(torch.ones(len(within), dtype=q.dtype, device=q.device), site)
        elif merge or idle or (fold and whole):
            norms = row_norms(q).clamp_min(1e-4)
            norms = torch.ones_like(norms) if merge or idle else norms
            eps = getattr(model.get_submodule(site.norm), "eps", 0.0) if site.norm is not None else 0.0
            parts = merge_tensors(q, site, tensors_of(model, site), float(eps), compactor.variance.double(), norms)
            for part, value in parts.items():
                end = made_by(site)[part]
                values[end[0]] = value
                if whole:
                    from_rows[end] = rows[None]
            new = diagonal(norms[torch.as_tensor(within, device=q.device)], site)
        else:
            if whole:
                for end in made_by(site).values():
                    later.ends.pop(end, None)
                    if end in layout.ends:
                        later.ends[end] = layout.ends[end]
                columns = np.arange(q.shape[-1] * (q.shape[0] if q.dim() == 3 else 1))
            new = pick(q, within, columns)
        compactors[name] = within, columns, new
    swaps = replace_tensors(model, graph, layout, later, values, from_rows)
    set_attributes(model, attribute_values(kept))
    for name, (within, columns, new) in compactors.items():
        module = model.get_submodule(name)
        if merge:
            unhook(module)
        else:
            compactor = getattr(module, NAME)
            swaps.append(renew(compactor, new, within, columns))
            if idle:
                compactor.idle = True
                compactor.weight.requires_grad_(False)
    return later, swaps


def replace_tensors(model: nn.Module, graph: Graph, layout: Layout, later: Layout, values: Mapping[str, Tensor],
             from_rows: Mapping[End, np.ndarray]) -> list[Swap]:
    """Put the cut tensors into the model; tied ones stay one object."""
    named = named_tensors(model)
    done: dict[int, Tensor] = {}
    swaps: list[Swap] = []
    for name in {t: None for t, _ in (*later.ends, *layout.ends)} | dict.fromkeys(values):
        t = named[name]
        if id(t) in done:
            continue
        value, part, of_state = values.get(name, t.detach()).to(t.dtype), {}, {}
        for dim in range(t.dim()):
            end = name, dim
            if end not in later.ends and end not in layout.ends and end not in from_rows:
                continue
            wanted = later.ends.get(end)
            blocks = len(wanted) if wanted is not None else 1
            wanted = later.left(graph, end, blocks) if wanted is None else wanted
            before = layout.left(graph, end, blocks)
            of_state[dim] = relative(before, wanted)
            part[dim] = relative(from_rows.get(end, before), wanted)
        new = slice_tensor(value, part).clone().contiguous(memory_format=format_of(t))
        if isinstance(t, nn.Parameter):
            new = nn.Parameter(new, requires_grad=t.requires_grad)
        done[id(t)] = new
        swaps.append(Swap(t, new, partial(slice_tensor, cut=of_state)))
    fit(model, {name: done[id(t)] for name, t in named.items() if id(t) in done})
    return swaps


def pick(q: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """Some rows and columns of a compactor's weight; of a block-diagonal one equally many of each block."""
    if q.dim() == 1:
        return q[torch.as_tensor(rows, device=q.device)]
    if q.dim() == 2:
        return q[torch.as_tensor(rows, device=q.device)][:, torch.as_tensor(columns, device=q.device)]
    blocks, k, c = q.shape
    parts = [q[b][torch.as_tensor(r % k, device=q.device)][:, torch.as_tensor(o % c, device=q.device)]
             for b, (r, o) in enumerate(zip(rows.reshape(blocks, -1), columns.reshape(blocks, -1), strict=True))]
    return torch.stack(parts)


def renew(compactor: Compactor, new: Tensor, rows: np.ndarray, columns: np.ndarray) -> Swap:
    """Give a compactor its new weight, and its masks the rows that are left."""
    old = compactor.weight
    compactor.weight = nn.Parameter(new.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    index = torch.as_tensor(rows, device=old.device)
    for name in ("chosen", "gone", "variance"):
        buffer = getattr(compactor, name)
        setattr(compactor, name, buffer[index] if buffer.numel() else buffer)
    return Swap(old, compactor.weight, partial(pick, rows=rows, columns=columns))


def unhook(module: nn.Module) -> None:
    """Take a compactor and its hook away."""
    for key in [k for k, hook in module._forward_hooks.items() if hook is behind]:
        del module._forward_hooks[key]
    del module._modules[NAME]


def restore_shapes(model: nn.Module, graph: Graph, sites: Mapping[str, Site], layout: Layout) -> list[Any]:
    """Give a dense model with compactors the shapes of a layout, to load a state into. Returns the swaps."""
    swaps = replace_tensors(model, graph, Layout(), layout, {}, {})
    for name, site in sites.items():
        compactor: Compactor = getattr(model.get_submodule(name), NAME)
        rows = layout.rows[name]
        columns = rows
        if site.kind != "diagonal":
            end = (str(site.weight), int(site.transposed))
            columns = layout.ends[end].reshape(-1) if end in layout.ends else np.arange(site.size)
        swaps.append(renew(compactor, pick(compactor.weight.detach(), rows, columns), rows, columns))
    return swaps
