"""Signals, standard input and standard output, as a program in a pipeline must treat them."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType

from tinyvllm.errors import InvalidRequestError


class Stopped(BaseException):
    """The program was told to stop: by a signal, or because nobody reads its output any more."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def handle_signals() -> None:
    """SIGINT and SIGTERM end the work in order, by Stopped; a second one kills at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise Stopped(128 + number)


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
    """Text without its last line end, as a shell's $(...) has it."""
    try:
        return data.decode("utf-8").removesuffix("\n")
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
        self._at_line_start = True

    def write(self, text: str) -> None:
        if not text:
            return
        try:
            self._stream.write(text.encode("utf-8", "replace"))
            self._stream.flush()
        except BrokenPipeError:
            raise Stopped(141) from None
        except OSError as error:
            raise OSError(f"standard output: {error.strerror}") from None
        self._at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """A line end, if the text written so far has none."""
        if not self._at_line_start:
            self.write("\n")
