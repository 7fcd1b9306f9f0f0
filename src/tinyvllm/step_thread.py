"""StepThread: the one thread that touches a TextEngine, for callers that must not wait for a step.

A step holds the engine for as long as a forward pass takes. So nobody else calls the engine, but
for what TextEngine lets any thread call, such as `parse`: what others want of it goes through an
inbox, which this thread empties between two steps. With nothing to do it sleeps in the inbox, and a
call wakes it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias, TypeVar

from tinyvllm.errors import TinyvllmError
from tinyvllm.request import ActiveRequest
from tinyvllm.text_engine import TextEngine

_T = TypeVar("_T")
_Call: TypeAlias = tuple[Callable[[], Any], Future[Any]]


class StepThread:
    """Steps `engine` while it has requests, runs calls in between, until it is closed."""

    def __init__(
        self,
        engine: TextEngine,
        after_step: Callable[[list[ActiveRequest]], None],
        at_end: Callable[[Callable[[], TinyvllmError]], None],
    ) -> None:
        """Both run on the thread, and must not wait for anybody.

        after_step: gets the requests that have got something from the step.
        at_end: the thread ends, closed or failed; gets a maker of errors that say why.
        """
        self._engine = engine
        self._after_step = after_step
        self._at_end = at_end
        self._inbox: SimpleQueue[_Call | None] = SimpleQueue()  # None: close
        self._failure: BaseException | None = None
        self._ended = False
        self._pid = os.getpid()
        # A daemon, so that a process may end with an engine open; AsyncEngine closes it at exit.
        self._thread = threading.Thread(target=self._run, name="tinyvllm-step", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return not self._ended and os.getpid() == self._pid

    def call(self, function: Callable[[], _T]) -> Future[_T]:
        """Runs `function` between two steps. Fails at once where the thread has ended."""
        if os.getpid() != self._pid:
            raise TinyvllmError(
                f"This engine belongs to process {self._pid}; this is process {os.getpid()}, "
                "forked from it. Make an engine of its own in each process."
            )
        future: Future[_T] = Future()
        self._inbox.put((function, future))
        if self._ended:  # perhaps just now, with the call left unread
            self._refuse_calls()
        return future

    def close(self) -> None:
        """Ends the thread after the step that it is in, and closes the engine. Twice is fine."""
        if os.getpid() != self._pid:
            return  # the thread and the engine are the parent's
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:  # which closes what it was left with
            self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                try:
                    call = self._inbox.get(block=not self._engine.has_unfinished())
                except Empty:
                    self._after_step(self._engine.step())
                    continue
                if call is None:
                    break
                _answer(call)
                del call  # not to be kept alive while the thread sleeps
        except BaseException as error:
            self._failure = error
        self._ended = True
        self._refuse_calls()
        self._at_end(self._error)
        self._engine.close()

    def _refuse_calls(self) -> None:
        while True:
            try:
                call = self._inbox.get_nowait()
            except Empty:
                return
            if call is not None and call[1].set_running_or_notify_cancel():
                call[1].set_exception(self._error())

    def _error(self) -> TinyvllmError:
        if self._failure is None:
            return TinyvllmError("This engine is closed. Make a new one.")
        error = TinyvllmError(f"This engine has failed: {self._failure!r}. Make a new one.")
        error.__cause__ = self._failure
        return error


def _answer(call: _Call) -> None:
    function, future = call
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
