"""docs/promises.md, 2, through the engine: what a request gets depends on nothing around it, bit
for bit.

Every request runs alone first, in an engine that shares nothing. Then all run together in engines
that batch, chunk, share, preempt and thread differently; tokens and logprobs must be the same.
"""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from checkpoint_files import LLAMA
from engine_driver import MODEL, Driver
from families import FAMILIES
from tinyvllm import _core, dummy

NUM_REQUESTS = 64
Requests = list[tuple[list[int], dict[str, Any]]]


def some_requests(seed: int, vocab: int, count: int = NUM_REQUESTS) -> Requests:
    """Prompts of 1 to 99 tokens, most of them with a beginning in common, and all options."""
    rng = random.Random(seed)
    common = [rng.randrange(vocab) for _ in range(70)]
    requests: Requests = []
    for number in range(count):
        beginning = common[: rng.choice([0, 0, 16, 33, 64, 70])]
        prompt = beginning + [rng.randrange(vocab) for _ in range(rng.randrange(1, 30))]
        options: dict[str, Any] = {
            "max_tokens": rng.randrange(1, 20),
            "n": rng.choice([1, 1, 1, 2, 4]),
            "seed": number,
            "temperature": rng.choice([0.0, 1.0, 1.5]),
            "top_p": rng.choice([1.0, 0.9]),
            "top_k": rng.choice([0, 0, 20]),
            "repetition_penalty": rng.choice([1.0, 1.2]),
            "frequency_penalty": rng.choice([0.0, 0.5]),
            "logprobs": rng.choice([0, 5, 20]),
            "prompt_logprobs": rng.choice([None, None, 3]),
        }
        requests.append((prompt, options))
    return requests


def run_alone(
    model: Path, requests: Requests, dtype: str = "auto", *, repack_weights: bool = False
) -> list[Any]:
    """The result of each request when nothing else has ever been there but its own blocks."""
    driver = Driver(
        model,
        dtype=dtype,
        prefix_caching=False,
        block_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        repack_weights=repack_weights,
    )
    return [driver.run_alone(prompt, **options).result() for prompt, options in requests]


def run_together(
    model: Path, requests: Requests, dtype: str = "auto", seed: int = 0, **options: Any
) -> tuple[list[Any], dict[str, Any]]:
    """The results when they arrive in random order at random times, and the engine's stats."""
    driver = Driver(model, dtype=dtype, **options)
    rng = random.Random(seed)
    order = rng.sample(range(len(requests)), len(requests))
    ids: dict[int, int] = {}
    while len(ids) < len(order):
        for number in order[len(ids) : len(ids) + rng.choice([1, 5, 30])]:
            ids[number] = driver.add(requests[number][0], **requests[number][1])
        for _ in range(rng.randrange(4)):
            driver.step()
    while driver.engine.has_unfinished():
        driver.step()
    assert all(record.ended and record.error is None for record in driver.records)
    results = [driver.records[ids[number]].result() for number in range(len(requests))]
    return results, driver.engine.stats()


def assert_same(got: list[Any], want: list[Any]) -> None:
    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        # repr tells every float from every other: the tokens and logprobs are the same bits.
        assert repr(one) == repr(other), f"request {number}"


CONFIGS: dict[str, dict[str, Any]] = {
    "64 at a time": {"max_num_seqs": 64, "max_num_batched_tokens": 512, "num_blocks": 4000},
    "one token a step": {"max_num_seqs": 1, "max_num_batched_tokens": 1, "n": 1},
    "chunks of 5": {"max_num_seqs": 4, "max_num_batched_tokens": 5},
    "chunks of 64, no cache": {
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "prefix_caching": False,
        "num_blocks": 200,
    },
    "a pool for one": {"max_num_seqs": 32, "max_num_batched_tokens": 100, "num_blocks": 36},
    "a pool for one, no cache": {
        "max_num_seqs": 32,
        "max_num_batched_tokens": 100,
        "num_blocks": 36,
        "prefix_caching": False,
    },
    "blocks of 1": {"block_size": 1, "num_blocks": 700, "max_num_seqs": 16},
    "blocks of 5, 2 threads": {"block_size": 5, "num_threads": 2, "num_blocks": 100},
    "blocks of 32, 4 threads": {
        "block_size": 32,
        "num_threads": 4,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 256,
        "num_blocks": 100,
    },
    "colliding hashes": {"prefix_hash_mask": 0, "num_blocks": 80, "max_num_seqs": 16},
    "static batches": {"static_batching": True, "max_num_seqs": 16, "num_blocks": 300},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = dummy.write_checkpoint(
        tmp_path_factory.mktemp("invariance"), MODEL, seed=3, dtype="bfloat16", tokenizer=False
    )
    return directory


@pytest.fixture(scope="module")
def requests() -> Requests:
    return some_requests(1, MODEL["vocab_size"])


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(model: Path, requests: Requests, dtype: str) -> list[Any]:
    results = run_alone(model, requests, dtype)
    assert len({repr(result) for result in results}) == len(requests)  # no two alike
    return results


@pytest.mark.parametrize("name", CONFIGS)
def test_a_request_gets_the_same_bits_in_any_company(
    model: Path, requests: Requests, dtype: str, alone: list[Any], name: str
) -> None:
    options = dict(CONFIGS[name])
    most = options.pop("n", 4)
    chosen = [number for number, (_, asked) in enumerate(requests) if asked["n"] <= most]
    got, stats = run_together(
        model, [requests[number] for number in chosen], dtype, seed=len(name), **options
    )
    assert_same(got, [alone[number] for number in chosen])
    if "pool for one" in name:
        assert stats["num_preemptions"] > 20
    assert (stats["prefix_cache_hits"] > 0) == options.get("prefix_caching", True)


@pytest.fixture(params=_core.supported_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TINYVLLM_CPU_ISA", request.param)
    return str(request.param)


@pytest.mark.parametrize("repack_weights", [False, True])
@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "mistral-window"])
def test_it_holds_on_every_instruction_set_and_family(
    tmp_path: Path, isa: str, name: str, repack_weights: bool
) -> None:
    family = FAMILIES[name]
    path = family.write(tmp_path)
    vocab = family.config["vocab_size"]
    assert isinstance(vocab, int)
    requests = some_requests(2, vocab, count=24)
    want = run_alone(path, requests, repack_weights=repack_weights)
    for budget, blocks, threads in [(9, 40, 1), (300, 60, 2)]:
        got, stats = run_together(
            path,
            requests,
            max_num_batched_tokens=budget,
            num_blocks=blocks,
            num_threads=threads,
            repack_weights=repack_weights,
        )
        assert_same(got, want)
        assert stats["prefix_cache_hits"] > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_chunks_of_1_to_512_tokens_give_the_same_bits(tmp_path: Path, dtype: str) -> None:
    config = MODEL | {"max_position_embeddings": 1024}
    path = dummy.write_checkpoint(tmp_path, config, seed=3, dtype="bfloat16", tokenizer=False)
    rng = random.Random(0)
    prompt = [rng.randrange(64) for _ in range(700)]
    asked = {"max_tokens": 5, "logprobs": 20, "prompt_logprobs": 5, "seed": 3}
    results = []
    for budget in (512, 1, 2, 7, 64, 65, 127, 300):
        driver = Driver(
            path,
            dtype=dtype,
            max_num_seqs=1,
            max_num_batched_tokens=budget,
            block_size=16,
            prefix_caching=False,
        )
        results.append(driver.run_alone(prompt, **asked).result())
        assert driver.engine.stats()["num_steps"] == -(-700 // budget) + 4
    assert_same(results[1:], results[:1] * 7)


def test_the_order_of_arrival_changes_nothing(model: Path, requests: Requests) -> None:
    results = [run_together(model, requests, seed=seed)[0] for seed in range(3)]
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


# --- The comparison can fail ----------------------------------------------------------------------


def flip_last_bit(path: Path, tensor: str) -> None:
    """Flips the lowest bit of a tensor's first number (little-endian, so of its first byte)."""
    data = bytearray(path.read_bytes())
    (header_size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_size])
    data[8 + header_size + header[tensor]["data_offsets"][0]] ^= 1
    path.write_bytes(data)


def test_a_change_of_one_weight_in_its_last_bit_is_seen(tmp_path: Path) -> None:
    path = dummy.write_checkpoint(
        tmp_path, LLAMA, seed=3, dtype="float32", norm_dtype="float32", tokenizer=False
    )
    requests = some_requests(1, LLAMA["vocab_size"], count=8)
    want = run_alone(path, requests)
    assert_same(run_alone(path, requests), want)
    flip_last_bit(path / "model.safetensors", "model.norm.weight")
    with pytest.raises(AssertionError, match="request"):
        assert_same(run_alone(path, requests), want)
