"""repack_weights: another layout in memory, the same model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from families import FAMILIES
from tinyvllm import LLM, SamplingParams, _core, dummy
from tinyvllm.errors import CapacityError
from tinyvllm.llm import BUNDLED_MODEL


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "mistral-window"])
def test_the_logits_are_those_of_the_weights_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    # AMX adds up in the same order in both layouts, which would leave nothing to tell them apart.
    isa = next(isa for isa in _core.supported_isas() if isa != "amx")
    monkeypatch.setenv("TINYVLLM_CPU_ISA", isa)
    family = FAMILIES[name]
    path = family.write(tmp_path)
    tokens = family.prompt(40)
    want = _core.Model(path, dtype).logits(tokens)
    got = _core.Model(path, dtype, repack_weights=True).logits(tokens)
    # Only the order of float32 sums differs; a bfloat16 that it tips is off by 2^-8 of itself.
    bound = 1e-5 if dtype == "float32" else 2e-2
    assert np.abs(got - want).max() <= bound * np.abs(want).max()
    assert not np.array_equal(got, want)  # or nothing was repacked


def test_greedy_text_of_the_bundled_model_is_the_same() -> None:
    params = SamplingParams(temperature=0, max_tokens=48)
    texts = []
    for repack in (False, True):
        with LLM(BUNDLED_MODEL, repack_weights=repack) as llm:
            output = llm.generate("Once upon a time", params, use_tqdm=False)[0]
            texts.append(output.outputs[0].text)
    assert texts[0] == texts[1]


RESIDENT = """
import sys
from tinyvllm import LLM
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
before = resident()
with LLM(sys.argv[1], max_num_seqs=1, max_model_len=32, repack_weights=True) as llm:
    print(resident() - before, llm.stats()["copied_weight_bytes"])
"""


def test_what_was_repacked_leaves_memory(tmp_path: Path) -> None:
    config = {**dummy.NAMED_CONFIGS["smollm2-135m"], "vocab_size": 4096, "eos_token_id": 1}
    path = dummy.write_checkpoint(tmp_path, config)
    result = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(path)], capture_output=True, timeout=120, text=True
    )
    assert result.returncode == 0, result.stderr
    resident, copied = map(int, result.stdout.split())
    assert copied > 200e6
    # One copy of the weights, a few pages at the ends of tensors, and what an engine takes itself.
    assert resident < copied + 40e6


@pytest.fixture(scope="module")
def larger_than_memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 1.5 times what is available, of which only the header is on the disk."""
    path = tmp_path_factory.mktemp("large")
    base = {**dummy.NAMED_CONFIGS["smollm2-135m"], "vocab_size": 2048, "bos_token_id": 0}
    base |= {"eos_token_id": 1, "num_hidden_layers": 1}
    dummy.write_checkpoint(path, base)  # the tokenizer and the other files
    config = {**base, "hidden_size": 8192, "intermediate_size": 32768}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 128}
    a_layer = dummy.checkpoint_bytes({**config, "num_hidden_layers": 2}) - dummy.checkpoint_bytes(
        config
    )
    config["num_hidden_layers"] = _core.available_memory() * 3 // 2 // a_layer + 1
    (path / "config.json").write_text(json.dumps(config))
    with (path / "model.safetensors").open("wb") as file:
        shapes = dummy.tensor_shapes(config)
        dummy._write_header(file, shapes, dict.fromkeys(shapes, "bfloat16"))
        file.truncate(file.tell() + dummy.checkpoint_bytes(config))
    return path


def test_what_does_not_fit_is_refused_with_the_numbers(larger_than_memory: Path) -> None:
    before = _core.available_memory()
    with pytest.raises(CapacityError) as caught:
        LLM(larger_than_memory, device="cpu", repack_weights=True)
    said = re.match(
        r"The repacked weights take (\d+) bytes, and (\d+) are available\..*without repack_weights",
        str(caught.value),
    )
    assert said
    in_rows = (larger_than_memory / "model.safetensors").stat().st_size
    assert int(said[1]) == pytest.approx(in_rows, rel=0.01)
    assert int(said[2]) == pytest.approx(before, rel=0.2)


def test_what_does_not_fit_is_exit_4(larger_than_memory: Path) -> None:
    command = [sys.executable, "-m", "tinyvllm.cli", "generate", "--model", str(larger_than_memory)]
    result = subprocess.run(
        [*command, "--prompt", "x", "--device", "cpu", "--repack-weights"],
        capture_output=True,
        timeout=60,
        text=True,
    )
    assert result.returncode == 4
    assert result.stdout == ""
    first, *table = result.stderr.splitlines()
    assert re.match(r"tinyvllm: error: The repacked weights take \d+ bytes, and \d+ are", first)
    assert [line.split()[0] for line in table] == ["weights", "KV", "workspace", "free"]


def test_the_flag_reaches_the_engine() -> None:
    command = [sys.executable, "-m", "tinyvllm.cli", "generate", "--prompt", "The fox", "-n", "4"]
    command += ["--seed", "1", "--raw"]
    plain = subprocess.run(command, capture_output=True, timeout=60)
    repacked = subprocess.run([*command, "--repack-weights"], capture_output=True, timeout=60)
    assert plain.returncode == repacked.returncode == 0
    assert plain.stdout == repacked.stdout
