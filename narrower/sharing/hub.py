"""A hub of models, through huggingface_hub: fetch a network that narrower has shared, upload a folder.

The hub is that of huggingface_hub's own settings (HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import HubError, NarrowerError, StorageError
from ..extras import optional
from ..storage import META, WEIGHTS
from .checksums import SUMS, check_files

SECONDS = 10
REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
EXPORTS = ("model.onnx", "model.onnx.data", "model.pt2")
"""Files that may stand beside a network. Those of an earlier one go when another is uploaded without them."""
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def is_repository(name: str) -> bool:
    """Whether a text has the form `user/name`."""
    return re.fullmatch(REPOSITORY, name, re.ASCII) is not None


def open_hub(*, writes: bool = False) -> Any:
    """The module huggingface_hub.

    Raises:
        MissingExtraError: it is not installed.
        HubError: there is no token, and one is needed to write.
    """
    hub = optional("huggingface_hub")
    constants = optional("huggingface_hub.constants")
    if writes and hub.get_token() is None:
        raise HubError(f"nobody is logged in to {constants.ENDPOINT}: {LOGIN}")
    return hub


def reach() -> None:
    """Raise HubError at once where the hub cannot be reached. Its client would try for a minute.

    Where HF_HUB_OFFLINE is set, nothing is asked: the client then looks into its cache alone.
    """
    constants, utils = optional("huggingface_hub.constants"), optional("huggingface_hub.utils")
    if constants.HF_HUB_OFFLINE:
        return
    try:
        utils.get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of requests or of httpx
        raise HubError(f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})") from error


def fetch(repository: str, revision: str | None = None) -> Path:
    """Download what `storage.load` reads, all of one commit, and check it by hash. Returns the folder, in the hub's cache.

    Without a connection, what was downloaded before is taken. The weights are asked for last: a repository of something else
    costs no large download.

    Args:
        repository: `user/name`.
        revision: branch, tag or commit; None: the main branch.

    Raises:
        HubError: there is no such repository or revision, or the hub cannot be reached.
        StorageError: the repository has no network that narrower has shared, or a file is damaged.
        MissingExtraError: the extra `hub` is not installed.
    """
    hub, errors = open_hub(), optional("huggingface_hub.errors")
    away = ""
    try:
        reach()
    except HubError as error:
        away = str(error)
    get = partial(hub.hf_hub_download, repository, library_name="narrower", local_files_only=bool(away))
    folder = Path()
    with asking(repository, revision):
        for name in (META, SUMS, WEIGHTS):
            try:
                folder = Path(get(name, revision=folder.name or revision)).parent  # the folder is called as the commit
            except errors.LocalEntryNotFoundError as error:
                reason = away or "HF_HUB_OFFLINE is set, or the hub broke off"
                raise HubError(f"{name} of {repository} is not on this machine, and not to be had: {reason}") from error
            except errors.EntryNotFoundError as error:
                raise StorageError(f"{repository} is no network that `narrower push` has shared: it has no {name}") from error
    check_files(folder, (META, WEIGHTS))
    return folder


def upload(contents: Mapping[str, bytes], repository: str, *, message: str, private: bool = False,
           revision: str | None = None) -> str:
    """Upload files in one commit: all of them, or none. The repository and the branch are made where they are missing.

    Args:
        contents: {name: content}. Other files of the repository stay, but for `EXPORTS`.
        repository: `user/name`.
        message: of the commit.
        private: the repository must be private.
        revision: the branch; None: the main one.

    Returns:
        The address of the commit.

    Raises:
        HubError: the hub cannot be reached or refuses; or the repository is public, and is to be private.
        MissingExtraError: the extra `hub` is not installed.
    """
    hub = open_hub(writes=True)
    api = hub.HfApi(library_name="narrower")
    reach()
    with asking(repository, revision):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:  # it was there already: `private` was not looked at
            raise HubError(f"{repository} exists and is public, so nothing was uploaded: make it private on the hub, or take "
                           "another name")
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        operations: list[Any] = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
                                 for name, content in contents.items()]
        there = api.list_repo_files(repository, revision=revision)
        operations += [hub.CommitOperationDelete(path_in_repo=name) for name in EXPORTS
                       if name in there and name not in contents]
        # Not upload_folder, which may divide the files among several commits.
        commit = api.create_commit(repository, operations, commit_message=message, revision=revision)
    return str(commit.commit_url)


@contextmanager
def asking(repository: str, revision: str | None) -> Iterator[None]:
    """Errors of the hub, and of the way to it, become HubErrors of one line."""
    errors = optional("huggingface_hub.errors")
    try:
        yield
    except NarrowerError:
        raise
    except errors.GatedRepoError as error:
        raise HubError(f"{repository} is given only to those who have accepted its terms on the hub; then {LOGIN}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(f"there is no repository {repository} on the hub, or it is private: then {LOGIN}") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repository} has no revision {revision}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        advice = f"; {LOGIN} of one who may" if status in (401, 403) else ""
        reason = error.server_message or next(iter(str(error).splitlines()), "")
        raise HubError(f"the hub refuses ({status}): {' '.join(reason.split())}{advice}") from error
    except Exception as error:  # of requests, of httpx, of the file system
        raise HubError(f"{repository}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
