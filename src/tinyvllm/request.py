"""One request as the front end sees it: the tokens that the engine sends become text and deltas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tinyvllm.detokenizer import IncrementalDetokenizer
from tinyvllm.outputs import (
    CompletionOutput,
    Logprob,
    RequestDelta,
    RequestOutput,
    TokenLogprobs,
)
from tinyvllm.sampling_params import SamplingParams
from tinyvllm.tokenizer import Tokenizer, TokenizerLoader

# What the engine reports for a token: its logprob, its rank, the best ids and their logprobs.
CoreLogprobs = tuple[float, int, list[int], list[float]]


class ParsedPrompt(NamedTuple):
    text: str | None  # None where token ids were given
    token_ids: list[int]


class ActiveRequest:
    """Takes the engine's events of one request and hands out deltas, until it has `finished`."""

    def __init__(
        self,
        id: int,
        prompt_index: int,
        prompt: ParsedPrompt,
        params: SamplingParams,
        tokenizer: TokenizerLoader,
        incremental: bool,
    ) -> None:
        """incremental: whether text is wanted as it comes, or once, at the end."""
        self.id = id
        self.finished = False
        self.error: Exception | None = None  # what has ended the request before its time
        self._prompt_index = prompt_index
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._outputs = [_Output(params, tokenizer, incremental) for _ in range(params.n)]
        self._deltas: list[RequestDelta] = []
        # (output, last token, reason) of ends whose text waits for the tokenizer.
        self._ends: list[tuple[int, int, str]] = []
        self._num_cached_tokens: int | None = None
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        if params.prompt_logprobs is not None and len(prompt.token_ids) == 1:
            self._prompt_logprobs = [None]  # nothing predicts the first token

    def accept(
        self, sample: int, token: int, finish: str | None, logprobs: CoreLogprobs | None
    ) -> bool:
        """One event: a token (or -1: none), the end of an output, or both.

        True if a stop string was found that the engine does not know of: it must be told.
        """
        output = self._outputs[sample]
        delta = RequestDelta(self._prompt_index, index=sample, text="")
        if token >= 0 and not output.stopped:
            delta.token_ids.append(token)
            delta.text = output.push(token, finish)
            if logprobs is not None:
                delta.logprobs = [_logprobs(self._tokenizer.result(), token, logprobs)]
        if finish is not None:
            if output.can_wait:
                self._ends.append((sample, token, finish))
            else:
                output.finish(delta, token, finish)
        if delta.text or delta.token_ids or delta.finish_reason:
            self._deltas.append(delta)
        return finish is None and output.stopped

    def accept_prompt_logprobs(self, entries: Sequence[CoreLogprobs]) -> None:
        """Those of the prompt's tokens, from the second one on."""
        tokens = self._prompt.token_ids[1:]
        self._prompt_logprobs = [
            None,
            *(
                _logprobs(self._tokenizer.result(), token, entry)
                for token, entry in zip(tokens, entries, strict=True)
            ),
        ]

    def end(self, num_cached_tokens: int, error: Exception | None) -> None:
        """The request's last event."""
        self.finished = True
        self.error = error
        self._num_cached_tokens = num_cached_tokens

    def take_deltas(self) -> Iterator[RequestDelta]:
        """What has come since the last call. A deferred tokenizer is loaded when the first delta
        that needs it is taken: the tokens before it are out by then.
        """
        deltas, self._deltas = self._deltas, []
        ends, self._ends = self._ends, []
        yield from deltas
        for sample, token, finish in ends:
            delta = RequestDelta(self._prompt_index, index=sample, text="")
            self._outputs[sample].finish(delta, token, finish)
            yield delta

    def new_output(self, request_id: str | None = None) -> RequestOutput:
        """An output to which nothing has been added yet."""
        return RequestOutput(
            request_id=str(self.id) if request_id is None else request_id,
            prompt=self._prompt.text,
            prompt_token_ids=self._prompt.token_ids,
            outputs=[CompletionOutput(i, "", []) for i in range(len(self._outputs))],
        )

    def fill_in(self, output: RequestOutput) -> None:
        """Adds to an output what is known of its prompt by now."""
        output.num_cached_tokens = self._num_cached_tokens
        output.prompt_logprobs = self._prompt_logprobs


class _Output:
    """One of a request's n outputs: its tokens become text.

    They are decoded as they come only where somebody waits for the text or a stop string must be
    found; else once, at the end. Both give the same text. Where the tokenizer is deferred, the
    first token does not wait for it, unless a stop string must be found; a text that has only this
    token follows in a delta of its own.
    """

    def __init__(
        self, params: SamplingParams, tokenizer: TokenizerLoader, incremental: bool
    ) -> None:
        self._params = params
        self._tokenizer = tokenizer
        self._incremental = incremental or bool(params.stop_strings)
        self._token_ids: list[int] = []  # that wait to be decoded
        self._detokenizer: IncrementalDetokenizer | None = None

    @property
    def stopped(self) -> bool:
        """A stop string was found; tokens that still come, from a step in flight, are dropped."""
        return self._detokenizer is not None and self._detokenizer.stop_reason is not None

    @property
    def can_wait(self) -> bool:
        """Nobody needs text before the tokenizer is loaded."""
        return not self._tokenizer.is_loaded and not self._params.stop_strings

    def push(self, token: int, finish: str | None) -> str:
        """Takes a token and returns the text that is certain now."""
        if finish == "stop" and not self._params.include_stop_str_in_output:
            return ""  # the token that ends an output is no part of its text, as in vLLM
        self._token_ids.append(token)
        is_first = len(self._token_ids) == 1
        if (is_first and self.can_wait) or not self._incremental:
            return ""
        return self._decode_waiting()

    def _decode_waiting(self) -> str:
        if self._detokenizer is None:
            self._detokenizer = IncrementalDetokenizer(
                self._tokenizer.result(),
                skip_special_tokens=self._params.skip_special_tokens,
                stop=self._params.stop_strings,
                include_stop_str_in_output=self._params.include_stop_str_in_output,
                min_tokens=self._params.min_tokens,
            )
        token_ids, self._token_ids = self._token_ids, []
        return self._detokenizer.push(token_ids)

    def finish(self, delta: RequestDelta, token: int, finish: str) -> None:
        """Adds to the last delta what is left of the text, and why it ended."""
        delta.finish_reason = finish
        if not self._incremental:
            tokenizer = self._tokenizer.result()
            delta.text = tokenizer.decode(self._token_ids, self._params.skip_special_tokens)
        else:
            delta.text += self._decode_waiting()
            assert self._detokenizer is not None
            delta.text += self._detokenizer.finish()
            if self._detokenizer.stop_reason is not None:
                delta.finish_reason, delta.stop_reason = "stop", self._detokenizer.stop_reason
                return
        if finish == "stop" and token in (self._params.stop_token_ids or ()):
            delta.stop_reason = token


def _logprobs(tokenizer: Tokenizer, token: int, values: CoreLogprobs) -> TokenLogprobs:
    chosen, rank, best_ids, best = values
    entries = {token: Logprob(chosen, rank, tokenizer.token_text(token))}
    for i, (token_id, logprob) in enumerate(zip(best_ids, best, strict=True), start=1):
        entries.setdefault(token_id, Logprob(logprob, i, tokenizer.token_text(token_id)))
    return entries
