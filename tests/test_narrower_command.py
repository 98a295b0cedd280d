"""The console command: Ctrl-C while the package is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = """
import sys

class Pressing:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Pressing())
from narrower_command import main
sys.exit(main())
"""


def test_ctrl_c_while_importing_leaves_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


def test_it_is_the_command_that_is_installed() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'narrower = "narrower_command:main"' in project and 'py-modules = ["narrower_command"]' in project
