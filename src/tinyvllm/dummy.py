"""Writes checkpoint directories with seeded random weights, at any shape, with numpy alone.

Tests, benchmarks and `load_format="dummy"` all get their models here. The same config, seed and
dtype give the same bytes on every machine and numpy version: the bits come from Philox, a counter
generator whose stream is fixed, and become weights through one table of normal quantiles.

    python -m tinyvllm.dummy DIRECTORY --model llama-3.2-1b

The weights are random, but not careless. Activations stay near 1 whatever the depth, attention
is uneven (scores with a standard deviation near 1.5: a wrong mask, a wrong rotation or a swapped
head changes the output; one much sharper would blow up the last bit of a rotation at position
2,000 to more than docs/promises.md, 1, allows). Logits are spread, so that greedy tokens are rarely
tied.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from tinyvllm.errors import InvalidRequestError, UnsupportedModelError

Config = Mapping[str, object]
Shape = tuple[int, ...]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# dtype -> (its name in a safetensors header, the numpy type that holds its bits). numpy has no
# bfloat16, so those travel as uint16.
_DTYPES: dict[str, tuple[str, np.dtype[np.generic]]] = {
    "bfloat16": ("BF16", np.dtype("<u2")),
    "float16": ("F16", np.dtype("<f2")),
    "float32": ("F32", np.dtype("<f4")),
}

_CHUNK = 1 << 18  # values a step, so that the working set fits the cache whatever the tensor


# --- What a checkpoint of a config holds --------------------------------------------------------


def _get_int(config: Config, key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise InvalidRequestError(
            f"config: {key} is {value!r}, a dummy checkpoint needs a positive integer. "
            "Set it in the config."
        )
    return value


def _family(config: Config) -> str:
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"config: model_type is {family!r}, dummy checkpoints exist for "
            f"{', '.join(FAMILIES)}. Use one of these."
        )
    return str(family)


def tensor_shapes(config: Config) -> dict[str, Shape]:
    """The names and shapes of the tensors that a checkpoint of this config has, in file order."""
    family = _family(config)
    hidden = _get_int(config, "hidden_size")
    intermediate = _get_int(config, "intermediate_size")
    heads = _get_int(config, "num_attention_heads")
    # The class defaults of Transformers differ where the key is absent; null means "as many as
    # there are heads" in all four.
    absent_kv_heads = {"llama": heads, "mistral": 8, "qwen2": 32, "qwen3": 32}[family]
    kv_heads = (
        _get_int(config, "num_key_value_heads", heads)
        if "num_key_value_heads" in config
        else absent_kv_heads
    )
    head_dim = _get_int(config, "head_dim", 128 if family == "qwen3" else hidden // heads)
    vocab = _get_int(config, "vocab_size")
    q_rows, kv_rows = heads * head_dim, kv_heads * head_dim

    has_qkv_bias = family == "qwen2" or (
        family in ("llama", "qwen3") and bool(config.get("attention_bias"))
    )
    has_o_bias = has_qkv_bias and family != "qwen2"
    has_mlp_bias = family == "llama" and bool(config.get("mlp_bias"))

    shapes: dict[str, Shape] = {}

    def add_linear(name: str, rows: int, columns: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    shapes["model.embed_tokens.weight"] = (vocab, hidden)
    for layer in range(_get_int(config, "num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        add_linear(f"{prefix}.self_attn.q_proj", q_rows, hidden, has_qkv_bias)
        add_linear(f"{prefix}.self_attn.k_proj", kv_rows, hidden, has_qkv_bias)
        add_linear(f"{prefix}.self_attn.v_proj", kv_rows, hidden, has_qkv_bias)
        if family == "qwen3":
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (head_dim,)
        add_linear(f"{prefix}.self_attn.o_proj", hidden, q_rows, has_o_bias)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        add_linear(f"{prefix}.mlp.gate_proj", intermediate, hidden, has_mlp_bias)
        add_linear(f"{prefix}.mlp.up_proj", intermediate, hidden, has_mlp_bias)
        add_linear(f"{prefix}.mlp.down_proj", hidden, intermediate, has_mlp_bias)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def checkpoint_bytes(config: Config, dtype: str = "bfloat16") -> int:
    """The size of the weights that write_checkpoint writes."""
    return sum(_num_bytes(shape, dtype) for shape in tensor_shapes(config).values())


# --- The values ---------------------------------------------------------------------------------


def _mean_and_std(
    name: str, shape: Shape, num_layers: int, logit_scale: float
) -> tuple[float, float]:
    """How a tensor is drawn, so that a normalised input of size 1 gives an output of known size."""
    part, kind = name.split(".")[-2:]
    if part in ("q_norm", "k_norm"):
        return 1.2, 0.25
    if part.endswith("norm"):
        return 1.0, 0.2
    if kind == "bias":
        return 0.0, 0.3
    unit = 1.0 / math.sqrt(shape[1])
    if part in ("embed_tokens", "lm_head"):
        # The last norm leaves values of size 1, so logits have a standard deviation of
        # logit_scale. A tied embedding is small against what the layers add to it; else each
        # token would predict itself.
        return 0.0, logit_scale * unit
    if part in ("q_proj", "k_proj"):
        return 0.0, 1.2 * unit  # scores q.k / sqrt(head_dim) of size 1.2^2
    if part in ("o_proj", "down_proj"):
        # 2 L branches, each of size about 2 / sqrt(2 L), sum to a residual stream of size about 2.
        return 0.0, 2.0 * unit * 2.0 / math.sqrt(2 * num_layers)
    return 0.0, 1.2 * unit  # v_proj, gate_proj, up_proj


@functools.cache
def _normal_quantiles() -> npt.NDArray[np.float32]:
    """65,536 equally likely values of the standard normal distribution.

    Rounded to 1/4096, so that a last-bit difference between two machines' logarithms is lost.
    """
    inverse = statistics.NormalDist().inv_cdf
    steps = np.rint([4096 * inverse((i + 0.5) / 65536) for i in range(65536)])
    quantiles: npt.NDArray[np.float32] = (steps / 4096).astype(np.float32)
    return quantiles


def to_bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Rounds finite float32 to bfloat16, nearest, ties to even. Returns the bits as uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    upper: npt.NDArray[np.uint16] = (rounded >> np.uint32(16)).astype(np.uint16)
    return upper


def _value_table(mean: float, std: float, dtype: str) -> npt.NDArray[np.generic]:
    values: npt.NDArray[np.float32] = np.float32(mean) + np.float32(std) * _normal_quantiles()
    if dtype == "bfloat16":
        return to_bfloat16_bits(values)
    return values.astype(_DTYPES[dtype][1])


def _random_chunks(
    name: str, count: int, seed: int, table: npt.NDArray[np.generic]
) -> Iterator[npt.NDArray[np.generic]]:
    """`count` values of `table`, picked by the tensor's own Philox stream, a chunk at a time."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    generator = np.random.Philox(key=key)
    for start in range(0, count, _CHUNK):
        wanted = min(_CHUNK, count - start)
        words = generator.random_raw((wanted + 3) // 4)  # 64 bits hold four indices of 16 bits
        yield table[words.astype("<u8", copy=False).view("<u2")[:wanted]]


# --- safetensors --------------------------------------------------------------------------------


def _num_bytes(shape: Shape, dtype: str) -> int:
    return math.prod(shape) * _DTYPES[dtype][1].itemsize


def _write_header(file: BinaryIO, shapes: Mapping[str, Shape], dtypes: Mapping[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + _num_bytes(shape, dtypes[name])
        header[name] = {
            "dtype": _DTYPES[dtypes[name]][0],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _split_into_shards(sizes: Mapping[str, int], num_shards: int) -> list[list[str]]:
    """Consecutive tensors, cut where the running total passes each n-th part of the whole."""
    if not 1 <= num_shards <= len(sizes):
        raise InvalidRequestError(
            f"num_shards is {num_shards}, the checkpoint has {len(sizes)} tensors. "
            f"Ask for 1 to {len(sizes)} shards."
        )
    shards: list[list[str]] = [[]]
    total, done = sum(sizes.values()), 0
    for left, (name, size) in zip(range(len(sizes), 0, -1), sizes.items(), strict=True):
        shards_to_come = num_shards - len(shards)
        full = done * num_shards >= total * len(shards) and shards_to_come > 0
        if shards[-1] and (full or left == shards_to_come):
            shards.append([])
        shards[-1].append(name)
        done += size
    return shards


def write_checkpoint(
    directory: Path,
    config: Config,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    norm_dtype: str | None = None,
    num_shards: int = 1,
    logit_scale: float = 3.0,
    tokenizer: bool = True,
    chat_template: str | None = None,
) -> Path:
    """Writes a checkpoint directory for `config`, the contents of a Hugging Face config.json.

    `norm_dtype` is that of the one-dimensional tensors (norm weights and biases), which some
    published files keep in float32. `logit_scale` is the standard deviation of the logits.
    Returns `directory`.
    """
    for value in (dtype, norm_dtype or dtype):
        if value not in _DTYPES:
            raise InvalidRequestError(
                f"dtype is {value!r}, a dummy checkpoint is written as {', '.join(_DTYPES)}. "
                "Use one of these."
            )
    num_layers = _get_int(config, "num_hidden_layers")
    shapes = tensor_shapes(config)
    dtypes = {n: norm_dtype or dtype if len(s) == 1 else dtype for n, s in shapes.items()}
    # Wider elements first, as the reference writer does: every tensor is then aligned to its own.
    names = sorted(shapes, key=lambda name: -_DTYPES[dtypes[name]][1].itemsize)
    sizes = {name: _num_bytes(shapes[name], dtypes[name]) for name in names}
    shards = _split_into_shards(sizes, num_shards)

    directory.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = (
            "model.safetensors"
            if num_shards == 1
            else f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        )
        with (directory / file_name).open("wb") as file:
            _write_header(file, {name: shapes[name] for name in shard}, dtypes)
            for name in shard:
                weight_map[name] = file_name
                mean, std = _mean_and_std(name, shapes[name], num_layers, logit_scale)
                table = _value_table(mean, std, dtypes[name])
                for chunk in _random_chunks(name, math.prod(shapes[name]), seed, table):
                    file.write(chunk.data)
    if num_shards > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)

    # Older files say torch_dtype, newer ones dtype; a config that says neither gets the older key.
    dtype_key = "dtype" if "dtype" in config else "torch_dtype"
    _write_json(directory / "config.json", {**config, dtype_key: dtype})
    special = _special_ids(config)
    _write_json(
        directory / "generation_config.json",
        {"_from_model_config": True, **{key: config[key] for key in special if key in config}},
    )
    if tokenizer:
        _write_tokenizer(directory, config, chat_template)
    return directory


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- The tokenizer ------------------------------------------------------------------------------


def _special_ids(config: Config) -> dict[str, list[int]]:
    """The ids that the config gives to bos, eos and pad; eos may be a list."""
    ids: dict[str, list[int]] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        values = value if isinstance(value, list) else [value]
        ids[key] = [v for v in values if isinstance(v, int) and v >= 0]
    return ids


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (the GPT-2 mapping).

    Printable Latin-1 stands for itself; the other 68 bytes take the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _merges(characters: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Merge rules without end: all pairs, common letters first, then all pairs plus one, ..."""
    common = [characters[byte] for byte in b" etaoinshrdlucmfwypvbgkjqxz"]
    alphabet = [*common, *(c for c in characters if c not in set(common))]
    words = alphabet
    while True:
        words_of_next_length = []
        for left, right in itertools.product(words, alphabet):
            yield left, right
            words_of_next_length.append(left + right)
        words = words_of_next_length


def _write_tokenizer(directory: Path, config: Config, chat_template: str | None) -> None:
    """A byte-level BPE tokenizer that fills the vocabulary and knows the config's special ids."""
    vocab_size = _get_int(config, "vocab_size")
    special: dict[int, str] = {}
    named: dict[str, str] = {}
    for key, ids in _special_ids(config).items():
        for number, token_id in enumerate(ids):
            if token_id >= vocab_size:
                raise InvalidRequestError(
                    f"config: {key} is {token_id}, vocab_size is {vocab_size}. Lower the id."
                )
            name = key.removesuffix("_id")
            short = name.removesuffix("_token") + (f"_{number + 1}" if number else "")
            special.setdefault(token_id, f"<|{short}|>")
            named.setdefault(name, special[token_id])
    characters = _byte_characters()
    if vocab_size < len(special) + len(characters):
        raise InvalidRequestError(
            f"config: vocab_size is {vocab_size}, a byte-level tokenizer needs 256 bytes and "
            f"{len(special)} special tokens. Raise vocab_size or pass tokenizer=False."
        )

    merges = list(itertools.islice(_merges(characters), vocab_size - len(special) - 256))
    tokens = itertools.chain(characters, (left + right for left, right in merges))
    vocab = {special[i] if i in special else next(tokens): i for i in range(vocab_size)}

    # Llama and Mistral prompts begin with bos. A model whose bos is its eos (SmolLM2) has none.
    bos = named.get("bos_token")
    begins_with_bos = (
        _family(config) in ("llama", "mistral")
        and bos is not None
        and bos != named.get("eos_token")
    )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    post_processor: dict[str, object] = {**byte_level, "use_regex": True}
    if begins_with_bos and bos is not None:
        post_processor = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
        }
    _write_json(
        directory / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": token_id,
                    "content": content,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for token_id, content in sorted(special.items())
            ],
            "normalizer": None,
            "pre_tokenizer": {**byte_level, "use_regex": True},
            "post_processor": post_processor,
            "decoder": {**byte_level, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocab,
                "merges": [f"{left} {right}" for left, right in merges],
            },
        },
    )
    tokenizer_config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.get("max_position_embeddings", 2048),
        **named,
    }
    if chat_template is not None:
        tokenizer_config["chat_template"] = chat_template
    _write_json(directory / "tokenizer_config.json", tokenizer_config)


# --- Published shapes ---------------------------------------------------------------------------

_LLAMA_3: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}

# The config.json of each model as it was published; only the weights are invented.
NAMED_CONFIGS: dict[str, dict[str, object]] = {
    "llama-3.2-1b": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "llama-3.1-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "tie_word_embeddings": False,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "initializer_range": 0.041666666666666664,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000,
        "rope_scaling": None,
        "rope_interleaved": False,
        "is_llama_config": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 28,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tinyvllm.dummy", description="Write a checkpoint with random weights."
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", choices=sorted(NAMED_CONFIGS), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bfloat16")
    parser.add_argument("--num-shards", type=int, default=1)
    arguments = parser.parse_args()
    write_checkpoint(
        arguments.directory,
        NAMED_CONFIGS[arguments.model],
        seed=arguments.seed,
        dtype=arguments.dtype,
        num_shards=arguments.num_shards,
    )


if __name__ == "__main__":
    main()
