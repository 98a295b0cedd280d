"""One row for each operator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from . import convolutions, data_movement, matmuls, normalisation, reductions
from .elementwise import copied, elementwise, fresh, like, same
from .interface import Rule, dims_of

# sizes among the arguments of these follow from the widths; the shapes that come out are compared instead
SIZED = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "slice", "split", "split_with_sizes", "empty", "zeros",
    "ones", "rand", "randn", "arange", "new_empty", "new_zeros", "new_ones", "empty_strided",
    "new_empty_strided", "as_strided_", "repeat",
}

SIZED_UNTIL = {"native_group_norm": 6, "native_layer_norm": 4}

MADE = {"lift_fresh", "lift_fresh_copy"}

FILLED = {"full": 1, "new_full": 2, "full_like": 1}

KINDS: dict[Rule, str] = {
    data_movement.view: "view _unsafe_view reshape _reshape_alias unsqueeze squeeze flatten unflatten view_copy",
    data_movement.permute: "permute transpose t swapaxes",
    data_movement.expand: "expand",
    same: "clone alias detach contiguous _to_copy native_dropout dropout feature_dropout alpha_dropout lift_fresh "
          "fake_quantize_per_tensor_affine as_strided_",
    copied: "copy",
    data_movement.cut: "slice",
    data_movement.select: "select",
    data_movement.split: "split split_with_sizes split_with_sizes_copy",
    data_movement.unbind: "unbind",
    data_movement.cat: "cat concat",
    data_movement.stack: "stack",
    data_movement.pad: "constant_pad_nd",
    data_movement.reorder: "flip roll",
    data_movement.repeat: "repeat",
    data_movement.pixel_shuffle: "pixel_shuffle pixel_unshuffle",
    data_movement.channel_shuffle: "channel_shuffle native_channel_shuffle",
    convolutions.convolution: "convolution _convolution",
    matmuls.matmul: "mm addmm bmm baddbmm mv addmv",
    normalisation.batch_norm: "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit "
                       "_native_batch_norm_legit_no_training _batch_norm_with_update batch_norm",
    normalisation.layer_norm: "native_layer_norm",
    normalisation.group_norm: "native_group_norm",
    normalisation.weight_norm: "_weight_norm_interface",
    reductions.glu: "glu",
    reductions.reduce: "mean sum var std var_mean std_mean amax amin max min prod linalg_vector_norm logsumexp any all "
                   "argmax argmin",
    reductions.softmax: "_softmax _log_softmax _safe_softmax cumsum cumprod",
    reductions.spatial: "avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices max_pool2d "
                    "adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d fractional_max_pool2d "
                    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_linear1d "
                    "upsample_trilinear3d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa "
                    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
                    "grid_sampler_2d grid_sampler_3d roi_align roi_pool",
    reductions.unpool: "max_unpool2d max_unpool3d",
    data_movement.index_put: "index_put",
    data_movement.index: "index index_select embedding",
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
