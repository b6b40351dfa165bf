"""`make licences`: docs/licences.md, from what each package in requirements.lock says of itself.

pip resolves what is pinned without installing it and reports the metadata, so that the CUDA build of torch and what it
brings have rows on machines without them.
"""

import json
import re
import subprocess
import sys
from typing import Any

from packaging.utils import canonicalize_name

from tests.support.lock import ROOT, pins

PAGE = ROOT / "docs" / "licences.md"
UNKNOWN = {"cuda-toolkit": "it has no code of its own: it names the nvidia-* packages that follow"}
INTRODUCTION = """# Licences of what is installed

Written by `make licences` from the metadata of each package in `requirements.lock`, those that others bring included.
"SPDX" is an expression that the package states as such; "classifier" and "text" are its words, in older fields.
The nvidia-* packages come with the CUDA build of torch; a CPU build needs none of them.

| package | version | licence | stated as |
|---|---|---|---|
"""
# Of Linux on x86_64, each of which pip wants to be told.
PLATFORMS = ["manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(5, 40))]


def metadata(python: str, versions: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What packages say of themselves, by their names."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    command += ["--ignore-requires-python", "--python-version", python, "--target", "nowhere", "--report", "-"]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    command += [f"{name}=={version}" for name, version in versions.items()]
    report = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    packages = [package["metadata"] for package in json.loads(report)["install"]]
    return {canonicalize_name(package["name"]): package for package in packages}


def licence(package: dict[str, Any]) -> tuple[str, str]:
    """A package's licence, and in which field it says so."""
    if expression := package.get("license_expression"):
        return expression, "SPDX"
    text = package.get("license", "").strip()
    if text and "\n" not in text:
        return text, "text"
    classifiers = [line for line in package.get("classifier", []) if line.startswith("License :: ")]
    if classifiers:
        return ", ".join(line.split(" :: ")[-1] for line in classifiers), "classifier"
    reason = UNKNOWN.get(canonicalize_name(package["name"]))
    return (f"unknown: {reason}" if reason else "unknown"), "nothing"


def write() -> None:
    """docs/licences.md. Where a version depends on that of Python, the first is the oldest Python's."""
    versions = [(pin.name, pin.version) for pin in pins()]
    oldest, newest = dict(reversed(versions)), dict(versions)
    newer = {name: version for name, version in newest.items() if oldest[name] != version}
    rows = []
    for python, chosen in (("3.11", oldest), ("3.13", newer)):
        said = metadata(python, chosen)
        rows += [(name, version, *licence(said[name])) for name, version in chosen.items()]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in sorted(rows)]
    PAGE.write_text(INTRODUCTION + "".join(lines))


def rows() -> dict[tuple[str, str], str]:
    """The licences on the page, by package and version."""
    cells = re.findall(r"^\| (\S+) \| (\d\S*) \| (.*) \| \w+ \|$", PAGE.read_text(), re.MULTILINE)
    return {(name, version): words for name, version, words in cells}


if __name__ == "__main__":
    write()
