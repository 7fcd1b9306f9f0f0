"""Checkpoints with invented weights: the files are well formed, the same everywhere, and sane."""

from __future__ import annotations

import hashlib
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from families import FAMILIES
from tinyvllm import dummy
from tinyvllm.errors import InvalidRequestError, UnsupportedModelError

SMALL = FAMILIES["llama-3.2-tied"].config
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data, read as the format's own description says."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def read_tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    tensors = {}
    for path in directory.glob("*.safetensors"):
        header, data = read_safetensors(path)
        del header["__metadata__"]
        for name, info in header.items():
            begin, end = info["data_offsets"]
            tensors[name] = (info["dtype"], tuple(info["shape"]), data[begin:end])
    return tensors


def values(tensor: tuple[str, tuple[int, ...], bytes]) -> Any:
    dtype, shape, data = tensor
    if dtype == "BF16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[dtype]).reshape(shape)


# --- The same everywhere ------------------------------------------------------------------------


def test_a_seed_gives_the_same_bytes_on_every_machine(tmp_path: Path) -> None:
    dummy.write_checkpoint(tmp_path, SMALL, seed=5)
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "a522e6260aa6b6bfba19ab9e44496907fd339d06ce49d10faa454304eef19179"


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    one = read_tensors(dummy.write_checkpoint(tmp_path / "1", SMALL, seed=1))
    two = read_tensors(dummy.write_checkpoint(tmp_path / "2", SMALL, seed=2))
    assert all(one[name][2] != two[name][2] for name in one)


def test_no_two_tensors_hold_the_same_values(tmp_path: Path) -> None:
    tensors = read_tensors(dummy.write_checkpoint(tmp_path, SMALL))
    assert len({data for _, _, data in tensors.values()}) == len(tensors)


def test_shards_hold_the_same_tensors_as_one_file(tmp_path: Path) -> None:
    one = read_tensors(dummy.write_checkpoint(tmp_path / "1", SMALL))
    four = dummy.write_checkpoint(tmp_path / "4", SMALL, num_shards=4)
    assert read_tensors(four) == one
    assert len(list(four.glob("*.safetensors"))) == 4


def test_a_tensor_does_not_depend_on_the_size_of_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_tensors(dummy.write_checkpoint(tmp_path / "whole", SMALL))
    monkeypatch.setattr(dummy, "_CHUNK", 4 * 97)
    assert read_tensors(dummy.write_checkpoint(tmp_path / "pieces", SMALL)) == whole


# --- Well formed --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_files_are_laid_out_as_the_format_says(name: str, tmp_path: Path) -> None:
    for path in FAMILIES[name].write(tmp_path).glob("*.safetensors"):
        header, data = read_safetensors(path)
        assert header.pop("__metadata__") == {"format": "pt"}
        assert (path.stat().st_size - len(data)) % 8 == 0
        end = 0
        for info in header.values():
            width = WIDTHS[info["dtype"]]
            assert info["data_offsets"] == [end, end + math.prod(info["shape"]) * width]
            assert end % width == 0
            end = info["data_offsets"][1]
        assert end == len(data)


def test_the_index_says_which_shard_holds_what(tmp_path: Path) -> None:
    dummy.write_checkpoint(tmp_path, SMALL, num_shards=3)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    held: dict[str, str] = {}
    size = 0
    for path in tmp_path.glob("*.safetensors"):
        header, data = read_safetensors(path)
        size += len(data)
        held |= {name: path.name for name in header if name != "__metadata__"}
    assert index == {"metadata": {"total_size": size}, "weight_map": held}


@pytest.mark.parametrize("num_shards", [1, 2, 5, 29])
def test_there_are_as_many_shards_as_were_asked_for(num_shards: int, tmp_path: Path) -> None:
    config = {**SMALL, "vocab_size": 4000}  # one tensor larger than all others together
    dummy.write_checkpoint(tmp_path, config, num_shards=num_shards)
    assert len(list(tmp_path.glob("*.safetensors"))) == num_shards


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_config_and_files_agree_on_the_dtype(dtype: str, tmp_path: Path) -> None:
    dummy.write_checkpoint(tmp_path, SMALL, dtype=dtype)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    stored = {kind for kind, _, _ in read_tensors(tmp_path).values()}
    assert stored == {{"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]}


def test_norm_dtype_is_that_of_vectors_only(tmp_path: Path) -> None:
    config = FAMILIES["qwen2"].config
    tensors = read_tensors(dummy.write_checkpoint(tmp_path, config, norm_dtype="float32"))
    assert {len(shape) for kind, shape, _ in tensors.values() if kind == "F32"} == {1}
    assert {len(shape) for kind, shape, _ in tensors.values() if kind == "BF16"} == {2}


@pytest.mark.parametrize(
    ("name", "num_parameters"),  # as their model pages state them
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248),
        ("smollm2-135m", 134_515_008),
        ("qwen3-0.6b", 596_049_920),
    ],
)
def test_published_configs_have_the_published_size(name: str, num_parameters: int) -> None:
    shapes = dummy.tensor_shapes(dummy.NAMED_CONFIGS[name])
    assert sum(map(math.prod, shapes.values())) == num_parameters


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    config = {**SMALL, "vocab_size": 300_000}
    dummy.write_checkpoint(tmp_path / "warm-up", SMALL, tokenizer=False)
    tracemalloc.start()
    dummy.write_checkpoint(tmp_path / "large", config, tokenizer=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "large" / "model.safetensors").stat().st_size > 75_000_000
    assert peak < 10_000_000


# --- The values ---------------------------------------------------------------------------------


def test_bfloat16_rounds_to_the_nearest_and_ties_to_even() -> None:
    bits = np.arange(0x0080, 0x7F00, dtype=np.uint32)  # every positive normal bfloat16 but the last
    low, high = (bits << 16).view(np.float32), ((bits + 1) << 16).view(np.float32)
    middle = ((low.astype(np.float64) + high) / 2).astype(np.float32)  # exact: one bit more
    up, down = np.float32(np.inf), np.float32(0)
    for sign in (1, -1):
        sign_bit = 0x8000 if sign < 0 else 0

        def rounded(x: Any, sign: int = sign) -> Any:
            return dummy.to_bfloat16_bits(np.float32(sign) * x)

        np.testing.assert_array_equal(rounded(low), bits | sign_bit)
        np.testing.assert_array_equal(rounded(middle), (bits + bits % 2) | sign_bit)
        np.testing.assert_array_equal(rounded(np.nextafter(middle, up)), (bits + 1) | sign_bit)
        np.testing.assert_array_equal(rounded(np.nextafter(middle, down)), bits | sign_bit)


def test_float32_weights_are_not_bfloat16_in_disguise(tmp_path: Path) -> None:
    tensors = read_tensors(dummy.write_checkpoint(tmp_path, SMALL, dtype="float32"))
    low_halves = np.frombuffer(tensors["model.layers.0.mlp.up_proj.weight"][2], "<u4") & 0xFFFF
    assert (low_halves != 0).mean() > 0.9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_are_normal(dtype: str, tmp_path: Path) -> None:
    tensors = read_tensors(dummy.write_checkpoint(tmp_path, SMALL, dtype=dtype))
    x = values(tensors["model.layers.1.mlp.up_proj.weight"]).astype(np.float64).ravel()
    x /= x.std()
    error = 1 / math.sqrt(len(x))  # of a mean; higher moments below have a few times that
    assert abs(x.mean()) < 4 * error
    assert abs((x**4).mean() - 3) < 4 * error * math.sqrt(96)
    assert abs((x[:-1] * x[1:]).mean()) < 4 * error
    assert abs((np.abs(x) < 1).mean() - 0.6827) < 0.01


def test_logit_scale_is_the_deviation_of_the_logits(tmp_path: Path) -> None:
    config = FAMILIES["llama-3.1-sharded"].config
    tensors = read_tensors(dummy.write_checkpoint(tmp_path, config, logit_scale=5.0))
    hidden = np.random.default_rng(0).standard_normal((64, 256))
    normalised = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True))
    logits = normalised @ values(tensors["lm_head.weight"]).T.astype(np.float64)
    assert logits.std() == pytest.approx(5.0, rel=0.05)


# --- The tokenizer ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    directory = dummy.write_checkpoint(
        tmp_path_factory.mktemp("tokenizer"), FAMILIES["llama-3.1-sharded"].config
    )
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: tokenizers.Tokenizer, text: str) -> None:
    text = text.replace("<|", "")  # the spelling of special tokens
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text


def test_the_tokenizer_fills_the_vocabulary(tokenizer: tokenizers.Tokenizer) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(640))


def test_special_tokens_have_the_ids_of_the_config(tokenizer: tokenizers.Tokenizer) -> None:
    assert tokenizer.token_to_id("<|bos|>") == 500
    assert tokenizer.token_to_id("<|eos|>") == 501
    assert tokenizer.token_to_id("<|eos_3|>") == 509


def test_a_llama_prompt_begins_with_one_bos(tokenizer: tokenizers.Tokenizer) -> None:
    assert tokenizer.encode("the").ids.count(500) == 1
    assert tokenizer.encode("the").ids[0] == 500


def test_common_letters_merge(tokenizer: tokenizers.Tokenizer) -> None:
    assert len(tokenizer.encode(" eat", add_special_tokens=False).ids) < 4


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen3-0.6b"])
def test_a_published_vocabulary_is_filled_too(name: str, tmp_path: Path) -> None:
    config = {**dummy.NAMED_CONFIGS[name], "hidden_size": 64, "num_hidden_layers": 1}
    dummy.write_checkpoint(tmp_path, config)
    loaded = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert loaded.get_vocab_size() == config["vocab_size"]


def test_chat_template_goes_into_the_tokenizer_config(tmp_path: Path) -> None:
    dummy.write_checkpoint(tmp_path, SMALL, chat_template="{{ messages[0].content }}")
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["chat_template"] == "{{ messages[0].content }}"
    assert (written["bos_token"], written["eos_token"]) == ("<|bos|>", "<|eos|>")


# --- Errors and the command ---------------------------------------------------------------------


def test_an_unknown_family_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gpt2'.*llama, mistral, qwen2, qwen3"):
        dummy.write_checkpoint(tmp_path, {**SMALL, "model_type": "gpt2"})


@pytest.mark.parametrize("value", [None, 0, -3, "128", True])
def test_a_size_that_is_not_a_positive_integer_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequestError, match=f"hidden_size is {value!r}"):
        dummy.tensor_shapes({**SMALL, "hidden_size": value})


def test_more_shards_than_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="num_shards is 30, the checkpoint has 29"):
        dummy.write_checkpoint(tmp_path, SMALL, num_shards=30)


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="'int8'"):
        dummy.write_checkpoint(tmp_path, SMALL, norm_dtype="int8")


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"vocab_size is 257.*256 bytes and 2 special"):
        dummy.write_checkpoint(tmp_path, {**SMALL, "vocab_size": 257})


def test_a_special_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="bos_token_id is 384, vocab_size is 384"):
        dummy.write_checkpoint(tmp_path, {**SMALL, "bos_token_id": 384})


def test_the_command_writes_a_published_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dummy.NAMED_CONFIGS, "qwen3-0.6b", FAMILIES["qwen3"].config)
    command = f"dummy {tmp_path} --model qwen3-0.6b --seed 1 --dtype float32 --num-shards 2"
    monkeypatch.setattr("sys.argv", command.split())
    dummy.main()
    config = FAMILIES["qwen3"].config
    wanted = dummy.write_checkpoint(tmp_path / "wanted", config, seed=1, dtype="float32")
    assert read_tensors(tmp_path) == read_tensors(wanted)
