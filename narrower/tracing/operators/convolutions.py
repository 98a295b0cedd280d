"""The rule for convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..labels import Carried, Label, along, collapsed
from .interface import Call, RuleContext, at_channels, except_free_at, free_at, meet


def convolution(r: RuleContext, call: Call) -> Sequence[Carried]:
    """convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    x, w, bias, transposed, groups = *call.args[:3], call.args[6], call.args[8]
    out: Tensor = call.out
    c = r.of(x)
    w_in, w_out = r.weight(w, groups, transposed)
    inputs = free_at(c, 1)
    into = at_channels(r, inputs[0]) if inputs else None
    depthwise = r.depthwise(call)
    ids_out = None if w_out is None else w_out.ids.reshape(-1)
    r.role(w_out, "out")
    r.use(w_out, (x if transposed else out).numel() * w[0].numel())
    if depthwise:
        if into is not None:
            if ids_out is None:
                r.pin(inputs, "operand", "depthwise convolution whose weight cannot shrink")
            else:
                r.unite(into.reshape(-1, 1), ids_out.reshape(groups, -1))
            r.reads(Label(into, 0), x, c.pool)
        elif w_out is not None:
            r.pin([w_out], "operand", "depthwise convolution of a tensor without channels (an input or a constant)")
    else:
        if into is not None and w_in is not None:
            r.unite(into, w_in.ids.reshape(-1))
            r.reads(Label(into, 0), x, c.pool)
        elif into is not None:
            r.pin(inputs, "operand", "convolution whose weight cannot shrink")
        elif w_in is not None:
            r.pin([w_in], "operand", "reads a tensor without channels (an input or a constant)")
        r.role(w_in, "in")
        if groups > 1:
            if into is not None:
                r.tie(Label(into.reshape(groups, -1), 1))
            if ids_out is not None:
                r.tie(Label(ids_out.reshape(groups, -1), 1))
    labels = []
    if w_out is not None and ids_out is not None and not r.alone(w_out):
        labels.append(Label(along(ids_out, out.ndim, 1), 1))
        if bias is not None:
            meet(r, [(Carried((Label(ids_out, 0),)), (out.shape[1],)), (r.of(bias), bias.shape)], 1, "bias")
    for label in except_free_at(c, [1]):
        if label.free == 0:
            labels.append(collapsed(label, range(1, x.ndim), r.unite))
        elif x.shape[label.free] == out.shape[label.free] and not transposed:
            # channels laid along space (efficient channel attention): neighbours are mixed
            label = collapsed(label, [d for d in range(x.ndim) if d != label.free], r.unite)
            r.mix(call, label)
            labels.append(Label(label.ids, label.free))
        else:
            r.pin([label], "position", "convolution along the channels")
    return [Carried(tuple(labels))]
