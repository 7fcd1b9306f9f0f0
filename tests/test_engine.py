"""The C++ engine on small dummy checkpoints: what ends a request, what may not change its tokens,
what it refuses, and what happens when a file or the process goes away under it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from checkpoint_files import LLAMA
from families import FAMILIES
from tinyvllm import _core, dummy
from tinyvllm.errors import (
    CapacityError,
    CheckpointError,
    InvalidRequestError,
    TinyvllmError,
    UnsupportedModelError,
)

VOCAB, OWN_LENGTH, NUM_LAYERS, KV_HEADS, HEAD_DIM = 64, 128, 3, 2, 4  # of LLAMA
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3]


def write_model(directory: Path, dtype: str) -> Path:
    """Three small layers whose greedy tokens differ enough to tell requests apart."""
    path: Path = dummy.write_checkpoint(directory, LLAMA, seed=3, dtype=dtype, tokenizer=False)
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("engine-float32"), "float32")


@pytest.fixture(scope="session")
def bfloat16_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("engine-bfloat16"), "bfloat16")


@pytest.fixture(params=_core.supported_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set in turn, for all engines and models of the test."""
    monkeypatch.setenv("TINYVLLM_CPU_ISA", request.param)
    return str(request.param)


def engine_of(path: Path, **options: Any) -> Any:
    return _core.Engine(path, **{"max_num_seqs": 4, "num_threads": 2, "num_blocks": 40, **options})


def params(**options: Any) -> Any:
    return _core.SamplingParams(**{"temperature": 0.0, **options})


@dataclasses.dataclass
class Result:
    """All events of one request, joined."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[Any] = dataclasses.field(default_factory=list)
    finish: str | None = None
    error: Exception | None = None


def take_step(engine: Any, results: dict[int, Result]) -> None:
    """Runs one step and adds its events; fails on an event after a request's end."""
    output = engine.step()
    events = zip(output.request, output.token, output.finish, output.logprobs, strict=True)
    for request, token, finish, logprobs in events:
        result = results.setdefault(request, Result())
        assert result.finish is None, f"an event of request {request} after its end"
        assert token >= 0 or finish is not None
        if token >= 0:
            result.tokens.append(token)
            result.logprobs.append(logprobs)
        result.finish = finish
    errors = {request: error for request, _, error in output.ended}
    assert len(errors) == len(output.ended)
    assert set(errors) == {request for request in output.request if results[request].finish}
    for request, error in errors.items():
        results[request].error = error
        assert (results[request].finish == "error") == (error is not None)


def drain(engine: Any) -> dict[int, Result]:
    """Steps to the end of all requests."""
    results: dict[int, Result] = {}
    while engine.has_unfinished():
        take_step(engine, results)
    assert all(result.finish for result in results.values())
    stats = engine.stats()
    assert stats["num_free_blocks"] == stats["num_blocks"]
    assert (stats["num_requests_running"], stats["num_requests_waiting"]) == (0, 0)
    return results


def generate(engine: Any, prompt: list[int], **options: Any) -> Result:
    engine.add_request(0, prompt, params(**options))
    return drain(engine)[0]


def greedy_tokens(path: Path, prompt: list[int], count: int) -> list[int]:
    """Argmax of the teacher-forced logits, the whole sequence anew for each token."""
    bare = _core.Model(path, num_threads=1)
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(bare.logits(np.array(tokens, np.int32))[-1])))
    return tokens[len(prompt) :]


@pytest.fixture(scope="session")
def greedy(model: Path) -> list[int]:
    """The 30 tokens that follow PROMPT."""
    tokens = greedy_tokens(model, PROMPT, 30)
    assert len(set(tokens)) > 8  # a model that repeats itself would let much go unseen
    return tokens


def test_the_largest_logit_is_taken_whoever_asks_for_more_beside_it(
    isa: str, model: Path, greedy: list[int]
) -> None:
    """Alone, rows of logits are compared as they are made; beside others they are written."""
    for other in ({"logprobs": 2}, {"temperature": 1.0, "seed": 5}, {"min_tokens": 3}):
        engine = engine_of(model)
        engine.add_request(0, PROMPT, params(max_tokens=30))
        engine.add_request(1, PROMPT[:7], params(max_tokens=12, **other))
        assert drain(engine)[0].tokens == greedy


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}])
def test_logits_that_are_not_finite_end_their_own_request_only(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    config = {**LLAMA, "tie_word_embeddings": False}
    path = dummy.write_checkpoint(tmp_path, config, seed=3, dtype="float32", tokenizer=False)
    want = generate(engine_of(path), PROMPT, max_tokens=8, **options).tokens
    weights = bytearray((path / "model.safetensors").read_bytes())
    begin = 8 + int.from_bytes(weights[:8], "little")
    begin += json.loads(weights[8:begin])["model.embed_tokens.weight"]["data_offsets"][0]
    row = np.frombuffer(weights, np.float32, 24, begin + (VOCAB - 1) * 24 * 4)
    row[3] = np.nan
    (path / "model.safetensors").write_bytes(weights)

    engine = engine_of(path)
    engine.add_request(0, PROMPT, params(max_tokens=8, **options))
    engine.add_request(1, [1, 2, VOCAB - 1], params(max_tokens=8, **options))
    results = drain(engine)
    assert results[0].tokens == want
    assert (results[1].tokens, results[1].finish) == ([], "error")
    assert "Request 1: a logit at position 2 is not a finite number" in str(results[1].error)


def first_new(tokens: list[int], after: int) -> int:
    """The first index from `after` on whose token has not come before."""
    return next(i for i in range(after, len(tokens)) if tokens[i] not in tokens[:i])


# --- Tokens ---------------------------------------------------------------------------------------


def test_greedy_tokens_are_the_argmax_of_teacher_forced_logits(
    isa: str, model: Path, bfloat16_model: Path
) -> None:
    for path in (model, bfloat16_model):
        got = generate(engine_of(path), PROMPT, max_tokens=12)
        assert got.tokens == greedy_tokens(path, PROMPT, 12)


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "mistral-window"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_do_not_depend_on_chunks_blocks_or_threads(
    tmp_path: Path, name: str, dtype: str
) -> None:
    family = FAMILIES[name]
    path = family.write(tmp_path)
    prompt = family.prompt(100)
    want = _core.Model(path, dtype=dtype, num_threads=1, block_size=16).logits(prompt)
    for chunk, block_size, num_threads in [(1, 16, 2), (7, 1, 2), (33, 32, 4), (0, 5, 3)]:
        bare = _core.Model(path, dtype=dtype, num_threads=num_threads, block_size=block_size)
        assert bare.logits(prompt, chunk).tobytes() == want.tobytes(), f"chunks of {chunk}"


# --- What ends a request --------------------------------------------------------------------------


def test_every_eos_token_ends_the_output_and_is_part_of_it(model: Path, greedy: list[int]) -> None:
    end = first_new(greedy, 5)
    unused = next(token for token in range(VOCAB) if token not in greedy)
    engine = engine_of(model, eos_token_ids=[unused, greedy[end]])
    got = generate(engine, PROMPT, max_tokens=30)
    assert (got.tokens, got.finish) == (greedy[: end + 1], "stop")


def test_ignore_eos_goes_on(model: Path, greedy: list[int]) -> None:
    engine = engine_of(model, eos_token_ids=[greedy[0], greedy[5]])
    got = generate(engine, PROMPT, max_tokens=30, ignore_eos=True)
    assert (got.tokens, got.finish) == (greedy, "length")


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_token_ids_end_the_output(model: Path, greedy: list[int], ignore_eos: bool) -> None:
    end = first_new(greedy, 5)
    got = generate(
        engine_of(model),
        PROMPT,
        max_tokens=30,
        stop_token_ids=[greedy[end]],
        ignore_eos=ignore_eos,
    )
    assert (got.tokens, got.finish) == (greedy[: end + 1], "stop")


@pytest.mark.parametrize("as_eos", [True, False])
def test_no_token_that_ends_comes_before_min_tokens(
    model: Path, greedy: list[int], as_eos: bool
) -> None:
    end = first_new(greedy, 5)
    engine = engine_of(model, eos_token_ids=[greedy[end]] if as_eos else [])
    stop = [] if as_eos else [greedy[end]]
    got = generate(engine, PROMPT, max_tokens=30, min_tokens=20, stop_token_ids=stop)
    assert got.tokens[:end] == greedy[:end]
    assert greedy[end] not in got.tokens[:20]
    assert len(got.tokens) >= 20


def test_an_eos_token_outside_the_vocabulary_is_harmless(model: Path, greedy: list[int]) -> None:
    engine = engine_of(model, eos_token_ids=[VOCAB, 1_000_000, -1])
    got = generate(engine, PROMPT, max_tokens=30, min_tokens=30)
    assert (got.tokens, got.finish) == (greedy, "length")


@pytest.mark.parametrize("max_tokens", [1, 2, 30])
def test_max_tokens_ends_with_length(model: Path, greedy: list[int], max_tokens: int) -> None:
    got = generate(engine_of(model), PROMPT, max_tokens=max_tokens)
    assert (got.tokens, got.finish) == (greedy[:max_tokens], "length")


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_output_that_reaches_max_model_len_ends_with_length(
    model: Path, greedy: list[int], max_tokens: int | None
) -> None:
    engine = engine_of(model, max_model_len=len(PROMPT) + 9)
    got = generate(engine, PROMPT, max_tokens=max_tokens)
    assert (got.tokens, got.finish) == (greedy[:9], "length")


def test_a_prompt_one_shorter_than_max_model_len_gets_one_token(
    model: Path, greedy: list[int]
) -> None:
    engine = engine_of(model, max_model_len=len(PROMPT) + 1)
    got = generate(engine, PROMPT, max_tokens=None)
    assert (got.tokens, got.finish) == (greedy[:1], "length")


@pytest.mark.parametrize("excess", [0, 1, 500])
def test_a_prompt_of_max_model_len_is_refused_with_both_numbers(model: Path, excess: int) -> None:
    engine = engine_of(model, max_model_len=20)
    with pytest.raises(
        InvalidRequestError, match=f"has {20 + excess} tokens and max_model_len is 20;.* most 19 "
    ):
        engine.add_request(0, [1] * (20 + excess), params())
    assert not engine.has_unfinished()


def test_finish_ends_with_the_reason_given(model: Path) -> None:
    engine = engine_of(model)
    for number, reason in enumerate(["stop", "length", "abort"]):
        engine.add_request(number, PROMPT, params())
        engine.finish(number, 0, reason)
    results = drain(engine)
    assert [results[number].finish for number in range(3)] == ["stop", "length", "abort"]
    with pytest.raises(InvalidRequestError, match='finish reason "error"'):
        engine.finish(0, 0, "error")


# --- The life of requests -------------------------------------------------------------------------


def test_requests_are_served_first_come_first_served(model: Path) -> None:
    engine = engine_of(model)
    for request in (5, 3, 9):
        engine.add_request(request, PROMPT[:request], params(max_tokens=4))
    ended: dict[int, Result] = {}
    order = []
    while engine.has_unfinished():
        take_step(engine, ended)
        order += [r for r, result in ended.items() if result.finish and r not in order]
    assert order == [5, 3, 9]


def test_abort_is_idempotent_and_ignores_ids_it_does_not_know(model: Path) -> None:
    engine = engine_of(model)
    engine.add_request(1, PROMPT, params())
    engine.step()
    engine.abort(1)
    engine.abort(1)
    engine.finish(1, 0, "stop")
    engine.abort(77)
    output = engine.step()
    assert (output.request, output.token, output.finish) == ([1], [-1], ["abort"])
    engine.abort(1)
    assert not engine.has_unfinished()
    assert engine.step().request == []


def test_an_abort_in_the_middle_of_a_prefill_gives_all_blocks_back(model: Path) -> None:
    engine = engine_of(model, max_num_batched_tokens=5)
    engine.add_request(1, PROMPT, params())
    output = engine.step()
    assert output.request == []  # a chunk of the prompt, no token yet
    assert engine.stats()["num_free_blocks"] < 40
    engine.abort(1)
    assert engine.stats()["num_free_blocks"] == 40
    assert drain(engine)[1].finish == "abort"


def test_an_id_is_in_use_until_its_end_has_been_reported(model: Path) -> None:
    engine = engine_of(model)
    for step in (lambda: None, engine.step, lambda: engine.abort(4)):
        if not engine.has_unfinished():
            engine.add_request(4, PROMPT, params())
        step()
        with pytest.raises(InvalidRequestError, match="Request id 4 is in use"):
            engine.add_request(4, PROMPT, params())
    assert drain(engine)[4].finish == "abort"
    assert generate(engine, PROMPT).finish == "length"


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "The prompt has no tokens"),
        ([1, 2, VOCAB], {}, "Prompt token 2 is 64; .* ids 0 to 63"),
        ([-1], {}, "Prompt token 0 is -1"),
        ([1], {"stop_token_ids": [VOCAB]}, "a stop_token_id is 64"),
        ([1], {"logit_bias": [(-5, 1.0)]}, "logit_bias is -5"),
    ],
)
def test_a_refused_request_leaves_the_engine_as_it_was(
    model: Path, prompt: list[int], options: dict[str, Any], message: str
) -> None:
    engine = engine_of(model)
    before = engine.stats()
    with pytest.raises(InvalidRequestError, match=message):
        engine.add_request(1, prompt, params(**options))
    assert engine.stats() == before
    assert not engine.has_unfinished()


def test_a_request_that_fails_takes_no_other_with_it(model: Path, greedy: list[int]) -> None:
    engine = engine_of(model)
    engine.add_request(1, PROMPT, params(min_tokens=1, stop_token_ids=list(range(VOCAB))))
    engine.add_request(2, PROMPT, params(max_tokens=30))
    results = drain(engine)
    assert (results[1].tokens, results[1].finish) == ([], "error")
    assert isinstance(results[1].error, TinyvllmError)
    assert "leave no token" in str(results[1].error)
    assert (results[2].tokens, results[2].finish) == (greedy, "length")


def test_stats_count_what_was_computed(model: Path) -> None:
    engine = engine_of(model, max_num_batched_tokens=10)
    generate(engine, PROMPT, max_tokens=7)
    generate(engine, PROMPT[5:15], max_tokens=3)  # no prefix in common
    stats = engine.stats()
    assert stats["prompt_tokens"] == len(PROMPT) + 10
    assert stats["generation_tokens"] == 10
    assert stats["num_preemptions"] == 0
    assert stats["num_steps"] == (3 + 6) + (1 + 2)  # 25 prompt tokens take three steps of 10


class EngineMachine(RuleBasedStateMachine):
    """Requests that come, go and are dropped at random: none is lost, no block leaks."""

    directory: Path
    alone: dict[tuple[int, ...], list[int]] = {}  # noqa: RUF012 -- shared by all examples

    @initialize(chunk=st.integers(1, 9), block_size=st.sampled_from([1, 4, 16]))
    def make(self, chunk: int, block_size: int) -> None:
        self.engine = engine_of(
            self.directory,
            max_num_seqs=1,
            max_num_batched_tokens=chunk,
            block_size=block_size,
            num_blocks=-(-32 // block_size),
            max_model_len=32,
        )
        self.prompts: dict[int, list[int]] = {}
        self.limits: dict[int, int] = {}
        self.finished_by: dict[int, str] = {}
        self.results: dict[int, Result] = {}

    def tokens_of(self, prompt: list[int]) -> list[int]:
        key = tuple(prompt)
        if key not in self.alone:
            self.alone[key] = greedy_tokens(self.directory, prompt, 6)
        return self.alone[key]

    @rule(length=st.integers(1, 26), start=st.integers(0, 3), max_tokens=st.integers(1, 6))
    def add(self, length: int, start: int, max_tokens: int) -> None:
        request = len(self.prompts)
        self.prompts[request] = ([start, *PROMPT])[:length]
        self.limits[request] = max_tokens
        self.engine.add_request(request, self.prompts[request], params(max_tokens=max_tokens))

    @rule(length=st.integers(32, 40))
    def add_too_long(self, length: int) -> None:
        with pytest.raises(InvalidRequestError):
            self.engine.add_request(1000, [1] * length, params())

    @precondition(lambda self: self.prompts)
    @rule(data=st.data(), reason=st.sampled_from(["abort", "stop", "length"]))
    def finish(self, data: st.DataObject, reason: str) -> None:
        request = data.draw(st.integers(0, len(self.prompts)))  # one of them was never added
        self.engine.finish(request, 0, reason)
        is_running = request in self.prompts and self.result(request).finish is None
        if is_running and request not in self.finished_by:
            self.finished_by[request] = reason

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            take_step(self.engine, self.results)

    def result(self, request: int) -> Result:
        return self.results.get(request, Result())

    @invariant()
    def blocks_are_held_by_running_requests_only(self) -> None:
        stats = self.engine.stats()
        live = [
            r for r in self.prompts if self.result(r).finish is None and r not in self.finished_by
        ]
        assert stats["num_requests_running"] + stats["num_requests_waiting"] == len(live)
        if stats["num_requests_running"] == 0:
            assert stats["num_free_blocks"] == stats["num_blocks"]

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.engine.has_unfinished():
            take_step(self.engine, self.results)
        assert set(self.results) == set(self.prompts)
        for request, result in self.results.items():
            want = self.tokens_of(self.prompts[request])[: self.limits[request]]
            if request in self.finished_by:
                assert result.finish == self.finished_by[request]
                assert result.tokens == want[: len(result.tokens)]
            else:
                assert (result.tokens, result.finish) == (want, "length")
        assert self.engine.stats()["num_free_blocks"] == self.engine.stats()["num_blocks"]


def test_no_request_is_lost_and_no_block_leaks(model: Path) -> None:
    EngineMachine.directory = model
    run_state_machine_as_test(
        EngineMachine, settings=settings(max_examples=40, stateful_step_count=20, deadline=None)
    )


# --- What may not change a request's tokens -------------------------------------------------------

SAMPLED = {"temperature": 1.5, "max_tokens": 25, "top_p": 0.95, "repetition_penalty": 1.1}


def test_a_seed_gives_the_same_tokens_and_logprobs_however_the_engine_is_set(
    isa: str, model: Path, bfloat16_model: Path
) -> None:
    for path in (model, bfloat16_model):
        results = [
            generate(engine_of(path, **options), PROMPT, seed=11, logprobs=3, **SAMPLED)
            for options in (
                {},
                {"max_num_seqs": 1, "max_num_batched_tokens": 1},
                {"max_num_batched_tokens": 7, "num_threads": 1},
                {"block_size": 1, "num_blocks": 128, "num_threads": 4},
                {"block_size": 32, "max_num_batched_tokens": 16},
            )
        ]
        assert len(set(results[0].tokens)) > 5
        assert all(result == results[0] for result in results)  # logprobs to the last bit


def test_another_seed_gives_other_tokens(model: Path) -> None:
    engine = engine_of(model)
    outputs = [generate(engine, PROMPT, seed=seed, **SAMPLED).tokens for seed in range(5)]
    assert len({tuple(tokens) for tokens in outputs}) == 5


def test_a_request_without_a_seed_gets_one_from_the_engines_and_its_arrival(model: Path) -> None:
    def outputs(seed: int) -> list[list[int]]:
        engine = engine_of(model, seed=seed)
        return [generate(engine, PROMPT, **SAMPLED).tokens for _ in range(3)]

    first = outputs(seed=1)
    assert first == outputs(seed=1)
    assert len({tuple(tokens) for tokens in [*first, *outputs(seed=2)]}) == 6


def test_a_refused_request_does_not_count_as_an_arrival(model: Path) -> None:
    want = generate(engine_of(model, seed=1), PROMPT, **SAMPLED)
    engine = engine_of(model, seed=1)
    with pytest.raises(InvalidRequestError):
        engine.add_request(0, [], params())
    assert generate(engine, PROMPT, **SAMPLED) == want


# --- Sizes ----------------------------------------------------------------------------------------

BYTES_PER_TOKEN = 2 * NUM_LAYERS * KV_HEADS * HEAD_DIM * 4  # K and V in float32


def test_the_pool_is_as_large_as_num_blocks_says(model: Path) -> None:
    info = engine_of(model, num_blocks=5).info()
    assert info["kv_cache_tokens"] == 80
    assert info["max_model_len"] == 80  # less than the model's own 128
    assert info["kv_cache_bytes_per_token"] == BYTES_PER_TOKEN


@pytest.mark.parametrize(("spare", "blocks"), [(0, 3), (-1, 2), (BYTES_PER_TOKEN * 16 - 1, 3)])
def test_the_pool_has_the_whole_blocks_that_its_bytes_hold(
    model: Path, spare: int, blocks: int
) -> None:
    memory = 3 * 16 * BYTES_PER_TOKEN + spare
    engine = engine_of(model, num_blocks=None, kv_cache_memory_bytes=memory)
    assert engine.info()["kv_cache_tokens"] == blocks * 16


def test_by_default_the_pool_holds_every_sequence_at_full_length(model: Path) -> None:
    assert engine_of(model, num_blocks=None).info()["kv_cache_tokens"] == 4 * OWN_LENGTH
    shorter = engine_of(model, num_blocks=None, max_model_len=33).info()
    assert shorter["kv_cache_tokens"] == 4 * 48  # whole blocks
    assert shorter["max_model_len"] == 33


def resident_share(path: Path) -> float:
    """Of the pages of a mapped file, how many are this process's."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    size = resident = 0
    for line in lines:
        if line.endswith(f" {path}"):
            of = dict(next(lines).split(":") for _ in range(4))
            size += int(of["Size"].split()[0])
            resident += int(of["Rss"].split()[0])
    assert size
    return resident / size


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("float32", "bfloat16"), ("float16", "bfloat16"), ("float16", "float32")],
)
def test_what_was_converted_leaves_memory(tmp_path: Path, stored: str, dtype: str) -> None:
    config = {**dummy.NAMED_CONFIGS["smollm2-135m"], "num_hidden_layers": 2, "vocab_size": 4096}
    path = dummy.write_checkpoint(tmp_path, config, dtype=stored, tokenizer=False)
    engine = engine_of(path, dtype=dtype)
    assert engine.info()["copied_weight_bytes"] > 15e6
    # A page or a few at either end of a tensor, and those that the system maps beside them.
    assert resident_share(path / "model.safetensors") < 0.25


def test_what_is_used_in_place_is_in_memory_before_the_first_step(tmp_path: Path) -> None:
    """And so the test above sees what is resident. Before Linux 5.14, with the step."""
    config = {**dummy.NAMED_CONFIGS["smollm2-135m"], "num_hidden_layers": 2, "vocab_size": 4096}
    path = dummy.write_checkpoint(tmp_path, config, dtype="bfloat16", tokenizer=False)
    engine = engine_of(path)
    release = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
    if release >= (5, 14):
        assert resident_share(path / "model.safetensors") > 0.95
    engine.add_request(1, PROMPT, params(max_tokens=1))
    engine.step()
    assert resident_share(path / "model.safetensors") > 0.75


def test_a_large_pool_costs_nothing_before_it_is_used(model: Path) -> None:
    code = f"""
        import resource
        from tinyvllm import _core
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        before = resident()
        engine = _core.Engine({str(model)!r}, kv_cache_memory_bytes=64 << 30, block_size=4096)
        assert engine.info()["kv_cache_tokens"] * {BYTES_PER_TOKEN} > 63 << 30
        print((resident() - before) >> 20)
    """
    assert int(run_python(code)) < 50


def test_a_max_model_len_that_the_pool_does_not_hold_is_refused_with_the_numbers(
    model: Path,
) -> None:
    with pytest.raises(CapacityError) as caught:
        engine_of(model, num_blocks=5, max_model_len=81)
    message = str(caught.value)
    assert "max_model_len 81 needs" in message
    assert f"({BYTES_PER_TOKEN} bytes a token); the pool holds 80 tokens" in message
    assert "Lower max_model_len to 80" in message


def test_a_pool_that_holds_no_block_is_refused_with_the_numbers(model: Path) -> None:
    with pytest.raises(
        CapacityError,
        match=rf"not hold one block: {BYTES_PER_TOKEN * 16} bytes for 16 tokens\. "
        "Raise kv_cache_memory_bytes",
    ):
        engine_of(model, num_blocks=None, kv_cache_memory_bytes=100)


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 5, "max_model_len": 81},
        {"num_blocks": None, "kv_cache_memory_bytes": 100},
        {"num_blocks": 2**31 - 1, "block_size": 4096},
    ],
    ids=["length", "no block", "address space"],
)
def test_what_does_not_fit_comes_with_a_table_of_what_takes_the_memory(
    model: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(CapacityError) as caught:
        engine_of(model, **options)
    rows = dict(re.findall(r"^  (\w[\w ]*?) +([0-9.]+) MiB", str(caught.value), re.MULTILINE))
    assert list(rows) == ["weights", "KV cache", "workspace", "free"]
    files = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert float(rows["weights"]) == pytest.approx(files / 2**20, abs=0.02)
    assert float(rows["KV cache"]) == pytest.approx(1000 * BYTES_PER_TOKEN / 2**20, abs=0.01)
    assert float(rows["workspace"]) > 0
    assert float(rows["free"]) == pytest.approx(_core.available_memory() / 2**20, rel=0.2)


def test_a_pool_beyond_the_address_space_is_refused(model: Path) -> None:
    # 2^31 - 1 blocks of 4,096 tokens: 1.6e15 bytes, more than a process can address.
    with pytest.raises(CapacityError, match=r"Cannot reserve \d+ bytes for a KV cache"):
        engine_of(model, num_blocks=2**31 - 1, block_size=4096)


def test_a_group_of_heads_that_no_step_could_run_is_refused_at_once(tmp_path: Path) -> None:
    config = {**LLAMA, "num_attention_heads": 257, "num_key_value_heads": 1, "head_dim": 2}
    path = dummy.write_checkpoint(tmp_path, config, dtype="float32", tokenizer=False)
    with pytest.raises(UnsupportedModelError, match=r"257 query heads over 1 KV heads; .* 256"):
        engine_of(path, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": OWN_LENGTH + 1}, "max_model_len is 129; .* at most 128"),
        ({"max_model_len": 2**62}, f"max_model_len is {2**62}; .* at most 128"),
        ({"max_model_len": 1}, "max_model_len is 1; .* at least 2"),
        ({"block_size": 0}, "block_size is 0;"),
        ({"block_size": 4097}, "block_size is 4097;"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0;"),
        ({"max_num_batched_tokens": 3}, "max_num_batched_tokens is 3; .* max_num_seqs, which is 4"),
        ({"num_blocks": 0}, "num_gpu_blocks_override is 0;"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes is 0;"),
        ({"num_threads": -1}, "num_threads is -1;"),
        ({"dtype": "float64"}, 'dtype is "float64"; .* auto, bfloat16 or float32'),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_value(
    model: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        engine_of(model, **{"num_blocks": None, **options})


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer ends where memory ends"
)
def test_activations_that_do_not_fit_are_a_capacity_error(model: Path) -> None:
    code = f"""
        import resource
        from tinyvllm import _core
        from tinyvllm.errors import CapacityError
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (128 << 20),) * 2)
        try:
            _core.Engine({str(model)!r}, max_num_batched_tokens=1 << 20, num_threads=1)
        except CapacityError as error:
            print(error)
    """
    message = run_python(code)
    assert message.startswith("Cannot reserve ")
    for name in ("weights", "KV cache", "workspace", "free"):
        assert f"\n  {name} " in message


# --- The end of files, engines and processes ------------------------------------------------------


def run_python(code: str) -> str:
    """What the code prints in a process of its own, which must end well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_file_cut_off_during_generation_is_an_error_of_that_engine_only(
    model: Path, tmp_path: Path, greedy: list[int]
) -> None:
    doomed = Path(shutil.copytree(model, tmp_path / "doomed"))
    engine, other = engine_of(doomed), engine_of(model)
    engine.add_request(1, PROMPT, params(max_tokens=30))
    engine.add_request(2, PROMPT, params(max_tokens=30))
    results: dict[int, Result] = {}
    for _ in range(3):
        take_step(engine, results)
    assert results[1].tokens == results[2].tokens == greedy[:3]

    os.truncate(doomed / "model.safetensors", 0)
    while engine.has_unfinished():
        take_step(engine, results)
    for request in (1, 2):
        assert results[request].tokens == greedy[:3]  # none that was computed from zeros
        assert results[request].finish == "error"
        assert isinstance(results[request].error, CheckpointError)
        assert "model.safetensors" in str(results[request].error)
    stats = engine.stats()
    assert stats["num_free_blocks"] == stats["num_blocks"]
    assert generate(other, PROMPT, max_tokens=30).tokens == greedy


def test_after_close_memory_threads_and_files_are_free_and_calls_say_so(
    model: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(model, tmp_path / "own"))

    def num_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = num_threads()
    engine = engine_of(own, num_threads=3)
    assert num_threads() == before + 2
    assert str(own) in Path("/proc/self/maps").read_text()
    engine.add_request(1, PROMPT, params())
    engine.close()
    engine.close()
    assert num_threads() == before
    assert str(own) not in Path("/proc/self/maps").read_text()
    calls: list[Callable[[], object]] = [
        lambda: engine.add_request(1, PROMPT, params()),
        engine.step,
        lambda: engine.abort(1),
        lambda: engine.finish(1, 0, "stop"),
        engine.has_unfinished,
        engine.stats,
        engine.info,
    ]
    for call in calls:
        with pytest.raises(TinyvllmError, match="This engine is closed"):
            call()


def test_in_a_forked_child_a_step_is_an_error_that_says_so(model: Path) -> None:
    code = f"""
        import os
        from tinyvllm import _core
        engine = _core.Engine({str(model)!r}, num_threads=2, num_blocks=40)
        engine.add_request(1, [1, 2, 3], _core.SamplingParams(max_tokens=4))
        if os.fork() == 0:
            output = engine.step()
            print(output.finish, output.ended[0][2], flush=True)
            own = _core.Engine({str(model)!r}, num_threads=2, num_blocks=40)
            own.add_request(1, [1, 2, 3], _core.SamplingParams(max_tokens=1))
            print(own.step().finish, flush=True)
            del engine, own
            os._exit(0)
        print(os.wait()[1])
        print(engine.step().finish)
    """
    error, own, status, parent = run_python(code).splitlines()
    assert error.startswith("['error'] This engine was made in process")
    assert error.endswith("Make the engine after the fork.")
    assert (own, status, parent) == ("['length']", "0", "[None]")
