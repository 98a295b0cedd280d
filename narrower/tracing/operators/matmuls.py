"""The rule for matrix products."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..labels import Carried, Label, collapsed
from .interface import Call, RuleContext, except_free_at, free_at, meet, tensors_in


def contract(r: RuleContext, a: Sequence[Label], b: Sequence[Label], what: str) -> None:
    """Unite the summed dimension of both sides (given flat); a side without channels pins the other."""
    if a and b:
        for label in b:
            r.unite(a[0].ids, label.ids)
    elif a or b:
        r.pin([*a, *b], "operand", f"{what} with a tensor that cannot shrink")


def matmul(r: RuleContext, call: Call) -> Sequence[Carried]:
    """mm, bmm, mv, and with a summand addmm, baddbmm: out = a @ b over (batch, m, k) and (batch, k, n)."""
    *summands, a, b = tensors_in(call.args)
    out: Tensor = call.out
    ca, cb = r.of(a), r.of(b)
    ka, kb = a.ndim - 1, max(0, b.ndim - 2)
    batch = range(a.ndim - 2)
    left = [collapsed(x, [a.ndim - 2], r.unite) for x in free_at(ca, ka)]
    right = [collapsed(x, [b.ndim - 1], r.unite) if b.ndim > 1 else x for x in free_at(cb, kb)]
    weight = next((x for x in (*cb.labels, *ca.labels) if x.axis), None)
    r.use_weight(weight, out.numel() * a.shape[ka])
    # the contracted dimension is the last but one of `right`: bring both to (batch..., k)
    contract(r, [Label(x.ids.reshape(*(x.ids.shape[d] for d in batch), -1), 0) for x in left],
             [Label(x.ids.reshape(*(x.ids.shape[d] for d in batch), -1), 0) for x in right], call.name)
    # A product of parameters is a weight: what it makes and reads shows where it is used. But x @ W.T is a layer, also of them.
    computed = ca.weight and cb.weight and not any(x.axis and x.axis.dim == 0 for x in free_at(cb, b.ndim - 1))
    for x in (*left, *right) if not computed else ():
        r.use_axis(call, x, "in")
    if left:
        r.sum_over(call, left[0])
    if left and ca.pool >= 0:
        r.read_maps(call, left[0], ca.pool)
    sides = []
    for c, k in ((ca, ka), (cb, kb)):
        kept = []
        for x in except_free_at(c, [k]):
            x = collapsed(x, [k], r.unite)
            if not computed:
                r.use_axis(call, x, "out")
            kept.append(Label(x.ids, x.free, x.axis if computed else None))
        sides.append(kept)
    labels = [x._replace(ids=x.ids if out.ndim == a.ndim else x.ids.squeeze(ka)) for x in sides[0] if x.free not in batch]
    labels += [x for x in sides[1] if x.free not in batch]
    shared = [(Carried(tuple(x for x in s if x.free in batch)), t.shape) for s, t in zip(sides, (a, b), strict=True)]
    if any(c.labels for c, _ in shared):
        pairs = [(c, tuple(n if d in batch else 1 for d, n in enumerate(shape))) for c, shape in shared]
        labels += meet(r, pairs, out.ndim, call.name)
    for summand in summands:
        result = [(Carried(tuple(labels)), out.shape), (r.of(summand), summand.shape)]
        labels = list(meet(r, result, out.ndim, "bias"))
    return [Carried(tuple(labels))]

