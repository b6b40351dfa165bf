"""Where rows are: files, folders of files, folders of `datasets` and the hub; and which of them a split stands for."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from dpo_ref.data.readers import KINDS, READERS, Named, file_rows, kind_of
from dpo_ref.data.tables import NO_ARROW, has_packed_buffers, without_padding
from dpo_ref.files.hub import note_commit


@dataclass(frozen=True)
class Source:
    """Where rows come from: a file, a folder of files, a folder written by `datasets`, or a name on the hub."""

    path: str
    name: str | None = None  # of the data set's configuration on the hub
    folder: str | None = None  # inside the data set on the hub
    split: str | None = None  # train unless the files have no splits
    split_key: str = "data.split"  # by which messages call it
    streaming: bool = False
    revision: str | None = None  # a branch, tag or commit on the hub

    def hub_options(self) -> dict[str, Any]:
        """Options of data sets of the hub, by the keys that messages call them."""
        options = {"data.name": self.name, "data.folder": self.folder, "data.revision": self.revision}
        return {**options, self.split_key: self.split, "data.streaming": self.streaming}


class Opened(NamedTuple):
    """A source's rows, a digest of all that they hold (None where only reading them could tell), and what to say of
    files that are not read."""

    rows: Iterable[Named]
    content: str | None
    notes: tuple[str, ...] = ()


def open_source(source: Source, key: str) -> Opened:
    """Find a source. Raises ValueError, naming `key`, for what is not there; its rows raise it for what is damaged."""
    local_path = Path(source.path).expanduser()
    if not local_path.exists():
        return _open_hub(source, key)
    if local_path.is_dir() and any((local_path / name).exists() for name in SAVED):
        return _open_saved(source, key)
    _refuse_options(replace(source, split=None), key, "a file or a folder of files")
    paths, notes = _paths_of_split(source, key)
    folder = local_path if local_path.is_dir() else local_path.parent
    hasher = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").digest()
        hasher.update(f"{path.relative_to(folder).as_posix()}\0".encode() + content)
    if local_path.is_dir():
        _refuse_unreadable(paths, f"{key}={source.path}")
    return Opened(chain.from_iterable(map(file_rows, paths)), hasher.hexdigest(), notes)


def _refuse_options(source: Source, key: str, description: str) -> None:
    for option, value in source.hub_options().items():
        if value:
            raise ValueError(f"{option}={value} has no effect: {key}={source.path} is {description}")


def _refuse_unreadable(paths: Sequence[Path], origin: str) -> None:
    """Raise ValueError for files of which not even the first row is had, all of them by name."""
    reasons = [reason for path in paths if (reason := _unreadable(path))]
    if reasons:
        several = f"{len(reasons)} files cannot be read: " if len(reasons) > 1 else ""
        raise ValueError(f"{origin}: {several}{_listed(reasons, '; ')}")


def _unreadable(path: Path) -> str | None:
    try:
        return None if next(file_rows(path), None) else f"{path.name} is empty; remove it, or fetch it again"
    except ValueError as error:
        return str(error)


SHOWN = 6  # names in a message


def _listed(names: Sequence[str], comma: str = ", ") -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return comma.join(names[:SHOWN]) + more


# --- the files of a folder


SAVED = ("state.json", "dataset_dict.json")  # in folders that `datasets` wrote
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "certificate.json", "rows.digests")
HARMLESS = re.compile(
    r"(readme|licen[sc]e|copying|notice|citation|changelog|md5sums|sha\d*sums|checksums?)\b.*"
    r"|.*\.(md|py|lock|md5|sha1|sha256|sha512)|_success|_metadata|_common_metadata"
)


def files(path: str, key: str) -> list[Path]:
    """The data files that `path` names: itself, or those in the folder, of every split. ValueError without any, for
    one that is no file or lies elsewhere, and for what else is in the folder, unless it is known to hold no rows."""
    local_path, origin = Path(path).expanduser(), f"{key}={path}"
    if local_path.is_file():
        if kind_of(local_path)[0] not in READERS:
            raise ValueError(f"{origin} is none of {KINDS}")
        return [local_path]
    if not local_path.is_dir():
        raise ValueError(f"{origin} is a pipe, a device or a socket; write its rows into a file")
    data, others = _survey(local_path)
    for entry in data:
        if not entry.is_file():
            raise ValueError(f"{origin}: {entry.name} is a pipe, a device, a socket or a broken link; remove it")
        _refuse_link(entry, local_path, origin)
    if others:
        names = [entry.relative_to(local_path).as_posix() + "/" * entry.is_dir() for entry in others]
        folder = next((f"; a folder in it is read as {origin}/{name[:-1]}" for name in names if name[-1] == "/"), "")
        raise ValueError(
            f"{origin}: {_listed(names)} cannot be read; data files are {KINDS}; move what is none out of the folder, "
            f"or convert it{folder}"
        )
    if not data:
        raise ValueError(f"{origin} holds no file of {KINDS}")
    return data


def _survey(folder: Path) -> tuple[list[Path], list[Path]]:
    """The data files of a folder and of its folders of splits; and what else is in them that may hold rows."""
    data, others = [], []
    for entry in sorted(folder.iterdir()):
        if _is_harmless(entry):
            continue
        if _is_folder_of_split(entry):
            inner_data, inner_others = _survey(entry)
            data += inner_data
            others += inner_others
        elif kind_of(entry)[0] in READERS and not entry.is_dir():
            data.append(entry)
        else:
            others.append(entry)
    return data, others


def _is_harmless(entry: Path) -> bool:
    """Whether a file is known to hold no rows, or a folder to hold no other files."""
    name = entry.name.lower()
    if name.startswith(".") or name in DESCRIPTIONS:
        return True
    if entry.is_dir():
        return name == "__pycache__" or (_is_real_folder(entry) and all(map(_is_harmless, entry.iterdir())))
    return kind_of(entry)[0] not in READERS and HARMLESS.fullmatch(name) is not None


def _is_real_folder(entry: Path) -> bool:
    return entry.is_dir() and not entry.is_symlink() and os.access(entry, os.R_OK | os.X_OK)


def _is_folder_of_split(entry: Path) -> bool:
    """Whether a folder stands for a split, or is called data and holds nothing but files of splits."""
    if not _is_real_folder(entry) or any((entry / name).exists() for name in SAVED):
        return False
    return bool(_splits_in(entry.name)) or (entry.name == "data" and all(map(_is_of_split, _survey(entry)[0])))


def _is_of_split(path: Path) -> bool:
    return bool(_splits_in(_stem(path)) or _splits_in(path.parent.name))


def _refuse_link(entry: Path, folder: Path, origin: str) -> None:
    """Raise ValueError for a file outside of its folder. The hub's cache keeps the files of its snapshots beside
    them."""
    snapshots = next((parent for parent in (folder, *folder.parents) if parent.name == "snapshots"), None)
    if not entry.resolve().is_relative_to((snapshots.parent if snapshots else folder).resolve()):
        raise ValueError(
            f"{origin}: {entry.name} is a link to {entry.resolve()}, outside of the folder; copy that file into it"
        )


# --- splits, by the names of files and folders


SPLITS = {"train": "train", "training": "train"}
SPLITS |= dict.fromkeys(("test", "tests", "testing"), "test")
SPLITS |= dict.fromkeys(("eval", "evals", "evaluation"), "eval")
SPLITS |= dict.fromkeys(("validation", "validate", "valid", "val", "dev"), "validation")
SPLITS |= dict.fromkeys(("held out", "heldout", "hold out", "holdout"), "heldout")
SPLITS |= dict.fromkeys(("benchmark", "benchmarks"), "benchmark")
_WORD = re.compile(rf"\b({'|'.join(SPLITS)})(set|data|split)?\b")
_BORDER = re.compile(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_SHARD = re.compile(r"([-_.]|(?<![vV\d]))\d+(-of-\d+(-[0-9a-f]{16})?)?$")


def _words(name: str) -> str:
    """The words of a name, which end at what is no letter and where a small letter meets a capital."""
    return _BORDER.sub(" ", name).strip().lower()


def _splits_in(name: str) -> list[str]:
    """The splits that a name speaks of: train-00000-of-00002, uf_test_prefs, pairsTrain, hh held-out, testset."""
    return [SPLITS[found[1]] for found in _WORD.finditer(_words(name))]


def _stem(path: Path) -> str:
    """A file's name without the suffixes that say what it is."""
    kind, packed = kind_of(path)
    return path.name[: len(path.name) - len(kind + packed)]


def _split_of(path: Path, folder: Path) -> str | None:
    """What a file's own name says, or else the folder next to it. Raises ValueError for names of which one says train
    and another, or the same, that the rows are held out."""
    parts = path.relative_to(folder).parts
    levels = [said for name in (_stem(path), *reversed(parts[:-1])) if (said := _splits_in(name))]
    others = dict.fromkeys(split for said in levels for split in said if split != "train")
    if levels and "train" in levels[0] and others:
        raise ValueError(f"{'/'.join(parts)} is of two splits by its name, train and {next(iter(others))}; rename it")
    return levels[0][0] if levels else None


def _splits(paths: Sequence[Path], folder: Path, origin: str) -> dict[Path, str | None]:
    """Each file's split; empty where no name says one. Raises ValueError for a name that says two."""
    try:
        splits = {path: _split_of(path, folder) for path in paths}
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    return splits if any(splits.values()) else {}


def _paths_of_split(source: Source, key: str) -> tuple[list[Path], tuple[str, ...]]:
    """The files of the split that is asked for, train unless said, and what becomes of the others. ValueError where
    names do not say it."""
    paths, folder, origin = files(source.path, key), Path(source.path).expanduser(), f"{key}={source.path}"
    splits = _splits(paths, folder, origin) if folder.is_dir() else {}
    if not splits:
        _refuse_options(source, key, "a folder whose files' names say no split" if folder.is_dir() else "a file")
        _refuse_kinds(paths, folder, origin, "")
        return paths, ()
    by_split: dict[str, list[Path]] = {}
    for path, split in splits.items():
        by_split.setdefault(split or "", []).append(path)
    if without := by_split.pop("", None):
        having = [path for path in paths if path not in without]
        raise ValueError(
            f"{origin}: a split is in the name of {_names(having, folder)}, and none in that of "
            f"{_names(without, folder)}; rename those, or move them out"
        )
    chosen = {path for path in paths if _is_of(path, folder, splits[path], source.split or "train")}
    unsaid = source.split is None and source.split_key != "data.split" and len(by_split) > 1
    if unsaid or not chosen:
        absent = "" if chosen else f" and no {source.split or 'train'}"
        example = next((split for split in by_split if split != "train"), "train")
        raise ValueError(
            f"{origin} has the splits {', '.join(by_split)}{absent}; {source.split_key}={example} reads that"
        )
    read = [path for path in paths if path in chosen]
    _refuse_kinds(read, folder, origin, source.split_key)
    left = {split: [path for path in each if path not in chosen] for split, each in by_split.items()}
    return read, _notes(source, key, chosen, left)


_KINDS = {"pref": "prefs", "prefs": "prefs", "preference": "prefs", "preferences": "prefs"}
_KINDS |= {"sft": "sft", "gen": "gen", "generation": "gen"}


def _kind_of_set(path: Path) -> str | None:
    """What the last word of a file's name says of its rows: train_prefs, train_sft.v2, pairs-gen-00000-of-00002."""
    words = [word for word in _words(_SHARD.sub("", _stem(path))).split() if word != "v"]
    return _KINDS.get(words[-1]) if words else None


def _refuse_kinds(paths: Sequence[Path], folder: Path, origin: str, by_split: str) -> None:
    """Raise ValueError for train_prefs beside train_sft: each is a set of its own, often of the same rows."""
    kinds = {kind: path for path in reversed(paths) if (kind := _kind_of_set(path))}
    if len(kinds) > 1:
        example = _SHARD.sub("", _stem(kinds[min(kinds)]))
        option = f"{by_split}={example}, " if by_split else ""
        raise ValueError(
            f"{origin}: {_names(sorted(kinds.values()), folder)} are sets of different kinds by their names; read one "
            f"by {option}data.path=its file, or several by data.sources=[...]"
        )


def _is_of(path: Path, folder: Path, split: str | None, wanted: str) -> bool:
    """Whether a file is of a split, called as everyone does, or as the file or its folder is: train_prefs."""
    if _WORD.fullmatch(re.sub("[-_]", " ", wanted.lower())):
        return split in _splits_in(wanted)
    stem = _stem(path)
    return wanted in {stem, _SHARD.sub("", stem), *path.relative_to(folder).parts[:-1]} - {"data"}


def _notes(source: Source, key: str, read: set[Path], left: dict[str, list[Path]]) -> tuple[str, ...]:
    """One line on the files that are not read, if there are any, or on several that are and are no shards of one."""
    folder = Path(source.path).expanduser()
    held_back = []
    for split, paths in left.items():
        hint = f" (data.eval_split={split} evaluates on {'it' if len(paths) == 1 else 'them'})"
        fate = f"held back{hint if key == 'data.path' else ''}" if source.split is None else "not"
        held_back += [f"{_names(paths, folder)} {_is(paths)} {fate}"] if paths else []
    if not held_back and len({(_SHARD.sub("", _stem(path)), kind_of(path)[0]) for path in read}) < 2:
        return ()
    why = f", as {source.split_key}={source.split} says" if source.split else ""
    return ("; ".join([f"{folder.resolve().name}: {_names(sorted(read), folder)} {_is(read)} read{why}", *held_back]),)


def _names(paths: Sequence[Path], folder: Path) -> str:
    return _listed([path.relative_to(folder).as_posix() for path in paths])


def _is(paths: Sequence[Path] | set[Path]) -> str:
    return "is" if len(paths) == 1 else "are"


# --- folders of `datasets` and the hub


def _open_saved(source: Source, key: str) -> Opened:
    """A folder written by `datasets`' save_to_disk."""
    from datasets import DatasetDict, load_from_disk

    _refuse_options(replace(source, split=None), key, "a folder on this machine")
    _refuse_climbing(Path(source.path).expanduser(), f"{key}={source.path}")
    _refuse_packed(Path(source.path).expanduser(), f"{key}={source.path}")
    try:
        dataset: Any = load_from_disk(str(Path(source.path).expanduser()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}={source.path} is a folder of datasets that cannot be read: {error}") from error
    if isinstance(dataset, DatasetDict):
        split = source.split or "train"
        if split not in dataset:
            raise ValueError(f"{source.split_key}={split}: {source.path} has {', '.join(map(str, dataset))}")
        dataset = dataset[split]
    elif source.split:
        raise ValueError(f"{source.split_key}={source.split} has no effect: {source.path} has no splits")
    return Opened(_named_rows(dataset, Path(source.path).name), dataset._fingerprint)


def _refuse_climbing(folder: Path, origin: str) -> None:
    """Raise ValueError for a folder of `datasets` that says its rows lie elsewhere."""
    for state in (folder / "state.json", *folder.glob("*/state.json")):
        try:
            names = [str(file["filename"]) for file in json.loads(state.read_bytes())["_data_files"]]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue  # `datasets` says what is wrong
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{origin}: {state.name} names {name}, which is no file of this folder")
            _refuse_link(state.parent / name, folder, origin)


def _refuse_packed(folder: Path, origin: str) -> None:
    """Raise ValueError for a file of Arrow whose buffers are compressed: pyarrow unpacks them without a limit, and
    `datasets` never packs them."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):  # state.json may give any name
        if _is_packed(path):
            raise ValueError(
                f"{origin}: the buffers in {path.name} are compressed, which datasets never writes; save its rows as "
                "JSON lines or Parquet"
            )


def _is_packed(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return has_packed_buffers(stream)
    except NO_ARROW:  # or it is cut off; pyarrow says what is wrong
        return False


def _open_hub(source: Source, key: str) -> Opened:
    from datasets import load_dataset

    path = source.path
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or kind_of(Path(path))[0] in READERS:
        raise ValueError(f"{key}={source.path} does not exist")
    try:
        dataset: Any = load_dataset(
            source.path,
            source.name,
            data_dir=source.folder,
            split=source.split or "train",
            streaming=source.streaming,
            revision=source.revision,
        )
    except Exception as error:  # the hub client raises many kinds; all mean that there are no rows
        raise ValueError(
            f"{key}={source.path} is neither a local file or folder nor to be had from the hub: {error}"
        ) from error
    note_commit(path, source.revision, f"{source.revision} {_origin(dataset)}")
    rows = _named_rows(dataset, f"{source.path} {source.split or 'train'}")
    return Opened(rows, None if source.streaming else dataset._fingerprint)


def _origin(dataset: Any) -> str:
    """Addresses and cached files that a set of `datasets` was made of, which name its commit."""
    addresses = " ".join(dataset.info.download_checksums or ())
    return " ".join([*(file["filename"] for file in getattr(dataset, "cache_files", ())), addresses])


def _named_rows(rows: Any, name: str) -> Iterator[Named]:
    for row_number, row in enumerate(rows, start=1):
        yield f"{name} row {row_number}", without_padding(row)
