"""Runs the work of a benchmark and takes the time of every token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tinyvllm.cli.bench_work import Work
from tinyvllm.errors import TinyvllmError
from tinyvllm.llm import LLM
from tinyvllm.request import ActiveRequest, ParsedPrompt
from tinyvllm.sampling_params import SamplingParams


@dataclass
class RequestTimes:
    """One request. Times are seconds since all requests of its run were handed over."""

    num_prompt: int
    token_times: list[float] = field(default_factory=list)
    num_cached: int = 0
    ended: float | None = None
    error: Exception | None = None

    @property
    def completed(self) -> bool:
        return self.ended is not None and self.error is None


class Run:
    """What is known of all requests of one run, also of one that was cut off."""

    def __init__(self, work: Work) -> None:
        self.requests = [RequestTimes(len(prompt)) for prompt in work.prompts]
        self.seconds = 0.0
        self.step_times: list[float] = []  # the end of each step


def run_work(
    llm: LLM,
    work: Work,
    run: Run,
    temperature: float,
    *,
    stream: bool,
    on_token: Callable[[bool], None] = lambda first: None,
) -> None:
    """Hands all requests over at once and steps the engine until they have ended.

    The time covers scheduling, the forward pass, sampling and detokenization; not loading and not
    tokenization.

    run: is filled in as far as it goes, whatever ends it.
    stream: text is made of each token as it comes, as for a reader who waits; else at the end.
    on_token: is called for each token; is it the first of its request?
    """
    active: dict[int, tuple[ActiveRequest, RequestTimes]] = {}
    began = time.perf_counter()
    try:
        for prompt, length, times in zip(work.prompts, work.output_lens, run.requests, strict=True):
            params = SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=length)
            try:
                request = llm.add(ParsedPrompt(None, prompt), params, incremental=stream)
            except TinyvllmError as error:  # that one will not be served
                times.error, times.ended = error, 0.0
                continue
            active[request.id] = request, times
        while active:
            changed = llm.step()
            now = time.perf_counter() - began
            run.step_times.append(now)
            for request in changed:
                times = active[request.id][1]
                for delta in request.take_deltas():
                    for _ in delta.token_ids:
                        on_token(not times.token_times)
                        times.token_times.append(now)
                if request.finished:
                    output = request.new_output()
                    request.fill_in(output)
                    times.num_cached = output.num_cached_tokens or 0
                    times.ended, times.error = now, request.error
                    del active[request.id]
    finally:
        run.seconds = time.perf_counter() - began
        for request, _ in active.values():
            llm.abort(request)
