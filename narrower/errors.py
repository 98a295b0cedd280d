"""All errors that narrower raises on purpose.

NarrowerError
├── TraceError      the model could not be run, is not a network of channels, or has nothing free
├── PlanError       a request that does not fit the graph: a pattern without a match, a fraction outside (0, 1)
│   └── BudgetError a budget below the least that can be reached
├── VerifyError     the narrowed network is not the dense one with those channels removed
├── StorageError    a checkpoint or narrower.json that is missing, damaged or of another model
├── DataError       a data set that is empty or unreadable
├── ExportError     an exporter does not take the network, or a runtime computes something else
├── HubError        a hub that cannot be reached, refuses, or has no such repository
├── NoiseError      times spread too far to decide anything by them
├── MissingExtraError  an optional package is not installed
└── ConfigError     arguments in the wrong order or out of range, settings that contradict each other, an output folder in use
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class NarrowerError(Exception):
    """Base of all errors that narrower raises on purpose; the message says what to do."""


class TraceError(NarrowerError):
    """The model could not be traced."""


class PlanError(NarrowerError):
    """A plan was asked for that does not fit the graph."""


class BudgetError(PlanError):
    """The budget cannot be reached; the message names the least that can."""


class VerifyError(NarrowerError):
    """The narrowed network differs from the masked dense network."""


class StorageError(NarrowerError):
    """A checkpoint or plan file is missing, damaged, or belongs to another model."""


class DataError(NarrowerError):
    """A data set is empty, missing or unreadable."""


class ExportError(NarrowerError):
    """An exporter does not take the network, or the file that it wrote computes something else than PyTorch."""


class HubError(NarrowerError):
    """A hub of models cannot be reached or refuses, or has no such repository."""


class NoiseError(NarrowerError):
    """Times on this machine spread so far that what they were measured for cannot be decided."""


class MissingExtraError(NarrowerError):
    """An optional package is not installed; the message has the command that does."""


class ConfigError(NarrowerError):
    """Arguments in the wrong order or out of range, settings that contradict each other, or an output folder that is in use."""


def similar(name: str, known: Iterable[str], *, most: int = 1, prefix: str = "") -> str:
    """A part of a message for a name that is not known: "; did you mean " and the nearest that are, or nothing."""
    near = difflib.get_close_matches(name, sorted(known), n=most)
    return f"; did you mean {', '.join(prefix + found for found in near)}?" if near else ""


def first_few(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """A part of a message: the first `most` of some names, and how many more there are."""
    return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """The class of an error and the first line of its message: PyTorch lists all signatures of an operator below it."""
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(":.")


def in_one_line(error: BaseException) -> str:
    """An error that the user's code raised: its class, its first line, and the line that the code was called at."""
    where = "".join(f" (line {f.lineno} of {f.filename})" for f in traceback.extract_tb(error.__traceback__)[1:2])
    return first_line(error) + where


def check_state(mine: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise StorageError where a saved state has other settings than `mine`, or is of another model."""
    for key, value in mine.items():
        if state.get(key) != value:
            what = "the model" if key == "groups" else key
            raise StorageError(f"this state is of another run: {what} was {state.get(key)}, is {value}")
