"""One request as the front end sees it: the tokens that the engine sends become text and deltas."""

from __future__ import annotations

from collections.abc import Iterator

from tinyvllm.detokenizer import IncrementalDetokenizer
from tinyvllm.outputs import Logprob, RequestDelta, TokenLogprobs
from tinyvllm.sampling_params import SamplingParams
from tinyvllm.tokenizer import Tokenizer

# What the engine reports for a token: its logprob, its rank, the best ids and their logprobs.
CoreLogprobs = tuple[float, int, list[int], list[float]]


class ActiveRequest:
    """Takes the engine's events of one request with `accept` and hands out deltas.

    Text is decoded as it comes only where somebody waits for it (`incremental`) or a stop string
    must be found; else once, at the end. Both give the same text.
    """

    def __init__(
        self,
        id: int,
        prompt_index: int,
        params: SamplingParams,
        tokenizer: Tokenizer,
        incremental: bool,
    ) -> None:
        self.id = id
        self.finished = False
        self._prompt_index = prompt_index
        self._params = params
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._deltas: list[RequestDelta] = []
        self._error: Exception | None = None
        self._detokenizer: IncrementalDetokenizer | None = None
        if incremental or params.stop_strings:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                stop=params.stop_strings,
                include_stop_str_in_output=params.include_stop_str_in_output,
            )

    @property
    def stop_string_found(self) -> bool:
        """The engine must be told: it goes on until then, and what it still sends is dropped."""
        return self._detokenizer is not None and self._detokenizer.stop_reason is not None

    def accept(
        self,
        token: int,
        finish: str | None,
        logprobs: CoreLogprobs | None,
        error: Exception | None,
    ) -> None:
        """One event of the engine: a token (or -1: none), an end, or both."""
        delta = RequestDelta(self._prompt_index, index=0, text="")
        if token >= 0 and not self.stop_string_found:
            self._token_ids.append(token)
            delta.token_ids.append(token)
            if logprobs is not None:
                delta.logprobs = [self._logprobs(token, logprobs)]
            # The token that ends an output is no part of its text, as in vLLM.
            ends = finish == "stop" and not self._params.include_stop_str_in_output
            if self._detokenizer is not None and not ends:
                delta.text = self._detokenizer.push([token])
        if finish is not None:
            self._finish(delta, token, finish)
            self._error = error
        if delta.text or delta.token_ids or delta.finish_reason:
            self._deltas.append(delta)

    def take_deltas(self) -> Iterator[RequestDelta]:
        """What has come since the last call. An error of the request is raised after it."""
        deltas, self._deltas = self._deltas, []
        yield from deltas
        if self._error is not None:
            raise self._error

    def _finish(self, delta: RequestDelta, token: int, finish: str) -> None:
        self.finished = True
        delta.finish_reason = finish
        if self._detokenizer is not None:
            delta.text += self._detokenizer.finish()
            if self._detokenizer.stop_reason is not None:
                delta.finish_reason, delta.stop_reason = "stop", self._detokenizer.stop_reason
                return
        else:
            ends = finish == "stop" and not self._params.include_stop_str_in_output
            delta.text = self._tokenizer.decode(
                self._token_ids[:-1] if ends else self._token_ids, self._params.skip_special_tokens
            )
        if finish == "stop" and token in self._params.stop_token_ids:
            delta.stop_reason = token

    def _logprobs(self, token: int, values: CoreLogprobs) -> TokenLogprobs:
        chosen, rank, best_ids, best = values
        entries = {token: Logprob(chosen, rank, self._tokenizer.token_text(token))}
        for i, (token_id, logprob) in enumerate(zip(best_ids, best, strict=True), start=1):
            entries.setdefault(token_id, Logprob(logprob, i, self._tokenizer.token_text(token_id)))
        return entries
