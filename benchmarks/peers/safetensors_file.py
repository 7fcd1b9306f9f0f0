"""What the writers of other formats read of a checkpoint. With numpy alone: a peer's environment
need not have tinyvllm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint16]


def read_tensors(path: Path) -> Iterator[tuple[str, Bits]]:
    """The bfloat16 tensors of one safetensors file, as their bits, mapped."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r", offset=8 + size)
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise ValueError(f"{path.name}: {name} is {entry['dtype']}; the benchmarks take BF16.")
        begin, end = entry["data_offsets"]
        yield name, data[begin:end].view(np.uint16).reshape(entry["shape"])


def rope_frequencies(config: dict[str, Any]) -> npt.NDArray[np.float64]:
    """RoPE's angle a position, [head_dim / 2], before any scaling."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequencies: npt.NDArray[np.float64] = config["rope_theta"] ** -(
        np.arange(0, head_dim, 2) / head_dim
    )
    return frequencies


def rope_factors(config: dict[str, Any]) -> npt.NDArray[np.float64]:
    """What each frequency is divided by: 1, or Llama 3.1's long-context scaling."""
    frequencies = rope_frequencies(config)
    scaling = config.get("rope_scaling")
    if not scaling:
        return np.ones_like(frequencies)
    if scaling.get("rope_type") != "llama3":
        raise ValueError(f"rope_scaling is {scaling}; the benchmarks take llama3 or none.")
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    factors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return factors
