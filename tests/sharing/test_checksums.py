"""SHA256SUMS: what it lists is compared, byte for byte."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from narrower.errors import StorageError
from narrower.sharing.checksums import BLOCK, SUMS, check_files, checksums, read_sums

FILES = {"a.json": b"{}", "large.bin": bytes(range(256)) * (BLOCK // 256 + 1), "with space.txt": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {**FILES, SUMS: checksums(FILES).encode()}.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_whole_files_pass_also_by_the_program_of_that_name(folder: Path) -> None:
    check_files(folder, FILES)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--strict", SUMS], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize("at", [0, BLOCK, len(FILES["large.bin"]) - 1])
def test_one_other_bit_is_found_wherever_it_is(at: int, folder: Path) -> None:
    content = bytearray(FILES["large.bin"])
    content[at] ^= 1
    (folder / "large.bin").write_bytes(content)
    check_files(folder, ["a.json"])
    with pytest.raises(StorageError, match=r"large\.bin is damaged"):
        check_files(folder, FILES)


def test_what_is_not_listed_or_not_there_is_named(folder: Path) -> None:
    with pytest.raises(StorageError, match="does not list other"):
        check_files(folder, ["other"])
    (folder / "a.json").unlink()
    with pytest.raises(StorageError, match=r"a\.json cannot be read"):
        check_files(folder, FILES)


@pytest.mark.parametrize("text", ["", "<html>", "abc  a.json\n", f"{'0' * 64} a.json\n", f"{'0' * 64}  a\n\n{'0' * 64}  b"])
def test_another_kind_of_file_is_no_list(text: str, folder: Path) -> None:
    (folder / SUMS).write_text(text)
    with pytest.raises(StorageError, match=f"{SUMS} is damaged"):
        read_sums(folder / SUMS)
