"""rope_angles and qk_norm_rope_and_cache: norms, rotation and the write into the paged cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from devices import is_cuda
from numeric import Array, cast, poison, relative_error, same_bits, to_bfloat16, widen
from tinyvllm import _core

ops = _core.ops


def frequencies(head_dim: int, theta: float = 10000.0) -> Array:
    return (theta ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)


# --- rope_angles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1.25])
@pytest.mark.parametrize("head_dim", [2, 64, 80])
def test_angles_are_a_float32_product_and_no_better(
    device: Any, rng: np.random.Generator, head_dim: int, scale: float
) -> None:
    positions = np.concatenate([[0, 1, 4095, 100_000, 131_071], rng.integers(0, 131_072, 28)])
    inverse = frequencies(head_dim)
    angle = widen(np.float32(positions)[:, None] * inverse)  # rounded to float32, then exact
    want = scale * np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    got = ops.rope_angles(device, positions.astype(np.int32), inverse, scale)
    # CUDA's own cosf and sinf are right to two last bits, those of the C library to one.
    assert relative_error(got, want, scale) < (2.5e-7 if is_cuda(device) else 1.5e-7)


def test_angles_do_not_depend_on_the_batch(device: Any, other_device: Any) -> None:
    positions, inverse = np.arange(33, dtype=np.int32) * 997, frequencies(64)
    whole = ops.rope_angles(other_device, positions, inverse)
    alone = [ops.rope_angles(device, positions[t : t + 1], inverse) for t in range(33)]
    assert same_bits(whole, np.concatenate(alone))


# --- qk_norm_rope_and_cache -----------------------------------------------------------------------

TOKENS, BLOCKS = 7, 11


class Case:
    """Random qkv of TOKENS tokens at scattered positions and slots, and an empty (NaN) cache."""

    def __init__(
        self,
        rng: np.random.Generator,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: str = "float32",
        block_size: int = 16,
        norms: bool = True,
    ) -> None:
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.eps = 1e-5
        self.qkv = self.some(rng, TOKENS, (heads + 2 * kv_heads) * head_dim)
        self.q_norm = self.some(rng, head_dim) if norms else None
        self.k_norm = self.some(rng, head_dim) if norms else None
        angles = rng.uniform(-4, 4, (TOKENS, head_dim // 2))
        self.cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
        self.slots = rng.permutation(BLOCKS * block_size)[:TOKENS]
        shape = (BLOCKS, kv_heads, block_size, head_dim)
        self.keys, self.values = poison(shape, dtype), poison(shape, dtype)

    @staticmethod
    def some(rng: np.random.Generator, *shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    def run(self, device: Any, tokens: slice = slice(None)) -> Array:
        result = ops.qk_norm_rope_and_cache(
            device,
            self.qkv[tokens],
            self.heads,
            self.q_norm,
            self.k_norm,
            self.eps,
            self.cos_sin[tokens],
            self.slots[tokens],
            self.keys,
            self.values,
        )
        return np.asarray(result)[:, : self.heads * self.head_dim]  # q; the rest is working space

    def parts(self) -> tuple[Array, Array, Array]:
        """q, k and v as they come in, in float64: [TOKENS, heads of each, head_dim]."""
        heads = widen(self.qkv).reshape(TOKENS, -1, self.head_dim)
        q, k, v = np.split(heads, [self.heads, self.heads + self.kv_heads], axis=1)
        return q, k, v

    def rotated(self, head: Array, norm: Array | None) -> Array:
        """RMSNorm and rotation in float64, one complex number for each pair of elements."""
        if norm is not None:
            head = head / np.sqrt((head**2).mean(-1, keepdims=True) + self.eps) * widen(norm)
        left, right = np.split(head, 2, axis=-1)
        cos, sin = np.split(widen(self.cos_sin)[:, None], 2, axis=-1)
        turned = (left + 1j * right) * (cos + 1j * sin)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def cached(self, cache: Array) -> Array:
        """What lies in the tokens' slots: [TOKENS, kv_heads, head_dim]."""
        block, in_block = np.divmod(self.slots, cache.shape[2])
        return cache[block, :, in_block]


shapes = pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(1, 1, 2), (2, 1, 6), (9, 3, 64), (5, 5, 80), (4, 2, 96), (8, 1, 128)],
)


@shapes
@pytest.mark.parametrize("norms", [False, True])
def test_queries_and_keys_are_normalised_and_rotated(
    device: Any, rng: np.random.Generator, heads: int, kv_heads: int, head_dim: int, norms: bool
) -> None:
    case = Case(rng, heads, kv_heads, head_dim, norms=norms)
    q, k, _ = case.parts()
    got_q = case.run(device).reshape(TOKENS, heads, head_dim)
    assert relative_error(got_q, case.rotated(q, case.q_norm)) < 4e-7
    assert relative_error(case.cached(case.keys), case.rotated(k, case.k_norm)) < 4e-7


@shapes
def test_values_are_stored_as_they_are(
    device: Any, rng: np.random.Generator, heads: int, kv_heads: int, head_dim: int
) -> None:
    case = Case(rng, heads, kv_heads, head_dim)
    case.run(device)
    np.testing.assert_array_equal(case.cached(case.values), case.parts()[2])


@pytest.mark.parametrize("block_size", [1, 16, 32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_tokens_own_slots_are_written(
    device: Any, rng: np.random.Generator, dtype: str, block_size: int
) -> None:
    case = Case(rng, 9, 3, 64, dtype, block_size)
    case.run(device)
    for cache in (case.keys, case.values):
        written = ~np.isnan(widen(cache)).any(axis=(1, 3))  # [block, slot]
        np.testing.assert_array_equal(np.flatnonzero(written), np.sort(case.slots))


@pytest.mark.parametrize("head_dim", [6, 64])
def test_a_bfloat16_cache_holds_the_float32_results_rounded(
    device: Any, rng: np.random.Generator, head_dim: int
) -> None:
    seed = int(rng.integers(1 << 30))
    exact = Case(np.random.default_rng(seed), 9, 3, head_dim)
    rounded = Case(np.random.default_rng(seed), 9, 3, head_dim, "bfloat16")
    assert same_bits(exact.run(device), rounded.run(device))
    assert same_bits(rounded.cached(rounded.keys), to_bfloat16(exact.cached(exact.keys)))
    assert same_bits(rounded.cached(rounded.values), to_bfloat16(exact.cached(exact.values)))


@pytest.mark.parametrize("head_dim", [6, 80])
def test_a_token_gives_the_same_bits_in_every_batch(
    device: Any, other_device: Any, rng: np.random.Generator, head_dim: int
) -> None:
    seed = int(rng.integers(1 << 30))
    together = Case(np.random.default_rng(seed), 9, 3, head_dim)
    apart = Case(np.random.default_rng(seed), 9, 3, head_dim)
    whole = together.run(other_device)
    alone = [apart.run(device, slice(t, t + 1)) for t in range(TOKENS)]
    assert same_bits(whole, np.concatenate(alone))
    assert same_bits(together.keys, apart.keys)
    assert same_bits(together.values, apart.values)


# --- The conversion to bfloat16, through the values that go into the cache ------------------------


def stored(device: Any, values: Array) -> Array:
    """The bfloat16 bits that a float32 value becomes in the cache."""
    dim = 256
    v = np.resize(values, (-(-values.size // dim), dim))
    tokens = len(v)
    qkv = np.concatenate([np.zeros((tokens, 2 * dim), np.float32), v], axis=-1)
    keys, cache = (poison((tokens, 1, 1, dim), "bfloat16") for _ in range(2))
    ops.qk_norm_rope_and_cache(
        device,
        qkv,
        1,
        None,
        None,
        1e-5,
        np.zeros((tokens, dim), np.float32),
        np.arange(tokens),
        keys,
        cache,
    )
    return cache.reshape(-1)[: values.size]


def test_each_bfloat16_number_comes_back_as_itself(device: Any) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    is_nan = np.isnan(values)
    got = stored(device, values)
    np.testing.assert_array_equal(got[~is_nan], bits[~is_nan])
    assert np.isnan(widen(got[is_nan])).all()


@pytest.mark.parametrize("low", [0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_float32_rounds_to_the_nearest_bfloat16_and_ties_to_even(device: Any, low: int) -> None:
    # Each pattern of the upper half with this lower half: below, at and above the tie. The last
    # before infinity overflow to it; a NaN whose fraction is all in the lower half stays one.
    patterns = (np.arange(1 << 16, dtype=np.uint32) << 16) | np.uint32(low)
    values = patterns.view(np.float32)
    is_nan = np.isnan(values)
    got = stored(device, values)
    np.testing.assert_array_equal(got[~is_nan], cast(widen(values[~is_nan]), "bfloat16"))
    assert np.isnan(widen(got[is_nan])).all()
