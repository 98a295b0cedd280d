"""How channel ids pass through each kind of ATen operator.

A rule takes the recorder (what has been learnt so far) and one call, and returns what the outputs carry. Rules
say which ids must live and die together (`unite`), where fibres need equal counts (`tie`), what cannot shrink (`pin`) and
what mixes channels in a way that removal changes by definition (`mix`). An operator without a rule pins all that enters it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import mixing, movement
from .calls import Call, Recorder, Rule, dims_of, meet, tensors_in
from .labels import NOTHING, Carried


def elementwise(r: Recorder, call: Call) -> Sequence[Carried]:
    inputs = tensors_in(call.args)
    out = call.out if isinstance(call.out, Tensor) else call.out[0]
    carried = [(r.of(t), t.shape) for t in inputs]
    if len(carried) == 1:
        return [carried[0][0]._replace(view=False)]
    labels = meet(r, carried, out.ndim, call.name)
    return [Carried(labels, all(c.uniform for c, _ in carried), pool=max((c.pool for c, _ in carried), default=-1)
                    if sum(bool(c.labels) for c, _ in carried) == 1 else -1)]


def like(r: Recorder, call: Call) -> Sequence[Carried]:
    """A new tensor of uniform or random content, as wide as the one that it is made like."""
    x = call.args[0]
    same_shape = isinstance(x, Tensor) and x.shape == call.out.shape and not call.name.startswith("new_")
    return [Carried(r.of(x).labels if same_shape else (), uniform=True)]


def same(r: Recorder, call: Call) -> Sequence[Carried]:
    """The first input as it is, and nothing for further outputs (masks, indices)."""
    return [r.of(call.args[0])]


def copied(r: Recorder, call: Call) -> Sequence[Carried]:
    """dst.copy_(src): the labels of both meet; a write into a part of another tensor cannot be followed."""
    dst, src = r.of(call.args[0]), r.of(call.args[1])
    if src.labels and (dst.view or dst.labels):
        r.pin([*src.labels, *dst.labels], "written in place into a part of a tensor")
        return [dst]
    return [src._replace(view=False)]


def fresh(r: Recorder, call: Call) -> Sequence[Carried]:
    return [NOTHING]


KINDS: dict[Rule, str] = {
    movement.view: "view _unsafe_view reshape _reshape_alias unsqueeze squeeze flatten unflatten view_copy",
    movement.permute: "permute transpose t swapaxes",
    movement.expand: "expand",
    same: "clone alias detach contiguous _to_copy native_dropout dropout feature_dropout alpha_dropout lift_fresh "
          "fake_quantize_per_tensor_affine as_strided_",
    copied: "copy",
    movement.cut: "slice",
    movement.select: "select",
    movement.split: "split split_with_sizes split_with_sizes_copy",
    movement.unbind: "unbind",
    movement.cat: "cat concat",
    movement.stack: "stack",
    movement.pad: "constant_pad_nd",
    movement.reorder: "flip roll",
    movement.repeat: "repeat",
    movement.pixel_shuffle: "pixel_shuffle pixel_unshuffle",
    movement.channel_shuffle: "channel_shuffle native_channel_shuffle",
    mixing.convolution: "convolution _convolution",
    mixing.matmul: "mm addmm bmm baddbmm mv addmv",
    mixing.batch_norm: "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit "
                       "_native_batch_norm_legit_no_training _batch_norm_with_update batch_norm",
    mixing.layer_norm: "native_layer_norm",
    mixing.group_norm: "native_group_norm",
    mixing.weight_norm: "_weight_norm_interface",
    mixing.glu: "glu",
    mixing.reduce: "mean sum var std var_mean std_mean amax amin max min prod linalg_vector_norm logsumexp any all "
                   "argmax argmin",
    mixing.softmax: "_softmax _log_softmax _safe_softmax cumsum cumprod",
    mixing.spatial: "avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices max_pool2d "
                    "adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d fractional_max_pool2d "
                    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_linear1d "
                    "upsample_trilinear3d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa "
                    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
                    "grid_sampler_2d grid_sampler_3d roi_align roi_pool",
    mixing.unpool: "max_unpool2d max_unpool3d",
    movement.index_put: "index_put",
    movement.index: "index index_select embedding",
    like: "zeros_like ones_like full_like empty_like rand_like randn_like new_empty new_zeros new_ones new_full empty "
          "zeros ones full rand randn bernoulli uniform normal fill zero empty_strided new_empty_strided",
    fresh: "arange eye linspace scalar_tensor",
    elementwise: "add sub mul div where maximum minimum addcmul addcdiv lerp prelu _prelu_kernel hardswish relu6 "
                 "hardtanh leaky_relu elu glu_backward threshold clamp pow rsub",
}

RULES: dict[str, Rule] = {name: rule for rule, names in KINDS.items() for name in names.split()}


def pooling(name: str, args: Sequence[Any]) -> bool:
    """Whether a call pools over space: a pooling operator, or a mean or maximum over all but the first two dimensions."""
    if name in ("mean", "amax") and len(args) > 1 and args[0].ndim > 2:
        return sorted(dims_of(args[1], args[0].ndim)) == list(range(2, args[0].ndim))
    return "pool" in name and "unpool" not in name


@cache
def rule_for(func: Any) -> tuple[str, Rule | None]:
    """Name without the in-place underscore, and the rule; any operator that torch tags as pointwise has one."""
    name = func._schema.name.split("::")[-1]
    if name not in RULES and name.endswith("_"):
        name = name[:-1]
    rule = RULES.get(name)
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = elementwise
    return name, rule
