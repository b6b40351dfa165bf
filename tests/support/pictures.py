"""Pictures that are composed and named, but not drawn: matplotlib takes ten times as long as all else that an
evaluation of a tiny model does."""

from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from matplotlib.backends import backend_pdf
from matplotlib.figure import Figure

PIXEL = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
EMPTY = {"png": PIXEL, "svg": b"<svg></svg>"}


def _save(figure, target, *, format, **options):
    if isinstance(target, Path):
        target.write_bytes(EMPTY[format])
    else:
        target.write(EMPTY[format].decode())


class _Pages:
    """A document without pages."""

    def __init__(self, target, metadata):
        target.write_bytes(b"%PDF-1.4")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def savefig(self, figure):
        pass


@contextmanager
def undrawn() -> Iterator[None]:
    """For tests that look at numbers, texts and the names of files: every picture is empty."""
    with (
        patch.object(Figure, "savefig", _save),
        patch.object(Figure, "draw_without_rendering", lambda figure: None),
        patch.object(backend_pdf, "PdfPages", _Pages),
    ):
        yield
