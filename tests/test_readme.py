"""README.md is run: its Python blocks from top to bottom, its `narrower ...` commands, its links and its make targets.

A block may be left out only for its cost, or because it needs what a test machine lacks, with the reason in an HTML
comment directly above it: `<!-- not run: downloads weights -->`. Commands left out are still held against `--help`.
A text block under `<!-- output -->` is what the Python block above it prints; under `<!-- output, figures vary -->`, up
to its digits.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sklearn.datasets
from PIL import Image

from narrower import Benchmark
from narrower.app.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
# Added behind each command, so that the whole page runs in a minute; later flags win over earlier ones.
TINY = {
    "train": ["--epochs", "1", "--img-size", "8", "-b", "16", "--workers", "0", "--cache-dir", "none"],
    "prune": ["--epochs", "1", "--dense-epochs", "1", "--img-size", "8", "-b", "16", "--images", "16", "--recalibrate", "64"]
    + ["--workers", "0", "--cache-dir", "none", "--no-report"],
    "sensitivity": ["--img-size", "8", "--images", "16", "--workers", "0", "--cache-dir", "none"],
    "eval": ["--workers", "0", "--cache-dir", "none"],
    "bench": ["--seconds", "0"],
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
    """A working directory with the files that the page speaks of; every sixth of the digits is enough for it."""
    bunch = sklearn.datasets.load_digits()
    few = SimpleNamespace(images=bunch.images[::6], target=bunch.target[::6])
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: few)
    place = tmp_path
    network = next(block.code for block in blocks(README, "python") if "class Net(" in block.code)
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


def test_python_blocks_run_from_top_to_bottom(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    page = [block for block in blocks(README, "python", "text") if not block.reason]
    assert any(block.language == "python" for block in page), "README.md shows no Python"
    names: dict[str, Any] = {"__name__": "readme"}
    printed = ""
    for block in page:
        if block.language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                # Empty lines first: a traceback then names the line of the README.
                exec(compile("\n" * block.line + block.code, str(README), "exec"), names)
            printed = output.getvalue()
        elif block.comment.startswith("output"):
            vary = "figures vary" in block.comment
            assert plain(block.code, vary) == plain(printed, vary), f"README.md:{block.line} shows other output"


def test_commands_of_the_readme_run_in_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(Benchmark, "check", lambda found: None)  # nine rounds do not decide which network is faster
    shell = [(block, words) for block in blocks(README, "bash") for words in commands(block)]
    assert shell, "README.md shows no command"
    for block, words in shell:
        if block.reason:
            with pytest.raises(SystemExit):
                main([words[0], "--help"])
            known = capfd.readouterr().out
            flags = [word for word in words if word.startswith("-")]
            unknown = [flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", known)]
            assert not unknown, f"README.md:{block.line}: narrower {words[0]} has no {unknown}"
        else:
            arguments = [word for word in words if word not in OFFLINE]
            shorter = [*TINY.get(words[0], []), *(WITHOUT_TRAINING if "--epochs 0" in shlex.join(words) else [])]
            photos = "resnet18" in words or "runs/photos" in words
            shorter += SMALL_IMAGES if photos else []
            shorter += WITHOUT_SOLVING if photos and words[0] == "prune" else []
            code = main([*arguments, *shorter])
            said = capfd.readouterr().err[-2000:]
            assert code == 0, f"README.md:{block.line}: narrower {shlex.join(words)}: exit code {code}\n{said}"


def test_make_targets_and_extras_exist() -> None:
    text = README.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(block.code for block in blocks(README, "bash"))))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = {extra for group in re.findall(r"pip install -e '\.\[([\w,]+)\]'", text) for extra in group.split(",")}
    assert extras and all(re.search(rf"^{extra} = \[", pyproject, re.MULTILINE) for extra in extras)


def test_links_lead_somewhere() -> None:
    for document in (README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{document.name}: {target} is missing"
