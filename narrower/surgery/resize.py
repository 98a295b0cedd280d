"""Slice tensors, and fit a model to tensors of other shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import StorageError
from ..graph.selection import Cut
from ..graph.types import Graph


def format_of(t: Tensor) -> torch.memory_format:
    for dims, fmt in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if t.dim() == dims and t.is_contiguous(memory_format=fmt) and not t.is_contiguous():
            return fmt
    return torch.contiguous_format


def slice_tensor(t: Tensor, cut: Cut) -> Tensor:
    """The part of `t` that stays, with the same dtype and device."""
    if t.is_meta:  # only the shape matters
        return torch.empty([cut[d].shape[1] if d in cut else n for d, n in enumerate(t.shape)], dtype=t.dtype, device="meta")
    # Blocks split the dense dimension 0, so dimensions with several blocks are cut before it changes.
    for dim, positions in sorted(cut.items(), key=lambda item: -len(item[1])):
        index = torch.as_tensor(positions, device=t.device)
        if len(index) == 1:
            t = t.index_select(dim, index[0])
        else:
            parts = t.chunk(len(index), dim=0)
            t = torch.cat([p.index_select(dim, index[k]) for k, p in enumerate(parts)], dim=0)
    return t


# The attributes that repeat the dimensions of a module's weight, in order.
MIRRORS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("out_features", "in_features"), nn.GroupNorm: ("num_channels",), nn.PReLU: ("num_parameters",),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
}


def mirrored_attributes(module: nn.Module, dense: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The attributes of a module that repeat the shapes of its tensors, with their new values.

    `dense`: the earlier shapes of its own tensors, by attribute name.
    """
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
    old = dense.get("weight", shape)
    if isinstance(module, nn.modules.conv._ConvNd) and shape and old:
        groups = module.groups
        if groups > 1 and groups == module.in_channels:  # depthwise
            groups = shape[0] if module.transposed else shape[0] // (old[0] // module.in_channels)
        first, second = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        return {first: shape[0], second: shape[1] * groups, "groups": groups}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        vector = module.weight if module.weight is not None else module.running_mean
        return {} if vector is None else {"num_features": vector.shape[0]}
    for kind, names in MIRRORS.items():
        if isinstance(module, kind) and shape:
            return dict(zip(names, shape, strict=False))
    if hasattr(module, "normalized_shape") and shape:
        return {"normalized_shape": type(module.normalized_shape)(shape)}
    return {}


def takes_bias(model: nn.Module, weight: str) -> bool:
    """Whether the layer with this weight has no bias and can get one.

    True for torch's own convolutions and linear layers, but for transposed convolutions in groups.
    """
    owner, _, leaf = weight.rpartition(".")
    module = model.get_submodule(owner)
    own = type(module).forward.__module__.startswith("torch.nn.modules.")
    kind = isinstance(module, nn.Linear) or (
        isinstance(module, nn.modules.conv._ConvNd) and (module.groups == 1 or not module.transposed))
    return own and leaf == "weight" and kind and module.bias is None


def outputs_dim(layer: nn.Module) -> int:
    """The dimension of a layer's weight that its outputs are along: 1 of a transposed convolution, else 0."""
    return int(getattr(layer, "transposed", False))


def give_bias(model: nn.Module, name: str) -> None:
    """Create the bias `name`: zeros, one entry per output channel of its layer."""
    module = model.get_submodule(name.rpartition(".")[0])
    weight = module.weight
    assert isinstance(weight, Tensor)
    module.bias = nn.Parameter(weight.detach().new_zeros(weight.shape[outputs_dim(module)]), requires_grad=weight.requires_grad)


def add_biases(model: nn.Module, graph: Graph, weights: Iterable[str]) -> Graph:
    """Add a bias of zeros to the layers with these weights, in place. Returns the graph with these biases."""
    names = {w: f"{w.removesuffix('weight')}bias" for w in sorted(weights)}
    for name in names.values():
        give_bias(model, name)
    groups = tuple(replace(g, slices=(*g.slices, *(
        replace(s, tensor=names[s.tensor], role="along") for s in g.slices if s.tensor in names and s.dim == 0)))
        for g in graph.groups)
    return replace(graph, groups=groups, shapes={**graph.shapes, **{n: graph.shapes[w][:1] for w, n in names.items()}},
                   parameters=graph.parameters | set(names.values()), created=(*graph.created, *names.values()))


class Change(NamedTuple):
    """An attribute or tensor that was replaced, and its old value."""

    module: nn.Module
    attribute: str
    value: Any


def fit(model: nn.Module, tensors: Mapping[str, Tensor], dense: Mapping[str, tuple[int, ...]] | None = None) -> list[Change]:
    """Put `tensors` ({parameter or buffer name: tensor}) into `model`, in place, and update attributes that repeat shapes.

    Shapes may differ from before. Tied tensors must be one object under all their names. `dense`: the earlier shapes, needed
    if the model holds the tensors already. Returns what was replaced. Raises StorageError for an unknown name.
    """
    changes: list[Change] = []
    by_owner: dict[str, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        owner, _, leaf = name.rpartition(".")
        by_owner.setdefault(owner, {})[leaf] = t
    for owner, leaves in by_owner.items():
        try:
            module = model.get_submodule(owner)
        except AttributeError as e:
            raise StorageError(f"the model has no module {owner!r}, which should hold {sorted(leaves)}") from e
        before = {}
        for leaf, t in leaves.items():
            store = module._parameters if leaf in module._parameters else module._buffers
            old = store.get(leaf)
            if old is None:
                raise StorageError(f"the model has no tensor {owner}.{leaf}")
            before[leaf] = dense[f"{owner}.{leaf}".lstrip(".")] if dense else tuple(old.shape)
            changes.append(Change(module, leaf, old))
            store[leaf] = t  # type: ignore[assignment]
        for attribute, value in mirrored_attributes(module, before).items():
            changes.append(Change(module, attribute, getattr(module, attribute)))
            if attribute in module.__dict__:  # setattr of nn.Module takes ten times as long
                module.__dict__[attribute] = value
            else:
                setattr(module, attribute, value)
    return changes


def undo(changes: list[Change]) -> None:
    """Undo the changes of `fit`."""
    for module, name, value in reversed(changes):
        if name in module._parameters:
            module._parameters[name] = value
        elif name in module._buffers:
            module._buffers[name] = value
        else:
            setattr(module, name, value)
