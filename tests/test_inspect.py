"""`tinyvllm inspect`: what it says of a model, and its memory plan against real processes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tinyvllm import _core, dummy, generation_config
from tinyvllm.errors import CapacityError, DeviceError
from tinyvllm.llm import BUNDLED_MODEL

COMMAND = [sys.executable, "-m", "tinyvllm.cli", "inspect"]


def inspect(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=60)


def report(*arguments: str, code: int = 0) -> Any:
    result = inspect(*arguments, "--json")
    assert result.returncode == code, result.stderr
    return json.loads(result.stdout)


# --- The plan against real processes --------------------------------------------------------------

# Fills the KV cache, the largest step and every row of logits, then tells what is resident.
GENERATE = """
import random, sys
from tinyvllm import LLM, SamplingParams
model, dtype, length, seqs, budget = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
rng = random.Random(0)
with LLM(model, dtype=dtype, max_model_len=length, max_num_seqs=seqs,
         max_num_batched_tokens=budget) as llm:
    vocab = llm.stats()["vocab_size"]
    prompts = [[rng.randrange(3, vocab) for _ in range(length - 2)] for _ in range(seqs)]
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) == 2 for output in outputs)
    with open("/proc/self/statm") as file:
        print(int(file.read().split()[1]) * 4096)
"""

TIED = dummy.NAMED_CONFIGS["smollm2-135m"]
UNTIED = {
    **TIED,
    "tie_word_embeddings": False,
    "vocab_size": 8192,
    "num_hidden_layers": 6,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
}


@pytest.mark.parametrize(
    ("config", "stored", "dtype", "length", "seqs", "budget"),
    [
        (None, "bfloat16", "auto", 128, 64, 2048),  # the bundled model
        (TIED, "bfloat16", "auto", 16, 64, 512),
        (UNTIED, "float16", "bfloat16", 64, 16, 256),
        (UNTIED, "bfloat16", "float32", 64, 16, 256),
    ],
    ids=["bundled", "270 MB", "float16, copied", "float32 on bfloat16"],
)
def test_the_plan_is_what_a_running_process_shows_as_resident(
    tmp_path: Path,
    config: Any,
    stored: str,
    dtype: str,
    length: int,
    seqs: int,
    budget: int,
) -> None:
    model = str(BUNDLED_MODEL)
    if config is not None:
        model = str(dummy.write_checkpoint(tmp_path / "model", config, dtype=stored))
    limits = ["--max-model-len", str(length), "--max-num-seqs", str(seqs)]
    limits += ["--max-num-batched-tokens", str(budget), "--dtype", dtype]
    memory = report(model, *limits)["memory"]
    assert memory["kv_tokens"] == -(-length // 16) * 16 * seqs
    result = subprocess.run(
        [sys.executable, "-c", GENERATE, model, dtype, str(length), str(seqs), str(budget)],
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    resident = int(result.stdout)
    assert memory["needed"] == pytest.approx(resident, rel=0.10)


def test_what_a_step_works_in_grows_with_the_threads() -> None:
    few, many = (
        report("llama-3.2-1b", "--threads", threads)["memory"]["activations"]
        for threads in ("1", "64")
    )
    assert many - few > 1 << 20


def test_a_larger_step_works_in_no_less() -> None:
    """Up to 64 tokens AMX takes wider strips of weights, with more sums than a token more has."""
    at_64, at_65 = (
        report("llama-3.2-1b", "--threads=8", "--max-num-seqs=8", f"--max-num-batched-tokens={n}")
        for n in (64, 65)
    )
    assert at_65["memory"]["activations"] >= at_64["memory"]["activations"]


def test_the_plan_follows_the_engines_own_choice_of_blocks() -> None:
    from tinyvllm import LLM

    for limits in ({"max_num_seqs": 3, "max_model_len": 100}, {"max_num_seqs": 7}):
        with LLM(**limits) as llm:  # type: ignore[arg-type]
            real = llm.stats()
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in limits.items()]
        memory = report(*arguments)["memory"]
        assert memory["kv_tokens"] == real["kv_cache_tokens"]
        assert memory["kv_bytes_per_token"] == real["kv_cache_bytes_per_token"]
        assert memory["max_model_len"] == real["max_model_len"]
        assert memory["copied_weights"] == real["copied_weight_bytes"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_plan_has_the_engines_own_activations(dtype: str) -> None:
    limits = {"max_num_seqs": 5, "max_num_batched_tokens": 77}
    with pytest.raises(CapacityError) as caught:  # which names what the engine has allocated
        _core.Engine(BUNDLED_MODEL, dtype=dtype, device="cpu", kv_cache_memory_bytes=1, **limits)
    said = re.search(r"workspace +([0-9.]+) MiB", str(caught.value))
    assert said
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in limits.items()]
    memory = report(*arguments, "--dtype", dtype)["memory"]
    assert memory["activations"] / 2**20 == pytest.approx(float(said[1]), abs=0.01)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "bfloat16"),
        ("float32", "float32"),
    ],
)
def test_the_plan_knows_what_repacked_weights_take(
    tmp_path: Path, stored: str, dtype: str, tied: bool
) -> None:
    from tinyvllm import LLM

    config = {**UNTIED, "tie_word_embeddings": tied, "vocab_size": 333, "eos_token_id": 1}
    model = dummy.write_checkpoint(tmp_path / "model", config, dtype=stored)
    with LLM(model, dtype=dtype, repack_weights=True, max_num_seqs=2, max_model_len=64) as llm:
        real = llm.stats()["copied_weight_bytes"]
    memory = report(str(model), "--dtype", dtype, "--repack-weights")["memory"]
    assert memory["copied_weights"] == real


# --- Will it fit ----------------------------------------------------------------------------------


def test_what_will_not_fit_is_exit_4_with_the_report_on_stdout() -> None:
    result = inspect("llama-3.1-8b", "--memory", "12G")
    assert result.returncode == 4
    assert b"does not fit" in result.stdout
    said = re.match(rb"tinyvllm: error: it will not fit: ([0-9.]+) GiB without KV", result.stderr)
    assert said
    memory = report("llama-3.1-8b", "--memory", "12G", code=4)["memory"]
    without_cache = (memory["needed"] - memory["kv_cache"]) / 2**30
    assert float(said[1]) == pytest.approx(without_cache, abs=0.02)
    assert 0 < without_cache - memory["weights"] / 2**30 < 1
    assert b"12.00 GiB" in result.stderr
    assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("arguments", "fits", "limit"),
    [
        (["--memory", "24G"], True, "left"),
        (["--memory", "24G", "--max-model-len", "64K"], True, "left"),
        (["--memory", "24G", "--max-model-len", "128K"], False, "left"),
        (["--memory", "80G"], True, "share"),
        (["--memory", "1000G", "--max-num-seqs", "4"], True, "sequences"),
        (["--memory", "15G"], False, "left"),
    ],
)
def test_the_kv_cache_gets_what_is_left_or_less(
    arguments: list[str], fits: bool, limit: str
) -> None:
    memory = report("llama-3.1-8b", *arguments, code=0 if fits else 4)["memory"]
    assert memory["fits"] is fits
    assert memory["kv_limit"] == limit
    assert memory["kv_bytes_per_token"] == 2 * 32 * 8 * 128 * 2  # K and V, layers, heads, bfloat16
    if fits:
        assert memory["needed"] <= memory["available"]
    if limit == "sequences":
        assert memory["full_length_sequences"] == 4


@pytest.mark.parametrize(
    ("asked", "padded"),
    [(1, 1), (2, 2), (3, 4), (5, 8), (17, 24), (64, 64), (65, 80), (250, 256)],
)
def test_the_batch_sizes_that_have_a_graph(asked: int, padded: int) -> None:
    assert _core.padded_batch_size(asked) == padded


@pytest.mark.parametrize(
    ("sequences", "items"),
    [
        (1, 32),  # 8192 / 256
        (3, 96),  # of 4 in a graph, where a split is twice as long: 4 x 16
        (12, 240),  # 15 x 16: sixteen sequences have splits of 1024, and 128 of them
        (64, 256),  # 31 x 8 are 248, and 64 x 4
    ],
)
def test_more_sequences_may_have_fewer_splits(sequences: int, items: int) -> None:
    """With 8 KV heads a split is 256 positions for up to 3 sequences, then 512, from 16 on 1024,
    from 32 on 2048."""
    assert _core.most_decode_items(sequences, num_kv_heads=8, max_model_len=8192) == items


@pytest.mark.parametrize(
    ("sequences", "kv_heads", "max_model_len", "sizes"),
    [
        (1, 8, 5120, 1),
        (1, 8, 8192, 2),  # splits of 256 or of 512 positions
        (8, 8, 8192, 6),  # 1, 2, 4 and 8, of which the last two have one split
        (8, 1, 8192, 8),
        (64, 8, 8192, 13),  # 1, 2, 4, then steps of 8
        (65, 8, 8192, 14),
        (256, 8, 8192, 25),
    ],
)
def test_how_many_graphs_of_decodes_there_are(
    sequences: int, kv_heads: int, max_model_len: int, sizes: int
) -> None:
    assert _core.num_decode_sizes(sequences, kv_heads, max_model_len) == sizes


def test_a_gpu_that_is_elsewhere() -> None:
    arguments = ["llama-3.1-8b", "--device", "cuda"]
    memory = report(*arguments, "--memory", "80G")["memory"]
    assert memory["device"] == "cuda"
    assert memory["kv_limit"] == "utilization"
    assert memory["weights"] == memory["copied_weights"] == pytest.approx(16.06e9, rel=1e-2)
    # 100 graphs of 32 layers, of 13 nodes each, and 10 beside them; 128 MiB for the driver.
    reserve = 100 * (32 * 13 + 10) * 10240 + (128 << 20)
    block = 16 * memory["kv_bytes_per_token"]
    assert 0 <= 0.9 * memory["available"] - memory["needed"] - reserve <= block
    few = report(*arguments, "--memory", "80G", "--max-num-seqs", "2")["memory"]
    assert few["kv_limit"] == "sequences"
    assert few["full_length_sequences"] == 2
    small = inspect(*arguments, "--memory", "16G")
    assert small.returncode == 4
    assert b"of which 90% may be used" in small.stderr


@pytest.mark.skipif(_core.cuda_build() != "none", reason="test_cuda_engine.py asks the GPU")
def test_a_gpu_that_is_not_there_is_exit_5() -> None:
    result = inspect("llama-3.1-8b", "--device", "cuda")
    assert result.returncode == 5
    with pytest.raises(DeviceError) as missing:
        _core.require_cuda_build()
    assert str(missing.value).encode() in result.stderr
    assert b"--memory 80G" in result.stderr
    assert report("--device", "auto")["memory"]["device"] == "cpu"


def test_only_headers_are_read(tmp_path: Path) -> None:
    """A checkpoint of 16 GB, of which only the header is on the disk: no page of it is missed."""
    config = {**dummy.NAMED_CONFIGS["llama-3.1-8b"], "vocab_size": 2048, "eos_token_id": 1}
    config["bos_token_id"] = 0
    model = tmp_path / "model"
    small = {**config, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    dummy.write_checkpoint(model, small)
    (model / "config.json").write_text(json.dumps(config))
    shapes = dummy.tensor_shapes(config)
    with (model / "model.safetensors").open("wb") as file:
        dummy._write_header(file, shapes, dict.fromkeys(shapes, "bfloat16"))
        size = sum(dummy._num_bytes(shape, "bfloat16") for shape in shapes.values())
        file.truncate(file.tell() + size)
    found = report(str(model), "--memory", "24G")
    assert found["files"] == [{"file": "model.safetensors", "num_bytes": size}]
    assert found["memory"]["weights"] == pytest.approx(size, rel=1e-3)
    assert size > 13e9


# --- What it says ---------------------------------------------------------------------------------


def test_the_report_of_the_bundled_model() -> None:
    found = report("--tensors")
    assert found["schema"] == 1
    assert found["model"] == "bundled"
    assert found["directory"] == str(BUNDLED_MODEL)
    assert found["config"]["num_layers"] == 5
    tensors = found["tensors"]
    assert found["parameters"]["total"] == sum(t["num_bytes"] for t in tensors) // 2
    embedding = next(t for t in tensors if t["name"] == "model.embed_tokens.weight")
    assert embedding == {
        "name": "model.embed_tokens.weight",
        "dtype": "BF16",
        "shape": [2048, 256],
        "num_bytes": 2 * 2048 * 256,
        "file": "model.safetensors",
    }
    assert found["tokenizer"]["vocab_size"] == 2048
    assert found["tokenizer"]["special_tokens"]["bos_token"] == {"token": "<|bos|>", "id": 0}
    assert found["tokenizer"]["chat_templates"]["default"]["file"].endswith("chat_template.jinja")
    assert found["eos_token_ids"] == [1, 2]


def test_shards_are_counted_each(tmp_path: Path) -> None:
    config = {**UNTIED, "num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 64}
    model = dummy.write_checkpoint(tmp_path / "model", config, num_shards=3)
    found = report(str(model), "--tensors")
    assert len(found["files"]) == 3
    for file in found["files"]:
        sizes = [t["num_bytes"] for t in found["tensors"] if t["file"] == file["file"]]
        assert file["num_bytes"] == sum(sizes) > 0
    assert found["parameters"]["output_matrix"] == 8192 * 96
    assert "tensors" not in report(str(model))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, {"temperature": (0, "has no do_sample: true"), "max_tokens": (256, "default")}),
        (
            {"do_sample": True},
            {"temperature": (1.0, "Transformers"), "top_k": (50, "Transformers")},
        ),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 7, "max_new_tokens": 9},
            {
                "temperature": (0.6, "generation_config.json"),
                "top_k": (7, "generation_config.json"),
                "max_tokens": (9, "generation_config.json"),
                "top_p": (1.0, "default"),
            },
        ),
        ({"temperature": 0.6}, {"temperature": (0, "has no do_sample: true")}),
    ],
)
def test_sampling_defaults_name_their_origin(
    tmp_path: Path, values: dict[str, Any] | None, expected: dict[str, tuple[Any, str]]
) -> None:
    config = {**UNTIED, "num_hidden_layers": 1, "hidden_size": 96, "intermediate_size": 64}
    model = dummy.write_checkpoint(tmp_path / "model", config)
    file = model / generation_config.FILE
    file.unlink()
    if values is not None:
        file.write_text(json.dumps(values))
    sampling = report(str(model))["sampling"]
    for name, (value, origin) in expected.items():
        assert sampling[name]["value"] == value
        assert origin in sampling[name]["from"]


def test_text_names_every_part() -> None:
    lines = inspect("--tensors", "--memory", "1G").stdout.decode().splitlines()
    begun = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert begun[:8] == [
        "model", "parameters", "config", "files", "tensors", "tokenizer", "chat", "sampling",
    ]  # fmt: skip
    assert "memory" in begun
    assert begun.count("model.norm.weight") == 1
    assert any(line.startswith(" " * 12 + "KV cache") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["/no/such/model"], 3, b"/no/such/model"),
        (["llama-9"], 3, b"llama-9"),
        (["smollm2-135m", "--max-model-len", "16K"], 2, b"16384; it must be from 2 to 8192"),
        (["smollm2-135m", "--memory", "much"], 2, b"much"),
        (["smollm2-135m", "--max-num-seqs", "0"], 2, b"--max-num-seqs"),
        (["--max-num-batched-tokens", "9"], 2, b"is 9; it must be at least max_num_seqs"),
        (["--max-num-seqs", "65537"], 2, b"65537"),
        (["--max-num-batched-tokens", "2M"], 2, b"is 2097152; it must be at least"),
        (["--memory", "9" * 30], 2, b"too large"),
    ],
)
def test_what_cannot_be_inspected(arguments: list[str], code: int, part: bytes) -> None:
    result = inspect(*arguments)
    assert result.returncode == code
    assert part in result.stderr
    assert result.stdout == b""


def test_a_damaged_file_is_exit_3(tmp_path: Path) -> None:
    config = {**UNTIED, "num_hidden_layers": 1, "hidden_size": 96, "intermediate_size": 64}
    model = dummy.write_checkpoint(tmp_path / "model", config)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2])
    result = inspect(str(model))
    assert result.returncode == 3
    assert b"model.safetensors" in result.stderr
