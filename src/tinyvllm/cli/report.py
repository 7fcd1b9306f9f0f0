"""What `generate` prints: text, JSON or JSON lines on stdout; notes and statistics for stderr."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, fields
from typing import Any

from tinyvllm.cli import startup
from tinyvllm.cli.terminal import Output, hold_signals
from tinyvllm.llm import LLM
from tinyvllm.outputs import CompletionOutput, Logprob, RequestDelta, best_logprobs
from tinyvllm.sampling_params import SamplingParams
from tinyvllm.stderr import printable, tell

SCHEMA = 1  # of --json and --jsonl; it changes when a key changes its meaning


def note(line: str) -> None:
    """A line on stderr."""
    tell(f"tinyvllm: {line}")


def notes(llm: LLM, asked_model_len: int | None) -> list[str]:
    """What the user should know before the answer."""
    info = llm.stats()
    lines = [*info["warnings"], *llm.sampling_defaults().warnings]
    if info["checkpoint_dtype"] == "float16" and info["dtype"] == "bfloat16":
        lines.append(
            "the weights are float16 and are rounded to bfloat16 (3 bits less); "
            "--dtype float32 keeps them exact"
        )
    own = info["model_max_position_embeddings"]
    if asked_model_len is None and info["max_model_len"] < own:
        lines.append(
            f"prompt and output may have {info['max_model_len']} tokens, which is what the KV "
            f"cache holds; the model's own limit is {own}"
        )
    return lines


@dataclass
class Prompt:
    """A prompt as it was given, and as the engine gets it."""

    text: str | None  # None: given as token ids
    token_ids: list[int]
    chat: bool  # the ids come from the chat template


@dataclass
class Answer:
    """One prompt's output, and what of its text is still to be printed."""

    output: CompletionOutput = field(default_factory=lambda: CompletionOutput(0, "", []))
    printed: int = 0  # characters


class Report:
    """Takes deltas with `add` and prints them in the form that was asked for."""

    def __init__(
        self,
        llm: LLM,
        stdout: Output,
        sampling: SamplingParams,
        origins: dict[str, str],
        prompts: list[Prompt],
        options: dict[str, Any],
    ) -> None:
        self._llm = llm
        self._stdout = stdout
        self._sampling = sampling
        self._origins = origins
        self._prompts = prompts
        self._model = options["model"] or "bundled"
        self._json, self._jsonl = options["as_json"], options["as_jsonl"]
        self._stream = options["stream"]
        self.has_begun = False  # something has come of an answer
        self._answers = [Answer() for _ in prompts]
        self._first_open = 0  # text is printed in the order of the prompts
        self._began = time.perf_counter()
        self._first_token_at: float | None = None
        self._last_token_at = self._began
        self._first_token_age: float | None = None  # of the process, in seconds

    def add(self, delta: RequestDelta) -> None:
        with hold_signals():  # a text is printed once, whenever the signal comes
            self._take(delta)
        self._stdout.flush()

    def _take(self, delta: RequestDelta) -> None:
        self.has_begun = True
        answer = self._answers[delta.prompt_index]
        answer.output.add(delta)
        if delta.token_ids:
            self._last_token_at = time.perf_counter()
            if self._first_token_at is None:
                self._first_token_at = self._last_token_at
                self._first_token_age = startup.process_age()
        if self._jsonl:
            if delta.finish_reason:
                self._write_json(
                    {
                        "schema": SCHEMA,
                        "model": self._model,
                        "seed": self._llm.seed,
                        **self._result(delta.prompt_index),
                    }
                )
        elif not self._json:
            self._print_text()

    def end(self) -> None:
        """Prints what is left. An answer that was cut off has the finish reason "abort"."""
        for index, answer in enumerate(self._answers):
            if answer.output.finish_reason is None:
                delta = RequestDelta(prompt_index=index, index=0, text="", finish_reason="abort")
                self.add(delta)
        if self._json:
            self._write_json(self._document())
        self._stdout.flush()

    def _print_text(self) -> None:
        """Streams the first open answer; one that ends lets the next one begin."""
        while self._first_open < len(self._answers):
            answer = self._answers[self._first_open]
            finished = answer.output.finish_reason is not None
            if self._stream or finished:
                text = answer.output.text[answer.printed :]
                # A file gets the text as it is, a terminal what it may have.
                self._stdout.write(printable(text) if self._stdout.is_terminal else text)
                answer.printed = len(answer.output.text)
            if not finished:
                return
            self._stdout.end_line()
            self._first_open += 1

    def _write_json(self, value: dict[str, Any]) -> None:
        self._stdout.write(json.dumps(value, ensure_ascii=False) + "\n")

    def _document(self) -> dict[str, Any]:
        prompt_tokens = self._num_prompt_tokens()
        output_tokens = self._num_output_tokens()
        return {
            "schema": SCHEMA,
            "model": self._model,
            "seed": self._llm.seed,
            "sampling": {
                item.name: {
                    "value": _plain(getattr(self._sampling, item.name)),
                    "from": self._origins.get(item.name, "default"),
                }
                for item in fields(self._sampling)
                if item.name != "seed"  # the run's, above
            },
            "results": [self._result(index) for index in range(len(self._answers))],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": output_tokens,
                "total_tokens": prompt_tokens + output_tokens,
            },
            "stats": {**self._llm.stats(), **self._times(), "start_seconds": startup.seconds},
        }

    def _result(self, index: int) -> dict[str, Any]:
        prompt, output = self._prompts[index], self._answers[index].output
        result: dict[str, Any] = {
            "index": index,
            "prompt": prompt.text,
            "chat": prompt.chat,
            "prompt_tokens": len(prompt.token_ids),
            "text": output.text,
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if output.logprobs is not None:
            result["cumulative_logprob"] = output.cumulative_logprob
            result["logprobs"] = logprobs_of(output, self._sampling.logprobs)
        return result

    # --- stderr -----------------------------------------------------------------------------------

    def stats(self) -> list[str]:
        info, times = self._llm.stats(), self._times()
        parts = {**startup.seconds, **self._llm.load_seconds()}
        start = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())
        sampling = ", ".join(
            f"{name} {_plain(getattr(self._sampling, name))!s} ({origin})"
            for name, origin in self._origins.items()
        )
        modes = {"chat template" if prompt.chat else "raw" for prompt in self._prompts}
        lines = [
            f"{self._model}: {info['dtype']}, {info['device']} {info['isa']}, "
            f"{info['num_threads']} threads; KV cache of {info['kv_cache_tokens']} tokens; "
            f"prompts: {' and '.join(sorted(modes))}",
            f"start: {start}",
            f"sampling: {sampling or 'defaults'}; seed {self._llm.seed}",
        ]
        if times["first_token_seconds"] is not None:
            given, computed = self._num_prompt_tokens(), info["prompt_tokens"]
            lines.append(
                f"prompt: {given} tokens"
                + (f", {computed} computed" if computed != given else "")
                + "; first token after "
                f"{times['first_token_seconds']:.3f} s"
                + (
                    f", {times['process_start_to_first_token_seconds']:.2f} s after process start"
                    if times["process_start_to_first_token_seconds"] is not None
                    else ""
                )
            )
        speed = times["output_tokens_per_second"]
        lines.append(
            f"output: {self._num_output_tokens()} tokens"
            + (f", {speed:.1f} tokens/s after the first" if speed is not None else "")
        )
        return lines

    def _times(self) -> dict[str, float | None]:
        first, rate = None, None
        if self._first_token_at is not None:
            first = self._first_token_at - self._began
            seconds = self._last_token_at - self._first_token_at
            rate = (self._num_output_tokens() - 1) / seconds if seconds > 0 else None
        return {
            "first_token_seconds": first,
            "process_start_to_first_token_seconds": self._first_token_age,
            "output_tokens_per_second": rate,
        }

    def _num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self._prompts)

    def _num_output_tokens(self) -> int:
        return sum(len(answer.output.token_ids) for answer in self._answers)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def logprobs_of(output: CompletionOutput, num_best: int | None) -> list[dict[str, Any]] | None:
    """Each token of the output, with the best ones of its position; None if nobody asked."""
    if output.logprobs is None:
        return None
    return [
        {
            **_logprob(token, entries[token]),
            "top": [_logprob(*entry) for entry in best_logprobs(entries, num_best)],
        }
        for token, entries in zip(output.token_ids, output.logprobs, strict=True)
    ]


def _logprob(token: int, entry: Logprob) -> dict[str, Any]:
    return {
        "token_id": token,
        "token": entry.decoded_token,
        "logprob": entry.logprob,
        "rank": entry.rank,
    }
