"""Matrix products of activations, counted alike in every forward of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from .calls import tensors_in

FIRST_FACTOR = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}


class Products:
    """Numbers the products none of whose factors is a parameter or buffer (`held` by the model), or a view of one."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        self.memory = {t.untyped_storage()._cdata for t in held}
        self.count = 0

    def number(self, name: str, args: Sequence[Any]) -> int | None:
        """To be asked for every call of a forward, once."""
        if name not in FIRST_FACTOR or any(
                t.untyped_storage()._cdata in self.memory for t in tensors_in(args)[FIRST_FACTOR[name]:]):
            return None
        self.count += 1
        return self.count - 1
