"""Signals, standard input and standard output, as a program in a pipeline must treat them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tinyvllm.errors import InvalidRequestError


class Stopped(SystemExit):
    """The program was told to stop: by a signal, or because nobody reads its output any more.

    A SystemExit, because an event loop (that of `chat`'s line editor) lets through nothing else
    that is raised while it runs a callback, which is where a signal may come.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def handle_signals() -> None:
    """SIGINT and SIGTERM end the work in order, by Stopped; a second one kills at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)


@contextmanager
def hold_signals() -> Iterator[None]:
    """A first signal inside takes effect at the end: what belongs together is done together."""
    global _holding, _held
    _holding = True
    try:
        yield
    finally:
        _holding = False
        number, _held = _held, 0
        if number:
            raise Stopped(128 + number)


_holding = False
_held = 0  # the signal that came meanwhile


def _stop(number: int, frame: FrameType | None) -> None:
    global _held
    signal.signal(number, signal.SIG_DFL)
    if _holding:
        _held = number
    else:
        raise Stopped(128 + number)


class Interrupts:
    """Whether SIGINT (Ctrl-C) has come. Who has reacted to it sets `seen` back."""

    def __init__(self) -> None:
        self.seen = False


@contextmanager
def catch_interrupts() -> Iterator[Interrupts]:
    """SIGINT ends nothing inside: it is seen by who asks."""
    interrupts = Interrupts()

    def see(number: int, frame: FrameType | None) -> None:
        interrupts.seen = True

    before = signal.signal(signal.SIGINT, see)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def read_stdin() -> str:
    if sys.stdin is None:
        raise InvalidRequestError("standard input is closed. Give --prompt or --prompt-file.")
    return _decode(sys.stdin.buffer.read(), "standard input")


def read_file(path: str) -> str:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"{path}: cannot be read: {error.strerror}.") from error
    return _decode(data, path)


def _decode(data: bytes, origin: str) -> str:
    """Text without the mark before it that some editors write, and without its last line end."""
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
        return text.removesuffix("\r\n" if text.endswith("\r\n") else "\n")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{origin}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8. "
            "Convert the text first."
        ) from None


class Output:
    """Standard output in UTF-8 whatever the locale. A reader that has gone is Stopped(141)."""

    def __init__(self) -> None:
        if sys.stdout is None:
            raise OSError("standard output is closed")
        self._stream = sys.stdout.buffer
        self.is_terminal = sys.stdout.isatty()
        self._at_line_start = True

    def write(self, text: str) -> None:
        """Into the buffer; `flush` hands it on."""
        if text:
            with self._failures():
                self._stream.write(text.encode("utf-8", "replace"))
            self._at_line_start = text.endswith("\n")

    def flush(self) -> None:
        with self._failures():
            self._stream.flush()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise Stopped(141) from None
        except OSError as error:
            raise OSError(f"standard output: {error.strerror}") from None

    def end_line(self) -> None:
        """A line end, if the text written so far has none."""
        if not self._at_line_start:
            self.write("\n")
