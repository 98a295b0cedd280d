"""`narrower.load`: from a folder, or from a hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from .. import storage
from ..errors import HubError, MissingExtraError, StorageError
from ..preconditions import checked
from .hub import fetch, is_repository


@checked
def load(where: str | os.PathLike[str], make_model: Callable[[], nn.Module], *, revision: str | None = None) -> nn.Module:
    """The narrow network that `save` or `narrower push` wrote. `make_model()` makes the dense one, which is cut to shape.

    Files are safetensors and JSON, read as data: nothing that they name is imported or run. Those of a hub are checked against
    the hashes that were uploaded with them.

    Args:
        where: a folder; or `"user/name"`, a repository on the hub (the extra `hub`), where there is no folder of that name.
        make_model: the user's own factory of the dense network.
        revision: branch, tag or commit of the repository; None: its main branch.

    Raises:
        StorageError: a file is missing or damaged, of a later version, or of another network than `make_model` gives.
        HubError: there is no such repository or revision, or the hub cannot be reached.
        MissingExtraError: the extra `hub` is not installed.
        ConfigError: `make_model` is no function.
    """
    storage.check_factory(make_model)
    if isinstance(where, str) and is_repository(where) and not Path(where).exists():
        try:
            where = fetch(where, revision)
        except (HubError, MissingExtraError) as error:
            raise type(error)(f"there is no folder {where} here; on the hub: {error}") from error
    elif revision is not None:
        raise StorageError(f"revision {revision!r} is for a repository on the hub, and {where} is a folder")
    return storage.load(where, make_model)
