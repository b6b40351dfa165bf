"""Every key that the table of metrics allows, and the literals of a file that could be one."""

import ast
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dpo_ref.evaluation.results import AT_TEMPERATURE, METRICS, Metric

NAMES = {  # what stands for the names in braces in tests
    "scorer": ("gold",),
    "baseline": ("initial",),
    "model": ("initial", "loss_reference"),
    "text": ("chosen", "rejected", "own"),
    "side": ("chosen", "rejected"),
    "file": ("Natural",),
    "score": ("implicit", "initial", "length", "likelihood", "likelihood_per_token", "reference"),
}
BEFORE = re.compile(AT_TEMPERATURE.of(temperature="[^/]+", key=""))


def keys_of(metric: Metric) -> Iterator[str]:
    """The metric's keys with all that stands beside them."""
    names = re.findall(r"\{(\w+)\}", metric.key)
    for values in itertools.product(*(NAMES[name] for name in names)):
        key = metric.of(**dict(zip(names, values, strict=True)))
        yield from (key, *(f"{key}{ending}" for ending in metric.beside))


ROWS = {key: metric for metric in METRICS if metric is not AT_TEMPERATURE for key in keys_of(metric)}


def unlisted(keys: Iterable[str]) -> set[str]:
    """Those of `keys` that no row of the table is about."""
    return {key for key in keys if BEFORE.sub("", key) not in ROWS}


def _outline(text: str) -> str:
    """A key with `{}` for each of its names."""
    return re.sub(r"\{\w*\}", "{}", text)


OUTLINES = {_outline(metric.key) for metric in METRICS}
FORBIDDEN = {
    *(key for key in ROWS if "/" in key),  # `seconds` is a word like any other
    *(f"{_outline(metric.key)}{ending}" for metric in METRICS for ending in ("", *metric.beside) if "/" in metric.key),
    *(outline.removesuffix("{}").removeprefix("{}") for outline in OUTLINES if "{}" in outline),  # to be glued
}


def key_literals(path: Path) -> set[str]:
    """Texts in a file's code, docstrings aside, that are a key of the table, with or without its names filled in."""
    tree = ast.parse(path.read_text())
    documented = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    apart = {id(part) for part in (*documented, *(part for text in joined for part in text.values))}
    texts = {
        "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in text.values) for text in joined
    }
    texts |= {
        _outline(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in apart
    }
    return {text for text in texts if re.sub(r"^(train|eval|evaluation|temperature/[^/]+)/", "", text) in FORBIDDEN}
