"""rope_and_attend against the two ops that it stands for, which have tests of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from devices import is_cuda
from numeric import Array, cast, poison, relative_error, same_bits, widen
from tinyvllm import _core

ops = _core.ops

EPS = 1e-5
BLOCK = 16


class Step:
    """The rows of one step over a cache of scattered blocks: (context, tokens) of each sequence.

    The tokens of the step are not in the cache yet; context 0 is a padded row.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        lengths: list[tuple[int, int]],
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: str,
        norms: bool,
        row_dtype: str,
    ) -> None:
        """dtype: of the cache and the result; row_dtype: of what the product left in qkv."""
        self.heads, self.dtype, self.dim = heads, dtype, dim
        self.lengths = lengths
        blocks = rng.permutation(sum(-(-n // BLOCK) for n, _ in lengths) + 2).tolist()
        shape = (len(blocks), kv_heads, BLOCK, dim)
        self.keys, self.values = poison(shape, dtype), poison(shape, dtype)
        self.sequences: list[tuple[int, int, list[int]]] = []
        slots, positions = [], []
        for context, tokens in lengths:
            table = [blocks.pop() for _ in range(-(-context // BLOCK))]
            self.sequences.append((context - tokens, tokens, table))
            for position in range(context):
                block, slot = table[position // BLOCK], position % BLOCK
                if position < context - tokens:
                    for cache in (self.keys, self.values):
                        cache[block, :, slot] = cast(rng.standard_normal((kv_heads, dim)), dtype)
                else:
                    slots.append(block * BLOCK + slot)
                    positions.append(position)
            if context == 0:
                slots.append(-1)
                positions.append(0)
        self.slots = np.array(slots, np.int64)
        self.qkv = cast(rng.standard_normal((len(slots), (heads + 2 * kv_heads) * dim)), row_dtype)
        angles = np.outer(positions, 0.3 ** np.arange(dim // 2))
        self.cos_sin = np.hstack([np.cos(angles), np.sin(angles)]).astype(np.float32)
        norm = rng.uniform(0.5, 2, (2, dim)).astype(np.float32)
        self.q_norm, self.k_norm = norm if norms else (None, None)

    def together(self, device: Any, window: int) -> tuple[Array, Array, Array]:
        keys, values = self.keys.copy(), self.values.copy()
        out = ops.rope_and_attend(
            device,
            self.qkv,
            self.heads,
            self.q_norm,
            self.k_norm,
            EPS,
            self.cos_sin,
            self.slots,
            keys,
            values,
            self.sequences,
            window,
            0.2,
            self.dtype,
        )
        return np.asarray(out), keys, values

    def apart(self, device: Any, window: int) -> tuple[Array, Array, Array]:
        keys, values = self.keys.copy(), self.values.copy()
        rotated = ops.qk_norm_rope_and_cache(
            device,
            self.qkv,
            self.heads,
            self.q_norm,
            self.k_norm,
            EPS,
            self.cos_sin,
            self.slots,
            keys,
            values,
        )
        q = np.ascontiguousarray(np.asarray(rotated)[:, : self.heads * self.dim])
        out = ops.paged_attention(
            device, q, keys, values, self.sequences, self.heads, window, 0.2, self.dtype
        )
        return np.asarray(out), keys, values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 2, 64), (8, 1, 128), (18, 1, 64), (3, 1, 96), (3, 3, 64)]
)
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 1), (16, 1), (17, 1), (32, 1), (90, 1), (300, 1), (513, 1)],
        [(40, 1), (129, 1), (20, 20), (50, 7)],
        [(30, 5)],
    ],
)
def test_it_is_the_two_ops(
    device: Any,
    rng: np.random.Generator,
    lengths: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    dim: int,
    window: int,
    norms: bool,
    dtype: str,
) -> None:
    row_dtype = dtype if is_cuda(device) else "float32"
    step = Step(rng, lengths, heads, kv_heads, dim, dtype, norms, row_dtype)
    out, keys, values = step.together(device, window)
    want, want_keys, want_values = step.apart(device, window)
    bound = 1e-6 if dtype == "float32" else 1e-2
    assert relative_error(out, widen(want)) < bound
    # The same slots are written, all others still NaN or as they were.
    assert same_bits(values, want_values)
    written = np.isfinite(widen(want_keys))
    assert np.array_equal(np.isfinite(widen(keys)), written)
    difference = np.abs(widen(keys) - widen(want_keys))[written]
    assert (difference <= bound * np.abs(widen(want_keys)[written]).max()).all()
