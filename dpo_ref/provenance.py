"""What a run was made with: library versions, machine, state of the source tree."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "hydra-core", "omegaconf", "wandb")


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:  # W&B, where tracking=none
        return None


def provenance() -> dict[str, Any]:
    """Versions (null for what is not installed), device and git commit, with `dirty` true when the tree differs from
    the commit."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "versions": {name: _version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "git": {"commit": _git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)},
    }
