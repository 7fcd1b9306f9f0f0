"""LLM: prompts in, outputs out, with vLLM's names. It steps its engine until they are there."""

from __future__ import annotations

import numbers
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from tinyvllm.chat_template import Message
from tinyvllm.errors import InvalidRequestError
from tinyvllm.outputs import RequestDelta, RequestOutput
from tinyvllm.request import ActiveRequest, ParsedPrompt
from tinyvllm.sampling_params import SamplingParams
from tinyvllm.text_engine import BUNDLED_MODEL, Prompt, TextEngine

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["BUNDLED_MODEL", "LLM", "Prompt"]

_T = TypeVar("_T")


class LLM(TextEngine):
    """A loaded model that completes prompts. Its arguments are TextEngine's. A context manager."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., tqdm[Any]] = True,
    ) -> list[RequestOutput]:
        """Continues every prompt. Outputs are in the order of the prompts.

        A prompt is a string, a list of token ids, {"prompt": ...} or {"prompt_token_ids": ...}.
        sampling_params: one for all or one a prompt; None: the model's own defaults.
        use_tqdm: whether to show progress on stderr, or what makes the bar in tqdm's place.
        """
        parsed = _parse_each(_as_list(prompts), self.parse)
        return self._complete(parsed, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., tqdm[Any]] = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of a list of them, through the model's chat template."""
        single = not messages or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        parse = partial(
            self.parse_chat,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        parsed = _parse_each(conversations, parse)
        return self._complete(parsed, sampling_params, use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestDelta]:
        """Yields what each step adds. Closing the iterator aborts what is unfinished."""
        parsed = _parse_each(_as_list(prompts), self.parse)
        requests = self._add(parsed, sampling_params, incremental=True)
        for deltas in self._run(requests):
            yield from deltas  # while one is out, somebody else may step the engine

    def _complete(
        self,
        prompts: list[ParsedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool | Callable[..., tqdm[Any]],
    ) -> list[RequestOutput]:
        requests = self._add(prompts, sampling_params, incremental=False)
        outputs = [request.new_output() for request in requests]
        progress = _Progress(len(outputs), use_tqdm) if use_tqdm else None
        try:
            for deltas in self._run(requests):
                for delta in deltas:
                    output = outputs[delta.prompt_index]
                    output.add(delta)
                    if progress and output.finished:
                        progress.add(output)
        finally:
            if progress:
                progress.close()
        for request, output in zip(requests, outputs, strict=True):
            request.fill_in(output)
        return outputs

    def _add(
        self,
        prompts: list[ParsedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        incremental: bool,
    ) -> list[ActiveRequest]:
        """Queues all prompts, or none if one of them is refused."""
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise InvalidRequestError(
                f"There are {len(prompts)} prompts and {len(sampling_params)} sampling_params. "
                "Give one for all, or one for each prompt."
            )
        requests: list[ActiveRequest] = []
        try:
            for index, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
                with _one_of(index, len(prompts)):
                    requests.append(
                        self.add(prompt, params, prompt_index=index, incremental=incremental)
                    )
        except BaseException:
            for request in requests:
                self.abort(request)
            raise
        return requests

    def _run(self, requests: list[ActiveRequest]) -> Iterator[Iterator[RequestDelta]]:
        """Steps the engine until these requests have ended; others that are queued advance, too."""
        unfinished = requests
        try:
            while unfinished:
                if not any(request.finished for request in unfinished):  # by somebody else's steps
                    self.step()
                deltas = chain.from_iterable(request.take_deltas() for request in unfinished)
                errors = [request.error for request in unfinished if request.error is not None]
                unfinished = [request for request in unfinished if not request.finished]
                yield deltas
                if errors:
                    raise errors[0]
        finally:
            for request in unfinished:
                self.abort(request)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Progress:
    """vLLM's progress bar: prompts done, and tokens a second in and out."""

    def __init__(self, num_prompts: int, use_tqdm: bool | Callable[..., tqdm[Any]]) -> None:
        from tqdm import tqdm

        make = use_tqdm if callable(use_tqdm) else tqdm
        self._num_prompt_tokens = self._num_output_tokens = 0
        self._began = time.perf_counter()
        self._bar = make(
            total=num_prompts,
            desc="Processed prompts",
            dynamic_ncols=True,
            postfix=self._speed(),
        )

    def add(self, output: RequestOutput) -> None:
        """Counts a prompt that is done."""
        self._num_prompt_tokens += len(output.prompt_token_ids)
        self._num_output_tokens += sum(len(one.token_ids) for one in output.outputs)
        self._bar.postfix = self._speed()
        self._bar.update()

    def close(self) -> None:
        self._bar.close()

    def _speed(self) -> str:
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        return (
            f"est. speed input: {self._num_prompt_tokens / elapsed:.2f} toks/s, "
            f"output: {self._num_output_tokens / elapsed:.2f} toks/s"
        )


def _parse_each(prompts: Sequence[_T], parse: Callable[[_T], ParsedPrompt]) -> list[ParsedPrompt]:
    parsed = []
    for index, prompt in enumerate(prompts):
        with _one_of(index, len(prompts)):
            parsed.append(parse(prompt))
    return parsed


@contextmanager
def _one_of(index: int, count: int) -> Iterator[None]:
    """What is wrong with one of several prompts says with which."""
    try:
        yield
    except InvalidRequestError as error:
        if count == 1:
            raise
        raise type(error)(f"prompt {index + 1} of {count}: {error}") from error


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many -> many."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    items: list[Any] = list(prompts)
    if items and all(isinstance(item, numbers.Integral) for item in items):
        return [items]  # the token ids of one prompt
    return items
