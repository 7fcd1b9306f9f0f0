"""What only CUDA does of gather_rows, rms_norm, rope and silu_mul: bfloat16 comes in, padding,
wide loads where the rows allow them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from devices import cuda, has_cuda
from numeric import (
    Array,
    cast,
    in_wider_rows,
    misaligned,
    poison,
    same_bits,
    to_bfloat16,
    widen,
)
from tinyvllm import _core

ops = _core.ops

pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs a GPU, or the emulator")


@pytest.fixture
def gpu() -> Any:
    return cuda()


def error(got: Array, want: Array) -> float:
    """The norm of the difference over that of what is right."""
    return float(np.linalg.norm(widen(got) - want) / np.linalg.norm(want))


def silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))


# Columns that are multiples of the 8 elements of a wide load, and that are not; several pieces.
@pytest.mark.parametrize(("tokens", "intermediate"), [(1, 8), (3, 1032), (5, 33), (300, 16)])
def test_silu_mul_reads_and_writes_bfloat16(
    gpu: Any, rng: np.random.Generator, tokens: int, intermediate: int
) -> None:
    gate_up = to_bfloat16(rng.standard_normal((tokens, 2 * intermediate)) * 3)
    gate, up = np.split(widen(gate_up), 2, axis=-1)
    got = ops.silu_mul(gpu, gate_up, dtype="bfloat16")
    assert error(got, silu(gate) * up) < 4e-3
    assert error(ops.silu_mul(gpu, gate_up, dtype="float32"), silu(gate) * up) < 1e-6
    assert same_bits(got, to_bfloat16(ops.silu_mul(gpu, gate_up, dtype="float32")))
    assert same_bits(ops.silu_mul(gpu, misaligned(gate_up), dtype="bfloat16"), got)
    assert same_bits(ops.silu_mul(gpu, in_wider_rows(gate_up), dtype="bfloat16"), got)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wide_and_single_loads_give_the_same_rows(
    gpu: Any, rng: np.random.Generator, dtype: str
) -> None:
    table, rows = cast(rng.standard_normal((20, 520)), dtype), np.array([19, 0, 3], np.int32)
    want = widen(table)[rows]
    np.testing.assert_array_equal(ops.gather_rows(gpu, rows, table), want)
    np.testing.assert_array_equal(ops.gather_rows(gpu, rows, misaligned(table)), want)


@pytest.mark.parametrize("hidden", [64, 2048, 2052, 4100])
def test_rms_norm_of_many_rows(gpu: Any, rng: np.random.Generator, hidden: int) -> None:
    x = cast(rng.standard_normal((40, hidden)), "float32")
    weight = cast(rng.standard_normal(hidden), "float32")
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight
    assert error(ops.rms_norm(gpu, x, weight, 1e-5), want) < 1e-6
    assert error(ops.rms_norm(gpu, x, weight, 1e-5, dtype="bfloat16"), want) < 4e-3


# Lanes a head: 8, 16 of which some are idle, 16, 32 with two rounds; one element at a time.
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256, 6, 34])
@pytest.mark.parametrize("norms", [False, True])
def test_heads_in_bfloat16_and_padded_rows(
    gpu: Any, rng: np.random.Generator, head_dim: int, norms: bool
) -> None:
    tokens, heads, kv_heads, block_size, blocks = 5, 3, 2, 4, 6
    qkv = to_bfloat16(rng.standard_normal((tokens, (heads + 2 * kv_heads) * head_dim)))
    slots = rng.permutation(blocks * block_size)[:tokens]
    slots[[1, 4]] = -1
    live = slots >= 0
    norm = cast(rng.standard_normal(head_dim), "float32") if norms else None
    angles = rng.uniform(-4, 4, (tokens, head_dim // 2))
    cos_sin = cast(np.concatenate([np.cos(angles), np.sin(angles)], -1), "float32")
    shape = (blocks, kv_heads, block_size, head_dim)
    keys, values = poison(shape, "bfloat16"), poison(shape, "bfloat16")

    got = ops.qk_norm_rope_and_cache(
        gpu, qkv, heads, norm, norm, 1e-5, cos_sin, slots, keys, values
    )

    x = widen(qkv).reshape(tokens, -1, head_dim)
    q, k, v = np.split(x, [heads, heads + kv_heads], axis=1)

    def turned(head: Array) -> Array:
        if norm is not None:
            head = head / np.sqrt((head**2).mean(-1, keepdims=True) + 1e-5) * norm
        left, right = np.split(head, 2, axis=-1)
        cos, sin = np.split(widen(cos_sin)[:, None], 2, axis=-1)
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)

    got_q = got.reshape(tokens, -1, head_dim)[:, :heads]
    assert error(got_q[live], turned(q)[live]) < 4e-3
    block, in_block = np.divmod(slots[live], block_size)
    assert error(keys[block, :, in_block], turned(k)[live]) < 4e-3
    np.testing.assert_array_equal(widen(values[block, :, in_block]), v[live])

    assert same_bits(got[~live], qkv[~live])  # of a padded row nothing is written
    for cache in (keys, values):
        written = ~np.isnan(widen(cache)).any(axis=(1, 3))
        np.testing.assert_array_equal(np.flatnonzero(written), np.sort(slots[live]))
