"""What mkdocs does besides: mathematics becomes MathML, and the files that pages link to come along.

Pages can be read in a checkout as well: a link is relative to its file, and may lead out of `docs/`. What it leads to is copied
into the site under its path in the repository. Mathematics stands between dollars. MathML needs no script and no font.
"""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside `docs/` that pages link to, and those that these link to."""
    pages = [DOCS / f.src_uri for f in files.documentation_pages()]
    for page in pages:
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve()
            place = place_of(path)
            if path.is_file() and DOCS not in path.parents and files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(path)))
                pages += [path] if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to the places in the site."""
    own = Path(page.file.abs_src_path)

    def led(found: re.Match[str]) -> str:
        place = place_of((own.parent / found[1]).resolve())
        return os.path.relpath(place, os.path.dirname(place_of(own)) or ".")

    return LINK.sub(led, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Turn formulas into MathML."""
    return FORMULA.sub(as_mathml, html)


def place_of(path: Path) -> str:
    """Where a file of the repository is in the site: pages under their paths in `docs/`, the README as the first of them."""
    if path == ROOT / "README.md":
        return "index.md"
    return path.relative_to(DOCS if DOCS in path.parents else ROOT).as_posix()


def as_mathml(found: re.Match[str]) -> str:
    formula, block = html.unescape(found[2]), found[1] == "div"
    made = convert(formula, display="block" if block else "inline")
    if "\\" in made:
        raise PluginError(f"a formula has a command that is not known: {formula}")
    return f'<div class="formula">{made}</div>' if block else made
