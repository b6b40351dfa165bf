"""Keeps credentials out of command lines, files and messages and out of what a run hands to a service, and the places
of a machine out of what is published.

A credential belongs into the environment, or where `wandb login` and `hf auth login` put it: one in a configuration is
refused before anything is written, and the keys of the environment are hidden in every error, however encoded.

A text is a credential if its key says so (`judge.api_key`, `hub_token`, `password`) or if it looks like one (the
published prefixes of API keys, a password inside a URL). Whatever was found under such a key is hidden wherever else
it appears, because an override given on the command line returns in the run's name.

Of places, paths become their last part, addresses of servers vanish. A name on the hub (`organisation/name`) and a
model of the lab (`lab:initial`) are no places and stay. Whatever stands as a path in a configuration is reduced
wherever else it appears, because an override returns in names and commands.
"""

import json
import os
import re
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote

# --- credentials


HIDDEN = "***"
ALWAYS_SECRET = {
    "secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "apikey", "authorization",
}  # fmt: skip
KINDS_OF_KEY = {"api", "access", "private", "auth", "secret", "served"}
TEXT_TOKENS = {"eos", "bos", "pad", "unk", "sep", "cls", "mask", "stop", "end", "start"}
LOOKS_SECRET = re.compile(
    r"\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|wandb_v\d_\w{16,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|gsk_\w{16,}"
    r"|nvapi-[\w-]{16,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
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


# --- keys of the environment, hidden in whatever an error, a server or a library says


SHORTEST_KEY = 8  # what is shorter is the value of some other variable, or no key


@cache
def _forms(secret: str) -> tuple[str, ...]:
    """How a secret may stand in a text: as it is, encoded for URLs and JSON, as hexadecimal digits, and of base64 what
    is the same whatever stands around it."""
    raw = secret.encode()
    percent, digits = "".join(f"%{byte:02X}" for byte in raw), raw.hex()
    forms = [secret, quote(secret, safe=""), quote_plus(secret), json.dumps(secret)[1:-1], percent, digits]
    for encode in (b64encode, urlsafe_b64encode):
        for before in range(3):
            first, end = -(-8 * before // 6), 8 * (before + len(raw)) // 6
            forms.append(encode(bytes(before) + raw).decode()[first:end])
    forms += [quote(secret, safe="").replace(code, code.lower()) for code in re.findall("%..", forms[1])]
    return tuple(dict.fromkeys([*forms, percent.lower(), digits.upper()]))


AROUND = r"[\w+/=-]{0,200}"  # the rest of what a piece of base64 stands in


def hide(text: str, secret: str) -> str:
    """`text` with a secret replaced by `***`, and with it all that it is encoded together with."""
    for form in _forms(secret):
        if form in text:
            text = (
                text.replace(form, HIDDEN)
                if form == secret
                else re.sub(AROUND + re.escape(form) + AROUND, HIDDEN, text)
            )
    return text


def _keys_here() -> list[str]:
    """The values of the environment's variables that hold keys by their names, and what `wandb login` has stored."""
    keys = {value for name, value in os.environ.items() if _names_key(name)} | _stored_keys()
    return sorted((key for key in keys if len(key) >= SHORTEST_KEY), key=len, reverse=True)


@cache
def _stored_keys() -> set[str]:
    try:
        stored = netrc(os.environ.get("NETRC"))
    except (OSError, NetrcParseError):
        return set()
    return {password for _, _, password in stored.hosts.values() if password}


def _names_key(name: str) -> bool:
    return names_secret(name) or name.lower().endswith("key")


def without_keys(text: str) -> str:
    """`text` without the environment's keys and without what looks like one."""
    for key in _keys_here():
        text = hide(text, key)
    return IN_ADDRESS.sub(HIDDEN, LOOKS_SECRET.sub(HIDDEN, text))


# --- keys that were typed, or stand in a configuration: refused


IN_ADDRESS = re.compile(
    r"(?<=://)[^/\s@'\",]+(?=@)|(?<=[?&#])(?:[\w.-]*(?:key|token|secret|password|sig|signature|auth))=[^&\s'\"]+",
    re.IGNORECASE,
)
ENTRY = re.compile(r"""['"]?([A-Za-z_][\w.-]*)['"]?\s*[:=]\s*['"]?([^\s,{}\['"\]]+)""")  # inside a value
NO_KEY = ("null", "none", "true", "false", "???")
OF_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*['\"]?(\w+)")
OF_WANDB = re.compile(r"[0-9a-f]{40}")  # and a commit of git
BELONGS = {
    "tracking": "type `wandb login`, or set WANDB_API_KEY",
    "judge": "set the environment variable that judge.key_variable names (OPENAI_API_KEY)",
    "reference": "set the environment variable DPO_REF_SERVED_KEY",
    "generation": "set the environment variable DPO_REF_SERVED_KEY",
    "hub": "type `hf auth login`, or set HF_TOKEN",
}
ANYWHERE = (
    "set it in the environment: WANDB_API_KEY, HF_TOKEN, DPO_REF_SERVED_KEY, or the variable that judge.key_variable "
    "names"
)


def _is_credential(key: str, value: str) -> bool:
    """Whether a text at a dotted key is, or holds, a credential."""
    last = key.rpartition(".")[2]
    if any(map(_names_key, key.split("."))) and value.strip("'\"").lower() not in ("", *NO_KEY):
        return True
    plain = unquote(value)
    if any(pattern.search(text) for pattern in (LOOKS_SECRET, IN_ADDRESS) for text in (value, plain)):
        return True
    if OF_WANDB.fullmatch(value.strip("'\"[]")) and last != "revision":
        return True
    if any(map(_names_key, OF_ENVIRONMENT.findall(value))):
        return True
    return any(form in value for key in _keys_here() for form in _forms(key))


def _refuse(origin: str, key: str, value: str) -> None:
    remedy = BELONGS.get(key.lstrip("+~").partition(".")[0], ANYWHERE)
    option = f"{origin}{LOOKS_SECRET.sub(HIDDEN, key)}"
    if IN_ADDRESS.search(unquote(value)):
        raise ValueError(f"{option} must hold no user, password or query with a key: {remedy}")
    raise ValueError(
        f"{option} holds what looks like a key, which files and other users would see: leave it out and {remedy}"
    )


def refuse_typed_credentials(words: Iterable[str]) -> None:
    """Raise ValueError for a word of the command line that holds a credential, without showing it."""
    for word in words:
        key, _, value = word.partition("=")
        inner = [(f"{key}.{name}", text) for name, text in ENTRY.findall(value)]
        if any(_is_credential(at, text) for at, text in [(key, value), ("", word), *inner]):
            _refuse("", key, value)


def refuse_credentials(tree: Any, origin: str, key: str = "") -> None:
    """Raise ValueError for a credential in a configuration, without showing it; `origin` says where that stands."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            refuse_credentials(value, origin, f"{key}.{name}".lstrip("."))
    elif isinstance(tree, list | tuple):
        for value in tree:
            refuse_credentials(value, origin, key)
    elif isinstance(tree, str) and _is_credential(key, tree):
        _refuse(f"{origin}: " if origin else "", key, tree)


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
