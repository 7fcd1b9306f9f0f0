"""matmul: y = x W^T + b against float64, and the order of its sums bit for bit
(docs/promises.md, 2).

Weights lie in rows and, on the CPU, in panels (csrc/ops/repack.h).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from devices import is_cuda
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
    tree_sum,
    widen,
)
from tinyvllm import _core

ops = _core.ops

PAIRS = [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float32", "float32")]
pairs = pytest.mark.parametrize(("x_dtype", "w_dtype"), PAIRS)


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    return cast(rng.standard_normal(shape), dtype)


def multiply(device: Any, layout: str, x: Array, *blocks: Array) -> Array:
    return np.asarray(ops.matmul(device, x, list(blocks), layout=layout))


@pairs
@pytest.mark.parametrize(
    ("tokens", "outputs", "depth"),
    [
        (1, 1, 1),
        (1, 97, 63),
        (7, 100, 64),
        (7, 29, 577),
        (33, 7, 8200),  # more rows than a block of x in the cache has
        (33, 193, 31),
        (300, 33, 1100),
        # With weights in rows AMX takes 8 or 16 outputs at a time that lie far apart; 4 are left.
        (1, 1700, 70),
        (20, 1700, 70),
        (40, 1700, 70),
        (50, 1700, 102),
    ],
)
def test_matmul_matches_float64(
    device: Any,
    layout: str,
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
    # A sum of float32 products is off by a share of the sum of their sizes, whatever cancels. In
    # panels there is one sum instead of several, so that it grows further.
    sizes = np.abs(widen(x)) @ np.abs(widen(w)).T
    assert relative_error(multiply(device, layout, x, w), want, sizes) < (
        5e-7 if layout == "rows" else 1e-6
    )


@pairs
def test_small_integers_are_summed_exactly(
    device: Any, layout: str, rng: np.random.Generator, x_dtype: str, w_dtype: str
) -> None:
    x, w = rng.integers(-9, 10, (5, 333)), rng.integers(-9, 10, (31, 333))
    got = multiply(device, layout, cast(x, x_dtype), cast(w, w_dtype))
    np.testing.assert_array_equal(got, x @ w.T)


@pairs
@pytest.mark.parametrize("tokens", [7, 90])
def test_row_blocks_are_stacked_each_with_its_bias_or_none(
    device: Any,
    layout: str,
    rng: np.random.Generator,
    x_dtype: str,
    w_dtype: str,
    tokens: int,
) -> None:
    x = rng.integers(-9, 10, (tokens, 50))
    blocks = [rng.integers(-9, 10, (rows, 50)) for rows in (100, 1, 33)]
    first, last = rng.integers(-99, 99, 100), rng.integers(-99, 99, 33)
    got = ops.matmul(
        device,
        cast(x, x_dtype),
        [cast(block, w_dtype) for block in blocks],
        [cast(first, "float32"), None, cast(last, "float32")],
        layout=layout,
    )
    want = np.concatenate([x @ blocks[0].T + first, x @ blocks[1].T, x @ blocks[2].T + last], -1)
    np.testing.assert_array_equal(got, want)


@pairs
@pytest.mark.parametrize("depth", [96, 101, 1030])  # long rows are cut into other tiles
def test_a_row_gives_the_same_bits_in_every_batch(
    device: Any,
    layout: str,
    rng: np.random.Generator,
    x_dtype: str,
    w_dtype: str,
    depth: int,
) -> None:
    x = random(rng, (70, depth), x_dtype)
    w = random(rng, (45 if is_cuda(device) else 149, depth), w_dtype)
    alone = np.concatenate([multiply(device, layout, x[m : m + 1], w) for m in range(70)])
    # The CPU's tiles differ from size to size; test_matmul_cuda.py has the kernels of CUDA.
    for size in (1, 2, 9, 33, 70) if is_cuda(device) else range(1, 71):
        assert same_bits(multiply(device, layout, x[:size], w), alone[:size]), f"a batch of {size}"
        assert same_bits(multiply(device, layout, x[70 - size :], w), alone[70 - size :])


@pairs
@pytest.mark.parametrize(
    ("tokens", "outputs", "depth"),
    [
        (600, 70, 1030),  # more than the 512 rows that AMX takes at a time, of a long row
        (560, 70, 1030),  # of which few are left
        (5000, 33, 33),
    ],
)
def test_a_row_gives_the_same_bits_in_a_batch_that_no_cache_holds(
    device: Any,
    layout: str,
    rng: np.random.Generator,
    x_dtype: str,
    w_dtype: str,
    tokens: int,
    outputs: int,
    depth: int,
) -> None:
    x = random(rng, (tokens, depth), x_dtype)
    w = random(rng, (outputs, depth), w_dtype)
    whole = multiply(device, layout, x, w)
    assert same_bits(multiply(device, layout, x[:7], w), whole[:7])
    assert same_bits(multiply(device, layout, x[-70:], w), whole[-70:])


def test_a_share_may_fill_its_memory_for_sums(rng: np.random.Generator) -> None:
    """On AMX 512 rows and 256 outputs are what a thread keeps between blocks of the depth."""
    x, w = rng.integers(-9, 10, (600, 900)), rng.integers(-9, 10, (1100, 900))
    got = ops.matmul(_core.CpuContext(1), cast(x, "bfloat16"), [cast(w, "bfloat16")])
    np.testing.assert_array_equal(got, x.astype(np.float64) @ w.T)


def test_no_rows_give_no_outputs(device: Any, layout: str) -> None:
    x, w = cast(np.ones((0, 64)), "bfloat16"), cast(np.ones((33, 64)), "bfloat16")
    assert multiply(device, layout, x, w).shape == (0, 33)


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_depth_of_zero_is_refused(cpu_device: Any, tokens: int) -> None:
    x, w = cast(np.ones((tokens, 0)), "bfloat16"), cast(np.ones((33, 0)), "bfloat16")
    with pytest.raises(Exception, match="a depth of 0"):
        multiply(cpu_device, "rows", x, w)


@pairs
@pytest.mark.parametrize("depth", [64, 65, 66, 67])
@pytest.mark.parametrize("order", ["rows", "panels"])
def test_a_zero_has_the_same_sign_in_every_batch(
    cpu_device: Any, order: str, x_dtype: str, w_dtype: str, depth: int
) -> None:
    """Products that underflow add up to -0, which is another number than +0 to the bit."""
    x, w = cast(np.full((50, depth), 1e-30), x_dtype), cast(np.full((33, depth), -1e-30), w_dtype)
    whole = multiply(cpu_device, order, x, w)
    for tokens in (1, 3, 5, 9, 12, 17, 26):
        assert same_bits(multiply(cpu_device, order, x[:tokens], w), whole[:tokens])


@pairs
def test_an_output_gives_the_same_bits_whatever_is_stacked_around_it(
    device: Any, layout: str, rng: np.random.Generator, x_dtype: str, w_dtype: str
) -> None:
    x = random(rng, (5, 101), x_dtype)
    w = random(rng, (211, 101), w_dtype)
    whole = multiply(device, layout, x, w)
    for cut in (1, 5, 32, 96, 97, 210):
        assert same_bits(multiply(device, layout, x, w[:cut], w[cut:]), whole), f"cut at {cut}"


@pairs
def test_the_number_of_threads_changes_no_bit(
    device: Any,
    other_device: Any,
    layout: str,
    rng: np.random.Generator,
    x_dtype: str,
    w_dtype: str,
) -> None:
    w = random(rng, (700, 203), w_dtype)
    for tokens in (1, 33, 64, 90):
        x = random(rng, (tokens, 203), x_dtype)
        assert same_bits(multiply(other_device, layout, x, w), multiply(device, layout, x, w))


@pairs
@pytest.mark.parametrize("order", ["rows", "panels"])
def test_there_may_be_more_threads_than_outputs_and_blocks_without_any(
    cpu_device: Any, rng: np.random.Generator, x_dtype: str, w_dtype: str, order: str
) -> None:
    many = _core.CpuContext(81, cpu_device.isa)  # more than there are runs in strips.h
    for outputs in (70, 3000):
        w = random(rng, (outputs, 64), w_dtype)
        for tokens in (1, 20, 90):
            x = random(rng, (tokens, 64), x_dtype)
            want = multiply(cpu_device, order, x, w)
            for blocks in ((w,), (w[:0], w), (w[:5], w[:0], w[5:]), (w, w[:0])):
                assert same_bits(multiply(many, order, x, *blocks), want)


def tile_sums(x: Array, w: Array) -> Array:
    """What AMX adds up: of 32 elements of k the even and the odd ones, then the sum of the two."""
    padding = [(0, 0), (0, -x.shape[1] % 32)]
    wide_x = np.pad(widen(x), padding).astype(np.float32)
    wide_w = np.pad(widen(w), padding).astype(np.float32)
    sums = np.zeros((len(x), len(w)), dtype=np.float32)
    for first in range(0, wide_x.shape[1], 32):
        halves = []
        for begin in (first, first + 1):
            half = np.zeros_like(sums)
            for k in range(begin, first + 32, 2):
                half = fused_multiply_add(wide_x[:, None, k], wide_w[None, :, k], half)
            halves.append(half)
        sums = sums + (halves[0] + halves[1])
    return sums


LANES = {"portable": 4, "avx2": 8, "avx512": 16, "avx512bf16": 16, "amx": 16}


def lane_sum(lanes: Array) -> Array:
    """The lanes of the last axis: in each four, i takes i + 2, then i + 1; then a tree of fours."""
    if lanes.shape[-1] < 4:
        return tree_sum(lanes)
    fours = lanes.reshape(*lanes.shape[:-1], -1, 4)
    return tree_sum(tree_sum(fours))


def vector_sums(isa: str, x: Array, w: Array, lanes: int, pair: int) -> Array:
    """A vector over ascending k: each lane takes `pair` elements at a time, the last one first."""
    multiply_add = multiply_then_add if isa == "portable" else fused_multiply_add
    padding = [(0, 0), (0, -x.shape[1] % (lanes * pair))]
    wide_x = np.pad(widen(x), padding).astype(np.float32).reshape(len(x), 1, -1, lanes, pair)
    wide_w = np.pad(widen(w), padding).astype(np.float32).reshape(1, len(w), -1, lanes, pair)
    sums = np.zeros((len(x), len(w), lanes), dtype=np.float32)
    for step in range(wide_x.shape[2]):
        for element in reversed(range(pair)):
            sums = multiply_add(
                wide_x[:, :, step, :, element], wide_w[:, :, step, :, element], sums
            )
    return sums


@pairs
@pytest.mark.parametrize("depth", [3, 64, 101, 1101])
@pytest.mark.parametrize("tokens", [3, 26, 35])  # few and many
@pytest.mark.parametrize("order", ["rows", "panels"])
def test_an_output_adds_its_products_in_the_order_that_its_layout_has(
    cpu_device: Any,
    rng: np.random.Generator,
    x_dtype: str,
    w_dtype: str,
    tokens: int,
    depth: int,
    order: str,
) -> None:
    x = random(rng, (tokens, depth), x_dtype)
    w = random(rng, (37, depth), w_dtype)
    bias = cast(rng.standard_normal(37), "float32")
    if (cpu_device.isa, x_dtype, w_dtype) == ("amx", "bfloat16", "bfloat16"):
        want = tile_sums(x, w)
    else:
        lanes = LANES[cpu_device.isa] if order == "rows" else 1  # of an output
        if (cpu_device.isa, x_dtype, order) == ("avx512bf16", "bfloat16", "rows"):
            lanes = 2
        pair = 2 if w_dtype == "bfloat16" else 1
        want = lane_sum(vector_sums(cpu_device.isa, x, w, lanes, pair))
    assert same_bits(ops.matmul(cpu_device, x, [w], [bias], layout=order), want + bias)


@pairs
@pytest.mark.parametrize(
    ("tokens", "depth"),
    # The last x is more than a cache holds.
    [(1, 64), (7, 1), (7, 31), (7, 100), (20, 100), (50, 100), (90, 31), (400, 1333)],
)
@pytest.mark.parametrize("end", [True, False])
def test_nothing_outside_the_operands_is_read(
    device: Any,
    layout: str,
    rng: np.random.Generator,
    x_dtype: str,
    w_dtype: str,
    tokens: int,
    depth: int,
    end: bool,
) -> None:
    x = random(rng, (tokens, depth), x_dtype)
    w = random(rng, (67, depth), w_dtype)
    bias = cast(rng.standard_normal(67), "float32")
    guarded_x, guarded_w, guarded_bias = (Guarded(array, end) for array in (x, w, bias))
    got = ops.matmul(
        device, guarded_x.array, [guarded_w.array], [guarded_bias.array], layout=layout
    )
    assert same_bits(got, ops.matmul(device, x, [w], [bias], layout=layout))


@pytest.mark.parametrize("tokens", [1, 7, 9, 11, 12, 17, 19, 25, 33])
@pytest.mark.parametrize("depth", [32, 77, 96, 160])
@pytest.mark.parametrize("order", ["rows", "panels"])
def test_the_bits_do_not_depend_on_where_in_memory_the_operands_are(
    cpu_device: Any, order: str, rng: np.random.Generator, tokens: int, depth: int
) -> None:
    x = random(rng, (tokens, depth), "bfloat16")
    w = random(rng, (149, depth), "bfloat16")
    want = np.concatenate([multiply(cpu_device, order, x[m : m + 1], w) for m in range(tokens)])
    for offset in (8, 40, 56, 4, 2):  # of the weights in a cache line
        got = multiply(cpu_device, order, in_wider_rows(x), misaligned(w, offset))
        assert same_bits(got, want), offset
    assert same_bits(multiply(cpu_device, order, misaligned(x), w), want)


@pairs
def test_rows_may_lie_apart_and_be_aligned_to_their_element_only(
    device: Any, layout: str, rng: np.random.Generator, x_dtype: str, w_dtype: str
) -> None:
    x = random(rng, (7, 77), x_dtype)
    w = random(rng, (31, 77), w_dtype)
    want = multiply(device, layout, x, w)
    assert same_bits(multiply(device, layout, in_wider_rows(x), misaligned(w)), want)
    assert same_bits(multiply(device, layout, misaligned(x), w), want)


@pairs
@pytest.mark.parametrize(("tokens", "depth"), [(7, 33), (90, 33), (600, 929)])
def test_a_nan_reaches_its_own_row_or_output_and_no_other(
    device: Any, layout: str, x_dtype: str, w_dtype: str, tokens: int, depth: int
) -> None:
    x, w = np.ones((tokens, depth)), np.ones((67, depth))
    x[3, -1] = w[17, -1] = w[41, 0] = np.nan
    got = multiply(device, layout, cast(x, x_dtype), cast(w, w_dtype))
    want = np.full((tokens, 67), float(depth))
    want[3] = want[:, 17] = want[:, 41] = np.nan
    np.testing.assert_array_equal(got, want)


def test_an_unsupported_pair_is_named(device: Any, layout: str) -> None:
    x, w = cast(np.ones((1, 4)), "bfloat16"), cast(np.ones((2, 4)), "float32")
    with pytest.raises(Exception, match="bfloat16 x float32 is not a supported pair"):
        multiply(device, layout, x, w)
