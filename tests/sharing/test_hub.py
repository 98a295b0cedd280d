"""fetch and upload against a hub on this machine: what comes back is what went there, or an error of one line says why not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huggingface_hub")
from support import hub as stand_in
from support.hub import Hub, Repository

from narrower.errors import HubError, StorageError
from narrower.sharing import SUMS, checksums, fetch, open_hub, upload
from narrower.sharing.hub import is_repository
from narrower.storage import META, WEIGHTS

FILES = {META: b"{}", WEIGHTS: b"tensors", "README.md": b"---\nlicense: mit\n---\n# card\n"}
SHARED = {**FILES, SUMS: checksums(FILES).encode()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with stand_in.running(monkeypatch, tmp_path / "cache") as found:
        yield found


def has(hub: Hub, **changes: bytes | None) -> dict[str, bytes]:
    """The files of ann/net on the hub: shared ones, with changes (by name; None: missing)."""
    files = {name: content for name, content in {**SHARED, **changes}.items() if content is not None}
    hub.repositories["ann/net"] = Repository(branches={"main": files})
    return files


def test_what_is_uploaded_is_what_is_fetched(hub: Hub) -> None:
    url = upload(SHARED, "ann/net", message="one")
    assert url.startswith(hub.address)
    files = hub.repositories["ann/net"].branches["main"]
    assert {name: files[name] for name in SHARED} == SHARED and not hub.repositories["ann/net"].private
    assert hub.repositories["ann/net"].messages == ["one"]
    folder = fetch("ann/net")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {name: SHARED[name] for name in (META, SUMS, WEIGHTS)}


def test_another_upload_takes_exported_files_away_that_it_does_not_have(hub: Hub) -> None:
    upload({**SHARED, "model.onnx": b"1", "model.pt2": b"1"}, "ann/net", message="one")
    hub.repositories["ann/net"].branches["main"]["notes.txt"] = b"mine"
    upload({**SHARED, "model.pt2": b"2"}, "ann/net", message="two")
    files = hub.repositories["ann/net"].branches["main"]
    assert "model.onnx" not in files and files["model.pt2"] == b"2" and files["notes.txt"] == b"mine"


def test_a_branch_is_made_and_fetched(hub: Hub) -> None:
    has(hub)
    upload({**SHARED, WEIGHTS: b"other", SUMS: checksums({**FILES, WEIGHTS: b"other"}).encode()}, "ann/net", message="one",
           revision="half")
    assert (fetch("ann/net", "half") / WEIGHTS).read_bytes() == b"other"
    assert (fetch("ann/net") / WEIGHTS).read_bytes() == b"tensors"
    with pytest.raises(HubError, match="ann/net has no revision quarter"):
        fetch("ann/net", "quarter")


def test_files_are_those_of_one_commit_though_another_comes_in_between(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    has(hub)
    module = open_hub()
    download, old = module.hf_hub_download, dict(hub.repositories["ann/net"].branches["main"])

    def then_changed(*args: Any, **kwargs: Any) -> Any:
        found = download(*args, **kwargs)
        hub.repositories["ann/net"].branches.update(main={**old, WEIGHTS: b"later"}, before=old)
        return found

    monkeypatch.setattr(module, "hf_hub_download", then_changed)
    assert (fetch("ann/net") / WEIGHTS).read_bytes() == b"tensors"


def test_a_private_repository_stays_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(SHARED, "ann/net", message="one", private=True)
    assert hub.repositories["ann/net"].private and fetch("ann/net").is_dir()
    has(hub)
    with pytest.raises(HubError, match="ann/net exists and is public"):
        upload({**SHARED, WEIGHTS: b"secret"}, "ann/net", message="two", private=True)
    assert hub.repositories["ann/net"].branches["main"] == SHARED


def test_the_weights_of_something_else_are_not_downloaded(hub: Hub) -> None:
    for lacks in (META, SUMS):
        has(hub, **{lacks: None})
        with pytest.raises(StorageError, match=f"ann/net is no network that `narrower push` has shared: it has no {lacks}"):
            fetch("ann/net")
    assert not any(WEIGHTS in request for request in hub.requests)


@pytest.mark.parametrize("name", [META, WEIGHTS])
def test_a_damaged_file_is_refused_by_name(name: str, hub: Hub) -> None:
    has(hub, **{name: SHARED[name] + b" "})
    with pytest.raises(StorageError, match=f"{name} is damaged: its SHA-256 is") as caught:
        fetch("ann/net")
    at = Path(str(caught.value).partition("remove ")[2].removesuffix(" and load again"))
    assert at.read_bytes() == SHARED[name] + b" "
    at.unlink()  # what the message says helps
    has(hub)
    fetch("ann/net")


def test_without_a_connection_what_was_fetched_before_is_taken(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    has(hub)
    folder = fetch("ann/net")
    stand_in.at("http://127.0.0.1:9", monkeypatch)
    assert fetch("ann/net") == folder
    started = time.monotonic()
    with pytest.raises(HubError, match=r"of ann/other .* http://127.0.0.1:9 cannot be reached \(Connect\w*Error\)"):
        fetch("ann/other")
    with pytest.raises(HubError, match="http://127.0.0.1:9 cannot be reached"):
        upload(SHARED, "ann/net", message="one")
    assert time.monotonic() - started < 20  # with retries it takes a minute


@pytest.mark.parametrize(("status", "says"), [(403, r"refuses \(403\): You have no rights here; log in with `hf auth login`"),
                                              (400, r"refuses \(400\): You have no rights here$")])
def test_what_the_hub_refuses_is_one_line_and_nothing_is_uploaded(status: int, says: str, hub: Hub) -> None:
    before = has(hub)
    hub.refuses = status
    with pytest.raises(HubError, match=says):
        upload({**SHARED, WEIGHTS: b"new"}, "ann/net", message="one")
    assert hub.repositories["ann/net"].branches["main"] == before


def test_an_unknown_or_private_repository_and_a_missing_token_say_how_to_log_in(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(HubError, match="there is no repository ann/net on the hub, or it is private: then log in"):
        fetch("ann/net")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    has(hub)
    with pytest.raises(HubError, match="nobody is logged in to http://127.0.0.1"):
        upload(SHARED, "ann/net", message="one")
    assert not any(request.startswith("POST") for request in hub.requests)


def test_a_repository_is_user_and_name() -> None:
    assert is_repository("ann/net-0.5_x") and is_repository("a/b")
    assert not any(map(is_repository, ("net", "a/b/c", "./net", "../net", "/net", "a/", "a\\b", "ann/net\n", "~/net", "")))
