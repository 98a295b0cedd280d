"""What a trace notes of each call, and which of a call's arguments follow the widths."""

from __future__ import annotations

from typing import Any, NamedTuple

from .labels import Carried


class Unseen(Exception):
    """Meta tensors hide what the forward does."""


class Event(NamedTuple):
    """One call of a forward: the plain numbers that it was given, the shapes that came out, and what they carry; the module
    that was running, and what the inputs carry (a parameter: its name)."""

    name: str
    numbers: tuple[Any, ...]
    shapes: list[tuple[int, ...]]
    carried: list[Carried]
    module: str = ""
    inputs: tuple[Carried | str, ...] = ()


# sizes among the arguments of these follow from the widths; the shapes that come out are compared instead
SIZED = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "slice", "split", "split_with_sizes", "empty", "zeros",
    "ones", "rand", "randn", "arange", "new_empty", "new_zeros", "new_ones", "empty_strided",
    "new_empty_strided", "as_strided_", "repeat",
}
SIZED_UNTIL = {"native_group_norm": 6, "native_layer_norm": 4}
MADE = {"lift_fresh", "lift_fresh_copy"}
FILLED = {"full": 1, "new_full": 2, "full_like": 1}
