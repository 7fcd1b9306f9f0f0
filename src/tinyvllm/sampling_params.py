"""SamplingParams: how tokens are chosen and when an output ends. Names and meanings are vLLM's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tinyvllm import _core
from tinyvllm.checks import integer, number, seed_number
from tinyvllm.errors import InvalidRequestError

MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 4096


@dataclass
class SamplingParams:
    """Checked when it is made: a value out of range is an InvalidRequestError (a ValueError).

    Fields may be assigned, as vLLM's may; a request takes a copy and checks it again.

    The order in which the options act is fixed: logit_bias and the min_tokens mask; repetition,
    then frequency and presence penalty; temperature; min_p; top_k; top_p.
    """

    n: int = 1
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over the output
    frequency_penalty: float = 0.0  # over the output
    seed: int | None = None  # None: from the engine's seed and the request's arrival number
    stop: str | Sequence[str] | None = ()  # strings that end it; the first complete one counts
    stop_token_ids: Sequence[int] | None = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: up to the engine's max_model_len
    min_tokens: int = 0  # before it no end: neither an end token nor a stop string in its text
    logprobs: int | None = None  # the best k of each token, besides the token's own
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = field(default_factory=dict)
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} is {getattr(self, name)!r}; give True or False.")
        _check_stop(self.stop_strings)
        _ = self.core  # checks the rest

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def clone(self) -> SamplingParams:
        """A copy, checked as if it had been made from these values."""
        return replace(
            self,
            stop=self.stop_strings,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=dict(self.logit_bias or {}),
        )

    @property
    def core(self) -> _core.SamplingParams:
        """The part that the C++ engine needs; it checks the ranges."""
        return _core.SamplingParams(
            n=integer("n", self.n, 32),
            temperature=number("temperature", self.temperature),
            top_p=number("top_p", self.top_p),
            top_k=integer("top_k", self.top_k, 32),
            min_p=number("min_p", self.min_p),
            repetition_penalty=number("repetition_penalty", self.repetition_penalty),
            presence_penalty=number("presence_penalty", self.presence_penalty),
            frequency_penalty=number("frequency_penalty", self.frequency_penalty),
            seed=None if self.seed is None else seed_number(self.seed),
            stop_token_ids=[integer("a stop_token_id", i, 32) for i in self.stop_token_ids or ()],
            ignore_eos=self.ignore_eos,
            max_tokens=None
            if self.max_tokens is None
            else integer("max_tokens", self.max_tokens, 64),
            min_tokens=integer("min_tokens", self.min_tokens, 64),
            logprobs=_optional("logprobs", self.logprobs),
            prompt_logprobs=_optional("prompt_logprobs", self.prompt_logprobs),
            logit_bias=[
                (
                    integer("a token id of logit_bias", int(token), 32),
                    number("a logit_bias", bias),
                )
                for token, bias in (self.logit_bias or {}).items()
            ],
        )


def _optional(name: str, value: Any) -> int | None:
    return None if value is None else integer(name, value, 32)


def _check_stop(stop: Sequence[str]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequestError(
            f"stop has {len(stop)} strings; at most {MAX_STOP_STRINGS} are looked for."
        )
    for text in stop:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
            raise InvalidRequestError(
                f"a stop string is {text!r:.60}; give a text of 1 to {MAX_STOP_CHARS} characters."
            )
