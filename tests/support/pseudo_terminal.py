"""A command typed at a terminal: a real one, by the operating system's account, whose bytes are kept."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

from tests.support.command import typed_here

DRAWN = re.compile(  # what rich draws with: colours, the cursor hidden and moved, a line cleared or begun anew
    rb"\x1b\[[\d;]*m|\x1b\[\?25[lh]|\x1b\[2K|\x1b\[\d*A|\r"
)


class Screen(NamedTuple):
    returncode: int | None
    sent: bytes

    @property
    def shown(self) -> str:
        """Without what draws."""
        return DRAWN.sub(b"", self.sent).decode()


def _at(terminal: int, columns: int, call: Callable[[], object]):
    os.environ |= {"TERM": "xterm", "COLUMNS": str(columns)}  # rich has looked at the streams of the process copied
    for stream in (1, 2):
        os.dup2(terminal, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    call()


def _until_closed(keyboard: int) -> bytes:
    sent = b""
    while True:
        try:
            piece = os.read(keyboard, 1 << 16)
        except OSError:  # as Linux says that nobody is left at the other end
            return sent
        if not piece:
            return sent
        sent += piece


def at_terminal(call: Callable[[], object], columns: int = 80) -> Screen:
    """A call in a process of its own, whose output and errors go to a terminal that wide."""
    keyboard, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else they warn of the copy
    process = get_context("fork").Process(target=_at, args=(terminal, columns, call))
    process.start()
    os.close(terminal)
    sent = _until_closed(keyboard).replace(b"\r\n", b"\n")  # as the terminal's own driver ends lines
    process.join(timeout=60)
    os.close(keyboard)
    return Screen(process.exitcode, sent)


def typed_at_terminal(*arguments: str, columns: int = 80) -> Screen:
    """Run a command in a process of its own, whose output and errors go to a terminal that wide."""
    return at_terminal(partial(typed_here, *arguments), columns)
