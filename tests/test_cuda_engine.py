"""The engine on a GPU, or on the emulator of one: against the CPU, and against itself."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli_process import COMMAND
from devices import has_cuda
from engine_driver import Driver
from tinyvllm import LLM, SamplingParams, _core
from tinyvllm.dummy import write_checkpoint
from tinyvllm.errors import CapacityError, InvalidRequestError, UnsupportedModelError

pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs a GPU, or the emulator")

# Two layers of a shape that takes the tensor-core kernels; logits spread so that greedy is clear.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "logprobs": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cuda-engine")
    write_checkpoint(directory, CONFIG, seed=1, dtype="bfloat16")
    return directory


def parsed_config(model: Path) -> dict[str, Any]:
    return _core.parse_model_config(model / "config.json")


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(length * 1000 + seed)
    return [generator.randrange(3, CONFIG["vocab_size"]) for _ in range(length)]


def logits(model: Path, tokens: list[int], device: str, chunk: int = 0, **options: Any) -> Any:
    return _core.Model(model, device=device, **options).logits(np.array(tokens, np.int32), chunk)


def drive(driver: Driver) -> None:
    while driver.engine.has_unfinished():
        driver.step()
    assert all(record.ended for record in driver.records)


def run(model: Path, requests: list[tuple[list[int], dict[str, Any]]], **options: Any) -> list[Any]:
    """The results of the requests on a GPU, all queued at once."""
    defaults: dict[str, Any] = {"device": "cuda", "num_blocks": 64, "max_model_len": 128}
    driver = Driver(model, **{**defaults, **options})
    for tokens, params in requests:
        driver.add(tokens, **params)
    drive(driver)
    return [record.result() for record in driver.records]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("chunk", [0, 1, 7])
def test_logits_are_those_of_the_cpu(model: Path, dtype: str, bound: float, chunk: int) -> None:
    tokens = prompt(37)
    want = logits(model, tokens, "cpu", dtype="float32")
    got = logits(model, tokens, "cuda", chunk, dtype=dtype)
    assert np.abs(got - want).max() <= bound * np.abs(want).max()


@pytest.mark.parametrize("chunk", [1, 9])
def test_a_graph_and_the_same_kernels_without_one_give_the_same_bits(
    model: Path, chunk: int
) -> None:
    tokens = prompt(19)
    graph = logits(model, tokens, "cuda", chunk)
    eager = logits(model, tokens, "cuda", chunk, enforce_eager=True)
    np.testing.assert_array_equal(graph, eager)


# What a draw asks for decides whether it is part of the step's graph: without filters of tokens,
# logprobs and changes of logits it is.
DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.9},
    "filters": {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "logprobs": {"temperature": 0.9, "logprobs": 3},
    "penalties": {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    "bias": {"temperature": 0, "logit_bias": [(7, 5.0)]},
}


def of_one_size(count: int, draw: str) -> list[tuple[list[int], dict[str, Any]]]:
    """Requests that decode together for three steps, of which three then go on alone."""
    options = {**DRAWS[draw], "ignore_eos": True}
    return [
        (prompt(1, seed), {**options, "seed": seed, "max_tokens": 7 if seed < 3 else 4})
        for seed in range(count)
    ]


def assert_same_with_and_without_graphs(
    model: Path, requests: list[tuple[list[int], dict[str, Any]]], **options: Any
) -> list[Any]:
    # Blocks of 16, as the kernels for tensor cores ask for.
    options = {"block_size": 16, "num_blocks": len(requests) + 8, **options}
    with_graphs = run(model, requests, **options)
    assert with_graphs == run(model, requests, **options, enforce_eager=True)
    return with_graphs


@pytest.mark.parametrize(
    ("draw", "count"),
    [("greedy", count) for count in (1, 2, 3, 4, 5, 8, 9, 16, 17, 64, 65)]
    + [(draw, count) for draw in DRAWS if draw != "greedy" for count in (2, 9)],
)
def test_batches_on_both_sides_of_a_graphs_size_are_the_same_with_and_without_graphs(
    model: Path, draw: str, count: int
) -> None:
    requests = of_one_size(count, draw)
    assert_same_with_and_without_graphs(
        model, requests, max_num_seqs=count, max_num_batched_tokens=128
    )


def test_draws_in_a_graph_and_beside_it_take_turns(model: Path) -> None:
    # Seven go on to the end, and beside them one after the other: all are batches padded to 8.
    draws = ["greedy", "temperature", "greedy"] * 2 + ["temperature"]
    draws += ["logprobs", "greedy", "penalties", "filters"]
    requests = [
        (prompt(1, seed), {**DRAWS[draw], "ignore_eos": True, "seed": seed, "max_tokens": 4})
        for seed, draw in enumerate(draws)
    ]
    for _, params in requests[:7]:
        params["max_tokens"] = 22
    assert_same_with_and_without_graphs(model, requests, max_num_seqs=8)


def test_the_same_requests_give_the_same_bits_from_run_to_run(model: Path) -> None:
    requests = of_one_size(5, "logprobs")
    assert run(model, requests) == run(model, requests)


def test_longer_splits_of_a_long_context_have_graphs_of_their_own(tmp_path: Path) -> None:
    # Of few sequences splits have 256 positions up to a context of 5,120, then 512.
    one_head = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    config = {**CONFIG, **one_head, "max_position_embeddings": 6000}
    write_checkpoint(tmp_path, config, seed=1, dtype="bfloat16", tokenizer=False)
    requests = [(prompt(5116), {**GREEDY, "max_tokens": 8})]
    limits = {"max_model_len": 5200, "num_blocks": 325, "max_num_batched_tokens": 5116}
    assert_same_with_and_without_graphs(tmp_path, requests, **limits)


def test_a_sampled_token_goes_on_in_the_next_step_without_the_host(model: Path) -> None:
    # What the engine computes one step ahead is what a sequence computes alone, token by token.
    tokens = prompt(5)
    [(outputs, _)] = run(model, [(tokens, {**GREEDY, "max_tokens": 12})])
    sampled = outputs[0][0]
    rows = logits(model, [*tokens, *sampled], "cuda", 1)
    assert np.argmax(rows[4:-1], axis=1).tolist() == sampled


def test_requests_end_where_they_should_though_a_step_is_ahead(model: Path) -> None:
    # An end token is known only when the next step is under way; what that gives is dropped.
    tokens = prompt(6)
    [(outputs, _)] = run(model, [(tokens, {**GREEDY, "max_tokens": 8})])
    sampled = outputs[0][0]
    stop = sampled[3]
    length = sampled.index(stop) + 1
    [(stopped, _)] = run(model, [(tokens, {**GREEDY, "max_tokens": 8, "stop_token_ids": [stop]})])
    assert stopped[0][0] == sampled[:length]
    assert stopped[0][2] == "stop"
    assert outputs[0][2] == "length"


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": [(7, 5.0)], "min_tokens": 4, "stop_token_ids": [9, 11]},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.02, "seed": 3},
        {"temperature": 1.0, "seed": 4, "n": 3},
    ],
)
def test_sampling_is_the_cpus(model: Path, options: dict[str, Any]) -> None:
    # In float32 the logits of the two devices are so close that every choice is the same.
    requests = [(prompt(n), {**GREEDY, **options, "max_tokens": 5}) for n in (3, 10)]
    gpu = run(model, requests, dtype="float32")
    cpu = run(model, requests, dtype="float32", device="cpu")
    for (got, _), (want, _) in zip(gpu, cpu, strict=True):
        assert [output[0] for output in got] == [output[0] for output in want]
        assert [output[2] for output in got] == [output[2] for output in want]


def test_prompt_logprobs_are_the_cpus(model: Path) -> None:
    requests = [(prompt(11), {**GREEDY, "prompt_logprobs": 2})]
    [(_, got)] = run(model, requests, dtype="float32", max_num_batched_tokens=8)
    [(_, want)] = run(model, requests, dtype="float32", max_num_batched_tokens=8, device="cpu")
    assert len(got) == len(want) == 10
    for (logprob, rank, ids, _), (want_logprob, want_rank, want_ids, _) in zip(
        got, want, strict=True
    ):
        assert logprob == pytest.approx(want_logprob, abs=1e-4)
        assert (rank, ids) == (want_rank, want_ids)


def test_there_are_no_more_logprobs_than_tokens(tmp_path: Path) -> None:
    config = {**CONFIG, "vocab_size": 12}
    write_checkpoint(tmp_path, config, seed=1, dtype="bfloat16", tokenizer=False)
    [(outputs, of_prompt)] = run(
        tmp_path, [([3, 4, 5], {**GREEDY, "logprobs": 20, "prompt_logprobs": 20})]
    )
    for _, _, ids, values in [*outputs[0][1], *of_prompt]:
        assert sorted(ids) == list(range(12))
        assert len(values) == 12


def test_preemption_and_shared_prefixes_leave_the_tokens_as_they_are(model: Path) -> None:
    shared = prompt(32)
    requests = [(shared + prompt(n), GREEDY) for n in (3, 9, 14, 20)]
    alone = [run(model, [request], dtype="float32")[0] for request in requests]
    # 20 blocks of 4 tokens: too few for all four at a time.
    driver = Driver(
        model, device="cuda", num_blocks=20, max_model_len=80, dtype="float32", max_num_seqs=4
    )
    for tokens, params in requests:
        driver.add(tokens, **params)
    drive(driver)
    stats = driver.engine.stats()
    assert stats["num_preemptions"] > 0
    assert stats["prefix_cache_hits"] > 0
    assert stats["num_free_blocks"] == stats["num_blocks"]
    together = [record.result() for record in driver.records]
    assert [got[0][0][0] for got in together] == [want[0][0][0] for want in alone]


def test_a_prefix_may_be_hit_in_the_step_that_computes_it(model: Path) -> None:
    # 33 tokens, blocks of 16: of the second prompt only the last token is left, as if it were a
    # decode, and what it attends to is written by the same step. The pool is full of other K and V.
    driver = Driver(
        model, device="cuda", block_size=16, num_blocks=12, max_model_len=80, dtype="bfloat16"
    )
    for seed in range(2):
        driver.add(prompt(64, seed), **GREEDY)
    drive(driver)
    for _ in range(3):
        driver.add(prompt(33), **GREEDY)
    drive(driver)
    first, *others = [record.result() for record in driver.records[2:]]
    assert driver.engine.stats()["prefix_cache_hits"] == 64
    for other in others:
        assert other[0][0][0] == first[0][0][0]


def batches(model: Path, request: tuple[list[int], dict[str, Any]]) -> list[Callable[[], Any]]:
    others = [(prompt(n, 7), GREEDY) for n in (2, 13, 30)]
    return [
        lambda: run(model, [*others, request], batch_invariant=True)[-1],
        lambda: run(model, [request, *others], batch_invariant=True)[0],
        lambda: run(model, [request], batch_invariant=True, max_num_batched_tokens=8)[0],
        lambda: run(model, [(request[0], GREEDY), request], batch_invariant=True)[-1],  # a hit
    ]


def test_repacked_weights_are_for_the_cpu(model: Path) -> None:
    with pytest.raises(InvalidRequestError, match="repack_weights is for the CPU"):
        Driver(model, device="cuda", repack_weights=True)


def test_batch_invariant_gives_a_request_the_same_bits_in_every_batch(model: Path) -> None:
    request = (prompt(34), GREEDY)
    alone = run(model, [request], batch_invariant=True)[0]
    for number, batch in enumerate(batches(model, request)):
        assert batch() == alone, f"batch {number}"


def test_a_step_that_throws_fails_its_requests_and_the_next_one_works(model: Path) -> None:
    driver = Driver(model, device="cuda", num_blocks=64, max_model_len=128, fail_at_step=3)
    for n in (4, 8):
        driver.add(prompt(n), **GREEDY)
    drive(driver)
    assert all("fails, as asked" in str(record.error) for record in driver.records)
    driver.add(prompt(5), **GREEDY)
    drive(driver)
    [(want, _)] = run(model, [(prompt(5), GREEDY)])
    assert driver.records[-1].result()[0] == want


def test_what_does_not_fit_says_so_with_the_numbers(model: Path) -> None:
    with pytest.raises(CapacityError, match=r"KV cache.*bytes") as caught:
        _core.Engine(model, device="cuda", num_blocks=2**31 - 1, max_model_len=128)
    rows = [line.split()[0] for line in str(caught.value).splitlines()[1:]]
    assert rows == ["weights", "KV", "workspace", "free"]


@pytest.mark.skipif(_core.cuda_build() != "emulated", reason="the emulator's memory is small")
def test_weights_that_do_not_fit_say_so_with_the_same_table(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 2048}  # 7 MB
    write_checkpoint(tmp_path, {**CONFIG, **wide}, dtype="bfloat16")
    result = subprocess.run(
        [*COMMAND, "generate", "-m", str(tmp_path), "-p", "x", "--device", "cuda"],
        env={**os.environ, "TINYVLLM_EMULATOR_MEMORY": "4"},
        capture_output=True,
        text=True,
    )
    first, *table = result.stderr.splitlines()
    assert result.returncode == 4
    assert "no room for the weights" in first
    rows = {line.split()[0]: float(line.split("MiB")[0].split()[-1]) for line in table}
    assert list(rows) == ["weights", "KV", "workspace", "free"]
    assert rows["weights"] > rows["free"] > 3
    assert rows["workspace"] > 128  # what is left to the driver


def test_a_length_beyond_the_models_is_refused_before_memory_is_taken_for_it(model: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"max_model_len is \d+; .* at most 256"):
        _core.Engine(model, device="cuda", max_model_len=2**62)


def test_a_context_that_decodes_cannot_merge_is_refused_with_the_numbers(tmp_path: Path) -> None:
    # 16 query heads take 128 bytes of shared memory a split of 256 positions.
    heads = {"num_attention_heads": 16, "num_key_value_heads": 1, "num_hidden_layers": 1}
    config = {**CONFIG, **heads, "max_position_embeddings": 10_000_000}
    write_checkpoint(tmp_path, config, seed=1, dtype="bfloat16", tokenizer=False)
    options: dict[str, Any] = {"device": "cuda", "max_num_seqs": 1, "block_size": 16}
    with pytest.raises(
        InvalidRequestError, match=r"max_model_len is 10000000; .*at most"
    ) as caught:
        _core.Engine(tmp_path, **options)
    said = re.search(r"at most (\d+) tokens.* (\d+) bytes of shared memory", str(caught.value))
    assert said
    longest, shared_bytes = int(said[1]), int(said[2])
    assert longest == pytest.approx(shared_bytes / 128 * 256, rel=0.01)

    with pytest.raises(InvalidRequestError, match=f"at most {longest} tokens"):
        _core.Engine(tmp_path, **options, max_model_len=longest + 1)
    limits = {"max_model_len": longest, "num_blocks": longest // 16}
    [(outputs, _)] = run(tmp_path, [(prompt(3), GREEDY)], **options, **limits)
    assert (len(outputs[0][0]), outputs[0][2]) == (GREEDY["max_tokens"], "length")


def test_more_decodes_than_a_launch_takes_are_refused(model: Path) -> None:
    limits = {"max_num_seqs": 65536, "max_num_batched_tokens": 65536}
    with pytest.raises(InvalidRequestError, match=r"at most 32768 .* Lower max_num_seqs"):
        _core.Engine(model, device="cuda", dtype="bfloat16", **limits)


def test_a_head_dim_that_no_kernel_takes_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {**CONFIG, "head_dim": 264}, dtype="bfloat16", tokenizer=False)
    with pytest.raises(UnsupportedModelError, match="head_dim is 264; on CUDA it is at most 256"):
        _core.Engine(tmp_path, device="cuda")


# --- Memory that comes back ----------------------------------------------------------------------


def free_memory() -> int:
    gc.collect()
    return _core.cuda_memory()[0]


def test_close_gives_all_memory_back(model: Path) -> None:
    free = []
    for _ in range(2):  # the driver keeps what it loads for the first one
        with LLM(model, device="cuda", num_gpu_blocks_override=64, max_num_seqs=4) as llm:
            params = SamplingParams(max_tokens=4, logprobs=2, prompt_logprobs=2)
            llm.generate([[3, 4, 5], [6]], params, use_tqdm=False)
            during = free_memory()
        free.append(free_memory())
        assert free[-1] > during
    assert free[1] == free[0]


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 2**31 - 1},
        {"num_blocks": 1, "max_model_len": 128},
        {"kv_cache_memory_bytes": 1},
        pytest.param(
            {"max_num_batched_tokens": 1 << 20},
            marks=pytest.mark.skipif(_core.cuda_build() != "emulated", reason="fits a real one"),
        ),
    ],
)
def test_an_engine_that_could_not_be_made_leaves_no_memory_behind(
    model: Path, options: dict[str, Any]
) -> None:
    emulated = _core.cuda_build() == "emulated"
    free = []
    for _ in range(2 if emulated else 10):
        with pytest.raises(CapacityError):
            _core.Engine(model, device="cuda", **options)
        free.append(free_memory())
    if emulated:
        assert free[1] == free[0]
    else:  # a driver takes a page of 2 MiB now and then, or gives one back
        assert free[-1] >= free[0] - (2 << 20)


def test_no_room_for_a_block_says_whose_share_it_was(model: Path) -> None:
    with pytest.raises(CapacityError, match=r"not hold one block.*Raise gpu_memory_utilization"):
        _core.Engine(model, device="cuda", gpu_memory_utilization=1e-6)


@pytest.mark.skipif(_core.cuda_build() == "emulated", reason="its graphs take no device memory")
def test_all_graphs_of_a_model_and_the_driver_stay_within_their_reserve(tmp_path: Path) -> None:
    deep = {**CONFIG, "num_hidden_layers": 32}
    write_checkpoint(tmp_path, deep, seed=1, dtype="bfloat16")
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 128, "max_model_len": 128}
    driver = Driver(tmp_path, device="cuda", num_blocks=128, **limits)
    before = free_memory()
    for draw in ("greedy", "filters"):  # a part of the graph, and behind it
        for count in (1, 2, 4, *range(8, 65, 8)):
            for tokens, params in of_one_size(count, draw):
                driver.add(tokens, **params)
            drive(driver)
    taken = before - free_memory()
    assert taken <= _core.gpu_reserve_bytes(parsed_config(tmp_path), 64, 128)


# --- The memory plan ------------------------------------------------------------------------------

STATS = """
import json, sys
from tinyvllm import LLM
with LLM(sys.argv[1], device="cuda", max_num_seqs=64, max_num_batched_tokens=128) as llm:
    print(json.dumps(llm.stats()))
"""


def test_inspect_plans_what_the_engine_takes_of_the_gpu(tmp_path: Path) -> None:
    """64 KiB of keys and values a token, and sequences that want more of them than any GPU has."""
    wide = {"num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = {**CONFIG, **wide, "head_dim": 128, "max_position_embeddings": 65536}
    model = str(write_checkpoint(tmp_path / "wide", config, dtype="bfloat16"))
    limits = ["--max-num-seqs", "64", "--max-num-batched-tokens", "128", "--device", "cuda"]

    def output_of(*arguments: str) -> Any:
        result = subprocess.run([sys.executable, *arguments], capture_output=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    plan = output_of("-m", "tinyvllm.cli", "inspect", model, *limits, "--json")["memory"]
    real = output_of("-c", STATS, model)
    assert plan["kv_limit"] == "utilization"
    assert plan["weights"] == pytest.approx(real["copied_weight_bytes"], rel=1e-3)
    assert plan["kv_tokens"] == pytest.approx(real["kv_cache_tokens"], rel=0.1)

    def workspace(**options: Any) -> float:
        sizes = {"max_num_seqs": 64, "max_num_batched_tokens": 128}
        with pytest.raises(CapacityError) as caught:  # which names what the engine has allocated
            _core.Engine(model, device="cuda", kv_cache_memory_bytes=1, **sizes, **options)
        said = re.search(r"workspace +([0-9.]+) MiB", str(caught.value))
        assert said
        return float(said[1])

    reserve = _core.gpu_reserve_bytes(parsed_config(Path(model)), 64, 65536)
    assert workspace() == pytest.approx((plan["activations"] + reserve) / 2**20, abs=0.01)
    without_graphs = plan["activations"] / 2**20 + 128
    assert workspace(enforce_eager=True) == pytest.approx(without_graphs, abs=0.01)
    assert workspace(batch_invariant=True) == pytest.approx(without_graphs, abs=0.01)
