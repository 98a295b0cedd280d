"""The page: sections into HTML."""

from __future__ import annotations

from importlib.resources import files

from ..extras import optional
from .facts import COSTS, Facts
from .sections import sections

TEMPLATE = "page.html.jinja"


def render(facts: Facts) -> tuple[str, dict[str, bytes]]:
    """The HTML page of a run, which loads nothing, and its pictures: {name of the file: SVG}.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    jinja2 = optional("jinja2")
    optional("matplotlib")
    made = sections(facts)
    text = files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    page = template.render(facts=facts, sections=made, tiles=tiles(facts))
    return page, {f"{s.picture.name}.svg": s.picture.svg for s in made if s.picture}


def tiles(facts: Facts) -> list[tuple[str, str, str]]:
    """What the run came to, in a few numbers: (what, the number, what it was)."""
    measured = facts.measured
    if not measured:
        return []
    dense, narrow = measured["dense"], measured["narrow"]
    found = []
    if (name := facts.headline) in dense and name in narrow:
        found.append((facts.headline_title, f"{narrow[name]:.2f} %", f"dense {dense[name]:.2f} %"))
    for key, title, scale, unit, _ in COSTS:
        if dense.get(key) and key in narrow:
            values = f"{dense[key] / scale:,.2f} → {narrow[key] / scale:,.2f} {unit}"
            found.append((title, f"{narrow[key] / dense[key]:.1%}", values))
    return found
