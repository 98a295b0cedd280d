"""SHA256SUMS: the hash of each file of a shared network, in the form that `sha256sum -c` reads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import StorageError

SUMS = "SHA256SUMS"
BLOCK = 1 << 20


def checksums(contents: Mapping[str, bytes]) -> str:
    """A line for each file: its hash and its name."""
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items())


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Compare files with the `SHA256SUMS` beside them.

    Raises:
        StorageError: a file has other contents, is missing or not listed. The message names it.
    """
    known = read_sums(folder / SUMS)
    for name in names:
        path = folder / name
        if name not in known:
            raise StorageError(f"{folder / SUMS} does not list {name}")
        try:
            found = hash_of(path)
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}") from error
        if found != known[name]:
            raise StorageError(f"{name} is damaged: its SHA-256 is {found[:12]}..., {SUMS} says {known[name][:12]}...; remove "
                               f"{path.resolve()} and load again")


def read_sums(file: Path) -> dict[str, str]:
    """{name: hash}. Raises StorageError for a file that is not of this form."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{file} cannot be read ({error})") from error
    found = [re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in lines]
    if not found or not all(found):
        raise StorageError(f"{file} is damaged: it is no list of SHA-256 hashes; remove {file.resolve()} and load again")
    return {match[2]: match[1] for match in found if match}


def hash_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits. The file may be larger than the memory."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
