"""The words of the command line: checked before Hydra reads them, composed as Hydra would, written for the user."""

import difflib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from dpo_ref.cli.schemas import CONF, SCHEMAS, groups, option_names
from dpo_ref.tracking.redaction import refuse_typed_credentials


def refuse_unknown(prefix: str, keys: Iterable[str], options: Iterable[str]) -> None:
    """Raise ValueError for a given key that is not known, with the nearest that is."""
    names = sorted(options)
    for key in keys:
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(prefix + n for n in names)}"
            raise ValueError(f"{prefix}{key} is not an option; {hint}")


def check_command_line(arguments: Sequence[str], kind: str) -> None:
    """Refuse credentials, before anything is written, and a misspelt key with the nearest one that exists, before
    Hydra does so without naming it.

    A key that some member of a group takes passes: whether the chosen member takes it is Hydra's question.
    """
    if {"-sc", "--shell-completion"} & set(arguments):
        return
    refuse_typed_credentials(arguments)
    top: dict[str, set[str]] = {f.name: set() for f in fields(SCHEMAS[kind])} | {"experiment": set()}
    top |= {f.name: {inner.name for inner in fields(f.type)} for f in fields(SCHEMAS[kind]) if is_dataclass(f.type)}
    for group in top.keys() & groups().keys():
        top[group] = option_names(group)
    for argument in arguments:
        key, equals, value = argument.lstrip("+~").partition("=")
        head, _, rest = key.partition(".")
        if value == "None":  # as the agent of a `wandb sweep` writes null
            raise ValueError(f"{argument}: None is a text here; write {key}=null (in a W&B sweep: value: 'null')")
        if "@" in head:  # a member inside another, as in scorer@data.scorer: Hydra knows its place
            continue
        if not equals or argument.startswith("-") or head.startswith("hydra"):
            continue
        refuse_unknown("", [head], top)
        if rest and rest != "_target_":
            refuse_unknown(f"{head}.", [rest], top[head])


OF_A_SAVED_RUN = {"resume": None, "policy": ("data", "model", "reference"), "sweep": ("data", "model", "reference")}


def with_trust(arguments: Sequence[str]) -> list[str]:
    """The words with the servers of a saved run, typed as the options they are (`reference.url=...`), as `trust=...`:
    Hydra would look for them in what it composes, which is not that run."""
    keys = {argument.partition("=")[0] for argument in arguments}
    saved = next((key for key in OF_A_SAVED_RUN if key in keys), None)
    if saved is None or "trust" in keys:
        return list(arguments)
    words = {argument: argument.partition("=") for argument in arguments}
    servers = {
        argument: value
        for argument, (key, _, value) in words.items()
        if key.endswith((".url", ".base_url"))
        and key.partition(".")[0] not in keys
        and key.startswith(OF_A_SAVED_RUN[saved] or "")
    }
    rest = [argument for argument in arguments if argument not in servers]
    return rest + ([f"trust=[{','.join(servers.values())}]"] if servers else [])


def checked(arguments: Sequence[str], kind: str) -> list[str]:
    """The words as Hydra gets them. What is refused ends the process with one sentence."""
    words = with_trust(arguments)
    try:
        check_command_line(words, kind)
    except ValueError as error:
        sys.exit(f"error: {error}")
    return words


def compose_command(overrides: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    """The tree and the choices that `train.py` gets for a command line. Raises what `train.py` would say."""
    check_command_line(overrides, "train")
    inside = GlobalHydra.instance().is_initialized()
    with nullcontext() if inside else initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("train", overrides=list(overrides), return_hydra_config=True)
    members = cfg.hydra.runtime.choices.items()
    choices = {str(group): name for group, name in members if name is not None and not str(group).startswith("hydra/")}
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    return cfg, choices


def reference_words(entry: Any) -> list[str]:
    """What one types after `train.py` for an entry of `references`: a model's path, the name of a kind, or
    {reference: <kind>, and its options}. Raises ValueError for what is none of these."""
    kinds = sorted(path.stem for path in groups()["reference"])
    if isinstance(entry, str):
        return _words_of_text(entry, kinds)
    options = dict(entry) if isinstance(entry, Mapping) else {}
    kind = options.pop("reference", None)
    if kind not in kinds:
        raise ValueError(f"references: {entry} is not {{reference: {'|'.join(kinds)}, and its options}}")
    return [f"reference={kind}", *typed_words({f"reference.{key}": value for key, value in options.items()})]


def _words_of_text(entry: str, kinds: Sequence[str]) -> list[str]:
    if entry in kinds:
        return [f"reference={entry}"]
    close = difflib.get_close_matches(entry, kinds, n=1)
    if close and not Path(entry).expanduser().exists():
        raise ValueError(f"references: {entry} is no model here; did you mean {close[0]}?")
    return ["reference=other", *typed_words({"reference.path": entry})]


def python() -> str:
    """What one types for this interpreter: `python` where the shell finds it under that name, else its path."""
    running = Path(sys.executable)
    if shutil.which("python") == str(running):
        return "python"
    return shlex.quote(str(running.relative_to(Path.cwd()) if running.is_relative_to(Path.cwd()) else running))


def typed_words(options: Mapping[str, Any]) -> list[str]:
    """Options as one types them on Hydra's command line, before the shell's quotes."""
    return [f"{key}={_literal(value)}" for key, value in options.items()]


def _literal(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, str) and not re.fullmatch(r"(?!(?i:null|true|false|nan|inf)$)[A-Za-z_./][\w./:-]*", value):
        return json.dumps(value, ensure_ascii=False)
    return value if isinstance(value, str) else json.dumps(value)
