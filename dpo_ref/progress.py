"""How long passes say how far they are."""

from collections.abc import Callable, Iterable
from typing import Any

# items, what is being done, how many items there are (None: not known) -> the same items
Progress = Callable[[Iterable[Any], str, int | None], Iterable[Any]]


def silent(items: Iterable[Any], description: str, total: int | None) -> Iterable[Any]:
    """No progress bar."""
    return items
