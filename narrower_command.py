"""The command `narrower`. It stands outside the package, whose import takes seconds, in which Ctrl-C may come."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line. Returns the exit code."""
    try:
        from narrower.app import cli
        from narrower.training.agreement import leave_after
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return leave_after(cli.main)
