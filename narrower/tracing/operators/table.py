"""One row for each operator: all that narrower knows of it. Every other table follows from this one.

To add an operator, add its name to the line of the operators that behave alike, or a line with a rule of its own.
Operators that torch tags as pointwise need no row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from . import convolutions, data_movement, matmuls, normalisation, reductions, shapes
from .elementwise import copied, elementwise, fresh, like, same
from .interface import Operator, Rule

NONE = (0, 0)  # sizes among the arguments follow from the widths; the shapes that come out are compared instead


def each(names: str, rule: Rule | None, **known: Any) -> Iterator[Operator]:
    """A row for each of the names."""
    return (Operator(name, rule, **known) for name in names.split())


ROWS: tuple[Operator, ...] = (
    # views and other movements of data
    *each("view _unsafe_view reshape _reshape_alias", data_movement.view, fixed_args=NONE, constants="kept"),
    *each("unsqueeze squeeze flatten unflatten view_copy", data_movement.view, constants="kept"),
    *each("permute transpose t swapaxes", data_movement.permute, constants="kept"),
    *each("expand", data_movement.expand, fixed_args=NONE, constants="kept"),
    *each("slice", data_movement.cut, fixed_args=NONE, constants="kept", takes_by_number=True),
    *each("select", data_movement.select, constants="kept"),
    *each("split split_with_sizes", data_movement.split, fixed_args=NONE, constants="kept"),
    *each("split_with_sizes_copy", data_movement.split, constants="kept"),
    *each("unsafe_split", data_movement.gates),
    *each("unbind", data_movement.unbind, constants="kept"),
    *each("cat concat", data_movement.cat, constants="kept"),
    *each("stack", data_movement.stack, constants="kept"),
    *each("constant_pad_nd", data_movement.pad, constants="padding", takes_by_number=True),
    *each("flip roll", data_movement.reorder, constants="kept"),
    *each("repeat", data_movement.repeat, fixed_args=NONE, constants="kept"),
    *each("pixel_shuffle pixel_unshuffle", data_movement.pixel_shuffle, constants="kept"),
    *each("im2col", data_movement.im2col, compared="shape", constants="zero"),
    *each("col2im", data_movement.col2im, compared="shape", constants="zero"),
    *each("unfold", data_movement.unfold, compared="shape", constants="kept"),
    *each("diag_embed", data_movement.diag_embed, compared="shape", constants="zero"),
    *each("view_as_real", data_movement.view_as_real, constants="zero"),
    *each("view_as_complex", data_movement.view_as_complex, constants="zero"),
    *each("channel_shuffle native_channel_shuffle", data_movement.channel_shuffle, constants="kept"),
    *each("index_put", data_movement.index_put, shape_rule=shapes.index_put),
    *each("index", data_movement.index, data_dependent="by mask"),
    *each("index_select embedding", data_movement.index),

    # layers
    *each("convolution", convolutions.convolution, fixed_args=(3, 8), compared="expanded", shape_rule=shapes.convolution,
          layer="convolution"),
    *each("deform_conv2d", convolutions.deformable, fixed_args=(5, 11)),  # torchvision's
    *each("mm", matmuls.matmul, matrix_product=True, compared="expanded", shape_rule=shapes.mm, layer="linear"),
    *each("addmm", matmuls.matmul, matrix_product=True, compared="expanded", shape_rule=shapes.addmm, layer="linear"),
    *each("bmm baddbmm", matmuls.matmul, matrix_product=True, compared="expanded", constants="product"),
    *each("mv addmv", matmuls.matmul, matrix_product=True, compared="expanded"),
    *each("native_batch_norm", normalisation.batch_norm, shape_rule=shapes.batch_norm, layer="batch norm"),
    *each("cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
          "_batch_norm_with_update batch_norm", normalisation.batch_norm, layer="batch norm"),
    *each("native_layer_norm", normalisation.layer_norm, fixed_args=(4, None), shape_rule=shapes.layer_norm,
          restrict_args=normalisation.restrict_layer_norm),
    *each("native_group_norm", normalisation.group_norm, fixed_args=(6, None),
          restrict_args=normalisation.restrict_group_norm),
    *each("_weight_norm_interface", normalisation.weight_norm),

    # reductions, pooling, resizing
    *each("mean", reductions.reduce, compared="shape", constants="kept", pools="over space", shape_rule=shapes.mean),
    *each("amax", reductions.reduce, compared="shape", constants="kept", pools="over space"),
    *each("amin max min", reductions.reduce, compared="shape", constants="kept"),
    *each("sum var std var_mean std_mean linalg_vector_norm argmax argmin", reductions.reduce, compared="shape",
          constants="zero"),
    *each("prod logsumexp any all", reductions.reduce, compared="shape"),
    *each("glu", reductions.glu),
    *each("_softmax _log_softmax _safe_softmax cumsum cumprod", reductions.softmax),
    *each("sort topk median nanmedian kthvalue mode cummax cummin", reductions.ordered, compared="shape"),
    *each("_fft_r2c _fft_c2c _fft_c2r", reductions.fourier, compared="shape", constants="zero"),
    *each("dot vdot", reductions.scalar_product),
    *each("avg_pool1d avg_pool2d avg_pool3d", reductions.spatial, constants="zero if padded", pools="always"),
    *each("max_pool2d_with_indices max_pool3d_with_indices max_pool2d adaptive_max_pool2d adaptive_max_pool3d "
          "_adaptive_avg_pool2d _adaptive_avg_pool3d fractional_max_pool2d", reductions.spatial, constants="kept",
          pools="always"),
    *each("roi_pool", reductions.spatial, constants="zero", pools="always"),  # torchvision's, as are roi_align and nms
    *each("upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d "
          "_upsample_nearest_exact2d reflection_pad1d reflection_pad2d reflection_pad3d "
          "replication_pad1d replication_pad2d replication_pad3d", reductions.spatial, constants="kept"),
    *each("upsample_bicubic2d _upsample_bilinear2d_aa grid_sampler_2d grid_sampler_3d roi_align", reductions.spatial,
          constants="zero"),
    *each("max_unpool2d max_unpool3d", reductions.unpool, constants="zero"),

    # one element at a time
    *each("relu silu gelu sigmoid tanh hardsigmoid hardswish hardtanh leaky_relu elu mish", elementwise, constants="pointwise",
          shape_rule=shapes.unary),
    *each("softplus celu", elementwise, constants="pointwise"),  # torch 2.4 does not tag them as pointwise
    *each("add sub", elementwise, constants="pointwise", shape_rule=shapes.binary),
    *each("mul", elementwise, constants="product", shape_rule=shapes.binary),
    *each("div", elementwise, constants="quotient", shape_rule=shapes.binary),
    *each("prelu _prelu_kernel", elementwise, constants="zero"),
    *each("complex polar", elementwise),
    *each("where maximum minimum addcmul addcdiv lerp relu6 glu_backward threshold clamp pow rsub", elementwise,
          constants="pointwise"),

    # copies and new tensors
    *each("clone", same, constants="kept", shape_rule=shapes.unary),
    *each("alias detach contiguous _to_copy", same, constants="kept"),
    *each("native_dropout dropout feature_dropout alpha_dropout fake_quantize_per_tensor_affine", same, constants="zero"),
    *each("as_strided_", same, fixed_args=NONE, constants="zero"),
    *each("lift_fresh", same, compared="values", constants="kept"),
    *each("lift_fresh_copy", None, compared="values"),
    *each("copy", copied),
    *each("zeros_like ones_like empty_like rand_like randn_like bernoulli uniform normal fill zero", like),
    *each("empty zeros ones rand randn new_empty new_zeros new_ones empty_strided new_empty_strided", like, fixed_args=NONE),
    *each("full full_like", like, fixed_args=(1, 2)),
    *each("new_full", like, fixed_args=(2, 3)),
    *each("arange eye linspace scalar_tensor", fresh),

    # whose output depends on values: what they make of channels is not known
    *each("_local_scalar_dense nonzero nonzero_static argwhere masked_select nms _unique2 unique_dim unique_consecutive equal "
          "is_nonzero bincount repeat_interleave", None, data_dependent="always"),
)

TABLE = {row.name: row for row in ROWS}


def row_of(name: str, pointwise: bool = True) -> Operator:
    """The row of a name; an operator without one is taken as pointwise, or as unknown."""
    return TABLE.get(name) or (Operator(name, elementwise, constants="pointwise") if pointwise else Operator(name))


@cache
def operator_of(func: Any) -> Operator:
    """The row of an overload as a dispatch mode sees it (`torch.ops.aten.add_.Tensor`).

    The names in the table are those of PyTorch and torchvision. Other operators go by their full name, as `mylib::silu`.
    """
    namespace, name = func._schema.name.split("::")
    if namespace != "aten" and not (namespace == "torchvision" and name in TABLE):
        name = func._schema.name
    if name not in TABLE and name.endswith("_"):
        name = name[:-1]
    return row_of(name, torch.Tag.pointwise in func.tags)
