"""`tinyvllm bench`: its work, its figures against independent ones, its forms and its ends."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import random
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import cli_process
from families import FAMILIES
from tinyvllm import LLM, _core, dummy
from tinyvllm.cli import bench_report
from tinyvllm.cli.bench_run import RequestTimes, Run
from tinyvllm.cli.bench_work import Work, random_work, work_of_file
from tinyvllm.cli.options import LengthRange, Lengths
from tinyvllm.errors import InvalidRequestError
from tinyvllm.limits import MachineLimits
from tinyvllm.llm import BUNDLED_MODEL
from tinyvllm.model_cost import Cost, ModelCost

COMMAND = [*cli_process.COMMAND, "bench"]
Result = subprocess.CompletedProcess[bytes]


def bench(*arguments: str, **options: Any) -> Result:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=120, **options)


def quick(*arguments: str, **options: Any) -> Result:
    """Of the bundled model, without the second that measuring the machine takes."""
    return bench(*arguments, "--no-limits", **options)


def document(result: Result) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr.decode()
    value: dict[str, Any] = json.loads(result.stdout)
    return value


# --- The work -------------------------------------------------------------------------------------


def test_the_default_is_nano_vllms_protocol() -> None:
    work = random_work(256, (100, 1024), (100, 1024), seed=0, vocab_size=151936)
    assert sum(map(len, work.prompts)) == 142_827
    assert sum(work.output_lens) == 133_966
    assert max(work.output_lens) == 1024

    # The lines of its bench.py, with the generator of the random module.
    random.seed(0)
    prompts = [
        [random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)
    ]
    assert work.prompts == prompts
    assert work.output_lens == [random.randint(100, 1024) for _ in range(256)]


def test_a_small_vocabulary_and_a_shared_prefix_leave_the_lengths_alone() -> None:
    plain = random_work(20, (10, 50), (5, 9), seed=3, vocab_size=50_000)
    small = random_work(20, (10, 50), (5, 9), seed=3, vocab_size=300, shared_prefix=40)
    assert [len(prompt) + 40 for prompt in plain.prompts] == list(map(len, small.prompts))
    assert small.output_lens == plain.output_lens
    assert len({tuple(prompt[:40]) for prompt in small.prompts}) == 1
    assert max(map(max, small.prompts)) < 300


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("512", [512]),
        ("512,128", [512, 128]),
        ("1-4", [1, 2, 3, 4]),
        ("128-512+128", [128, 256, 384, 512]),
        ("1-4096*2", [2**i for i in range(13)]),
        ("3-20*3,2k,2K", [3, 9, 2000, 2048]),
    ],
)
def test_lengths_are_lists_and_ranges(text: str, numbers: list[int]) -> None:
    assert Lengths().convert(text, None, None) == numbers


@pytest.mark.parametrize(
    "text", ["", "a", "0", "4-1", "1-8*1", "1-8*0", "1-8+0", "1-2-3", "1..4", "1-8*", "1-2000"]
)
def test_lengths_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="number"):
        Lengths().convert(text, None, None)


def test_length_ranges() -> None:
    assert LengthRange().convert("100:1024", None, None) == (100, 1024)
    assert LengthRange().convert("1K", None, None) == (1024, 1024)
    for text in ("0", "5:4", "a:b", "1:2:3", "-1:5"):
        with pytest.raises(click.BadParameter):
            LengthRange().convert(text, None, None)


def test_a_file_of_prompts_says_what_they_are_and_how_long_outputs_get(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "Once upon a time", "max_tokens": 7},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
        {"prompt_token_ids": [5, 6, 7], "max_tokens": 1},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    with LLM() as llm:
        tokenizer = llm.get_tokenizer()
    work = work_of_file(path, tokenizer, None, (20, 30), seed=0)
    assert work.prompts == [
        tokenizer.encode("Once upon a time"),
        tokenizer.encode_chat([{"role": "user", "content": "Hello"}])[1],
        [5, 6, 7],
    ]
    assert work.output_lens[::2] == [7, 1]
    assert 20 <= work.output_lens[1] <= 30
    assert work.longest == len(work.prompts[1]) + work.output_lens[1]
    assert work_of_file(path, tokenizer, 1, (20, 30), seed=0).output_lens == [7]
    with pytest.raises(InvalidRequestError, match="has 3 prompts, 4 are asked for"):
        work_of_file(path, tokenizer, 4, (20, 30), seed=0)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "line 1: no prompt"),
        ('{"prompt": 3}', "line 1: no prompt"),
        ('{"prompt_token_ids": ["a"]}', "line 1: no prompt"),
        ('{"prompt": "a", "max_tokens": 0}', "line 1: max_tokens is 0"),
        ("", "has 0 prompts, at least 1"),
        ("\xff", "not a text in UTF-8"),
    ],
)
def test_a_bad_file_of_prompts_is_a_usage_error(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(line.encode("latin-1"))
    result = quick("throughput", "--prompts", str(path))
    assert result.returncode == 2
    assert result.stdout == b""
    assert complaint in result.stderr.decode()


# --- The figures ----------------------------------------------------------------------------------


def test_statistics_are_numpys() -> None:
    generator = random.Random(1)
    times = [sorted(generator.random() for _ in range(generator.randint(2, 9))) for _ in range(7)]
    run = Run(Work([[1]] * len(times), [1] * len(times)))
    for request, values in zip(run.requests, times, strict=True):
        request.token_times, request.ended = values, values[-1]
    run.seconds = 1.0
    samples = {
        "ttft": [values[0] for values in times],
        "itl": np.concatenate([np.diff(values) for values in times]),
        "tpot": [(values[-1] - values[0]) / (len(values) - 1) for values in times],
        "e2el": [values[-1] for values in times],
    }
    point = {"num_prompts": 7, "shared_prefix": 0}
    cost = ModelCost(BUNDLED_MODEL)
    row = bench_report.throughput_row(point, run, cost, None)
    for name, values in samples.items():
        milliseconds = 1e3 * np.asarray(values)
        assert row[f"mean_{name}_ms"] == pytest.approx(np.mean(milliseconds))
        assert row[f"median_{name}_ms"] == pytest.approx(np.median(milliseconds))
        assert row[f"std_{name}_ms"] == pytest.approx(np.std(milliseconds))
        assert row[f"p90_{name}_ms"] == pytest.approx(np.percentile(milliseconds, 90))
        assert row[f"p99_{name}_ms"] == pytest.approx(np.percentile(milliseconds, 99))
    assert row["output_throughput"] == sum(map(len, times))
    assert row["request_throughput"] == 7


def brute_force_cost(
    config: dict[str, Any], num_prompt: int, num_cached: int, num_decoded: int
) -> Cost:
    """Product for product: 2 flops a multiply-add, positions one by one."""
    matrices = {
        name: shape for name, shape in dummy.tensor_shapes(config).items() if len(shape) == 2
    }
    head = matrices.get("lm_head.weight") or matrices["model.embed_tokens.weight"]
    linear = sum(
        2 * rows * columns
        for name, (rows, columns) in matrices.items()
        if name not in ("lm_head.weight", "model.embed_tokens.weight")
    )
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    window = config.get("sliding_window")
    flops = bytes_read = 0.0
    for position in range(num_cached, num_prompt + num_decoded):
        flops += linear
        if position >= num_prompt - 1:  # its logits become a token
            flops += 2 * head[0] * head[1]
        in_sight = min(position + 1, window or position + 1)
        layers = config["num_hidden_layers"]
        flops += layers * heads * in_sight * 2 * (2 * head_dim)
        if position >= num_prompt:
            bytes_read += layers * in_sight * 2 * kv_heads * head_dim * 2
    return Cost(flops, kv_bytes=bytes_read)


@pytest.mark.parametrize("name", ["llama-3.2-v5", "qwen3", "mistral-window", "llama-biases"])
def test_the_cost_of_a_request_is_the_sum_of_its_products(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    with LLM(family.write(tmp_path), dtype="bfloat16") as llm:
        kv_bytes_per_token = llm.stats()["kv_cache_bytes_per_token"]
    cost = ModelCost(tmp_path)
    got = cost.prefill(150) + cost.decode(150, 80)
    want = brute_force_cost(dict(family.config), 150, 0, 80)
    assert got.flops == pytest.approx(want.flops)
    assert got.bytes == pytest.approx(want.bytes)
    cached = cost.prefill(150, 32)
    assert cached.flops == pytest.approx(brute_force_cost(dict(family.config), 150, 32, 0).flops)
    assert cached.kv_bytes == 32 * kv_bytes_per_token


@pytest.mark.parametrize("shape", ["smollm2-135m", "llama-3.1-8b"], ids=["tied", "untied"])
def test_a_step_reads_every_matrix_once(shape: str, tmp_path: Path) -> None:
    config = dummy.NAMED_CONFIGS[shape]
    (tmp_path / "config.json").write_text(json.dumps(config))
    cost = ModelCost(tmp_path)
    shapes = {k: v for k, v in dummy.tensor_shapes(config).items() if len(v) == 2}
    elements = sum(rows * columns for rows, columns in shapes.values())
    vocab, hidden = shapes["model.embed_tokens.weight"]
    looked_up = 0 if config["tie_word_embeddings"] else vocab * hidden
    assert cost.num_parameters == elements
    assert cost.step_bytes == 2 * (elements - looked_up)
    assert ModelCost(tmp_path, "float32", "bfloat16").step_bytes == cost.step_bytes
    assert ModelCost(tmp_path, "float32", "float32").step_bytes == 2 * cost.step_bytes


def test_shares_are_the_ideal_time_over_the_measured_one(tmp_path: Path) -> None:
    """Two requests whose prompts are computed in 2 s, and 3 steps that decode in 3 s."""
    cost = ModelCost(FAMILIES["llama-3.2-v5"].write(tmp_path))
    run = Run(Work([[1] * 40] * 2, [4, 4]))
    for request in run.requests:
        request.token_times, request.ended = [2.0, 3.0, 4.0, 5.0], 5.0
    run.step_times, run.seconds = [1.0, 2.0, 3.0, 4.0, 5.0], 5.0
    limits = MachineLimits(read_bandwidth_bytes_per_second=1e6, bf16_flops_per_second=1e9)
    row = bench_report.latency_row({}, [run, run], cost, limits)
    prefill, decode = cost.prefill(40), cost.decode(40, 3)
    assert row["prefill_arithmetic_share"] == pytest.approx(2 * prefill.flops / 1e9 / 2)
    assert row["prefill_bandwidth_share"] == pytest.approx(2 * cost.step_bytes / 1e6 / 2)
    assert row["decode_arithmetic_share"] == pytest.approx(2 * decode.flops / 1e9 / 3)
    decode_bytes = 3 * cost.step_bytes + 2 * decode.bytes
    assert row["decode_bandwidth_share"] == pytest.approx(decode_bytes / 1e6 / 3)
    assert row["prefill_throughput"] == pytest.approx(80 / 2)
    assert row["decode_throughput"] == pytest.approx(6 / 3)


def test_tokens_that_come_before_the_last_first_one_are_not_decoded_in_the_time_after_it(
    tmp_path: Path,
) -> None:
    """A long prompt beside a short one, whose tokens come meanwhile: 3 and 1 of 6 are late."""
    cost = ModelCost(FAMILIES["llama-3.2-v5"].write(tmp_path))
    run = Run(Work([[1] * 4, [1] * 40], [4, 4]))
    for request, times in zip(run.requests, [[1, 2, 3, 5], [4, 5, 6, 7]], strict=True):
        request.token_times, request.ended = [float(now) for now in times], float(times[-1])
    run.step_times, run.seconds = [float(now) for now in range(1, 8)], 7.0
    limits = MachineLimits(read_bandwidth_bytes_per_second=1e6, bf16_flops_per_second=1e9)
    row = bench_report.latency_row({}, [run], cost, limits)
    assert row["prefill_throughput"] == pytest.approx(44 / 4)
    assert row["decode_throughput"] == pytest.approx(4 / 3)
    share = row["decode_bandwidth_share"]

    # A run without late tokens has no rate, and takes none from the others.
    early = Run(Work([[1] * 4], [1]))
    early.requests[0].token_times, early.requests[0].ended = [1.0], 1.0
    early.step_times, early.seconds = [1.0], 1.0
    row = bench_report.latency_row({}, [run, early], cost, limits)
    assert row["decode_throughput"] == pytest.approx(4 / 3)
    assert row["decode_bandwidth_share"] == pytest.approx(share)


@pytest.mark.parametrize(("share", "said"), [(1.05, False), (1.5, True)])
def test_a_share_that_memory_cannot_give_is_explained(share: float, said: bool) -> None:
    assert bench_report._reads_from_caches({"bandwidth_share": share}) is said
    row = {"prefill_bandwidth_share": None, "decode_bandwidth_share": share}
    assert bench_report._reads_from_caches(row) is said


def test_a_request_that_failed_counts_as_failed_only() -> None:
    cost = ModelCost(BUNDLED_MODEL)
    run = Run(Work([[1], [2]], [1, 1]))
    run.requests[0] = RequestTimes(1, [0.5], ended=0.5)
    run.requests[1] = RequestTimes(1, [], ended=0.0, error=ValueError("no"))
    run.seconds = 0.5
    row = bench_report.throughput_row({"num_prompts": 2}, run, cost, None)
    assert (row["completed"], row["failed"]) == (1, 1)
    assert row["total_input_tokens"] == row["total_output_tokens"] == 1
    assert row["mean_tpot_ms"] is None  # of one token there is none


# --- The commands ---------------------------------------------------------------------------------


def test_latency_as_json_has_every_figure_and_every_repeat() -> None:
    arguments = ["-p", "9,5", "-n", "6", "-b", "2", "-r", "3", "--warmup", "1", "-o", "json"]
    value = document(quick("latency", *arguments))
    assert value["benchmark"] == "latency"
    assert value["model"] == "bundled"
    assert value["num_threads"] >= 1
    assert [(row["input_len"], row["output_len"]) for row in value["results"]] == [(9, 6), (5, 6)]
    for row in value["results"]:
        assert (row["batch_size"], row["warmup"], row["repeats"]) == (2, 1, 3)
        assert (row["completed"], row["failed"]) == (6, 0)
        assert row["total_output_tokens"] == 36
        assert row["output_lens"] == [6] * 6
        assert len(row["durations"]) == 3
        assert [len(gaps) for gaps in row["itls"]] == [5] * 6
        for ttft, gaps, latency in zip(row["ttfts"], row["itls"], row["latencies"], strict=True):
            assert latency == pytest.approx(ttft + sum(gaps))
        assert row["median_ttft_ms"] == pytest.approx(1e3 * np.median(row["ttfts"]))
        assert row["p99_e2el_ms"] == pytest.approx(1e3 * np.percentile(row["latencies"], 99))
        assert row["duration"] == pytest.approx(sum(row["durations"]))
        assert row["decode_bandwidth_share"] is None  # --no-limits


def test_one_token_has_no_time_between_tokens() -> None:
    (row,) = document(quick("latency", "-p", "4", "-n", "1", "-r", "2", "-o", "json"))["results"]
    assert row["mean_tpot_ms"] is row["mean_itl_ms"] is row["decode_throughput"] is None
    assert row["mean_e2el_ms"] == pytest.approx(row["mean_ttft_ms"])


def test_the_other_forms_have_the_same_rows() -> None:
    arguments = ["latency", "-p", "1-4*2", "-n", "3", "-r", "1", "--warmup", "0"]
    lines = quick(*arguments, "-o", "jsonl").stdout.splitlines()
    assert [json.loads(line)["input_len"] for line in lines] == [1, 2, 4]
    rows = list(csv.DictReader(io.StringIO(quick(*arguments, "-o", "csv").stdout.decode())))
    assert [row["input_len"] for row in rows] == ["1", "2", "4"]
    assert float(rows[0]["mean_ttft_ms"]) > 0
    assert not {"ttfts", "itls", "latencies"} & set(rows[0])
    text = quick(*arguments).stdout.decode()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 * 4
    assert len(set(map(len, table))) == 1
    assert [line.split("|")[1].strip() for line in table[2::4]] == ["1", "2", "4"]
    assert [line.split("|")[5].strip() for line in table[2:6]] == ["TTFT", "TPOT", "ITL", "E2EL"]


def test_throughput_runs_what_is_asked_for() -> None:
    arguments = ["--num-prompts", "5", "--input-len", "10:30", "--output-len", "2:9"]
    (row,) = document(quick("throughput", *arguments, "-o", "json"))["results"]
    work = random_work(5, (10, 30), (2, 9), seed=0, vocab_size=2048)
    assert row["input_lens"] == [len(prompt) for prompt in work.prompts]
    assert row["output_lens"] == work.output_lens
    assert (row["completed"], row["failed"], row["num_prompts"]) == (5, 0, 5)
    assert row["output_throughput"] == pytest.approx(sum(work.output_lens) / row["duration"])
    assert row["cached_tokens"] == 0
    text = quick("throughput", *arguments).stdout.decode()
    (values,) = text.splitlines()[-1:]
    assert re.match(rf"\| +5 \| +{sum(row['input_lens'])} \| +{sum(row['output_lens'])} \|", values)


def test_a_shared_prefix_is_computed_once() -> None:
    arguments = ["throughput", "--num-prompts", "4", "--shared-prefix", "64", "-p", "8", "-n", "2"]
    arguments += ["--max-num-seqs", "1", "-o", "json"]  # one after the other
    value = document(quick(*arguments))
    (row,) = value["results"]
    assert value["prefix_caching"] is True
    assert row["input_lens"] == [72] * 4
    assert row["cached_tokens"] == 3 * 64
    value = document(quick(*arguments, "--no-prefix-caching"))
    assert value["prefix_caching"] is False
    assert value["results"][0]["cached_tokens"] == 0


def test_a_request_that_is_refused_makes_exit_code_1(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt_token_ids": [999999]}\n{"prompt": "Once", "max_tokens": 3}\n')
    result = quick("throughput", "--prompts", str(path), "-n", "3", "-o", "json")
    assert result.returncode == 1
    (row,) = json.loads(result.stdout)["results"]
    assert (row["completed"], row["failed"]) == (1, 1)
    assert b"1 requests failed; the first: " in result.stderr
    assert b"999999" in result.stderr


def test_the_machines_limits_are_measured_beside() -> None:
    result = bench("latency", "-p", "64", "-n", "8", "-r", "1", "-o", "json")
    value = document(result)
    assert value["read_bandwidth_bytes_per_second"] > 1e8
    assert value["bf16_flops_per_second"] > 1e8
    (row,) = value["results"]
    for phase in ("prefill", "decode"):
        for limit in ("arithmetic", "bandwidth"):
            assert row[f"{phase}_{limit}_share"] > 0


def test_a_config_is_enough_for_random_weights(tmp_path: Path) -> None:
    config = FAMILIES["llama-3.2-v5"].config
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["latency", "--model", str(tmp_path), "-p", "4", "-n", "2", "-r", "1", "-o", "json"]
    refused = quick(*arguments)
    assert refused.returncode == 3
    result = quick(*arguments, "--load-format", "dummy")
    assert document(result)["load_format"] == "dummy"
    assert b"of random weights" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_a_named_shape_needs_no_file_and_leaves_none(tmp_path: Path) -> None:
    arguments = ["--model", "smollm2-135m", "-p", "4", "-n", "2", "-r", "1", "--warmup", "0"]
    result = quick("latency", *arguments, "-o", "json", env={**os.environ, "TMPDIR": str(tmp_path)})
    value = document(result)
    assert value["model"] == "smollm2-135m"
    assert value["num_parameters"] == 134_479_872
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit_on_the_disk_are_refused_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from click.testing import CliRunner

    from tinyvllm.cli import bench as module
    from tinyvllm.errors import CapacityError

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(8, 0, 10**9))
    runner = CliRunner()
    result = runner.invoke(module.command, ["latency", "--model", "llama-3.1-8b"])
    assert isinstance(result.exception, CapacityError)
    assert "need 16.1 GB, 1.0 GB are free. Set TMPDIR" in str(result.exception)


def test_the_size_of_the_kv_cache_is_what_was_asked_for() -> None:
    arguments = ["latency", "-p", "20", "-n", "2", "--kv-cache-memory-bytes", "1"]
    result = quick(*arguments)
    assert result.returncode == 4
    assert b"kv_cache_memory_bytes" in result.stderr


def test_what_is_longer_than_the_model_is_refused_before_it_is_loaded() -> None:
    for arguments in (
        ["latency", "-p", "2000", "-n", "49"],
        ["throughput", "-p", "2000", "-n", "49"],
        ["throughput", "-p", "20", "-n", "49", "--max-model-len", "60"],
        ["throughput", "-p", "20", "-n", "49", "--max-model-len", "0"],
    ):
        result = quick(*arguments)
        assert result.returncode == 2
        assert b"the longest request has" in result.stderr
        assert b"Ask for shorter ones" in result.stderr


# --- How it ends ----------------------------------------------------------------------------------


def on_terminal(*arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """A bench whose stderr is a terminal. The process, and that terminal's other side."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=slave, stdin=subprocess.DEVNULL
    )
    os.close(slave)
    return process, master


def read_until(master: int, pattern: bytes) -> bytes:
    text, until = b"", time.monotonic() + 60
    while re.search(pattern, text) is None:
        ready, _, _ = select.select([master], [], [], until - time.monotonic())
        assert ready, f"{pattern!r} has not come, but {text!r}"
        text += os.read(master, 4096)
    return text


def test_ctrl_c_prints_what_was_measured_and_the_bar_has_the_time_left() -> None:
    work = ["--num-prompts", "16", "--input-len", "8", "--output-len", "2000"]
    process, master = on_terminal("throughput", "--no-limits", "-o", "json", *work)
    shown = read_until(master, rb" [1-9]\d?%\|")
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    os.close(master)
    assert process.returncode == 130
    assert re.search(rb"16 requests: +\d+%\|.*\| \d\d:\d\d<\d+:\d\d", shown)
    (row,) = json.loads(stdout)["results"]
    assert (row["num_prompts"], row["completed"], row["failed"]) == (16, 0, 0)
    assert 0 < row["total_output_tokens"] < 16 * 2000
    assert row["output_throughput"] > 0


def test_ctrl_c_keeps_the_points_that_are_done() -> None:
    process = subprocess.Popen(
        [*COMMAND, "latency", "--no-limits", "-p", "4,1500", "-n", "4", "-r", "100", "-o", "jsonl"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    first = json.loads(process.stdout.readline())
    assert (first["input_len"], first["repeats"]) == (4, 100)
    process.send_signal(signal.SIGINT)
    rest, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == b""  # no terminal, no bar
    rows = [json.loads(line) for line in rest.splitlines()]
    assert all(row["input_len"] == 1500 and 0 < row["repeats"] < 100 for row in rows)
    assert all(row["completed"] == row["repeats"] for row in rows)


def test_a_reader_that_has_gone_ends_it_in_silence() -> None:
    process = subprocess.Popen(
        [*COMMAND, "latency", "--no-limits", "-p", "4", "-n", "1-60", "-r", "1", "-o", "jsonl"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""


def test_the_core_knows_the_windows_that_the_cost_needs(tmp_path: Path) -> None:
    directory = FAMILIES["mistral-window"].write(tmp_path)
    assert set(_core.parse_model_config(directory / "config.json")["sliding_window"]) == {64}
