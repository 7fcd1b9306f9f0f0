"""A checkpoint directory: which files it needs, shards and their index, what is refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint_files import (
    LLAMA,
    Tensors,
    safetensors,
    some_tensors,
    write_config,
    write_model,
    write_shards,
)
from tinyvllm import _core
from tinyvllm.errors import CheckpointError, UnsupportedModelError

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def floats(*values: float) -> tuple[str, tuple[int, ...], bytes]:
    return ("F32", (len(values),), np.array(values, "<f4").tobytes())


SHARDS: dict[str, Tensors] = {
    ONE: {"x": floats(1, 2, 3), "y": floats(4)},
    TWO: {"z": floats(5, 6)},
}
MAP = {"x": ONE, "y": ONE, "z": TWO}


def refused(directory: Path, kind: type[Exception] = CheckpointError) -> str:
    """The message with which the directory is refused: one line that begins with a path in it."""
    with pytest.raises(kind) as caught:
        _core.Checkpoint(directory)
    message = str(caught.value)
    assert message.startswith(str(directory))
    assert message.isprintable()
    return message


# Sharded checkpoints


def test_tensors_are_found_in_their_shards(tmp_path: Path) -> None:
    checkpoint = _core.Checkpoint(write_shards(tmp_path, SHARDS))
    assert checkpoint.names() == ["x", "y", "z"]
    assert checkpoint.tensor_info("z")["file"] == tmp_path / TWO
    np.testing.assert_array_equal(checkpoint.read("x"), [1, 2, 3])
    np.testing.assert_array_equal(checkpoint.read("z"), [5, 6])
    assert checkpoint.warnings() == []


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDS)
    write_model(tmp_path, safetensors({"w": floats(7)}))
    assert _core.Checkpoint(tmp_path).names() == ["w"]


def test_a_change_in_any_shard_is_noticed(tmp_path: Path) -> None:
    checkpoint = _core.Checkpoint(write_shards(tmp_path, SHARDS))
    os.utime(tmp_path / TWO, ns=(1, 1))
    with pytest.raises(CheckpointError, match=rf"{TWO}: its modification time"):
        checkpoint.check_files()


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "../../etc/model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "model\0.safetensors",
        ".",
        "..",
        "",
    ],
)
def test_a_shard_outside_of_the_directory_is_refused(tmp_path: Path, shard: str) -> None:
    directory = tmp_path / "model"
    write_shards(directory, SHARDS, weight_map=MAP | {"x": shard})
    (tmp_path / "model.safetensors").write_bytes(safetensors({"x": floats(1, 2, 3)}))
    message = refused(directory)
    assert f'{INDEX}: puts tensor "x" into ' in message
    assert "not the name of a file beside the index" in message or "not a .safetensors" in message


def test_a_shard_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDS, weight_map=MAP | {"x": "pytorch_model.bin"})
    assert 'tensor "x" into "pytorch_model.bin", which is not a .safetensors' in refused(tmp_path)


def test_a_missing_shard_is_named_and_counted(tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDS)
    (tmp_path / TWO).unlink()
    assert f'shard "{TWO}" is missing (1 of the 2' in refused(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDS, weight_map=MAP | {"gone": TWO})
    assert f'{INDEX}: puts tensor "gone" into "{TWO}", which does not hold it' in refused(tmp_path)


def test_a_tensor_in_another_shard_than_the_index_says_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDS, weight_map=MAP | {"x": TWO})
    message = refused(tmp_path)
    assert f'puts tensor "x" into "{TWO}", which does not hold it ({ONE} does)' in message


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, {ONE: SHARDS[ONE], TWO: {"z": floats(5), "y": floats(4)}})
    assert f'tensor "y" is in two shards, {ONE} and {TWO}' in refused(tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDS)
    os.truncate(tmp_path / TWO, (tmp_path / TWO).stat().st_size - 2)
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path / TWO}: ")
    assert "byte 8 of the data" in message
    assert "6 bytes of data" in message


@pytest.mark.parametrize("total_size", [23, 25, 24.5, -24, "24", [], 2**70])
def test_a_wrong_total_size_is_only_a_warning(tmp_path: Path, total_size: Any) -> None:
    checkpoint = _core.Checkpoint(write_shards(tmp_path, SHARDS, total_size=total_size))
    (warning,) = checkpoint.warnings()
    assert f"{INDEX}: total_size is " in warning
    assert "24 bytes" in warning


def test_a_total_size_written_as_a_float_is_right(tmp_path: Path) -> None:
    assert _core.Checkpoint(write_shards(tmp_path, SHARDS, total_size=24.0)).warnings() == []


def test_a_tensor_that_the_index_does_not_list_is_a_warning(tmp_path: Path) -> None:
    checkpoint = _core.Checkpoint(write_shards(tmp_path, SHARDS, weight_map={"x": ONE, "z": TWO}))
    (warning,) = checkpoint.warnings()
    assert 'does not list 1 tensors that its shards hold, such as "y"' in warning
    np.testing.assert_array_equal(checkpoint.read("y"), [4])


@pytest.mark.parametrize(
    ("index", "why"),
    [
        (b"", "is empty (0 bytes)"),
        (b"{", "is not valid JSON at byte 1"),
        (b"\xff", "is not UTF-8 at byte 0"),
        (b"[]", "is not a JSON object but []"),
        (b"{}", "has no weight_map"),
        (b'{"weight_map": 3}', "its weight_map is 3, not an object"),
        (b'{"weight_map": {}}', "its weight_map lists no tensor"),
        (b'{"weight_map": {"x": 3}}', 'puts tensor "x" into 3, which is not a file name'),
        (b'{"weight_map": {"x": "a", "x": "b"}}', 'has the key "x" twice'),
        (b'{"weight_map": {}, "weight_map": {}}', 'has the key "weight_map" twice'),
        (b'{"weight_map": ' + b"[" * 100_000, "nests more than 32 levels deep"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, index: bytes, why: str) -> None:
    write_shards(tmp_path, SHARDS)
    (tmp_path / INDEX).write_bytes(index)
    message = refused(tmp_path)
    assert f"{INDEX}: " in message
    assert why in message


def test_an_index_with_too_many_shards_is_refused(tmp_path: Path) -> None:
    weight_map = {f"t{i}": f"{i}.safetensors" for i in range(4097)}
    write_shards(tmp_path, SHARDS, weight_map=weight_map)
    assert "lists 4097 shards, more than 4096" in refused(tmp_path)


# Directories


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")


def test_a_file_instead_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors(some_tensors()))
    assert "is not a directory" in refused(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("names", "kind", "why"),
    [
        (["pytorch_model.bin"], UnsupportedModelError, 'pickled weights ("pytorch_model.bin")'),
        (["consolidated.00.pth"], UnsupportedModelError, 'pickled weights ("consolidated.00.pth")'),
        (
            ["pytorch_model.bin.index.json"],
            UnsupportedModelError,
            'pickled weights ("pytorch_model.bin.index.json")',
        ),
        (["model.Q4_K_M.gguf"], UnsupportedModelError, 'GGUF weights ("model.Q4_K_M.gguf")'),
        (["adapter_model.safetensors"], UnsupportedModelError, "a LoRA adapter"),
        (
            ["model-00001-of-00002.safetensors", "pytorch_model.bin"],
            CheckpointError,
            f'"{ONE}", but neither model.safetensors nor {INDEX}',
        ),
        (["config.json"], CheckpointError, "holds no weights"),
        ([], CheckpointError, "holds no weights: neither model.safetensors nor"),
    ],
)
def test_weights_in_another_format_are_refused_by_name(
    tmp_path: Path, names: list[str], kind: type[Exception], why: str
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert why in refused(tmp_path, kind)


def test_a_gguf_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "is a GGUF file" in refused(tmp_path / "model.gguf", UnsupportedModelError)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors(some_tensors()))
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path / 'config.json'}: cannot be opened: No such file")


def test_quantised_weights_are_refused_before_they_are_looked_at(tmp_path: Path) -> None:
    config = LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    write_model(tmp_path, b"not even a header", config)
    assert 'quantised by "gptq"' in refused(tmp_path, UnsupportedModelError)


# Tensors


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = _core.Checkpoint(write_model(tmp_path, safetensors(some_tensors())))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("lm_head.weight")
    assert f'{tmp_path / "model.safetensors"}: tensor "lm_head.weight" is missing' in str(
        caught.value
    )
    assert "among its 3 tensors" in str(caught.value)


def test_weights_of_which_none_can_be_used_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, safetensors({"q": ("F8_E4M3", (4,), bytes(4))}))
    message = refused(tmp_path, UnsupportedModelError)
    assert 'model.safetensors: tensor "q" has dtype F8_E4M3' in message
    assert "none of the 1 tensors is F32, F16 or BF16" in message


@pytest.mark.parametrize(
    ("elements", "dtype"),
    [
        ({"F32": 3, "BF16": 4}, "bfloat16"),
        ({"F32": 5, "BF16": 4}, "float32"),
        ({"F16": 4, "F32": 3, "I64": 100}, "float16"),
        ({"F16": 4, "BF16": 5}, "bfloat16"),
        ({"F32": 4, "BF16": 4}, "float32"),
    ],
)
def test_the_dtype_is_the_one_of_most_elements(
    tmp_path: Path, elements: dict[str, int], dtype: str
) -> None:
    width = {"F32": 4, "I64": 8, "F16": 2, "BF16": 2}
    tensors = {name: (name, (n,), bytes(n * width[name])) for name, n in elements.items()}
    assert _core.Checkpoint(write_model(tmp_path, safetensors(tensors))).dtype == dtype


def test_the_config_comes_with_the_weights(tmp_path: Path) -> None:
    write_model(tmp_path, safetensors(some_tensors()), LLAMA | {"torch_dtype": "float32"})
    checkpoint = _core.Checkpoint(tmp_path)
    assert checkpoint.config == _core.parse_model_config(write_config(tmp_path)) | {
        "dtype": "float32"
    }
    assert checkpoint.config["hidden_size"] == LLAMA["hidden_size"]
