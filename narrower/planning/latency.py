"""LatencyTable: times measured on a machine, and the milliseconds of a network of any widths that follow from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..errors import PlanError
from ..graph.types import Graph

FORMAT = 1
CLASSES = (1, 2, 4, 8, 16, 32)  # the largest power of two that divides a width, up to 32
NOISY_SPREAD, NOISY_ERROR = 0.25, 0.1
LEAST_SHARE = 0.2  # of the dense sizes: layers are measured down to a quarter
LEAST_POWER = 0.05
PULL = 0.02


class LayerKind(NamedTuple):
    """What the time of a layer depends on, apart from its widths.

    `operator`: conv, conv_transpose or linear. `size`: the input's, in space; for a linear layer, rows per sample. `groups`: of
    the convolution; 0 where each channel is a group of its own.
    """

    operator: str
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    size: tuple[int, ...] = ()

    @property
    def family(self) -> tuple[Any, ...]:
        """Kinds that run in the same code, on images of other sizes."""
        return self.operator, self.kernel, self.stride, min(self.groups, 2)


class Layer(NamedTuple):
    """A layer of the dense network: its weight and the sizes of that in dimensions 0 and 1, the number of its kind.

    `calls` per forward. `positions`: elements written per out channel.
    """

    tensor: str
    sizes: tuple[int, int]
    kind: int
    calls: int
    positions: int


class Point(NamedTuple):
    """Milliseconds of one layer of a kind whose weight has these sizes in dimensions 0 and 1."""

    kind: int
    sizes: tuple[int, int]
    ms: float


class Steps(NamedTuple):
    """Milliseconds at neighbouring widths along one dimension of the weight, from `widths[0]`, a round number, downwards."""

    kind: int
    dim: int
    widths: tuple[int, ...]
    ms: tuple[float, ...]


class Whole(NamedTuple):
    """A whole network: the sizes of each layer's weight, milliseconds, and the spread of these (quartiles over median)."""

    sizes: Mapping[str, tuple[int, int]]
    ms: float
    spread: float


@dataclass(frozen=True)
class LatencyTable:
    """Measured times of layers and of whole networks, and the prediction for a network of other widths.

    A layer takes exp(a + b x + c y + d x y) milliseconds, where x and y are the logarithms of the sizes of its weight in
    dimensions 0 and 1, relative to the dense ones: a product of powers, with an interaction. Sizes are first rounded up to the
    multiples that the runtime computes in, and times get a factor where a width is no such multiple. a to d are fitted to
    `points`, multiples and factors come from `steps`. A network takes the sum, times a factor, a time for each activation that
    its layers write, and a constant: these three are fitted to `networks`, without negative values.

    Args:
        place: what was measured: runtime, device, threads, dtype, shape, clock, machine.
        kinds: the kinds of its layers.
        layers: its layers, by their weights.
        points: times of layers at some widths.
        steps: times at neighbouring widths, which show the multiples that the runtime likes.
        networks: times of whole networks.
    """

    place: Mapping[str, Any]
    kinds: tuple[LayerKind, ...]
    layers: tuple[Layer, ...]
    points: tuple[Point, ...]
    steps: tuple[Steps, ...]
    networks: tuple[Whole, ...]

    @property
    def tensors(self) -> Sequence[str]:
        """The weights of the layers."""
        return [layer.tensor for layer in self.layers]

    @property
    def rest_ms(self) -> float:
        """What a forward takes apart from its layers."""
        return self.whole_fit[2]

    def times(self, layers: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Milliseconds of some layers, by their numbers, with weights of these `sizes` [layers, 2]."""
        factor, per_element, _ = self.whole_fit
        written = self.written[layers] * self.outputs(layers, sizes)
        return factor * self.alone(layers, sizes) + per_element * written

    def predict(self, sizes: Mapping[str, tuple[int, int]]) -> float:
        """Milliseconds of a network with weights of these sizes, in dimensions 0 and 1."""
        given = np.array([sizes[t] for t in self.tensors], dtype=float).reshape(-1, 2)
        return float(self.times(np.arange(len(given)), given).sum()) + self.rest_ms

    def alone(self, layers: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Milliseconds of layers by themselves: before the comparison with whole networks."""
        coef, multiples, factors, calls, dense = (values[layers] for values in self.by_layer)
        n = np.ceil(sizes / multiples - 1e-9) * multiples
        classes = np.log2(np.gcd(np.maximum(1, np.rint(sizes)).astype(np.int64), CLASSES[-1])).astype(np.int64)
        slower = np.take_along_axis(factors, classes[..., None], axis=2)[..., 0].max(axis=1)
        return calls * slower * np.exp((coef * log_terms(n / dense)).sum(axis=1))

    def outputs(self, layers: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """The out channels of layers. A transposed convolution has them in dimension 1, for each of its groups.

        A depthwise one has as many groups as there are entries in dimension 0.
        """
        turned, groups = self.turned[layers], self.turned_groups[layers]
        return np.where(turned, sizes[:, 1] * np.where(groups, groups, sizes[:, 0]), sizes[:, 0])

    @cached_property
    def turned(self) -> np.ndarray:
        return np.array([self.kinds[layer.kind].operator == "conv_transpose" for layer in self.layers], dtype=bool)

    @cached_property
    def turned_groups(self) -> np.ndarray:
        return np.array([self.kinds[layer.kind].groups for layer in self.layers])

    @cached_property
    def written(self) -> np.ndarray:
        return np.array([layer.calls * layer.positions for layer in self.layers], dtype=float)

    @cached_property
    def by_layer(self) -> tuple[np.ndarray, ...]:
        """For each layer its coefficients, the multiples of both dimensions, a factor for each class of width, calls, sizes."""
        chosen = [layer.kind for layer in self.layers]
        multiples = np.array([self.liked(k) for k in chosen], dtype=float).reshape(-1, 2)
        factors = np.array([[self.family_steps(k, dim)[1] for dim in (0, 1)] for k in chosen]).reshape(-1, 2, len(CLASSES))
        dense = np.array([layer.sizes for layer in self.layers], dtype=float).reshape(-1, 2)
        points = [[p for p in self.points if p.kind == k] for k in range(len(self.kinds))]
        coef = np.array([fitted(points[k], m, own) for k, m, own in zip(chosen, multiples, dense, strict=True)]).reshape(-1, 4)
        return coef, multiples, factors, np.array([layer.calls for layer in self.layers], dtype=float), dense

    def liked(self, kind: int) -> tuple[int, int]:
        """The multiples that the runtime computes in, along dimensions 0 and 1 of the weight of a kind of layer."""
        return self.family_steps(kind, 0)[0], self.family_steps(kind, 1)[0]

    def family_steps(self, kind: int, dim: int) -> tuple[int, tuple[float, ...]]:
        """The multiple, and the factor of each class of width, as measured on a layer of the same family; else 1."""
        family = self.kinds[kind].family
        found = next((s for s in self.steps if s.dim == dim and self.kinds[s.kind].family == family), None)
        return steps_read(found.widths, found.ms) if found else (1, (1.0,) * len(CLASSES))

    def multiples(self, graph: Graph, blocks: int = 2) -> dict[str, int]:
        """For each free group the multiple that all layers with its channels like, halved until `blocks` of it fit in there.

        With 1 a group of a single multiple stays whole. With 2 every group can shrink.
        """
        kinds = {layer.tensor: layer.kind for layer in self.layers}
        out = {}
        for group in graph.free:
            most = 1
            for s in group.slices:
                if s.tensor in kinds and s.dim < 2:
                    each = max(1, len(s.positions) // (s.blocks * group.size))  # positions that a channel has there
                    liked = self.liked(kinds[s.tensor])[s.dim]
                    most = max(most, liked // math.gcd(liked, each))
            while most > 1 and most * blocks > group.size:
                most //= 2
            out[group.name] = most
        return out

    @cached_property
    def whole_fit(self) -> tuple[float, float, float]:
        """The factor of the layers' times, milliseconds per element written, and the constant: from the whole networks."""
        rows, ms = [], []
        every = np.arange(len(self.layers))
        for network in self.networks:
            sizes = np.array([network.sizes[t] for t in self.tensors], dtype=float).reshape(-1, 2)
            rows.append([self.alone(every, sizes).sum(), float((self.written * self.outputs(every, sizes)).sum()), 1.0])
            ms.append(network.ms)
        if not rows:
            return 1.0, 0.0, 0.0
        return fitted_whole(np.array(rows), np.array(ms))

    @property
    def errors(self) -> list[float]:
        """How far the prediction is from each measured network, as a fraction of its time."""
        return [self.predict(n.sizes) / n.ms - 1 for n in self.networks]

    @property
    def spread(self) -> float:
        """How far the times of one network lie apart: quartiles over median, the largest of the measured networks."""
        return max((n.spread for n in self.networks), default=0.0)

    @property
    def error(self) -> float:
        """The largest of `errors`, without its sign."""
        return max(map(abs, self.errors), default=0.0)

    @property
    def noisy(self) -> bool:
        """The times say little: they spread too far, or contradict each other."""
        return self.spread > NOISY_SPREAD or self.error > NOISY_ERROR

    def check(self, graph: Graph) -> None:
        """Raises PlanError if the table is of another network."""
        for layer in self.layers:
            shape = graph.shapes.get(layer.tensor)
            if shape is None or tuple(shape[:2]) != layer.sizes:
                raise PlanError(f"the latency table is of another network: its weight {layer.tensor!r} of sizes {layer.sizes} "
                                f"{'does not exist' if shape is None else f'has {tuple(shape[:2])}'} here")

    def __str__(self) -> str:
        where = ", ".join(f"{k} {v}" for k, v in self.place.items())
        lines = [f"{len(self.layers)} layers of {len(self.kinds)} kinds, {len(self.points)} times of layers ({where})"]
        for kind in dict.fromkeys(self.kinds[s.kind].family for s in self.steps):
            k = next(i for i, other in enumerate(self.kinds) if other.family == kind)
            groups = {0: ", depthwise", 1: ""}.get(self.kinds[k].groups, ", grouped")
            name = f"{kind[0]} {'x'.join(map(str, kind[1]))} stride {'x'.join(map(str, kind[2]))}{groups}"
            lines.append(f"{name}: multiples of {' and '.join(map(str, self.liked(k)))}")
        lines += [f"network: {n.ms:.3f} ms measured, spread {n.spread:.0%}, prediction {e:+.1%}"
                  for n, e in zip(self.networks, self.errors, strict=True)]
        if self.noisy:
            lines.append(f"too noisy: spread up to {self.spread:.0%}, prediction off by up to {self.error:.0%}; stop other "
                         "programs, or measure longer")
        return "\n".join(lines)

    def to_json(self) -> str:
        """All measurements; `from_json` reads them again."""
        return json.dumps({
            "format": FORMAT, "place": dict(self.place),
            "kinds": [k._asdict() for k in self.kinds], "layers": [k._asdict() for k in self.layers],
            "points": [k._asdict() for k in self.points], "steps": [k._asdict() for k in self.steps],
            "networks": [{**n._asdict(), "sizes": dict(n.sizes)} for n in self.networks],
        })

    @staticmethod
    def from_json(text: str) -> LatencyTable:
        """What `to_json` wrote. Raises PlanError for damaged text or another version."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise PlanError(f"the latency table has format {data['format']}, this version of narrower reads {FORMAT}")
            table = LatencyTable(
                dict(data["place"]), tuple(kind_from(k) for k in data["kinds"]), tuple(layer_from(k) for k in data["layers"]),
                tuple(Point(p["kind"], (p["sizes"][0], p["sizes"][1]), float(p["ms"])) for p in data["points"]),
                tuple(Steps(s["kind"], s["dim"], tuple(s["widths"]), tuple(s["ms"])) for s in data["steps"]),
                tuple(Whole({t: (n[0], n[1]) for t, n in w["sizes"].items()}, float(w["ms"]), float(w["spread"]))
                      for w in data["networks"]))
            times = [*(p.ms for p in table.points), *(n.ms for n in table.networks), *(m for s in table.steps for m in s.ms)]
            named = [*(n.kind for n in table.layers), *(p.kind for p in table.points), *(s.kind for s in table.steps)]
            if not np.isfinite(times).all() or min(times, default=1.0) <= 0 or not {*named} <= {*range(len(table.kinds))}:
                raise PlanError("the latency table is damaged: a time is no positive number, or a kind is missing")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            raise PlanError(f"this is not a latency table ({type(e).__name__}: {e})") from e
        return table


def kind_from(data: Mapping[str, Any]) -> LayerKind:
    """A kind as written in a file. Raises KeyError or TypeError for something else."""
    kernel, stride, padding, dilation, size = (
        tuple(int(n) for n in data[name]) for name in ("kernel", "stride", "padding", "dilation", "size"))
    return LayerKind(str(data["operator"]), kernel, stride, padding, dilation, int(data["groups"]), size)


def layer_from(data: Mapping[str, Any]) -> Layer:
    """A layer as written in a file. Raises KeyError or TypeError for something else."""
    n0, n1 = data["sizes"]
    return Layer(str(data["tensor"]), (int(n0), int(n1)), int(data["kind"]), int(data["calls"]), int(data["positions"]))


def log_terms(ratios: np.ndarray) -> np.ndarray:
    """1, x, y and x y of the logarithms x and y of `ratios` [n, 2]. The product is cut off where nothing was measured."""
    logs = np.log(np.maximum(ratios, 1e-3))
    near = np.clip(logs, math.log(LEAST_SHARE), 0.0)
    return np.stack([np.ones(len(logs)), logs[:, 0], logs[:, 1], near[:, 0] * near[:, 1]], axis=1)


def fitted(points: Sequence[Point], multiples: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """Coefficients of a layer with `dense` sizes: least squares in logarithms, over the points of its kind.

    Points between `LEAST_SHARE` of its sizes and all count fully, others the less the farther they are. A weak pull towards a
    time proportional to both sizes decides what no point does. With every size that shrinks the time does.
    """
    if not points:
        return np.array([-np.inf, 0.0, 0.0, 0.0])
    sizes = np.ceil(np.array([p.sizes for p in points]) / multiples) * multiples
    ratios = sizes / (np.ceil(dense / multiples) * multiples)
    own = ((ratios <= 1.001) & (ratios >= LEAST_SHARE)).all(axis=1)
    weight = np.where(own, 1.0, 0.1 / (1 + (np.log2(ratios) ** 2).sum(axis=1)))
    ms = np.log([p.ms for p in points])
    level = float((weight * ms).sum() / weight.sum())
    rows = np.concatenate([weight[:, None] * log_terms(sizes / dense), PULL * np.diag([0.0, 1.0, 1.0, 1.0])])
    wanted = np.concatenate([weight * (ms - level), PULL * np.array([0.0, 1.0, 1.0, 0.0])])
    found = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    found[1:3] = np.maximum(found[1:3], LEAST_POWER)
    most = (found[1:3].min() - LEAST_POWER) / -math.log(LEAST_SHARE)
    found[3] = np.clip(found[3], -0.3, most)
    found[0] += level
    return np.asarray(found)


def fitted_whole(rows: np.ndarray, ms: np.ndarray) -> tuple[float, float, float]:
    """The factors of the three columns, none negative, with the least squared relative error.

    A weak pull towards (1, 0, 0) decides where few networks were measured.
    """
    from scipy.optimize import nnls

    size = np.maximum(np.abs(rows / ms[:, None]).max(axis=0), 1e-30)
    table = np.concatenate([rows / ms[:, None] / size, PULL * np.eye(3)])
    wanted = np.concatenate([np.ones(len(ms)), [PULL * size[0], 0.0, 0.0]])
    factor, per_element, rest = nnls(table, wanted)[0] / size
    return float(factor), float(per_element), float(rest)


def steps_read(widths: Sequence[int], ms: Sequence[float]) -> tuple[int, tuple[float, ...]]:
    """The multiple that a runtime computes in, and the factor of each class of width.

    `widths` are a round one, that minus 1, 2, 4 and so on, and a last one. A width counts as a multiple if it saves at least
    half of what the line from the first to the last does. A narrower one costs what the next multiple does, times its factor.
    """
    top, low = ms[0], ms[-1]
    slope = (top - low) / (widths[0] - widths[-1])
    found = {widths[0] - w: t for w, t in zip(widths[1:-1], ms[1:-1], strict=True)}
    multiple = next((c for c in sorted(found) if slope > 0 and all(
        top - t >= 0.5 * slope * k for k, t in found.items() if k >= c)), max(found, default=1))
    factors = tuple(max(1.0, found[c] / top) if c < multiple and c in found else 1.0 for c in CLASSES)
    return multiple, factors
