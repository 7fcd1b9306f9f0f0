"""The loop of run-batch: lines in, steps of the engine, answers out in the order of the lines."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tinyvllm.cli.batch_lines import Line, Settings, encode, read_line
from tinyvllm.cli.line_io import LineReader, LineWriter
from tinyvllm.errors import CheckpointError, InvalidRequestError
from tinyvllm.llm import LLM
from tinyvllm.outputs import RequestOutput
from tinyvllm.request import ActiveRequest

if TYPE_CHECKING:
    from tqdm import tqdm

# Lines made ready between two steps: those that run do not wait for a whole window of new ones.
_LINES_A_STEP = 32
_NUM_REMEMBERED_IDS = 1 << 16  # OpenAI's own files have at most 50,000 lines
_SECONDS_A_REFRESH = 0.2


@dataclass
class Tally:
    """What the output holds so far, from this run and from the one that it resumes."""

    answered: int = 0  # lines, whether with an answer or with an error
    failed: int = 0
    first_error: str = ""
    repeated_ids: int = 0
    first_repeat: str = ""
    _line_of_id: dict[int, int] = field(default_factory=dict)  # hash of custom_id -> line

    def add(self, answer: Mapping[str, Any]) -> None:
        self.answered += 1
        if isinstance(error := answer.get("error"), Mapping):
            self.failed += 1
            self.first_error = self.first_error or str(error.get("message"))

    def see(self, line: Line) -> None:
        """Compares the line's custom_id with those of the lines before it."""
        if line.custom_id is None:
            return
        key = hash(line.custom_id)
        if key in self._line_of_id:
            self.repeated_ids += 1
            self.first_repeat = self.first_repeat or (
                f"line {line.number} has the custom_id of line {self._line_of_id[key]}, "
                f"{line.custom_id!r:.60}"
            )
        elif len(self._line_of_id) < _NUM_REMEMBERED_IDS:
            self._line_of_id[key] = line.number


def next_line(reader: LineReader, wait: bool) -> Line | None:
    """The next line that is not empty; None as LineReader.read has it."""
    while (data := reader.read(wait)) is not None:
        if reader.number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if data and not data.isspace():
            return read_line(data, reader.number)
    return None


@dataclass
class _Slot:
    """A line of the window: its outputs as they come, then its answer."""

    line: Line
    end: int  # where the next line begins in the input
    outputs: list[RequestOutput] = field(default_factory=list)
    requests: list[ActiveRequest] = field(default_factory=list)  # that have not ended
    answer: dict[str, Any] | None = None


class Batch:
    """Answers lines until there are none. At most `window` of them are not yet in the output."""

    def __init__(
        self,
        llm: LLM,
        settings: Settings,
        reader: LineReader,
        writer: LineWriter,
        window: int,
        tally: Tally,
        progress: Progress,
    ) -> None:
        self._llm = llm
        self._settings = settings
        self._reader = reader
        self._writer = writer
        self._window = window
        self._tally = tally
        self._progress = progress
        self._slots: deque[_Slot] = deque()  # in the order of the lines
        self._by_request: dict[int, tuple[_Slot, RequestOutput]] = {}

    def run(self) -> None:
        """Raises what ends it before its time: Stopped, or an error that is no single line's."""
        while True:
            self._write()
            self._read()
            if self._llm.has_unfinished():
                for request in self._llm.step():
                    self._take(request)
            elif not self._slots and self._reader.at_end:
                return

    def _read(self) -> None:
        """Starts lines while the window has room, and waits for one if there is nothing to do."""
        for _ in range(_LINES_A_STEP):
            if len(self._slots) >= self._window:
                return
            line = next_line(self._reader, wait=not self._slots)
            if line is None:
                return
            self._tally.see(line)
            slot = _Slot(line, self._reader.position)
            self._slots.append(slot)
            try:
                for prompt, params in line.requests(self._llm, self._settings):
                    request = self._llm.add(prompt, params, incremental=False)
                    output = request.new_output()
                    slot.requests.append(request)
                    slot.outputs.append(output)
                    self._by_request[request.id] = slot, output
            except InvalidRequestError as error:
                self._fail(slot, error)

    def _take(self, request: ActiveRequest) -> None:
        """Adds what a step has brought to one request."""
        slot, output = self._by_request[request.id]
        for delta in request.take_deltas():
            output.add(delta)
        if not request.finished:
            return
        del self._by_request[request.id]
        slot.requests.remove(request)
        if slot.answer is not None:
            return  # it has failed, and this is one of the others that it had
        if request.error is not None:
            if isinstance(request.error, CheckpointError):
                raise request.error  # no line will be answered any more
            self._fail(slot, request.error)
        elif not slot.requests:
            slot.answer = slot.line.answer(slot.outputs, self._llm, self._settings)
            slot.outputs.clear()

    def _fail(self, slot: _Slot, error: Exception) -> None:
        slot.answer = slot.line.refusal(error)
        slot.outputs.clear()
        for request in slot.requests:
            self._llm.abort(request)

    def _write(self) -> None:
        """Writes the answers that no earlier line holds up."""
        while self._slots and (answer := self._slots[0].answer) is not None:
            self._writer.write(encode(answer))
            slot = self._slots.popleft()
            self._tally.add(answer)
            self._progress.show(slot.end)


class Progress:
    """How far a run is, on stderr: a bar if that is a terminal, and a line at the end."""

    def __init__(self, llm: LLM, tally: Tally, position: int, size: int | None, hide: bool) -> None:
        """position, size: of the input, in bytes; a pipe has no size."""
        self._llm = llm
        self._tally = tally
        self._num_before = tally.answered
        self._began = time.perf_counter()
        self._shown = self._began
        self._bar: tqdm[Any] | None = None
        if not hide and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            known = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
            self._bar = tqdm(
                total=size,
                initial=position,
                bar_format=known if size else "{elapsed}{postfix}",
                dynamic_ncols=True,
            )

    def show(self, position: int) -> None:
        now = time.perf_counter()
        if self._bar is None or now - self._shown < _SECONDS_A_REFRESH:
            return
        self._shown = now
        self._bar.set_postfix_str(f"{self._lines()}, {self._speed()}", refresh=False)
        self._bar.update(position - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def summary(self) -> list[str]:
        tally = self._tally
        lines = f"{self._lines()} in {time.perf_counter() - self._began:.1f} s, {self._speed()}"
        if self._num_before:
            lines += f"; {self._num_before} were there"
        notes = [lines]
        if tally.failed:
            notes.append(f"the first that failed: {tally.first_error}")
        if tally.repeated_ids:
            notes.append(
                f"custom_ids that come twice: {tally.repeated_ids}, each answered; the first: "
                f"{tally.first_repeat}"
            )
        return notes

    def _lines(self) -> str:
        failed = f" ({self._tally.failed} failed)" if self._tally.failed else ""
        return f"{self._tally.answered - self._num_before} lines{failed}"

    def _speed(self) -> str:
        seconds = max(time.perf_counter() - self._began, 1e-9)
        stats = self._llm.stats()
        return (
            f"{stats['prompt_tokens'] / seconds:.0f} prompt and "
            f"{stats['generation_tokens'] / seconds:.0f} output tokens/s"
        )
