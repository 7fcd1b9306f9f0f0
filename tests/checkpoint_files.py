"""Writes checkpoint directories byte by byte, so that a test can make one wrong in one place."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]  # name -> dtype, shape, bytes

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def some_tensors() -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """One tensor of each dtype that loads, of odd sizes; their bytes count up."""
    sizes = {"a": ("F32", (3, 5), 60), "b": ("BF16", (7,), 14), "c": ("F16", (1, 3, 2), 12)}
    return {
        name: (dtype, shape, bytes(np.arange(size, dtype=np.uint8)))
        for name, (dtype, shape, size) in sizes.items()
    }


def header_of(tensors: Tensors) -> dict[str, Any]:
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [end, end + len(data)],
        }
        end += len(data)
    return header


def blob(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A file of this header (bytes are taken as they are) and data; `length` may be a lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def safetensors(tensors: Tensors) -> bytes:
    return blob(header_of(tensors), b"".join(data for _, _, data in tensors.values()))


def write_config(directory: Path, config: Any = LLAMA) -> Path:
    path = directory / "config.json"
    path.write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    return path


def write_model(directory: Path, content: bytes, config: Any = LLAMA) -> Path:
    """A directory with a config and one weight file of this content."""
    directory.mkdir(exist_ok=True)
    write_config(directory, config)
    (directory / "model.safetensors").write_bytes(content)
    return directory


def write_shards(
    directory: Path,
    shards: Mapping[str, Tensors],
    weight_map: Any = None,
    total_size: Any = None,
) -> Path:
    """A sharded directory; the index is true unless another weight_map or total_size is given."""
    directory.mkdir(exist_ok=True)
    write_config(directory)
    true_map = {}
    size = 0
    for file, tensors in shards.items():
        (directory / file).write_bytes(safetensors(tensors))
        for name, (_, _, data) in tensors.items():
            true_map[name] = file
            size += len(data)
    index = {
        "metadata": {"total_size": size if total_size is None else total_size},
        "weight_map": true_map if weight_map is None else weight_map,
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
