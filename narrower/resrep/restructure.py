"""Remove channels from a network with compactors in place, and merge the compactors into it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.selection import Cut, Kept
from ..inputs import precise
from ..narrowing.fold import absorb_constants
from ..narrowing.optimizer import Swap
from ..surgery.attributes import attribute_values, set_attributes
from ..surgery.copying import parameter_like
from ..surgery.resize import fit, format_of, slice_tensor
from ..surgery.walk import named_tensors, outer_modes_off
from .compactor import NAME, Compactor, diagonal, remove_compactor, row_norms
from .merging import merge_tensors
from .placement import Placement, Site, merge_targets

Mode = Literal["cut", "fold", "freeze", "merge"]
"""What `restructure` does with compactors.

`cut`: only drop their rows. The layers before full and block-diagonal compactors keep their channels.
`fold`: merge full and block-diagonal compactors, and start again with diagonals of their row norms. These layers get narrower.
`freeze`: merge all compactors and keep them as identities that no longer train.
`merge`: merge all compactors and remove them.
"""

SHORTEST = 1e-4  # the smallest initial value of a diagonal compactor


class Merged(NamedTuple):
    """A tensor with a compactor merged into it, and the dense positions along the changed dimension."""

    value: Tensor
    rows: Cut


@outer_modes_off()
@torch.no_grad()
def restructure(model: nn.Module, placement: Placement, before: Kept, after: Kept, mode: Mode) -> list[Swap]:
    """Reduce `model` (with compactors, in place) from the channels `before` to the channels `after`.

    Constants that removed channels leave are added to the layers that read them. Returns what was replaced, for an optimizer.
    """
    cuts = present_cuts(model, placement.sites, before)
    for reader, group, value in placement.constants:
        absorb_constants(named_tensors(model), before.graph, reader, group, np.where(after.mask(group), 0.0, value),
                         {(tensor, dim): positions for tensor, cut in cuts.items() for dim, positions in cut.items()})
    swaps: list[Swap] = []
    merged: dict[str, Merged] = {}
    for site in placement.sites.values():
        swap, tensors = reduce_compactor(model, site, np.nonzero(after.axis_mask(*site.rows).reshape(-1))[0], mode)
        swaps.append(swap)
        merged |= tensors
    swaps += replace_tensors(model, cuts, present_cuts(model, placement.sites, after), merged)
    set_attributes(model, attribute_values(after))
    for name in placement.sites:
        if mode == "merge":
            remove_compactor(model.get_submodule(name))
        elif mode == "freeze":
            compactor_at(model, name).freeze()
    return swaps


@torch.no_grad()
def largest_cut(model: nn.Module, placement: Placement, after: Kept) -> float:
    """The largest norm of the compactor rows that are not among the channels `after`."""
    found = [0.0]
    for name, site in placement.sites.items():
        c = compactor_at(model, name)
        stays = torch.as_tensor(after.axis_mask(*site.rows).reshape(-1)[c.rows], device=c.weight.device)
        found.append(float(row_norms(c.weight).masked_fill(stays, 0).max()))
    return max(found)


def compactor_at(model: nn.Module, name: str) -> Compactor:
    """The compactor behind the module of that name."""
    return getattr(model.get_submodule(name), NAME)


def reduce_compactor(model: nn.Module, site: Site, rows: np.ndarray, mode: Mode) -> tuple[Swap, dict[str, Merged]]:
    """Reduce a compactor to these dense rows, and merge it if the mode says so. Returns the tensors that it was merged into."""
    compactor, whole = compactor_at(model, site.module), site.kind != "diagonal"
    if compactor.frozen or (mode in ("cut", "fold") and not whole):
        return compactor.restrict(rows, rows), {}
    if mode == "cut":
        return compactor.restrict(rows, compactor.columns), {}
    norms = row_norms(precise(compactor.weight.detach()))
    diagonal_left = norms.clamp_min(SHORTEST) if mode == "fold" else torch.ones_like(norms)
    merged = merged_tensors(model, site, compactor, diagonal_left)
    left = torch.as_tensor(np.searchsorted(compactor.rows, rows), device=norms.device)
    return compactor.restrict(rows, rows, diagonal(diagonal_left[left], site)), merged


def merged_tensors(model: nn.Module, site: Site, compactor: Compactor, diagonal_left: Tensor) -> dict[str, Merged]:
    """The tensors with a compactor merged, by name. `diagonal_left` `(K,)`: the diagonal of the compactor that will follow."""
    named, targets = named_tensors(model), merge_targets(site)
    eps = getattr(model.get_submodule(site.norm), "eps", 0.0) if site.norm is not None else 0.0
    values = merge_tensors(precise(compactor.weight.detach()), site,
                           {part: precise(named[tensor].detach()) for part, (tensor, _) in targets.items()},
                           float(eps), precise(compactor.variance), diagonal_left)
    merged = {}
    for part, value in values.items():
        tensor, dim = targets[part]
        merged[tensor] = Merged(value, {} if site.kind == "diagonal" else {dim: compactor.rows[None]})
    return merged


def present_cuts(model: nn.Module, sites: Mapping[str, Site], kept: Kept) -> dict[str, Cut]:
    """What the tensors have of the dense ones: `kept`, but in front of a full or block-diagonal compactor what it reads."""
    cuts = {tensor: dict(cut) for tensor, cut in kept.cuts.items()}
    for name, site in sites.items():
        if site.kind != "diagonal":
            for tensor, dim in merge_targets(site).values():
                cuts.setdefault(tensor, {})[dim] = compactor_at(model, name).columns[None]
    shapes = kept.graph.shapes
    smaller = {t: {d: p for d, p in cut.items() if p.shape[1] < shapes[t][d]} for t, cut in cuts.items()}
    return {tensor: cut for tensor, cut in smaller.items() if cut}


def relative(cut: Cut, now: Cut) -> Cut:
    """A cut of the dense tensor as a cut of the tensor that has only the positions `now`."""
    out = dict(cut)
    for dim in cut.keys() & now.keys():
        out[dim] = np.stack([np.searchsorted(a, b) for a, b in zip(now[dim], cut[dim], strict=True)])
    return out


def replace_tensors(model: nn.Module, before: Mapping[str, Cut], after: Mapping[str, Cut],
                    merged: Mapping[str, Merged]) -> list[Swap]:
    """Put the cut and merged tensors into the model. Tied tensors stay one object."""
    named = named_tensors(model)
    new_of: dict[int, Tensor] = {}
    swaps: list[Swap] = []
    for name in {**after, **merged}:
        t = named[name]
        if id(t) in new_of:
            continue
        value, rows = merged.get(name, Merged(t.detach(), {}))
        now, cut = before.get(name, {}), after.get(name, {})
        new = slice_tensor(value.to(t.dtype), relative(cut, {**now, **rows})).clone().contiguous(memory_format=format_of(t))
        new_of[id(t)] = parameter_like(t, new)
        swaps.append(Swap(t, new_of[id(t)], partial(slice_tensor, cut=relative(cut, now))))
    fit(model, {name: new_of[id(t)] for name, t in named.items() if id(t) in new_of})
    return swaps


def restore_shapes(model: nn.Module, placement: Placement, kept: Kept, rows: Mapping[str, np.ndarray],
                   columns: Mapping[str, np.ndarray]) -> list[Swap]:
    """Give a dense model with compactors the shapes, and the sizes that modules store, that it had with these channels and with
    these rows and columns of compactors.

    Values are those of the dense model: load a state afterwards. Returns what was replaced, for an optimizer.
    """
    set_attributes(model, attribute_values(kept))
    swaps = [compactor_at(model, name).restrict(rows[name], columns[name]) for name in placement.sites]
    return swaps + replace_tensors(model, {}, present_cuts(model, placement.sites, kept), {})
