"""What comes back from generate, chat and stream. Names and meanings are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass
class Logprob:
    """One token's log-probability under the model's raw distribution."""

    logprob: float
    rank: int | None = None  # 1: the most likely token
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]  # of one position: the token that was taken, and the best k


def best_logprobs(entries: TokenLogprobs, k: int | None) -> list[tuple[int, Logprob]]:
    """The best k of the position; the token that was taken is among them only if it is one."""
    ranked = sorted(entries.items(), key=lambda item: (-item[1].logprob, item[0]))
    return ranked[: k or 0]


@dataclass
class CompletionOutput:
    """One continuation of one prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None  # only where logprobs were asked for
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None  # stop, length, abort or error
    stop_reason: int | str | None = None  # the stop token id or stop string; None for EOS

    def finished(self) -> bool:
        return self.finish_reason is not None

    def add(self, delta: RequestDelta) -> None:
        """Appends what one step has added."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + sum(
                entries[token].logprob
                for token, entries in zip(delta.token_ids, delta.logprobs, strict=True)
            )


@dataclass
class RequestOutput:
    """One prompt and its continuations."""

    request_id: str
    prompt: str | None  # None where token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int | None = None  # of the prompt, from the prefix cache; None: unfinished
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    def add(self, delta: RequestDelta) -> None:
        """Appends what one step has added."""
        self.outputs[delta.index].add(delta)
        if delta.finish_reason is not None:
            self.finished = all(output.finished() for output in self.outputs)

    def snapshot(self) -> RequestOutput:
        """A copy that stays as it is when this one grows."""
        outputs = [
            replace(
                output,
                token_ids=list(output.token_ids),
                logprobs=None if output.logprobs is None else list(output.logprobs),
            )
            for output in self.outputs
        ]
        return replace(self, outputs=outputs)

    def __getitem__(self, key: str) -> Any:
        """nano-vllm's outputs are dicts of the only continuation: output["text"], ["token_ids"]."""
        if key not in ("text", "token_ids"):
            raise KeyError(key)
        return getattr(self.outputs[0], key)


@dataclass
class RequestDelta:
    """What one step added to one continuation; the last one of each has a finish_reason."""

    prompt_index: int  # which of the prompts given to stream()
    index: int  # which of its n continuations
    text: str  # may be empty while a character or a possible stop string is incomplete
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
