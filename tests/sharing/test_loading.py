"""narrower.load: a folder goes first; otherwise user/name is a repository."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("huggingface_hub")
from support import hub as stand_in
from support import reference
from support.hub import Hub, Repository
from support.networks import IMAGES, Plain

import narrower
from narrower.errors import ConfigError, HubError, MissingExtraError, StorageError
from narrower.sharing import SUMS, checksums


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with stand_in.running(monkeypatch, tmp_path / "cache") as found:
        yield found


def saved(folder: Path) -> dict[str, bytes]:
    """A narrow network, and the files of its repository."""
    model = Plain()
    narrower.save(narrower.narrow(model, reference.halved(model, IMAGES)), folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return {**files, SUMS: checksums(files).encode()}


def test_a_repository_is_loaded_as_a_folder_is(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["ann/net"] = Repository(branches={"main": saved(tmp_path / "out")})
    here, there = narrower.load(tmp_path / "out", Plain), narrower.load("ann/net", Plain)
    assert all(torch.equal(a, b) for a, b in zip(here.state_dict().values(), there.state_dict().values(), strict=True))
    with pytest.raises(HubError, match="there is no folder ann/net here; on the hub: ann/net has no revision old"):
        narrower.load("ann/net", Plain, revision="old")


def test_a_folder_of_that_name_goes_first(hub: Hub, tmp_path: Path) -> None:
    saved(tmp_path / "ann" / "net")
    narrower.load("ann/net", Plain)
    assert not hub.requests
    with pytest.raises(StorageError, match="revision 'old' is for a repository on the hub, and ann/net is a folder"):
        narrower.load("ann/net", Plain, revision="old")


@pytest.mark.parametrize("where", [Path("ann/net"), f"ann{os.sep}net{os.sep}none", "net", "./ann"])
def test_a_path_is_never_asked_of_the_hub(where: str | Path, hub: Hub) -> None:
    with pytest.raises(StorageError, match=r"narrower\.json is missing"):
        narrower.load(where, Plain)
    assert not hub.requests


def test_a_wrong_factory_is_told_before_anything_is_downloaded(hub: Hub) -> None:
    with pytest.raises(ConfigError, match="load takes a function"):
        narrower.load("ann/net", Plain())
    assert not hub.requests


def test_without_the_extra_the_message_names_both_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"no folder ann/net here; on the hub: .* is missing .*narrower\[hub\]"):
        narrower.load("ann/net", Plain)
