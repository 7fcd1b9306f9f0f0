"""Lines in and lines out, for a command that must not wait for a slow writer while it has work,
and must leave whole lines behind however it ends."""

from __future__ import annotations

import os
import select
import stat

from tinyvllm.cli.terminal import Stopped, hold_signals

_CHUNK = 1 << 20


class LineReader:
    """The lines of a file or a pipe, one at a time, in memory that does not grow."""

    def __init__(self, descriptor: int, max_bytes: int) -> None:
        """Of a longer line only the first max_bytes + 1 bytes are kept."""
        self._descriptor = descriptor
        self._max_bytes = max_bytes
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._buffer = bytearray()
        self._num_searched = 0  # bytes of the buffer that are no line end
        self._num_read = 0
        self.at_end = False
        self.number = 0  # lines handed out

    @property
    def position(self) -> int:
        """Where in the file the next line begins."""
        return self._num_read - len(self._buffer)

    def read(self, wait: bool) -> bytes | None:
        """The next line, without its end. None: it is not there yet, or never will be (`at_end`).

        wait: whether to wait for it.
        """
        while True:
            end = self._buffer.find(b"\n", self._num_searched)
            if end >= 0:
                return self._take(end, end + 1)
            self._num_searched = len(self._buffer)
            if self.at_end:
                return self._take(self._num_searched, self._num_searched) if self._buffer else None
            if self._num_searched > self._max_bytes:
                del self._buffer[self._max_bytes + 1 :]
                self._num_searched = len(self._buffer)
            if not wait and not self._poll.poll(0):
                return None
            data = self._read_some()
            self._num_read += len(data)
            self._buffer += data
            self.at_end = not data

    def _take(self, end: int, following: int) -> bytes:
        line = bytes(self._buffer[: min(end, self._max_bytes + 1)])
        del self._buffer[:following]
        self._num_searched = 0
        self.number += 1
        return line

    def _read_some(self) -> bytes:
        while True:
            try:
                return os.read(self._descriptor, _CHUNK)
            except BlockingIOError:  # somebody has made the pipe non-blocking
                self._poll.poll()


class LineWriter:
    """Whole lines into a file or a pipe, each at once. A reader that has gone is Stopped(141)."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self.is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self.num_lines = 0  # that are written; right also when a signal has come during one
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def write(self, line: bytes) -> None:
        """Raises OSError with the file cut back to whole lines where there is no room for one."""
        if not self.is_file:
            self._poll.poll()  # here a signal ends the wait for a slow reader, between two lines
        with hold_signals():
            num_written = 0
            try:
                while num_written < len(line):
                    try:
                        num_written += os.write(self._descriptor, line[num_written:])
                    except BlockingIOError:
                        self._poll.poll()
                self.num_lines += 1
            except BrokenPipeError:
                raise Stopped(141) from None
            except OSError as error:
                if not self.is_file:
                    raise OSError(f"{self._name}: {error.strerror}") from None
                if num_written:
                    end = os.lseek(self._descriptor, 0, os.SEEK_CUR)
                    os.ftruncate(self._descriptor, end - num_written)
                raise OSError(
                    f"{self._name}: {error.strerror}. The lines that it has are whole; make room, "
                    "and --resume goes on after them"
                ) from None
