"""Lines on stderr: for what a user should know, and need not hear."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# What a terminal obeys instead of showing it: the C0 and C1 controls, and the characters that turn
# the direction of writing. Line ends and tabs stay; a C0 control shows as its picture.
_CONTROLS = {
    **{code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)},
    0x7F: 0x2421,
    **dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
}


def printable(text: str) -> str:
    """Text of a stranger (a model, a file) as a terminal may have it: it cannot drive one."""
    return text.translate(_CONTROLS)


@contextmanager
def telling() -> Iterator[None]:
    """For writing to stderr: what nobody can hear is lost, and changes nothing else."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # for what is left in Python's buffer, too


def tell(text: str) -> None:
    """Writes a line, or several."""
    if sys.stderr is not None:  # it is closed, and print would take stdout in its place
        with telling():
            print(printable(text), file=sys.stderr, flush=True)
