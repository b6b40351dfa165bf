"""The words of the command line: checked before Hydra reads them, composed as Hydra would, written for the user."""

import difflib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from dpo_ref.cli import schemas
from dpo_ref.cli.launchers import OPTIONS
from dpo_ref.cli.schemas import CONF, SCHEMAS, groups, option_names, option_types
from dpo_ref.cli.side_by_side import LAUNCHER, SideBySideConfig
from dpo_ref.distributed import num_started, ranks
from dpo_ref.tracking.redaction import refuse_typed_credentials

RENAMED_OPTIONS = {"eps": "label_smoothing"}  # words of before, and what is written instead
RENAMED_MEMBERS = {
    (
        "objective",
        "alpha_dpo",
    ): "objective=alpha_divergence_dpo is what this was; objective=alphadpo is arXiv:2410.10148"
}


def refuse_unknown(prefix: str, keys: Iterable[str], options: Iterable[str]) -> None:
    """Raise ValueError for a given key that is not known, with its new name or the nearest that is."""
    names = sorted(options)
    for key in keys:
        if key not in names:
            if RENAMED_OPTIONS.get(key) in names:
                raise ValueError(f"{prefix}{key} is called {prefix}{RENAMED_OPTIONS[key]} now")
            close = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(prefix + n for n in names)}"
            raise ValueError(f"{prefix}{key} is not an option; {hint}")


def check_command_line(arguments: Sequence[str], kind: str) -> None:
    """Refuse credentials, before anything is written, and a misspelt key with the nearest one that exists, before
    Hydra does so without naming it.

    A key that some member of a group takes passes: whether the chosen member takes it is Hydra's question.
    """
    if COMPLETION & set(arguments):
        return
    refuse_typed_credentials(arguments)
    top: dict[str, set[str]] = {f.name: set() for f in fields(SCHEMAS[kind])} | {"experiment": set()}
    sections = {
        f.name: {inner.name for inner in fields(f.type)} for f in fields(SCHEMAS[kind]) if is_dataclass(f.type)
    }
    top |= sections
    for group in top.keys() & groups().keys():
        top[group] = option_names(group)
    for argument in overrides_in(arguments):
        key, equals, value = argument.lstrip("+~").partition("=")
        head, _, rest = key.partition(".")
        _refuse_nothing(argument, kind)
        if equals and key in sections and not value.startswith("{"):
            raise ValueError(f"{argument}: {key} is a section; write its options, such as {key}.{min(sections[key])}=")
        if value == "None":  # as the agent of a `wandb sweep` writes null
            raise ValueError(f"{argument}: None is a text here; write {key}=null (in a W&B sweep: value: 'null')")
        if "@" in head:  # a member inside another, as in scorer@data.scorer: Hydra knows its place
            continue
        if head.startswith("hydra"):
            _check_launcher_option(key, arguments)
            continue
        if not equals:
            raise ValueError(f"{argument!r} is no option: write key=value; --help lists the keys")
        refuse_unknown("", [head], top)
        if rest and rest != "_target_":
            refuse_unknown(f"{head}.", [rest], top[head])
        if head == "search" and rest and not any(word.lstrip("+").startswith("search=") for word in arguments):
            raise ValueError(f"{argument} has no effect without a search: add +search=halving, and -m")


def _refuse_nothing(argument: str, kind: str) -> None:
    """Raise ValueError where a group is to have no member, with what says that here, and where a key is deleted."""
    key, _, value = argument.lstrip("+~").partition("=")
    group, deleted = key.partition("@")[0], argument.startswith("~")
    if renamed := next((now for name in value.split(",") if (now := RENAMED_MEMBERS.get((group, name)))), None):
        raise ValueError(f"{argument}: {renamed}")
    if group not in groups():
        if deleted:
            raise ValueError(f"{argument}: nothing is deleted here; leave {key} out, or write {key}=null")
        return
    if not deleted and value not in NOTHING:
        return
    members = sorted(path.stem for path in groups()[group])
    optional = any(f.name == key and f.default is None for f in fields(SCHEMAS[kind]))
    says = [f"leave {key} out"] if optional else []
    says += [f"write {key}=none"] if "none" in members else []
    choices = f"choose one of {', '.join(members)}"
    raise ValueError(f"{argument}: {key} takes the name of a choice; {' or '.join(says) or choices}")


def _check_launcher_option(key: str, arguments: Sequence[str]) -> None:
    """Raise ValueError for an option that the launcher of these words does not take."""
    launcher = next((word.partition("=")[2] for word in arguments if word.startswith("hydra/launcher=")), "")
    if launcher in LAUNCHERS and key.startswith("hydra.launcher."):
        refuse_unknown("hydra.launcher.", [key.split(".")[2]], (f.name for f in fields(LAUNCHERS[launcher])))


LAUNCHERS = {LAUNCHER: SideBySideConfig, **OPTIONS}  # ours, and their options


NOTHING = ("null", "NULL", "Null", "None", "")  # as values of a group


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
    """The words as Hydra gets them, flags first, as it takes none between others. What is refused ends the process
    with one sentence."""
    words = _flags_first(with_trust(arguments))
    words = [spelled(word) for word in words] if kind == "train" else words
    if COMPLETION & set(words):
        words += _folders_to_complete()
    if MULTIRUN & set(words) and num_started() > 1:
        sys.exit(f"error: {ONE_RUN}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    try:
        schemas.look_in(config_folders(words))
        check_command_line(words, kind)
        if COMPLETION & set(words):
            return words
        _refuse_unusable(words)
        return for_swept_members(as_meant(words, kind), kind)
    except ValueError as error:
        sys.exit(f"error: {error}")


def spelled(word: str) -> str:
    """A word as Hydra has it: recipes and searches are of groups without a default, and `export`, a folder here, is
    the name of a group there."""
    if word.startswith(("recipe=", "search=")):
        return f"+{word}"
    return word.replace("export=", "export_to=", 1) if word.startswith("export=") else word


# --- words as they are meant: Hydra's grammar reads some texts as something else, or not at all


COMPLETION, MULTIRUN = {"-sc", "--shell-completion"}, {"-m", "--multirun"}
ONE_RUN = (
    "torchrun starts the ranks of one run, and -m asks for several: type a command for each, or let a cluster start "
    "the ranks of every job (python train.py -m ... hydra/launcher=submitit_slurm hydra.launcher.tasks_per_node=8)"
)
FLAGS_WITH_VALUE = (
    "-cd", "--config-dir", "-cp", "--config-path", "-cn", "--config-name", "-p", "--package", "--experimental-rerun",
    "-c", "--cfg",
)  # fmt: skip
INFO = ("-i", "--info")  # which may do without one
FUNCTIONS = "choice|range|interval|glob|sort|shuffle|tag|int|float|str|bool|json_str|extend_list"
STRUCTURE = re.compile(rf"""[\[{{'"]|({FUNCTIONS})\(""")  # begins a list, a dictionary, a quoted text or a function


# --- the user's own folders of YAML files


DIRECTORY = ("-cd", "--config-dir")  # flags that name one


def directory_words(arguments: Sequence[str]) -> list[str]:
    """The words that name the user's own folders of YAML files, to be typed again with another command."""
    named = [index for index, word in enumerate(arguments) if word in DIRECTORY]
    joined = [w for w in arguments if w.startswith((*(f"{flag}=" for flag in DIRECTORY), "hydra.searchpath="))]
    return [*(word for index in named for word in arguments[index : index + 2]), *joined]


def script(name: str) -> str:
    """What one types to run a script of ours beside this one, with the user's own folders."""
    size = ranks().size
    starting = ["torchrun", "--nproc-per-node", str(size)] if size > 1 else ["python"]
    return shlex.join([*starting, name, *directory_words(sys.argv[1:])])


def config_folders(arguments: Sequence[str]) -> list[Path]:
    """Those folders. Raises ValueError for one that does not exist."""
    words = directory_words(arguments)
    given = {flag: words[index + 1] for index, flag in enumerate(words[:-1]) if flag in DIRECTORY}
    joined = [word.partition("=")[2] for word in words if word.startswith(tuple(f"{flag}=" for flag in DIRECTORY))]
    searched: list[Any] = [
        override.value() for word in words if word.startswith("hydra.") and (override := _parsed(word))
    ]
    listed = [str(place) for value in searched for place in (value if isinstance(value, list) else [value])]
    places = [*given.values(), *joined, *listed]
    folders = {place: _folder(place) for place in places}
    if missing := [place for place, folder in folders.items() if folder is None or not folder.is_dir()]:
        raise ValueError(
            f"{missing[0]} is no folder of YAML files (--config-dir, hydra.searchpath); it does not exist"
        )
    return [folder for folder in folders.values() if folder is not None]


def _folder(place: str) -> Path | None:
    """A folder as Hydra's search path names it: a path, file://<path> or pkg://<package>."""
    scheme, separator, rest = place.partition("://")
    if not separator:
        return Path(place)
    if scheme == "file":
        return Path(rest)
    package, *inner = rest.replace("/", ".").split(".")
    found = find_spec(package)
    roots = (found.submodule_search_locations if found else None) or []
    return next((Path(root, *inner) for root in roots if Path(root, *inner).is_dir()), None)


def _folders_to_complete() -> list[str]:
    """Those of the line in which TAB was pressed."""
    try:
        return directory_words(shlex.split(os.environ.get("COMP_LINE", "")))
    except ValueError:  # a quote that is not closed yet
        return []


def _refuse_unusable(words: Sequence[str]) -> None:
    """Raise ValueError for a file of the user's that is chosen and whose component cannot be had."""
    reasons = {(path.parent.name, path.stem): f"{path}: {why}" for path, why in schemas.UNUSABLE.items()}
    for word in overrides_in(words):
        key, _, value = word.lstrip("+").partition("=")
        for choice in value.split(","):
            if why := reasons.get((key.partition("@")[0], choice)):
                raise ValueError(why)


def _flags_first(arguments: Sequence[str]) -> list[str]:
    overrides = overrides_in(arguments)
    return [*(word for word in arguments if word not in overrides), *overrides]


def overrides_in(arguments: Sequence[str]) -> list[str]:
    """The words that are no flags and no flag's value."""
    values = {index + 1 for index, argument in enumerate(arguments) if argument in FLAGS_WITH_VALUE}
    values |= {
        index + 1 for index, word in enumerate(arguments[:-1]) if word in INFO and "=" not in arguments[index + 1]
    }
    return [word for index, word in enumerate(arguments) if index not in values and not word.startswith("-")]


def quoted(text: str) -> str:
    """A text in quotes, as Hydra reads it whatever it contains: backslashes count before a quote alone."""
    inner = re.sub(r"(\\*)'", lambda match: 2 * match[1] + r"\'", text)
    return "'" + re.sub(r"\\+$", lambda match: 2 * match[0], inner) + "'"


def _parsed(word: str) -> Override | None:
    """What Hydra reads; None for what is not in its grammar."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def as_meant(arguments: Sequence[str], kind: str) -> list[str]:
    """The words, with quotes around values that are texts and that Hydra would not read as such: what its grammar has
    no place for (`=`, `#`, letters beyond ASCII), a number where a text is asked for, a comma in the name of a file.
    Raises ValueError for what cannot be told, with the quoted form."""
    sweeps, texts = bool(MULTIRUN & set(arguments)), _texts(kind)
    overrides = overrides_in(arguments)
    return [_as_meant(word, sweeps, texts) if word in overrides else word for word in arguments]


def _texts(kind: str) -> set[str]:
    """The keys whose values are texts, or of any kind, as paths are."""
    schema = SCHEMAS[kind]
    types = {f.name: get_type_hints(schema)[f.name] for f in fields(schema) if f.name not in groups()}
    for group in {f.name for f in fields(schema)} & groups().keys():
        for target in set(groups()[group].values()):
            options = option_types(group, target).items()
            types |= {f"{group}.{name}": hint for name, hint in options if hint in (str, str | None)}
    return {key for key, hint in types.items() if hint in (str, str | None, Any)}


def _as_meant(word: str, sweeps: bool, texts: Collection[str]) -> str:
    key, _, value = word.partition("=")
    if "${" in value and _is_file(value):
        raise ValueError(f"{word}: ${{...}} in a value reads another option; give the file a name without it")
    override = _parsed(word)
    if override is None:
        return f"{key}={_quoted_values(key, value, sweeps)}"
    if override.is_hydra_override() or override.is_delete():
        return word
    several = override.is_sweep_override()
    if several and _is_file(value) and not any(map(_is_file, value.split(","))):
        return f"{key}={quoted(value)}"
    if several:
        if not sweeps:
            raise ValueError(
                f"{word} has several values: with -m each is a run, {key}=[{value}] is a list, and "
                f'"{key}={quoted(value)}" one text'
            )
        return word
    read = override.value()
    is_text = key.lstrip("+") in texts
    otherwise = isinstance(read, int | float) or (read != value and _is_file(value))
    return f"{key}={quoted(value)}" if is_text and otherwise else word


def _is_file(text: str) -> bool:
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, of no user, or with a null in it
        return False


def _quoted_values(key: str, value: str, sweeps: bool) -> str:
    """A value that is not in Hydra's grammar, as the text or the texts to sweep over that it is. ValueError for what
    begins as a list, a dictionary or a function."""
    if STRUCTURE.match(value) and not _is_file(value):
        raise ValueError(
            f"{key}={value} cannot be read; in a list or dictionary, texts with other characters than letters, digits "
            f"and _-./+@%*?$| stand in quotes, as in \"{key}=['a=b']\"; a text as a whole does too: "
            f'"{key}={quoted(value)}"'
        )
    parts = value.split(",") if sweeps and not _is_file(value) else [value]
    words = [part if len(parts) > 1 and _parsed(f"{key}={part}") else quoted(part) for part in parts]
    if _parsed(f"{key}={','.join(words)}") is None:
        raise ValueError(f"{key}={value} cannot be read: {key} is no option's name")
    return ",".join(words)


def tracking_words(choice: str, words: Sequence[str]) -> list[str]:
    """Where a command line has its runs tracked, for the evaluation that follows them. An option that is swept is left
    out: the evaluation is one."""
    said = [parsed for word in words if word.lstrip("+").startswith("tracking.") and (parsed := _parsed(word))]
    return [f"tracking={choice}", *(parsed.input_line or "" for parsed in said if not parsed.is_sweep_override())]


def for_swept_members(words: Sequence[str], kind: str) -> list[str]:
    """The words with `++` before options of groups whose members are swept: Hydra composes the default member first,
    which may not take them. Raises ValueError for an option that some of the members do not take."""
    overrides = [override for word in overrides_in(words) if (override := _parsed(word)) is not None]
    swept = {
        override.key_or_group: [str(choice) for choice in override.sweep_string_iterator()]
        for override in overrides
        if override.key_or_group in groups() and override.is_choice_sweep()
    }
    if not MULTIRUN & set(words) or not swept:
        return list(words)
    keys = {override.input_line: override.key_or_group for override in overrides}
    return [f"++{word}" if word[:1] != "+" and _is_taken(word, keys.get(word, ""), swept) else word for word in words]


def _is_taken(word: str, key: str, swept: Mapping[str, Sequence[str]]) -> bool:
    """Whether a word is about an option that the swept members of its group take."""
    group, _, option = key.partition(".")
    if group not in swept or not option:
        return False
    targets = {path.stem: target for path, target in groups()[group].items()}
    known = [member for member in swept[group] if member in targets]  # Hydra names those that are not
    without = [member for member in known if option not in option_types(group, targets[member])]
    if without:
        raise ValueError(
            f"{word} is no option of {', '.join(f'{group}={member}' for member in without)}: sweep over those that "
            f"take it, or leave {key} out (evaluate.py sweep=[...] makes one table of several sweeps)"
        )
    return True


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


ON_QUESTIONS = "prompts=jsonl prompts.path=questions.jsonl"  # behind evaluate.py, where no prompts are held out
NEXT_OF_SCORES = "policy=<run or model folder> scorer=reward_model scorer.path={}/policy"  # after a reward model's run


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
        return quoted(value)
    return value if isinstance(value, str) else json.dumps(value)
