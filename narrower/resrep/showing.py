"""The state of a training with compactors, group by group, for people."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..graph.selection import Keep


def group_rows(norms: Mapping[str, np.ndarray], chosen: Mapping[str, np.ndarray], kept: Keep) -> list[tuple[str, ...]]:
    """A header, and a row for each group.

    `norms` [C], `chosen` [C]: of each channel the norm of its rows, and whether it is to go. `kept`: the channels that stay.
    The norms shown are those of channels that are not chosen.
    """
    rows: list[tuple[str, ...]] = [("group", "channels", "chosen", "at zero", "least norm", "mean norm")]
    for name, found in norms.items():
        stay = found[~chosen[name]]
        shown = (f"{stay.min():.2f}", f"{stay.mean():.2f}") if len(stay) else ("", "")
        rows.append((name, str(len(found)), str(int(chosen[name].sum())), str(len(found) - len(kept[name])), *shown))
    return rows
