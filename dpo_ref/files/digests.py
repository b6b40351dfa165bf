"""Bytes that a later process trusts: they carry a digest, so that what was lost or changed is seen."""

import json
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from xxhash import xxh3_128, xxh3_128_hexdigest

from dpo_ref.files.writing import write_json

PART = 2**26  # bytes
DIGEST, DIGESTS = "digest", "digests.json"
TELLERS: list[Callable[[str], None]] = []  # by whom the user is told what `tell` is given


def file_digest(path: Path) -> str:
    """XXH3-128 over the XXH3-128 of a file's parts; all cores take parts of a large file.

    It tells what decayed, not what was forged: who can write the file can write its digest. So it need not be
    cryptographic, and costs a sixth of SHA-256.
    """
    starts = range(0, path.stat().st_size or 1, PART)
    if len(starts) == 1:
        return xxh3_128_hexdigest(_part_digest(path, 0))
    with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1)) as pool:
        return xxh3_128_hexdigest(b"".join(pool.map(partial(_part_digest, path), starts)))


def _part_digest(path: Path, start: int) -> bytes:
    hasher, rest, block = xxh3_128(), PART, memoryview(bytearray(min(PART, 2**20)))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while rest and (num_read := file.readinto(block[:rest])):
            hasher.update(block[:num_read])
            rest -= num_read
    return hasher.digest()


def tell(sentence: str) -> None:
    """Tell the user something from where there is no terminal."""
    for teller in TELLERS:
        teller(sentence)


class Damaged(ValueError):
    """A file that is not what was written. `what` says which and how one sees it, `remedy` what to do about it."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}; {remedy}")
        self.what = what


def bytes_digest(content: bytes) -> str:
    """XXH3-128, as of files."""
    return xxh3_128_hexdigest(content)


def _json_digest(content: Mapping[str, Any]) -> str:
    return bytes_digest(json.dumps(content).encode())


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the digest of everything it says, as its last entry."""
    return {**content, DIGEST: _json_digest(content)}


def unsealed(text: str | bytes, what: str, remedy: str) -> dict[str, Any]:
    """The JSON object that was `sealed`. Raises Damaged, naming `what`, for anything else; an object without a digest
    is of an earlier version, and read with a word to the user."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{what} is damaged: it is not JSON ({error})", remedy) from error
    if not isinstance(content, dict):
        raise Damaged(f"{what} is damaged: it is no JSON object", remedy)
    if (digest := content.pop(DIGEST, None)) is None:
        if not _WITHOUT_DIGEST:
            tell(f"{what} is of an earlier version, which wrote no digests: such files are read unchecked")
        _WITHOUT_DIGEST.append(what)
    elif digest != _json_digest(content):
        raise Damaged(f"{what} is damaged: its digest is that of other content", remedy)
    return content


_WITHOUT_DIGEST: list[str] = []  # what was read unchecked; the first is told of


def seal_folder(folder: Path, besides: Collection[str] = ()) -> None:
    """Write the digests of all files in a folder beside them, without those `besides`, which may change."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    sealed_names = [name for name in names if name not in (DIGESTS, *besides)]
    write_json(folder / DIGESTS, {name: file_digest(folder / name) for name in sealed_names})


def damage_in(folder: Path) -> str | None:
    """The file of a sealed folder that is not as it was when the folder was sealed; None where all are."""
    try:
        digests = json.loads((folder / DIGESTS).read_bytes())
        return next((name for name, digest in digests.items() if file_digest(folder / name) != digest), None)
    except FileNotFoundError as error:
        return Path(error.filename).name
    except (OSError, ValueError, AttributeError):
        return DIGESTS
