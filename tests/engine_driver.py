"""Drives an Engine in tests: collects what its steps put out, and checks the books around each.

`Driver` gives its requests the ids 0, 1, 2 ... in the order of their arrival, so that
(request, sample) is the order in which they are served.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tinyvllm import _core

MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


@dataclasses.dataclass
class Output:
    """One output of a request: all of its events, joined."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[Any] = dataclasses.field(default_factory=list)
    finish: str | None = None


@dataclasses.dataclass
class Record:
    """One request: what was asked, and what has come back."""

    prompt: list[int]
    options: dict[str, Any]
    outputs: list[Output]
    prompt_logprobs: Any = None
    ended: bool = False
    num_cached: int | None = None
    error: Exception | None = None

    def result(self) -> Any:
        """All that docs/promises.md, 2, says may not depend on anything else."""
        return [dataclasses.astuple(output) for output in self.outputs], self.prompt_logprobs


class Driver:
    """An engine, and the records of its requests."""

    def __init__(self, model: Path, **options: Any) -> None:
        self.options = {
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "block_size": 4,
            "num_blocks": 64,
            "num_threads": 1,
            "prefix_caching": True,
            "static_batching": False,
            **options,
        }
        self.engine = _core.Engine(model, **self.options)
        self.records: list[Record] = []

    def add(self, prompt: list[int], **options: Any) -> int:
        options = {"ignore_eos": True, "seed": 1, **options}
        request = len(self.records)
        self.engine.add_request(request, prompt, _core.SamplingParams(**options))
        outputs = [Output() for _ in range(options.get("n", 1))]
        self.records.append(Record(prompt, options, outputs))
        return request

    def step(self) -> None:
        """One step, whose events must belong to outputs that have not ended."""
        output = self.engine.step()
        events = zip(
            output.request,
            output.sample,
            output.token,
            output.finish,
            output.logprobs,
            strict=True,
        )
        touched = set()
        for request, sample, token, finish, logprobs in events:
            touched.add(request)
            record = self.records[request]
            assert not record.ended, f"an event of request {request} after its end"
            one = record.outputs[sample]
            assert one.finish is None, (
                f"request {request}: an event of output {sample} after its end"
            )
            assert token >= 0 or finish is not None
            if token >= 0:
                one.tokens.append(token)
                one.logprobs.append(logprobs)
            one.finish = finish
        for request, prompt_logprobs in output.prompt_logprobs.items():
            record = self.records[request]
            assert record.prompt_logprobs is None, f"prompt logprobs of {request} came twice"
            assert not record.ended
            record.prompt_logprobs = prompt_logprobs
        for request, num_cached, error in output.ended:
            record = self.records[request]
            assert not record.ended, f"request {request} has ended twice"
            assert request in touched, f"the end of request {request} came after its last output's"
            record.ended, record.num_cached, record.error = True, num_cached, error
            assert (error is not None) == any(one.finish == "error" for one in record.outputs)
        for request in touched:
            record = self.records[request]
            assert record.ended == all(one.finish for one in record.outputs)

    def drain(self) -> None:
        """Steps to the end of all requests, checking the books around each step."""
        while self.engine.has_unfinished():
            self.checked_step()
        assert all(record.ended for record in self.records)
        stats = self.engine.stats()
        assert stats["num_free_blocks"] == stats["num_blocks"]
        assert (stats["num_requests_running"], stats["num_requests_waiting"]) == (0, 0)

    def run_alone(self, prompt: list[int], **options: Any) -> Record:
        """A request that finds nothing else in the engine."""
        assert not self.engine.has_unfinished()
        request = self.add(prompt, **options)
        while self.engine.has_unfinished():
            self.step()
        return self.records[request]

    # --- The books (docs/promises.md, 4 and 5) ----------------------------------------------------

    def checked_step(self) -> None:
        before, stats_before = self.engine.snapshot(), self.engine.stats()
        self.check_books(before)
        self.step()
        after, stats_after = self.engine.snapshot(), self.engine.stats()
        self.check_books(after)
        hits = stats_after["prefix_cache_hits"] - stats_before["prefix_cache_hits"]
        self._check_transition(before, after, hits)

    def check_books(self, snapshot: dict[str, Any]) -> None:
        size = self.options["block_size"]
        sequences = snapshot["sequences"]
        cached = set(snapshot["cached_blocks"])
        assert len(cached) == len(snapshot["cached_blocks"])

        # First come, first served: in the order of arrival, all that runs before all that waits.
        order = [(one["request"], one["sample"]) for one in sequences]
        assert order == sorted(set(order))
        running = [one for one in sequences if one["running"]]
        assert running == sequences[: len(running)]
        assert sum(one["num_slots"] for one in running) <= self.options["max_num_seqs"]
        # Only the last one that runs may be in the middle of its prompt; the others decode.
        for one in running[:-1]:
            assert len(one["tokens"]) - one["num_computed"] == 1
        for one in sequences:
            assert one["num_computed"] < len(one["tokens"])

        # A block's count is the number of tables that hold it; free + used = total.
        counts = [0] * self.options["num_blocks"]
        for one in sequences:
            table = one["block_table"]
            assert len(set(table)) == len(table)
            assert len(table) == -(-one["num_computed"] // size)
            assert one["running"] or one["num_computed"] == 0
            for block in table:
                counts[block] += 1
        assert counts == snapshot["block_counts"]
        stats = self.engine.stats()
        assert stats["num_free_blocks"] == counts.count(0)
        assert stats["num_cached_blocks"] == len(cached)
        assert self.options["prefix_caching"] or not cached

        # Who shares a block agrees on all tokens up to its last; who holds a cached one filled it.
        content: dict[int, list[int]] = {}
        for one in sequences:
            for index, block in enumerate(one["block_table"]):
                end = min((index + 1) * size, one["num_computed"])
                tokens = one["tokens"][:end]
                assert content.setdefault(block, tokens) == tokens
                assert block not in cached or end == (index + 1) * size

    def _check_transition(
        self, before: dict[str, Any], after: dict[str, Any], num_hits: int
    ) -> None:
        size = self.options["block_size"]
        old = {(one["request"], one["sample"]): one for one in before["sequences"]}
        new = {(one["request"], one["sample"]): one for one in after["sequences"]}
        num_tokens = -num_hits
        for key, one in old.items():
            now = new.get(key)
            if now is None or (one["num_slots"] > 1 and now["num_slots"] == 1):  # ended, or forked
                num_tokens += len(one["tokens"]) - one["num_computed"]
            elif now["num_computed"] > one["num_computed"]:
                num_tokens += now["num_computed"] - one["num_computed"]
            else:
                assert now["tokens"] == one["tokens"]  # not scheduled, or preempted
                assert now["num_computed"] == one["num_computed"] or not now["running"]

        if old:  # whoever came first gets on in every step
            first = next(iter(old))
            assert (
                first not in new
                or new[first]["num_computed"] > old[first]["num_computed"]
                or len(new[first]["tokens"]) > len(old[first]["tokens"])
            )
            failed = any(self.records[request].error for request, _ in old.keys() - new.keys())
            assert failed or 1 <= num_tokens <= self.options["max_num_batched_tokens"]

        # What a step has written to is held by nobody else who was there before it.
        for key, one in old.items():
            index, offset = divmod(one["num_computed"], size)
            if offset == 0 or key not in new or new[key]["num_computed"] <= one["num_computed"]:
                continue
            block = new[key]["block_table"][index]
            assert block not in before["cached_blocks"] or block != one["block_table"][index]
            others = [
                other
                for other, now in new.items()
                if other != key and other in old and block in now["block_table"]
            ]
            assert others == [] or old[key]["num_slots"] > 1 or block in after["cached_blocks"]

        if self.options["static_batching"] and any(one["running"] for one in old.values()):
            waited = {key for key, one in old.items() if not one["running"]}
            assert not any(new[key]["running"] for key in waited if key in new)
