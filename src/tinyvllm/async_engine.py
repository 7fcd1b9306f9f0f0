"""AsyncEngine: many requests at once from asyncio, each a stream of outputs. What a server owns.

    async with AsyncEngine(model) as engine:
        async for output in engine.generate(prompt, sampling_params):
            ...

Three parties hold a request: the task that reads it, the event loop of that task, and the step
thread. After each step the step thread sends what is new to the loop, in one call for all requests
of that loop; the loop adds it to the request's output and wakes the task; the task takes a copy
when it gets round to it. So a task that reads slowly delays nobody, and costs no more memory than
its output does.
"""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from tinyvllm.errors import InvalidRequestError
from tinyvllm.outputs import RequestDelta, RequestOutput
from tinyvllm.request import ActiveRequest, ParsedPrompt
from tinyvllm.sampling_params import SamplingParams
from tinyvllm.step_thread import StepThread
from tinyvllm.text_engine import BUNDLED_MODEL, Prompt, TextEngine
from tinyvllm.tokenizer import Tokenizer


class AsyncEngine:
    """A loaded model that serves tasks. Its arguments are TextEngine's.

    Coroutines may come from any event loop, and from several. `async with` or `close()` ends the
    step thread; so does the end of the process, or of the last reference.
    """

    def __init__(self, model: str | Path = BUNDLED_MODEL, **options: Any) -> None:
        self._engine = TextEngine(model, **options)
        self._streams = _Streams(self._engine)
        self._thread = StepThread(self._engine, self._streams.deliver, self._streams.fail)
        self._numbers = itertools.count()
        weakref.finalize(self, self._thread.close)  # which holds no reference to self

    async def generate(
        self,
        prompt: Prompt | ParsedPrompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continues a prompt. Yields the output so far whenever there is more of it.

        As vLLM's default, an output holds all text and tokens from the beginning, and the last one
        is `finished`. Text that has been out never changes: what is new is the rest of it. Steps
        are merged while nobody reads. Leaving the loop, or cancelling the task, aborts the request.
        A prompt or an option that cannot be served raises in place of the first output, with
        nothing queued.
        """
        if isinstance(prompt, ParsedPrompt):
            parsed = prompt
        else:  # a long text takes a while, in which other tasks go on
            parsed = await asyncio.to_thread(self._engine.parse, prompt)
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        if request_id is None:
            names = (f"request-{number}" for number in self._numbers)
            request_id = next(name for name in names if self._streams.find(name) is None)
        stream = self._streams.open(request_id)
        try:
            start = partial(self._streams.start, stream, parsed, params)
            await asyncio.wrap_future(self._thread.call(start))
            while not stream.finished:
                yield await stream.next()
        finally:
            self._streams.forget(stream)
            self._abort(stream)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Ends requests: their last outputs have the finish reason `abort`. Unknown ids are fine.

        It returns at once; the requests end before the next step.
        """
        for name in [request_id] if isinstance(request_id, str) else request_id:
            stream = self._streams.find(name)
            if stream is not None:
                self._abort(stream)

    def _abort(self, stream: _Stream) -> None:
        if not stream.finished and self.is_running:
            self._thread.call(partial(self._streams.abort, stream))

    async def stats(self) -> dict[str, Any]:
        """TextEngine.stats(), as they are between two steps."""
        return await asyncio.wrap_future(self._thread.call(self._engine.stats))

    async def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes. False, with nothing done, while requests are unfinished."""
        return await asyncio.wrap_future(self._thread.call(self._engine.reset_prefix_cache))

    @property
    def is_running(self) -> bool:
        """False once it is closed, or has failed beyond the error of a request."""
        return self._thread.is_running

    def get_tokenizer(self) -> Tokenizer:
        return self._engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """What `sampling_params=None` means: the model's own defaults, then SamplingParams'."""
        return self._engine.get_default_sampling_params()

    def close(self) -> None:
        """Ends the step thread after the step that it is in. Whoever still reads gets an error."""
        self._thread.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)  # the loop goes on while the last step does


class _News(NamedTuple):
    """What one step brought to one stream."""

    stream: _Stream
    deltas: list[RequestDelta]
    error: Exception | None = None


class _Stream:
    """One request's output on its way to the task that reads it."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.loop = asyncio.get_running_loop()
        self.finished = False  # the task has got all there is
        self.request: ActiveRequest | None = None  # once the engine has taken it
        self._output: RequestOutput | None = None  # from here on: for the loop's thread only
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def add(self, news: _News) -> None:
        assert self.request is not None
        if self._output is None:
            self._output = self.request.new_output(self.request_id)
        for delta in news.deltas:
            self._output.add(delta)
        self._error = self._error or news.error
        self._changed.set()

    async def next(self) -> RequestOutput:
        """Waits until there is more, and returns all there is."""
        await self._changed.wait()
        self._changed.clear()
        if self._error is not None:
            self.finished = True
            raise self._error
        assert self.request is not None
        assert self._output is not None
        self.request.fill_in(self._output)
        self.finished = self._output.finished
        return self._output.snapshot()


class _Streams:
    """All streams of an engine. `start`, `abort`, `deliver` and `fail` are the step thread's."""

    def __init__(self, engine: TextEngine) -> None:
        self._engine = engine
        self._by_name: dict[str, _Stream] = {}  # that have a reader
        self._by_request: dict[int, _Stream] = {}  # whose requests the engine has not ended

    def open(self, request_id: str) -> _Stream:
        stream = _Stream(request_id)
        if self._by_name.setdefault(request_id, stream) is not stream:
            raise InvalidRequestError(f'request_id "{request_id}" is in use. Choose another.')
        return stream

    def find(self, request_id: str) -> _Stream | None:
        return self._by_name.get(request_id)

    def forget(self, stream: _Stream) -> None:
        del self._by_name[stream.request_id]

    def start(self, stream: _Stream, prompt: ParsedPrompt, params: SamplingParams) -> None:
        stream.request = self._engine.add(prompt, params, incremental=True)
        self._by_request[stream.request.id] = stream

    def abort(self, stream: _Stream) -> None:
        if stream.request is not None:
            self._engine.abort(stream.request)

    def deliver(self, requests: list[ActiveRequest]) -> None:
        """Sends what a step has brought to the event loops of those who read it."""
        news = []
        for request in requests:
            stream = self._by_request[request.id]
            if request.finished:
                del self._by_request[request.id]
            news.append(_News(stream, list(request.take_deltas()), request.error))
        for stream in _send(news):
            self.abort(stream)

    def fail(self, make_error: Callable[[], Exception]) -> None:
        """Sends an error to everybody who waits."""
        _send([_News(stream, [], make_error()) for stream in self._by_request.values()])
        self._by_request.clear()


def _send(news: list[_News]) -> list[_Stream]:
    """One call for each event loop. Returns the streams whose loops are closed."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_News]] = {}
    for item in news:
        by_loop.setdefault(item.stream.loop, []).append(item)
    lost = []
    for loop, items in by_loop.items():
        try:
            loop.call_soon_threadsafe(_add_all, items)
        except RuntimeError:  # closed, with its tasks gone
            lost += [item.stream for item in items]
    return lost


def _add_all(news: list[_News]) -> None:
    for item in news:
        item.stream.add(item)
