"""Pictures that are composed and named, but not drawn: matplotlib takes ten times as long as all else that an
evaluation of a tiny model does. An SVG holds the words that were written into the picture."""

from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from unittest.mock import patch

from matplotlib.backends import backend_pdf
from matplotlib.figure import Figure
from matplotlib.text import Text

PIXEL = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def _save(figure, target, *, format, **options):
    words = "".join(f"<text>{escape(text.get_text())}</text>" for text in figure.findobj(Text) if text.get_text())
    if format == "png":
        target.write_bytes(PIXEL)
    elif isinstance(target, Path):
        target.write_text(f"<svg>{words}</svg>")
    else:
        target.write(f"<svg>{words}</svg>")


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
    """For tests that look at numbers, texts and the names of files: a picture is its words."""
    with (
        patch.object(Figure, "savefig", _save),
        patch.object(Figure, "draw_without_rendering", lambda figure: None),
        patch.object(backend_pdf, "PdfPages", _Pages),
    ):
        yield
