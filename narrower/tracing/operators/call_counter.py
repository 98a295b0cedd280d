"""The numbers that identify the calls of a forward in a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .interface import Call, address, tensors_in
from .table import operator_of


class CallCounter:
    """Numbers the calls of one forward: the same call has the same numbers under every dispatch mode.

    `held` are the model's parameters and buffers: a matrix product with one of them, or with a view of one, is a layer.
    All other products are numbered.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        self.memory = {address(t) for t in held}
        self.by_name: Counter[str] = Counter()
        self.calls = self.pools = self.products = 0

    def again(self) -> CallCounter:
        """A counter for another forward of the same model."""
        counter = CallCounter()
        counter.memory = self.memory
        return counter

    def count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Call:
        """The next call of the forward, with its numbers. Must be called once for every call."""
        operator = operator_of(func)
        pool = product = -1
        if operator.pools != "never" and operator.is_pooling(args):
            pool, self.pools = self.pools, self.pools + 1
        if operator.matrix_product and not any(address(t) in self.memory for t in tensors_in(args)[-2:]):
            product, self.products = self.products, self.products + 1
        number, place = self.by_name[operator.name], self.calls
        self.by_name[operator.name], self.calls = number + 1, place + 1
        return Call(operator, args, kwargs or {}, number, place, pool, product)
