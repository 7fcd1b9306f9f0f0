"""copy_blocks: K and V of whole blocks, in every layer, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from devices import is_cuda
from numeric import cast, same_bits
from tinyvllm import _core

ops = _core.ops


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
# A block whose bytes are a multiple of 16, and one whose are not.
@pytest.mark.parametrize(("kv_heads", "block_size", "head_dim"), [(2, 16, 8), (1, 1, 6), (3, 5, 2)])
def test_blocks_are_copied_in_every_layer_and_no_other_is_touched(
    device: Any,
    rng: np.random.Generator,
    dtype: str,
    kv_heads: int,
    block_size: int,
    head_dim: int,
) -> None:
    pool = cast(rng.standard_normal((3, 2, 11, kv_heads, block_size, head_dim)), dtype)
    want = pool.copy()
    copies = [(0, 10), (4, 3), (4, 7)]
    for source, target in copies:
        want[:, :, target] = pool[:, :, source]
    assert same_bits(ops.copy_blocks(device, pool, copies), want)


def test_no_copies_change_nothing(device: Any, rng: np.random.Generator) -> None:
    pool = cast(rng.standard_normal((1, 2, 3, 1, 4, 8)), "bfloat16")
    assert same_bits(ops.copy_blocks(device, pool, []), pool)


def test_padding_copies_nothing_on_cuda(device: Any, rng: np.random.Generator) -> None:
    if not is_cuda(device):
        pytest.skip("the CPU takes no padding")
    pool = cast(rng.standard_normal((2, 2, 5, 1, 4, 8)), "bfloat16")
    want = pool.copy()
    want[:, :, 1] = pool[:, :, 0]
    assert same_bits(ops.copy_blocks(device, pool, [(-1, -1), (0, 1), (-1, -1)]), want)
