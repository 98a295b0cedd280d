"""Damaged files: JSON values and bytes with something replaced, removed or added."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 20), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


def damaged(data: Any, draw: st.DataObject) -> Any:
    """A valid JSON value with one thing in it replaced, removed or added, at a random depth."""
    here = draw.draw(st.sampled_from(["replace", "deeper", "deeper", "deeper"]))
    if here == "replace" or not isinstance(data, (dict, list)) or not data:
        return draw.draw(JSON)
    keys: list[Any] = sorted(data) if isinstance(data, dict) else list(range(len(data)))
    key = draw.draw(st.sampled_from(keys))
    what = draw.draw(st.sampled_from(["inside", "inside", "remove", "add"]))
    new: Any = dict(data) if isinstance(data, dict) else list(data)
    if what == "inside":
        new[key] = damaged(data[key], draw)
    elif what == "remove":
        del new[key]
    elif isinstance(new, dict):
        new[draw.draw(st.text(max_size=5))] = draw.draw(JSON)
    else:
        new.insert(key, draw.draw(JSON))
    return new


def damaged_bytes(content: bytes, data: Any) -> bytes:
    """A file with a byte changed, or some left out, put in or repeated, mostly near its beginning or end."""
    draw = data.draw
    end = draw(st.sampled_from([64, 512, len(content)]))
    at = draw(st.integers(0, min(end, len(content)) - 1))
    at = len(content) - 1 - at if draw(st.booleans()) else at
    what = draw(st.sampled_from(["change", "cut", "insert", "repeat", "end"]))
    some = draw(st.integers(1, 16))
    if what == "change":
        return content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at + 1:]
    if what == "cut":
        return content[:at] + content[at + some:]
    if what == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=16)) + content[at:]
    return content[:at + some] + content[at:] if what == "repeat" else content[:at]
