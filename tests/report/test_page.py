"""The page of a run: whole, alone, and about this run."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
from support.html import check_page
from support.run_folders import ROWS, make_facts, resrep_facts

import narrower
from narrower.report import PICTURE_NAMES, render


def test_a_page_is_whole_and_loads_nothing() -> None:
    html, pictures = render(resrep_facts())
    page = check_page(html)
    assert "run <1>" in page.text  # the name of the folder is text and no markup
    assert set(pictures) == {f"{name}.svg" for name in PICTURE_NAMES if name != "maps"}
    assert html.count("<svg") == len(pictures) and len(html) < 5e6
    assert all(ElementTree.fromstring(svg).tag.endswith("svg") for svg in pictures.values())
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html
    assert "Left out" not in page.text


def test_a_page_shows_the_figures_of_the_run() -> None:
    text = check_page(render(make_facts(layers=(), sensitivity=None, rows=[ROWS[0], *ROWS[-2:]]))[0]).text
    for figure in ("86.51 %", "dense 88.29 %", "81.27 %", "50.0%", "4.00 → 2.00 M", "net.py:Net"):
        assert figure in text


def test_what_a_run_lacks_is_named_and_the_rest_is_there() -> None:
    measured = {key: value for key, value in ROWS[-1].items() if key != "layer_times"}
    bare = make_facts(rows=[ROWS[0], measured], layers=(), widths={}, scores={}, sensitivity=None, graph=None,
                      absent={"layers": "of layers", "sensitivity": "of damage", "graph": "of the graph"})
    html, pictures = render(bare)
    text = check_page(html).text
    assert not pictures
    assert text.count("Left out") == 8 and "of damage" in text and "of layers" in text and "nothing was trained" in text
    assert "86.51 %" in text


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(narrower.MissingExtraError, match=rf"{package} is missing .*narrower\[report\]"):
        render(make_facts())
