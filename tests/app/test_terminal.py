"""What is printed: the progress bar fits a terminal of 80 columns."""

from __future__ import annotations

import io
import re

import pytest

pytest.importorskip("rich")
pytest.importorskip("accelerate")

from rich.console import Console

from narrower.app.terminal import Terminal


@pytest.mark.parametrize(("title", "total"), [
    ("resrep: epoch 10/20, masked 47%, at 52%", 50_000),
    ("resrep: epoch 100/180, masked 47%, at 52%", 1_281_167),
    ("train dense: epoch 3/25", 1_198),
    ("a title that is longer than the whole terminal is wide: " * 2, 50_000),
])
def test_the_bar_is_one_line_of_80_columns(title: str, total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrower.app.terminal.Rate.render", lambda self, task: "2,345/s")
    terminal, shown = Terminal(), io.StringIO()
    terminal.err = Console(file=shown, width=80, force_terminal=True, color_system=None)
    for _ in terminal.watch([[0, range(total // 2)]] * 2, title, total):
        terminal._bars[-1].refresh()
    texts = [re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", text) for text in re.split(r"[\r\n]", shown.getvalue())]
    lines = [text for text in texts if text.strip()]
    assert lines and all(len(line) <= 80 for line in lines)
    begins = title if len(title) < 42 else title[:40]
    assert all(line.startswith(begins) and f"/{total:,} 2,345/s" in line for line in lines)
