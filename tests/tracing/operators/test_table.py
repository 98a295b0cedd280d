"""The table of operators: one row for each, and rows that agree with what PyTorch knows of the operator."""

from __future__ import annotations

import pytest
import torch
from support.operators import collected

from narrower.tracing.operators.elementwise import elementwise
from narrower.tracing.operators.interface import Operator
from narrower.tracing.operators.table import ROWS, TABLE, operator_of, row_of

TORCHVISION = {"roi_align", "roi_pool", "nms", "deform_conv2d"}
LATER = {"_safe_softmax"}  # not in the oldest torch that is promised


def test_every_operator_has_one_row() -> None:
    assert len(ROWS) == len(TABLE), "an operator has two rows"


def test_every_row_is_of_an_operator_that_exists() -> None:
    known = {n.split(".")[0].removeprefix("aten::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")}
    assert not {n for n in TABLE if n not in known and f"{n}_" not in known} - TORCHVISION - LATER


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_says_something_and_agrees_with_itself(row: Operator) -> None:
    first, last = row.fixed_args
    assert first >= 0 and (last is None or last >= first)
    assert row != Operator(row.name), "the row is that of an unknown operator"
    assert row.rule is not None or row.data_dependent == "always" or row.compared == "values"
    assert (row.rule is elementwise) >= (row.constants in ("pointwise", "slope", "quotient"))
    assert row.compared != "shape" or row.shape_rule is None or row.name == "mean"
    assert (row.matrix_product or row.name == "convolution") == (row.compared == "expanded")
    assert not (row.matrix_product and row.pools != "never")
    assert row.restrict_args is None or row.rule is not None


def test_operators_whose_output_depends_on_values_are_those_that_torch_tags() -> None:
    """An operator that torch tags so and that has a row must say so, or the trace takes meta tensors at their word."""
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    for row in ROWS:
        packet = getattr(torch.ops.aten, row.name, None)
        overloads = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
        if any(tags & set(o.tags) for o in overloads):
            assert row.data_dependent != "never", row.name


def test_names_of_operators() -> None:
    aten = torch.ops.aten
    assert operator_of(aten.add_.Tensor) is TABLE["add"] and operator_of(aten.exp_.default).rule is elementwise
    assert operator_of(aten.gather.default) == Operator("gather")
    assert operator_of(aten.as_strided_.default) is TABLE["as_strided_"]
    assert row_of("exp").constants == "pointwise" and row_of("cat") is TABLE["cat"]


@torch.library.custom_op("narrower_tests::silu", mutates_args=(), schema="(Tensor x) -> Tensor")
def silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.linspace(0, 1, x.shape[1])[None, :, None, None]


silu.register_fake(torch.empty_like)


def test_an_operator_of_another_library_is_not_taken_for_that_of_the_same_name() -> None:
    own = torch.ops.narrower_tests.silu
    assert operator_of(own.default) == Operator("narrower_tests::silu")
    collector, _ = collected(own)
    assert {str(reason).split(" (")[0] for _, reason in collector.pins} == {"operator narrower_tests::silu is not known"}


def test_poolings_over_space() -> None:
    x = torch.zeros(1, 2, 3, 3)
    mean = TABLE["mean"]
    assert TABLE["max_pool2d"].is_pooling((x,)) and mean.is_pooling((x, [2, 3])) and mean.is_pooling((x, [-1, -2]))
    assert not mean.is_pooling((x, [1])) and not mean.is_pooling((x,)) and not TABLE["add"].is_pooling((x, x))
    assert {row.name for row in ROWS if "pool" in row.name} - {row.name for row in ROWS if row.pools == "always"} \
        == {"max_unpool2d", "max_unpool3d"}


def test_indices_that_are_masks_depend_on_values() -> None:
    x, mask = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    assert TABLE["index"].depends_on_data((x, [mask])) and not TABLE["index"].depends_on_data((x, [None, torch.tensor([1])]))
    assert TABLE["nonzero"].depends_on_data((x,)) and not TABLE["add"].depends_on_data((x, x))


ON_ZEROS: dict[str, tuple[object, ...]] = {  # further arguments of operators that say that they make zeros of zeros
    "sum": (), "mean": (), "amax": (), "std": (), "linalg_vector_norm": (), "clone": (), "argmax": (), "max": (),
    "_adaptive_avg_pool2d": ([2, 2],), "avg_pool2d": ([2, 2],), "flip": ([1],), "pixel_shuffle": (2,),
    "repeat": ([1, 1, 2, 1],), "roll": ([1], [1]), "upsample_bicubic2d": ([8, 8], True), "upsample_nearest2d": ([8, 8],),
    "im2col": ([2, 2], [1, 1], [0, 0], [1, 1]), "unfold": (1, 2, 1), "diag_embed": (),
    "reflection_pad2d": ([1, 1, 1, 1],), "fake_quantize_per_tensor_affine": (0.1, 0, -8, 7),
}


@pytest.mark.parametrize("name", ON_ZEROS)
def test_zeros_stay_zeros_and_constants_that_are_kept_stay(name: str) -> None:
    operator, constants = getattr(torch.ops.aten, name), TABLE[name].constants
    assert constants in ("kept", "zero", "zero if padded") and not operator(torch.zeros(1, 4, 4, 4), *ON_ZEROS[name]).any()
    if constants != "zero":
        out = operator(torch.full((1, 4, 4, 4), 0.33), *ON_ZEROS[name])
        torch.testing.assert_close(out, torch.full_like(out, 0.33))
