"""Keeps credentials out of what a run hands to a service (its configuration, names and tags), and the places of a
machine out of what is published.

A text is a credential if its key says so (`judge.api_key`, `hub_token`, `password`) or if it looks like one (the
published prefixes of API keys, a password inside a URL). Whatever was found under such a key is hidden wherever else
it appears, because an override given on the command line returns in the run's name.

Of places, paths become their last part, addresses of servers vanish. A name on the hub (`organisation/name`) and a
model of the lab (`lab:initial`) are no places and stay. Whatever stands as a path in a configuration is reduced
wherever else it appears, because an override returns in names and commands.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# --- credentials


HIDDEN = "***"
ALWAYS_SECRET = {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "apikey"}
KINDS_OF_KEY = {"api", "access", "private", "auth", "secret"}
TEXT_TOKENS = {"eos", "bos", "pad", "unk", "sep", "cls", "mask", "stop", "end", "start"}
LOOKS_SECRET = re.compile(
    r"\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|wandb_v\d_\w{16,}|AKIA[0-9A-Z]{16})|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
EMPTY = (None, "", True, False)  # says whether there is a credential, not which
SHORTEST_HIDDEN_ELSEWHERE = 6  # a shorter one would also hide parts of ordinary words


def names_secret(key: str) -> bool:
    """Whether a key's name says that its value is a credential. `eos_token` and `api_key_env` do not."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    *before, last = re.split(r"[^a-z0-9]+", words)
    kind = before[-1] if before else ""
    if last == "token":
        return kind not in TEXT_TOKENS
    return last in ALWAYS_SECRET or (last == "key" and kind in KINDS_OF_KEY)


def _secrets(value: Any, under_secret_key: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _secrets(inner, under_secret_key or names_secret(str(key)))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _secrets(inner, under_secret_key)
    elif under_secret_key and value not in EMPTY:
        yield str(value)
    elif isinstance(value, str):
        yield from LOOKS_SECRET.findall(value)


class Redactor:
    """Hides the credentials found in a configuration; `found` says whether there were any."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        secrets = set(_secrets(config))
        self.found = bool(secrets)
        self._elsewhere = sorted((s for s in secrets if len(s) >= SHORTEST_HIDDEN_ELSEWHERE), key=len, reverse=True)

    def text(self, text: str) -> str:
        """`text` with every known credential replaced by `***`."""
        for secret in self._elsewhere:
            text = text.replace(secret, HIDDEN)
        return LOOKS_SECRET.sub(HIDDEN, text)

    def tree(self, value: Any, key: str = "") -> Any:
        """A copy of a configuration without credentials, of types that JSON knows."""
        if isinstance(value, Mapping):
            return {str(name): self.tree(inner, f"{key}.{name}") for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.tree(inner, key) for inner in value]
        if value not in EMPTY and any(map(names_secret, key.split("."))):
            return HIDDEN
        return value if value is None or isinstance(value, bool | int | float) else self.text(str(value))


# --- places


END = r"\s\"'`,;:=\[\]{}()<>|"
LOCAL = re.compile(rf"(?<![\w:/.~-])(?:~|\.{{1,2}})?/(?:[^/{END}]+/)*([^/{END}]+)/?")
ADDRESS = re.compile(rf"\b(\w+)://[^{END}]+(?::\d+[^{END}]*)?")
BEGINS_A_PATH = ("/", "~", "./", "../")


def is_place(text: str) -> bool:
    """Whether a text as a whole is a path: by how it begins, or because it is there."""
    if text.startswith(BEGINS_A_PATH):
        return True
    try:
        return "/" in text and "\n" not in text and Path(text).exists()
    except OSError:  # longer than a path can be
        return False


def _places(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _places(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _places(inner)
    elif isinstance(value, str) and is_place(value):
        yield value


class PathRedactor:
    """Reduces paths and addresses, those that a configuration holds wherever they stand in a text."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._paths = sorted(set(_places(config)), key=len, reverse=True)

    def text(self, text: str) -> str:
        """`text` with paths reduced to their last part and addresses to their scheme."""
        for path in self._paths:
            text = text.replace(path, Path(path).name)
        return LOCAL.sub(r"\1", ADDRESS.sub(r"\1:...", text))

    def tree(self, value: Any) -> Any:
        """A copy of JSON values with every text in it reduced."""
        if isinstance(value, Mapping):
            return {name: self.tree(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.tree(inner) for inner in value]
        return self.text(value) if isinstance(value, str) else value
