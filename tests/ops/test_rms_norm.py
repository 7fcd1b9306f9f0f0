"""rms_norm against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from numeric import (
    Array,
    Guarded,
    in_wider_rows,
    misaligned,
    relative_error,
    same_bits,
    to_bfloat16,
    widen,
)
from tinyvllm import _core

ops = _core.ops

# Below and above one vector, a multiple of it and not; the last is past the buffer on the stack.
SIZES = [(1, 1), (1, 64), (7, 577), (33, 80), (2, 8200)]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    x, weight = widen(x), widen(weight)
    return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight)


def some(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("tokens", "hidden"), SIZES)
def test_rms_norm_matches_float64(
    device: Any, rng: np.random.Generator, tokens: int, hidden: int
) -> None:
    x, weight = some(rng, tokens, hidden), some(rng, hidden)
    got = ops.rms_norm(device, x, weight, 1e-5)
    want = rms_norm(x, weight, np.float32(1e-5))
    assert relative_error(got, want, np.abs(want)) < 1e-6  # of each element, not of the largest


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_eps_rules_where_x_is_small(device: Any, rng: np.random.Generator, eps: float) -> None:
    x, weight = some(rng, 7, 64) * np.float32(1e-3), some(rng, 64)
    got = ops.rms_norm(device, x, weight, eps)
    assert relative_error(got, rms_norm(x, weight, eps)) < 1e-6


def test_a_row_of_zeros_stays_zero(device: Any) -> None:
    zeros, ones = np.zeros((1, 33), np.float32), np.ones(33, np.float32)
    np.testing.assert_array_equal(ops.rms_norm(device, zeros, ones, 1e-5), zeros)


@pytest.mark.parametrize(("tokens", "hidden"), SIZES)
def test_bfloat16_output_is_the_float32_output_rounded(
    device: Any, rng: np.random.Generator, tokens: int, hidden: int
) -> None:
    x, weight = some(rng, tokens, hidden), some(rng, hidden)
    exact = ops.rms_norm(device, x, weight, 1e-5)
    got = ops.rms_norm(device, x, weight, 1e-5, dtype="bfloat16")
    assert same_bits(got, to_bfloat16(exact))


@pytest.mark.parametrize("hidden", [5, 577])
def test_a_row_gives_the_same_bits_in_every_batch(
    device: Any, other_device: Any, rng: np.random.Generator, hidden: int
) -> None:
    x, weight = some(rng, 33, hidden), some(rng, hidden)
    whole = ops.rms_norm(other_device, x, weight, 1e-5)
    alone = [ops.rms_norm(device, x[t : t + 1], weight, 1e-5) for t in range(33)]
    assert same_bits(whole, np.concatenate(alone))


def test_rows_may_lie_apart_and_be_aligned_to_their_element_only(
    device: Any, rng: np.random.Generator
) -> None:
    x, weight = some(rng, 7, 77), some(rng, 77)
    want = ops.rms_norm(device, x, weight, 1e-5)
    assert same_bits(ops.rms_norm(device, in_wider_rows(x), misaligned(weight), 1e-5), want)


@pytest.mark.parametrize("end", [True, False])
def test_nothing_outside_the_operands_is_read(
    device: Any, rng: np.random.Generator, end: bool
) -> None:
    x, weight = some(rng, 3, 45), some(rng, 45)
    guarded_x, guarded_weight = Guarded(x, end), Guarded(weight, end)
    got = ops.rms_norm(device, guarded_x.array, guarded_weight.array, 1e-5)
    assert same_bits(got, ops.rms_norm(device, x, weight, 1e-5))


def test_a_nan_spoils_its_own_row_only(device: Any) -> None:
    x = np.ones((3, 33), np.float32)
    x[1, 32] = np.nan
    got = ops.rms_norm(device, x, np.ones(33, np.float32), 1e-5)
    np.testing.assert_array_equal(np.isnan(got).all(-1), [False, True, False])
    assert not np.isnan(got[[0, 2]]).any()
