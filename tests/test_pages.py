"""README.md and the pages of docs/ are run: their Python blocks from top to bottom, their `narrower ...` commands, their links,
and make targets.

Every page goes on from what the first page (docs/index.md) has made: its Python names, and, in the order of mkdocs.yml, the
runs in its folder. The same command on several pages runs once.

A block may be left out only for its cost, or because it needs what a test machine lacks, with the reason in an HTML
comment directly above it: `<!-- not run: downloads weights -->`. Commands left out are still held against `--help`.
A text block under `<!-- output -->` is what the Python block above it prints; under `<!-- output, figures vary -->`, up
to its digits.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sklearn.datasets
import yaml
from PIL import Image

from narrower import Benchmark
from narrower.app import external
from narrower.app.cli import main

ROOT = Path(__file__).resolve().parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
START = DOCS / "index.md"


def names_in(nav: Any) -> list[str]:
    """The files that the navigation of mkdocs.yml names, in order."""
    if isinstance(nav, str):
        return [nav]
    return [name for part in (nav.values() if isinstance(nav, dict) else nav) for name in names_in(part)]


NAV = names_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
PAGES = [*(DOCS / name for name in NAV if (DOCS / name).exists()), README]
# Added behind each command, so that all pages run in a minute; later flags win over earlier ones.
TINY = {
    "train": ["--epochs", "1", "--img-size", "8", "-b", "16", "--workers", "0", "--cache-dir", "none"],
    "prune": ["--epochs", "1", "--dense-epochs", "1", "--img-size", "8", "-b", "16", "--images", "16", "--recalibrate", "64"]
    + ["--workers", "0", "--cache-dir", "none", "--no-report"],
    "sensitivity": ["--img-size", "8", "--images", "16", "--workers", "0", "--cache-dir", "none"],
    "eval": ["--workers", "0", "--cache-dir", "none"],
    "bench": ["--seconds", "0", "--runtimes", "eager"],
    "compare": ["--images", "16"],
}
WITHOUT_TRAINING = ["--epochs", "0"]
# Least squares with 4,608 inputs take a minute; the commands for digits measure and reconstruct.
WITHOUT_SOLVING = ["--method", "magnitude", "--allocate", "share", "--no-reconstruct"]
SMALL_IMAGES = ["--img-size", "64"]  # of photographs, at 224 px else
OFFLINE = {"--pretrained"}  # published weights are not downloaded: the same network starts untrained


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line of the fence and the comment above it ("" if there is none)."""

    language: str
    code: str
    line: int
    comment: str

    @property
    def reason(self) -> str:
        """Why the block is not run, or ""."""
        return self.comment.partition("not run: ")[2]


def blocks(path: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a Markdown file in the given languages, in order."""
    found = []
    lines = path.read_text(encoding="utf-8").splitlines()
    start = None
    for number, text in enumerate(lines):
        if text.startswith("```") and start is None:
            start = number
        elif text.startswith("```") and start is not None:
            above = re.fullmatch(r"<!-- (.+) -->", lines[start - 1].strip()) if start else None
            code = "\n".join(lines[start + 1 : number]) + "\n"
            found.append(Block(lines[start][3:].strip(), code, start + 1, above[1] if above else ""))
            start = None
    assert start is None, f"{path.name}:{start}: a block is not closed"
    return [block for block in found if block.language in languages]


def commands(block: Block) -> list[list[str]]:
    """The `narrower ...` command lines of a shell block, split into words; comments and continuations resolved."""
    joined = block.code.replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [line[1:] for line in words if line[:1] == ["narrower"]]


def plain(text: str, figures_vary: bool) -> list[list[str]]:
    """The words of each line; numbers as `#`, and dashes of a table as one, where figures may vary."""
    if figures_vary:
        text = re.sub(r"-{2,}", "--", re.sub(r"\d[\d,.]*(e[+-]\d+)?", "#", text))
    return [line.split() for line in text.strip().splitlines()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the pages speak of; every sixth of the digits is enough for it."""
    bunch = sklearn.datasets.load_digits()
    few = SimpleNamespace(images=bunch.images[::6], target=bunch.target[::6])
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: few)
    place = tmp_path
    network = next(block.code for block in blocks(START, "python") if "class Net(" in block.code)
    (place / "net.py").write_text(network, encoding="utf-8")
    for split, count in (("train", 8), ("val", 2)):
        for label, colour in (("dark", 40), ("light", 200)):
            (place / "photos" / split / label).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (80, 72), (colour, colour + number, colour))
                image.save(place / "photos" / split / label / f"{number}.jpg")
    (place / "unlabelled").mkdir()
    for number in range(20):
        Image.new("RGB", (80, 72), (5 * number, 90, 90)).save(place / "unlabelled" / f"{number}.jpg")
    return place


def run_python(page: Path, names: dict[str, Any]) -> dict[str, Any]:
    """Run the Python blocks of a page in these names, and compare what they print with the blocks that show it."""
    printed = ""
    for block in blocks(page, "python", "text"):
        if block.language == "python" and not block.reason:
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                # Empty lines first: a traceback then names the line of the page.
                exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
            printed = output.getvalue()
        elif block.comment.startswith("output"):
            vary = "figures vary" in block.comment
            assert plain(block.code, vary) == plain(printed, vary), f"{page.name}:{block.line} shows other output"
    return names


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the first page leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("start"))
        return run_python(START, {"__name__": "pages"})


WITH_PYTHON = [page for page in PAGES if page != START and blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python_blocks_run_from_top_to_bottom(
    page: Path, started: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    run_python(page, dict(started))


def test_commands_run_in_the_order_of_the_pages(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(Benchmark, "check", lambda found: None)  # nine rounds do not decide which network is faster
    monkeypatch.setattr(external, "TRIALS", 4)
    shell = [(page, block, words) for page in PAGES for block in blocks(page, "bash") for words in commands(block)]
    assert len(shell) > 10, "the pages show few commands"
    done: list[list[str]] = []
    for page, block, words in shell:
        place = f"{page.name}:{block.line}: narrower {shlex.join(words)}"
        if block.reason:
            with pytest.raises(SystemExit):
                main([words[0], "--help"])
            known = capfd.readouterr().out
            flags = [word for word in words if word.startswith("-")]
            unknown = [flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", known)]
            assert not unknown, f"{place}: there is no {unknown}"
        elif words not in done:
            done.append(words)
            code = main(shorter(words))
            said = capfd.readouterr().err[-2000:]
            assert code == 0, f"{place}: exit code {code}\n{said}"


def shorter(words: list[str]) -> list[str]:
    """A command that does the same in seconds, and without a network."""
    added = [*TINY.get(words[0], []), *(WITHOUT_TRAINING if "--epochs 0" in shlex.join(words) else [])]
    photos = "resnet18" in words or "runs/photos" in words
    added += SMALL_IMAGES if photos else []
    added += WITHOUT_SOLVING if photos and words[0] == "prune" else []
    return [*(word for word in words if word not in OFFLINE), *added]


def test_make_targets_and_extras_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shell = "\n".join(block.code for page in PAGES for block in blocks(page, "bash"))
    targets = set(re.findall(r"\bmake ([a-z]+)\b", shell))
    assert {"demo", "test"} <= {*re.findall(r"\bmake ([a-z]+)\b", README.read_text(encoding="utf-8"))} & targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    groups = [group for text in texts for group in re.findall(r"pip install (?:-e )?'(?:\.|narrower)\[([\w,]+)\]'", text)]
    extras = {extra for group in groups for extra in group.split(",")}
    assert extras and all(re.search(rf"^{extra} = \[", pyproject, re.MULTILINE) for extra in extras)


def test_links_lead_somewhere() -> None:
    for document in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (document.parent / target).exists(), f"{document.name}: {target} is missing"


def test_every_page_is_in_the_navigation() -> None:
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} <= set(NAV)


def texts_of(source: str) -> Iterator[str]:
    """The texts in a module, as they are joined; what is filled in stands as `...`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_of_the_page_troubleshooting_are_those_of_the_code() -> None:
    said = [text for path in (ROOT / "narrower").rglob("*.py") for text in texts_of(path.read_text(encoding="utf-8"))]
    lines = [line for line in (DOCS / "troubleshooting.md").read_text(encoding="utf-8").splitlines() if line.startswith("**`")]
    messages = [message for line in lines for message in re.findall(r"`(.+?)`\*\*", line)]
    assert len(messages) > 40
    for message in messages:
        parts = [part for part in re.split(r"\s*(?:macs=\.\.\.|'\.\.\.'|\.\.\.)\s*", message) if len(part) > 3]
        assert any(all(part in text for part in parts) for text in said), f"no error says {message!r}"
