"""A run's folder read as data, whoever made it: nothing in it is called, nothing outside it is written, no key goes to
a server that it alone names.

What is called stands in `conf/` of this installation, or in a folder that the command line names: every `_target_` of
the saved configuration must be that of the file which was chosen for its place. Interpolations, which read the
environment, are refused, as are links that lead out of the folder.
"""

import ipaddress
import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_ref.cli.command_line import typed_words
from dpo_ref.cli.schemas import FOLDERS, TrainSchema, groups, locate, parts_of, schema
from dpo_ref.component import annotations, configuration, member_group
from dpo_ref.evaluation import policy
from dpo_ref.files.digests import bytes_digest
from dpo_ref.models.server import KEY
from dpo_ref.tracking.redaction import refuse_credentials

# --- its two files


LARGEST = 2**20  # bytes; those of a run have a few thousand
DEEPEST = 30  # levels
AGAIN = "copy the folder again from where it is whole, or train it again"


@dataclass(frozen=True, slots=True)
class SavedRun:
    """What a run's folder says about it: its configuration, of which everything is offered by `conf/`, and its
    summary."""

    config: DictConfig
    summary: dict[str, Any]


def read_run(folder: Path, option: str, needed: Sequence[str] = ()) -> SavedRun:
    """The run in a folder, whose summary says what is `needed`; `option` says who names it. Raises ValueError for
    anything but data in the form that runs have, with the file, the key and the remedy."""
    _refuse_links_outside(folder, option)
    summary = read_summary(folder, option, needed)
    path = folder / "config.yaml"
    config = _configuration(path, option)
    tree = OmegaConf.to_container(config)
    offered = _offered(summary["choices"], folder, option)
    _refuse_interpolations(tree, f"{option}: {path}")
    refuse_credentials(tree, f"{option}: {path}")
    _check_targets(tree, offered, f"{option}: {path}", _other_version(summary))
    _check_types(config, offered, f"{option}: {path}")
    return SavedRun(config, summary)


SEAL = "# digest of the lines below: "


def with_digest(text: str) -> str:
    """A configuration's text behind a line with its digest, which is there also where the end is cut off."""
    return f"{SEAL}{bytes_digest(text.encode())}\n{text}"


def check_unchanged(folder: Path, option: str) -> None:
    """Raise ValueError for a config.yaml whose first line is the digest of another text."""
    path = folder / "config.yaml"
    content = _text(path, option)
    if content.startswith(SEAL) and with_digest(content.partition("\n")[2]) != content:
        raise ValueError(
            f"{option}: {path} is not as the run wrote it: its first line is the digest of another text; {AGAIN}. If "
            "it was changed on purpose, delete that line"
        )


def _text(path: Path, option: str) -> str:
    if not path.is_file():
        raise ValueError(f"{option}: {path} is missing; {AGAIN}")
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{option}: {path} is larger than {LARGEST:,} bytes, and no record of a run is; {AGAIN}")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: {path} is damaged: it is no text; {AGAIN}") from error


def _configuration(path: Path, option: str) -> DictConfig:
    return configuration_in(_text(path, option), f"{option}: {path}")


def configuration_in(text: str, origin: str) -> DictConfig:
    """The configuration that a text is, its interpolations left as they are. Raises ValueError for anything else."""
    try:
        _check_yaml(text)
        config = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{origin} is not the configuration of a run ({reason}); {AGAIN}") from error
    if not isinstance(config, DictConfig) or not config:
        raise ValueError(f"{origin} is not the configuration of a run: it is empty or no mapping; {AGAIN}")
    return config


def _check_yaml(text: str) -> None:
    """Raise ValueError for tags, which name types; for aliases, of which a small file builds a huge tree; and for
    more levels than any configuration has."""
    level = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or (isinstance(event, yaml.NodeEvent) and event.anchor):
            raise ValueError(f"line {event.start_mark.line + 1} has an anchor or alias")
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag:
            raise ValueError(f"line {event.start_mark.line + 1} has a tag")
        level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if level > DEEPEST:
            raise ValueError(f"line {event.start_mark.line + 1} is more than {DEEPEST} levels deep")


NAME = re.compile(r"\w[\w.-]*")  # of a file in conf/, without a way out of it
ALWAYS = ("status", "overrides", "choices", "seed")  # what every summary says


def read_summary(folder: Path, option: str, needed: Sequence[str] = ()) -> dict[str, Any]:
    """A run's summary.json. Raises ValueError for another form, for what lacks what is `needed`, for what is no choice
    and for what is no override."""
    path = folder / policy.SUMMARY
    summary = policy.read_summary(folder, option, [*ALWAYS, *needed])
    for group, choice in summary["choices"].items():
        if not isinstance(choice, str) or not NAME.fullmatch(choice):
            raise ValueError(
                f"{option}: {path}: choices.{group}={choice!r:.80} is no name of a file in conf/; {AGAIN}"
            )
    for override in summary["overrides"]:
        _check_override(override, f"{option}: {path}")
    return summary


PARAMETER = "hydra.sweeper.params."  # before a key that Hydra sweeps over


def read_sweep(path: Path, option: str) -> tuple[list[str], list[str]]:
    """What Hydra recorded of a sweep's command: its words about the jobs, and those about Hydra, of which only what is
    swept is checked. Raises ValueError for another form and for what is no override."""
    # as it stands: what reads the environment, or another value, is a text here
    tree: Any = OmegaConf.to_container(configuration_in(_text(path, option), f"{option}: {path}"))
    recorded: list[list[str]] = []
    for keys in (("hydra", "overrides", "task"), ("hydra", "overrides", "hydra")):
        listed = tree
        for key in keys:
            listed = listed.get(key) if isinstance(listed, dict) else None
        if not isinstance(listed, list) or not all(isinstance(word, str) for word in listed):
            raise ValueError(f"{option}: {path} is not Hydra's record of a sweep: it has no {'.'.join(keys)}; {AGAIN}")
        recorded.append(listed)
    task, hydra = recorded
    for word in (*task, *(word.removeprefix(PARAMETER) for word in hydra if word.startswith(PARAMETER))):
        _check_override(word, f"{option}: {path}", several=True)
    return task, hydra


OVERRIDE = re.compile(r"[+~]*([\w/-]+)(?:@[\w.]+)?((?:\.[\w-]+)*)(?:=(.*))?", re.DOTALL)


def _check_override(override: Any, origin: str, several: bool = False) -> None:
    """Raise ValueError for a recorded word that would compose more than options and files of conf/. A sweep's may have
    `several` choices."""
    word = OVERRIDE.fullmatch(override) if isinstance(override, str) else None
    if word is None or any(map(_is_special, word[2].split("."))) or "${" in (word[3] or "") or SPECIAL.search(word[0]):
        raise ValueError(
            f"{origin}: overrides hold {override!r:.120}, which is no option of a run; take it out, or train it again"
        )
    choices = (word[3] or "").split(",") if several else [word[3] or ""]
    if word[1] in groups() and not word[2] and not all(NAME.fullmatch(choice.strip("'\"")) for choice in choices):
        raise ValueError(f"{origin}: overrides hold {override!r:.120}, which is no name of a file in conf/; {AGAIN}")


# --- its configuration: no calls but those of conf/


SPECIAL = re.compile(r"\b_(target|args|partial|recursive|convert|call)_\b")  # what Hydra acts on


class Offered(NamedTuple):
    """What `conf/` has for a place of a run's tree."""

    group: str
    file: str
    target: str


def _is_special(key: str) -> bool:
    return SPECIAL.fullmatch(key) is not None


def _inner(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _entries(tree: Any, key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every entry of a tree: its dotted key, the last part of it, its value."""
    if isinstance(tree, dict | list):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield _inner(key, name), str(name), value
            yield from _entries(value, _inner(key, name))


def _offered(choices: Mapping[str, str], folder: Path, option: str) -> dict[str, Offered]:
    """What was chosen for each place, as `conf/` has it."""
    offered = {}
    for name, choice in choices.items():
        group, _, at = name.partition("@")
        if group not in groups():  # experiments are files of choices
            continue
        members = {path.stem: target for path, target in groups()[group].items()}
        if choice not in members:
            raise ValueError(
                f"{option}: {folder / 'summary.json'} has choices.{name}={choice}, and conf/{group}/ has no "
                f"{choice}.yaml; if it is yours, name its folder with --config-dir, or put it there"
            )
        offered[at or group] = Offered(group, f"conf/{group}/{choice}.yaml", members[choice])
    return offered


def _other_version(summary: Mapping[str, Any]) -> str:
    """What to do about a run that this version does not offer."""
    commit = summary["git"].get("commit") if isinstance(summary.get("git"), dict) else None
    is_commit = isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{7,64}", commit)
    checkout = f"git checkout {commit}" if is_commit else "the commit it was made with"
    called = "nothing of it was called"
    return f"{called}. If another version of dpo_ref made the run, {checkout} reads it; else train it again"


def _refuse_interpolations(tree: Any, origin: str) -> None:
    for key, name, value in _entries(tree):
        if "${" in name or (isinstance(value, str) and "${" in value):
            raise ValueError(
                f"{origin} has {key}={str(value)!r:.80}, an interpolation, which reads what the folder does not hold "
                "(such as the environment): write the value itself there"
            )


def _check_targets(tree: Any, offered: Mapping[str, Offered], origin: str, remedy: str) -> None:
    """Raise ValueError unless each component is the one that conf/ offers for what was chosen at its place, and for
    any other word that Hydra acts on."""
    entries = {key: value for key, _, value in _entries(tree)}
    targets = {f"{at}._target_": choice for at, choice in offered.items()}
    for key, name, value in _entries(tree):
        if not _is_special(name) or (key in targets and value == targets[key].target):
            continue
        offers = f"{targets[key].file} offers {targets[key].target}" if key in targets else "conf/ offers none there"
        raise ValueError(f"{origin} has {key}={str(value)!r:.120}, and {offers}: {remedy}")
    for key in (*(key for key in groups() if isinstance(tree.get(key), dict)), *offered):
        inside = _members_inside(offered[key]) if key in offered else ()
        for at in (key, *(f"{key}.{name}" for name in inside)):
            if f"{at}._target_" not in targets or f"{at}._target_" not in entries:
                raise ValueError(f"{origin} lacks {at}._target_, or summary.json the choice for it; {AGAIN}")


def _members_inside(choice: Offered) -> list[str]:
    """The options of a component that are themselves members of a group."""
    parts = parts_of(choice.group, locate(choice.target))
    hints = [(name, annotations(part)[name]) for part in parts for name in configuration(part)]
    return [name for name, hint in hints if member_group(hint) is not None]


def _check_types(config: DictConfig, offered: Mapping[str, Offered], origin: str) -> None:
    """Raise ValueError for a value of another type than its option has; which options there are is checked later."""
    _check_node(config, OmegaConf.structured(TrainSchema), "", origin)
    for at, choice in offered.items():
        typed = OmegaConf.structured(schema(*parts_of(choice.group, locate(choice.target))))
        _check_node(OmegaConf.select(config, at), typed, at, origin)


def _check_node(node: Any, typed: DictConfig, key: str, origin: str) -> None:
    sections = {f.name for f in fields(TrainSchema) if OmegaConf.is_config(typed.get(f.name))} if not key else set()
    for name in node:
        if name in sections and isinstance(node[name], DictConfig):
            _check_node(node[name], typed[name], _inner(key, name), origin)
        elif name in typed and not OmegaConf.is_missing(node, name):
            try:
                typed[name] = node[name]
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"{origin} has {_inner(key, name)} of another kind: {reason}; {AGAIN}") from error


# --- its files: none leads out of it


def _refuse_links_outside(folder: Path, option: str) -> None:
    """Raise ValueError for a link to something outside the folder, over which a run or an evaluation would write.

    W&B's own folder is left out: it makes its links anew.
    """
    root = folder.resolve()
    for path in (entry for entry in folder.rglob("*") if entry.is_symlink()):
        if "wandb" in path.relative_to(folder).parts[:-1] or path.resolve().is_relative_to(root):
            continue
        raise ValueError(
            f"{option}: {path} is a link that leads out of the run's folder, to {path.resolve()}: put what it names "
            "in its place, or delete it"
        )


# --- its servers: none is asked before the command line says so


OF_OPENAI = "OPENAI_API_KEY"  # to whom it goes unless told otherwise
RESTART = "restart"  # the option of generation=served that is a command


class _Unconfirmed(NamedTuple):
    key: str
    word: str  # an address, the name of a variable that holds a key, or a command
    consequence: str


def check_servers(tree: DictConfig, confirmed: Any, option: str) -> None:
    """Raise ValueError for a server, a key or a command that a saved configuration alone names. `confirmed` is
    `trust=`: what the command line says may be asked, sent and run. A server on this machine needs it where a key
    would be sent."""
    given = set(_words(confirmed))
    left = [each for each in _unconfirmed(OmegaConf.to_container(tree)) if each.word.rstrip("/") not in given]
    left = [each for each in left if each.word not in _own_addresses()] if left else []
    if not left:
        return
    raise ValueError(
        f"{option}: its config.yaml alone says {left[0].key}={left[0].word}, and {left[0].consequence}; if that is "
        f"what you want, append {shlex.join(trust_words([*sorted(given), *(each.word for each in left)]))}"
    )


def _unconfirmed(tree: Any) -> Iterator[_Unconfirmed]:
    nodes = {"": tree} | {key: value for key, _, value in _entries(tree) if isinstance(value, dict)}
    variables = {key: node.get("key_variable") or KEY for key, node in nodes.items()}
    for key, name, value in _entries(tree):
        variable = variables.get(key.rpartition(".")[0], KEY)
        if name == "key_variable" and value not in (OF_OPENAI, KEY, None) and os.environ.get(str(value)):
            yield _Unconfirmed(key, str(value), "what that variable holds would be sent to a server as a key")
        if name == RESTART and value is not None:
            yield _Unconfirmed(key, str(value), "that command would be run")
        if not isinstance(value, str) or not re.match(r"\s*https?:", value, re.IGNORECASE):
            continue
        if os.environ.get(variable):
            yield _Unconfirmed(key, value, f"the key in {variable} would be sent there")
        elif not _is_here(value):
            yield _Unconfirmed(key, value, "texts would be sent there")


def _is_here(address: str) -> bool:
    """Whether a server is on this machine."""
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _own_addresses() -> Collection[str]:
    """What the user's own conf/ says, and the folders that the command line names."""
    texts = (path.read_text(encoding="utf-8") for folder in FOLDERS for path in folder.rglob("*.yaml"))
    trees = (yaml.load(text, Loader=yaml.SafeLoader) for text in texts if re.search(r"^[^#]*https?:", text, re.M))
    return {value for tree in trees for _, _, value in _entries(tree) if isinstance(value, str)}


def refuse_unused_trust(tree: DictConfig | None, confirmed: Any) -> None:
    """Raise ValueError for `trust=` of what a saved configuration does not name."""
    named = {str(value).rstrip("/") for _, _, value in _entries(OmegaConf.to_container(tree or OmegaConf.create()))}
    for word in _words(confirmed):
        if word not in named:
            raise ValueError(f"trust={word} has no effect: the run's saved configuration names no such server")


def _words(confirmed: Any) -> list[str]:
    return [str(word).rstrip("/") for word in ([confirmed] if isinstance(confirmed, str) else confirmed or ())]


ADDRESS = re.compile(r"https?://[^\s,'\"\[\]{}()]+", re.IGNORECASE)


def trust_words(words: Sequence[str]) -> list[str]:
    """`trust=` with addresses and names of variables, as one types it before the shell's quotes; nothing for none."""
    unique = list(dict.fromkeys(words))
    return typed_words({"trust": unique[0] if len(unique) == 1 else unique}) if unique else []


def addresses_in(words: Sequence[str]) -> list[str]:
    """The addresses that a command line names."""
    return [address for word in words for address in ADDRESS.findall(word)]
