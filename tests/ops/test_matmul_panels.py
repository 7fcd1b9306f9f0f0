"""matmul with weights in panels (csrc/ops/repack.h): the same product, in an order of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from numeric import (
    Array,
    Guarded,
    cast,
    fused_multiply_add,
    in_wider_rows,
    misaligned,
    multiply_then_add,
    relative_error,
    same_bits,
    widen,
)
from tinyvllm import _core

ops = _core.ops

PAIRS = [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float32", "float32")]
pairs = pytest.mark.parametrize(("x_dtype", "w_dtype"), PAIRS)


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    return cast(rng.standard_normal(shape), dtype)


def multiply(device: Any, x: Array, *blocks: Array) -> Array:
    return np.asarray(ops.matmul(device, x, list(blocks), layout="panels"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (32, 16), (33, 17), (70, 50), (64, 31)])
def test_a_panel_has_32_rows_side_by_side_in_lanes_of_4_bytes(
    cpu_device: Any, rng: np.random.Generator, dtype: str, rows: int, depth: int
) -> None:
    w = random(rng, (rows, depth), dtype)
    pair = 2 if dtype == "bfloat16" else 1
    padded = np.pad(w, [(0, -rows % 32), (0, -depth % pair)])
    want = padded.reshape(-1, 32, padded.shape[1] // pair, pair).transpose(0, 2, 1, 3)
    for given in (w, misaligned(w)):
        got = np.asarray(ops.repack(cpu_device, given))
        np.testing.assert_array_equal(got.ravel(), want.ravel())


@pairs
@pytest.mark.parametrize(
    ("tokens", "outputs", "depth"),
    [
        (1, 1, 1),
        (1, 97, 63),
        (13, 100, 64),
        (7, 29, 577),
        (33, 7, 8200),  # panels of several blocks, and more rows than a block of x has
        (300, 33, 1100),
        (33, 193, 31),
    ],
)
def test_it_matches_float64(
    cpu_device: Any,
    rng: np.random.Generator,
    x_dtype: str,
    w_dtype: str,
    tokens: int,
    outputs: int,
    depth: int,
) -> None:
    x = random(rng, (tokens, depth), x_dtype)
    w = random(rng, (outputs, depth), w_dtype)
    want = widen(x) @ widen(w).T
    # One sum after the other in float32: the error grows with the square root of their number.
    sizes = np.abs(widen(x)) @ np.abs(widen(w)).T
    assert relative_error(multiply(cpu_device, x, w), want, sizes) < 1e-6


@pairs
def test_row_blocks_are_stacked_each_with_its_bias_and_added_to_the_residual(
    cpu_device: Any, rng: np.random.Generator, x_dtype: str, w_dtype: str
) -> None:
    x = rng.integers(-9, 10, (7, 51))
    blocks = [rng.integers(-9, 10, (rows, 51)) for rows in (100, 1, 33)]
    first, last = rng.integers(-99, 99, 100), rng.integers(-99, 99, 33)
    residual = rng.integers(-99, 99, (7, 134))
    weights = [cast(block, w_dtype) for block in blocks]
    biases = [cast(first, "float32"), None, cast(last, "float32")]
    want = np.concatenate([x @ blocks[0].T + first, x @ blocks[1].T, x @ blocks[2].T + last], -1)
    got = ops.matmul(cpu_device, cast(x, x_dtype), weights, biases, layout="panels")
    np.testing.assert_array_equal(got, want)
    added = ops.matmul_add(
        cpu_device,
        cast(x, x_dtype),
        weights,
        cast(residual, "float32"),
        biases,
        layout="panels",
    )
    np.testing.assert_array_equal(added, want + residual)


@pairs
@pytest.mark.parametrize("depth", [101, 1030])  # one block, and two
def test_a_row_gives_the_same_bits_in_every_batch_and_with_any_threads(
    device: Any, other_device: Any, rng: np.random.Generator, x_dtype: str, w_dtype: str, depth: int
) -> None:
    x = random(rng, (50, depth), x_dtype)
    w = random(rng, (100, depth), w_dtype)
    alone = np.concatenate([multiply(device, x[m : m + 1], w) for m in range(50)])
    for size in range(1, 51):
        assert same_bits(multiply(other_device, x[:size], w), alone[:size]), f"a batch of {size}"
    for cut in (1, 32, 33, 99):
        assert same_bits(multiply(device, x[:5], w[:cut], w[cut:]), alone[:5]), f"cut at {cut}"


@pairs
@pytest.mark.parametrize("depth", [3, 64, 1101])
def test_an_output_is_a_lane_that_adds_up_ascending_k(
    cpu_device: Any, rng: np.random.Generator, x_dtype: str, w_dtype: str, depth: int
) -> None:
    x = random(rng, (3, depth), x_dtype)
    w = random(rng, (37, depth), w_dtype)
    bias = cast(rng.standard_normal(37), "float32")
    pair = 2 if w_dtype == "bfloat16" else 1  # of which the second one comes first
    multiply_add = multiply_then_add if cpu_device.isa == "portable" else fused_multiply_add
    padding = [(0, 0), (0, -depth % pair)]
    wide_x = np.pad(widen(x), padding).astype(np.float32)
    wide_w = np.pad(widen(w), padding).astype(np.float32)
    sums = np.zeros((3, 37), dtype=np.float32)
    for first in range(0, wide_x.shape[1], pair):
        for k in reversed(range(first, first + pair)):
            sums = multiply_add(wide_x[:, None, k], wide_w[None, :, k], sums)
    got = ops.matmul(cpu_device, x, [w], [bias], layout="panels")
    assert same_bits(got, sums + bias)


@pairs
@pytest.mark.parametrize("depth", [1, 31, 100])
@pytest.mark.parametrize("end", [True, False])
def test_nothing_outside_the_operands_is_read(
    cpu_device: Any, rng: np.random.Generator, x_dtype: str, w_dtype: str, depth: int, end: bool
) -> None:
    x = random(rng, (7, depth), x_dtype)
    w = random(rng, (31, depth), w_dtype)
    bias = cast(rng.standard_normal(31), "float32")
    guarded_x, guarded_w, guarded_bias = (Guarded(array, end) for array in (x, w, bias))
    got = ops.matmul(
        cpu_device, guarded_x.array, [guarded_w.array], [guarded_bias.array], layout="panels"
    )
    assert same_bits(got, ops.matmul(cpu_device, x, [w], [bias], layout="panels"))
    assert same_bits(multiply(cpu_device, in_wider_rows(x), w), multiply(cpu_device, x, w))


@pairs
def test_a_nan_reaches_its_own_row_or_output_and_no_other(
    cpu_device: Any, x_dtype: str, w_dtype: str
) -> None:
    x, w = np.ones((7, 33)), np.ones((31, 33))
    x[3, 32] = w[17, 32] = np.nan
    got = multiply(cpu_device, cast(x, x_dtype), cast(w, w_dtype))
    want = np.full((7, 31), 33.0)
    want[3] = want[:, 17] = np.nan
    np.testing.assert_array_equal(got, want)
