"""compose: a plan for a network, and one for the narrow network that it gives, as a single plan."""

from __future__ import annotations

import numpy as np

from ..errors import PlanError
from ..graph.selection import Kept
from ..preconditions import checked
from .plan import Plan, costed_plan


@checked
def compose(first: Plan, second: Plan) -> Plan:
    """The plan on the graph of `first` that removes what `first` removes, and then what `second` removes.

    `second` is for the network that `first` gives, from a graph of its own: `trace` the narrow network, repaired or not. So a
    network can be cut in steps, with scores and damages measured anew after each, and the result can still be narrowed from the
    dense network, verified, and reconstructed against it.

    Raises PlanError if `second` is not for that network, or removes channels alone that the first graph joins with others.
    """
    before, after = Kept(first.graph, first.keep), Kept(second.graph, second.keep)
    keep = {}
    for group in first.graph.free:
        stays, goes = np.zeros((2, group.size), dtype=bool)
        for s in group.slices:
            here = stays_along(s.tensor, s.dim, before, after)[s.positions]
            stays[s.channels[here]] = True
            goes[s.channels[~here]] = True
        if (stays & goes).any():
            raise PlanError(f"group {group.name!r}: the second plan removes channel {int((stays & goes).argmax())} in some "
                            "layers only; the first graph removes it in all or none")
        keep[group.name] = np.nonzero(stays)[0]
    composed = Kept(first.graph, keep)
    for tensor, cut in after.cuts.items():
        for dim, stays in cut.items() if tensor in first.graph.shapes else ():  # a repair gives biases to layers that had none
            if composed.positions(tensor, dim).size != stays.size:
                raise PlanError(f"the second plan removes channels of {tensor} (dimension {dim}) that stay whole in the first "
                                "graph: trace both networks alike")
    return costed_plan(first.graph, keep, {"steps": [*first.request.get("steps", [first.request]), second.request]})


def stays_along(tensor: str, dim: int, before: Kept, after: Kept) -> np.ndarray:
    """For each dense position along a dimension of a tensor whether it stays in both cuts. Bool, of all blocks in a row."""
    positions = before.positions(tensor, dim)
    blocks, narrow = positions.shape
    shape = after.graph.shapes.get(tensor, ())
    if len(shape) <= dim or shape[dim] != narrow:
        raise PlanError(f"the second plan is not for the network that the first one gives: there {tensor} has {narrow} entries "
                        f"along dimension {dim}, its shape here is {shape}")
    size = before.graph.shapes[tensor][dim]
    stays = np.zeros((blocks, size), dtype=bool)
    np.put_along_axis(stays, positions, after.axis_mask(tensor, dim), axis=1)
    return stays.reshape(-1)
