"""Collect the facts of the dense forward: equations between channel ids, ties, pins, uses, and a log of its calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..graph.types import PinCode, PinReason, Role
from ..surgery.copying import loose_tensors
from .interpreter import Event, LabelInterpreter, mark_as_given
from .labels import Axes, Axis, Carried, Ids, Label, PaddingAxis, fibres
from .operators.data_dependent import Answer
from .operators.interface import Call, at_channels, free_at
from .recorder import CARRIED

MANY = 50_000  # no layer has so many channels: these are numbers that become filters later, as in conditional convolutions
PIECES = ("split", "split_with_sizes", "unsafe_split", "slice", "unbind", "select")


class ConstraintCollector(LabelInterpreter):
    """Collects the equations, ties, pins and uses of a dense forward."""

    def __init__(self, model: nn.Module, axes: Axes, view_dims: Mapping[str, int],
                 answers: Sequence[Answer] | None = None) -> None:
        super().__init__(model, axes, answers)
        mark_as_given(loose_tensors(model))  # once: the probes run the same copy of the model
        self.view_dims = view_dims  # the source line of a view that splits channels -> the dimension that shrinks with them
        self.pairs: list[tuple[Ids, Ids]] = []
        self.ties: list[Ids] = []
        self.pins: list[tuple[Ids, PinReason]] = []
        self.mixers: list[tuple[str, int, int, Ids]] = []
        self.products: list[tuple[int, tuple[int, ...], Ids]] = []
        self.roles: set[tuple[Axis, Role]] = set()  # a tied weight may make channels here and read them there
        self.macs: Counter[str] = Counter()  # by weight
        self.depthwise_calls: set[int] = set()
        self.computed: dict[int, Axis] = {}  # convolutions by number whose weight is computed, and which axis of it they read
        self.lost: dict[str, str] = {}  # modules whose weight is computed so that its channels could not be followed, and why
        self.maps: dict[int, tuple[int | None, int, Ids]] = {}
        self.map_readers: Counter[int] = Counter()
        self.map_alive: list[Tensor] = []
        self.pool_inputs: dict[int, Ids] = {}
        self.spreads: dict[int, list[tuple[int, ...]]] = {}  # for each label of a view
        self.splits: dict[int, tuple[tuple[int, ...], Ids, str]] = {}
        self.pieces: dict[int, list[tuple[Label, ...]]] = {}  # of each step that takes channels apart
        self.log: list[Event] = []
        self.returned: dict[int, str] = {}  # activation -> the first module that returned it

    def __enter__(self) -> ConstraintCollector:
        register = nn.modules.module
        self.running: list[str] = []
        self.hooks = [register.register_module_forward_pre_hook(self.note_call),
                      register.register_module_forward_hook(self.note_return)]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*exception)

    def note_call(self, module: nn.Module, args: Any) -> None:
        self.running.append(self.modules.get(id(module), ""))

    def note_return(self, module: nn.Module, args: Any, out: Any) -> None:
        self.running.pop()
        number = self.number_of(out) if isinstance(out, Tensor) else None
        if number is not None and id(module) in self.modules:
            self.returned.setdefault(number, self.modules[id(module)])

    def on_call(self, call: Call, outs: Sequence[Tensor], carried: Sequence[Carried]) -> None:
        for label in free_at(self.of(call.args[0]), 1)[:1] if call.pool >= 0 else []:
            self.pool_inputs[call.pool] = at_channels(self, label)
        shapes = [tuple(t.shape) for t in outs]
        running = self.running[-1] if self.running else ""
        if (call.name == "convolution" or call.operator.matrix_product) and not carried[0].weight:
            self.lost.update({running or self.where(): c.lost for c in self.given if isinstance(c, Carried) and c.lost})
        self.log.append(Event(call.name, self.numbers(call), shapes, list(carried)[: len(outs)], running, self.given))
        self.record(call, outs, any(c.labels for c in carried))
        if call.name in PIECES:
            self.pieces[len(self.steps) - 1] = [c.labels for c in carried[: len(outs)]]

    def unite(self, a: Ids, b: Ids) -> None:
        if a is not b:
            x, y = np.broadcast_arrays(a, b)
            if x.size > 4096:  # whole weights: most ids are paired with themselves
                differ = x != y
                x, y = x[differ], y[differ]
            self.pairs.append((x.reshape(-1), y.reshape(-1)))

    def tie(self, label: Label) -> None:
        rows = fibres(label)
        if rows.size > MANY:
            self.pin([label], "position", f"a weight of {rows.size} numbers in one dimension")
        elif len(rows) > 1:
            self.ties.append(rows)

    def pin(self, labels: Sequence[Label], code: PinCode, text: str) -> None:
        reason = PinReason(code, text, self.where())
        self.pins += [(label.ids.reshape(-1), reason) for label in labels]

    def mix(self, call: Call, label: Label) -> None:
        if any(m[:2] == (call.name, call.number) for m in self.mixers[-2:]):
            self.pin([label], "mixing", f"{call.name} mixes channels along two dimensions")
            return
        self.mixers.append((call.name, call.number, label.free, at_channels(self, label)))

    def sum_over(self, call: Call, label: Label) -> None:
        if call.product >= 0:
            self.products.append((call.product, label.ids.shape, label.ids.reshape(-1)))

    def use_axis(self, call: Call, label: Label | None, role: Role) -> None:
        if label is not None and label.axis is not None:
            self.roles.add((label.axis, role))
            if role == "in" and call.name == "convolution" and hasattr(call.args[1], CARRIED):
                self.computed[call.number] = label.axis

    def use_weight(self, label: Label | None, macs: float) -> None:
        if label is not None and label.axis is not None:
            self.macs[label.axis.tensor] += round(macs)

    def read_maps(self, call: Call, label: Label, pool: int) -> None:
        """Note where the maps can be observed: at the call that reads them, or at the input of the pooling before it."""
        source = call.args[0]
        key = pool if pool >= 0 else -1 - id(source)
        self.map_readers[key] += 1
        if pool in self.pool_inputs:
            self.maps.setdefault(key, (None, pool, self.pool_inputs[pool]))
        elif pool < 0 and key not in self.maps:
            self.maps[key] = (call.number, -1, label.ids)
            self.map_alive.append(source)

    def is_depthwise(self, call: Call) -> bool:
        if depthwise := bool(call.args[8] > 1 and call.args[8] == call.args[0].shape[1]):
            self.depthwise_calls.add(call.place)
        return depthwise

    def padding_ids(self, call: Call, size: int, part: int) -> Ids:
        return self.axes.ids(PaddingAxis(call.name, call.number, part), size)

    def spread_dims(self, call: Call, dims: Sequence[int], ids: Ids) -> tuple[int, ...]:
        real = tuple(d for d in dims if (ids != ids.take([0], axis=d)).any())
        self.spreads.setdefault(call.place, []).append(real)
        return real

    def view_dim(self, call: Call, dims: Sequence[int], ids: Ids) -> int:
        where = self.where()
        self.splits[call.place] = tuple(dims), ids, where
        return self.view_dims.get(where, dims[-1])
