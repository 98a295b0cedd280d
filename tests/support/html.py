"""What an HTML page is made of, by the parser of the standard library."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "hr", "input"}
LOADING = {"src", "href", "xlink:href", "data", "poster", "srcset", "action"}


class Page(HTMLParser):
    """`open`: tags that wait for their end. `loads`: addresses outside the page. `ids`: of all elements. `text`: to read."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data

    def note(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in LOADING and not (value or "").startswith(("#", "data:")):
                self.loads.append(value or "")


def check_page(html: str) -> Page:
    """A page that is whole, loads nothing, runs nothing, and whose pictures are XML."""
    page = Page(html)
    assert not page.open, f"not closed: {page.open}"
    assert not page.loads and "script" not in html and "@import" not in html
    assert not re.findall(r"url\((?!#)", html)
    assert len(page.ids) == len(set(page.ids)), "an id twice"
    assert not set(re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', html)) - set(page.ids), "a reference to nothing"
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
    return page
