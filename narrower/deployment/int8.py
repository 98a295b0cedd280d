"""int8: static post-training quantisation of an ONNX file by ONNX Runtime's own tool."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import ExportError
from ..extras import optional
from ..inputs import model_inputs
from .formats import by_name


def quantize(source: Path, target: Path, module: nn.Module, batches: Iterable[Any]) -> int:
    """Write `target`, the network of `source` with 8-bit weights (per channel) and activations (QDQ form).

    The range of each activation is the smallest that holds its values on `batches`. Weights use 7 bits: processors without VNNI
    add products of full 8-bit values in 16 bits, and these overflow.

    Returns the number of batches. Raises ExportError if there are none, or if the tool fails on the network.
    """
    tool = optional("onnxruntime.quantization")
    session = optional("onnxruntime").InferenceSession(str(source), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    seen = 0

    class Reader(tool.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            nonlocal seen
            batch = next(self.left, None)
            if batch is None:
                return None
            seen += 1
            return by_name(model_inputs(batch, module), names)

    try:
        tool.quantize_static(str(source), str(target), Reader(), quant_format=tool.QuantFormat.QDQ, per_channel=True,
                             reduce_range=True, activation_type=tool.QuantType.QUInt8, weight_type=tool.QuantType.QInt8)
    except Exception as error:
        if not seen:
            raise ExportError("no calibration batch: int8 needs some images, to see how large activations get") from error
        raise
    return seen


def relative_error(expected: Tensor, found: Tensor) -> float:
    """The root of the summed squared difference, as a fraction of that of the expected values."""
    a, b = expected.detach().cpu().double(), found.detach().cpu().double()
    return ((a - b).norm() / a.norm().clamp_min(1e-300)).item() if a.numel() else 0.0
