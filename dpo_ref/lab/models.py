"""The lab's checkpoints, `lab:<name>`: where they are, and that they are what was shipped.

Those that ship lie in `checkpoints/`, each in a folder named by its model and by the digest of what is in it, so every
machine starts from the same weights. The others are built on first use, into the cache, by their recipes
(`recipes.py`); a folder is named by its recipe's digest, so changing the recipe builds anew and never overwrites. A
lock makes a second process wait for the first instead of building twice.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_ref.files.cache import cache_folder, in_use, is_kept
from dpo_ref.files.digests import DIGESTS, damage_in, file_digest
from dpo_ref.lab.recipes import RECIPES, Recipe, build
from dpo_ref.models.loading import LOCATORS
from dpo_ref.tracking.terminal import say

SCHEME = "lab:"
CHECKPOINTS = Path(__file__).parent / "checkpoints"
BUILT = ("large",)  # on first use: too large to ship


def locate(path: str) -> str:
    """The folder of the model `lab:<name>`, built if it is of `BUILT` and not in the cache. Raises ValueError for a
    name that there is not, and for shipped files that are not as they were."""
    name = path.removeprefix(SCHEME)
    if name not in RECIPES:
        raise ValueError(f"{path} is no model of the lab; there are {', '.join(SCHEME + n for n in RECIPES)}")
    if name in BUILT:
        return str(_built(name, RECIPES[name]))
    shipped = shipped_folder(name)
    if shipped is None:
        raise ValueError(f"{path} ships in {CHECKPOINTS} and is not there; git checkout -- {CHECKPOINTS}")
    if changed := change_in(shipped):
        raise ValueError(f"{path}: {shipped / changed} is not the file that ships; git checkout -- {shipped}")
    return str(shipped)


LOCATORS[SCHEME] = locate


# --- those that ship


def shipped_folder(name: str) -> Path | None:
    """Where a model that ships is; None if it is not there."""
    return next(CHECKPOINTS.glob(f"{name}-*"), None)


def shipped_name(name: str, folder: Path) -> str:
    """What a model's folder is called among those that ship: its name and the digest of its files' digests."""
    return f"{name}-{file_digest(folder / DIGESTS)[:12]}"


def change_in(folder: Path) -> str | None:
    """The file of a shipped folder that is not as its name says; None where all are."""
    if damaged := damage_in(folder):
        return damaged
    return None if folder.name == shipped_name(folder.name.partition("-")[0], folder) else DIGESTS


# --- those that are built


def _built(name: str, recipe: Recipe) -> Path:
    folder = cache_folder() / "models" / f"lab-{name}-{recipe.key}"
    if damage_in(folder) is not None:
        with _lock(folder.with_suffix(".lock"), name):
            if not is_kept(folder, "it is built again"):
                say(f"building lab:{name}, once per machine (its place is a GPU: a CPU takes many hours)")
                build(recipe, folder)
    in_use(folder)
    return folder


@contextmanager
def _lock(path: Path, name: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is building lab:{name}; waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
