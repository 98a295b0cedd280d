"""`python -m narrower`."""

from .app.cli import main
from .training.agreement import leave_after

if __name__ == "__main__":
    raise SystemExit(leave_after(main))
