"""gather_rows: rows come out as they are, bfloat16 widened exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from numeric import Array, Guarded, cast, in_wider_rows, misaligned, same_bits, widen
from tinyvllm import _core

ops = _core.ops


def table_of(rng: np.random.Generator, dtype: str, cols: int = 77) -> Array:
    return cast(rng.standard_normal((50, cols)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", [1, 7, 33])
def test_rows_come_in_the_order_asked_for_and_as_often(
    device: Any, rng: np.random.Generator, dtype: str, num_rows: int
) -> None:
    table = table_of(rng, dtype)
    rows = rng.integers(0, 50, num_rows).astype(np.int32)
    rows[-1] = rows[0]
    got = ops.gather_rows(device, rows, table)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, widen(table)[rows])


@pytest.mark.parametrize("cols", [77, 64])
def test_bfloat16_rows_may_come_out_as_they_are(
    device: Any, rng: np.random.Generator, cols: int
) -> None:
    table, rows = table_of(rng, "bfloat16", cols), np.array([49, 0, 3, 0], np.int32)
    assert same_bits(ops.gather_rows(device, rows, table, "bfloat16"), table[rows])


def test_no_rows_give_no_rows(device: Any, rng: np.random.Generator) -> None:
    got = ops.gather_rows(device, np.array([], np.int32), table_of(rng, "float32"))
    assert got.shape == (0, 77)


def test_every_bfloat16_pattern_is_widened_to_its_own_bits(device: Any) -> None:
    table = np.arange(1 << 16, dtype=np.uint16).reshape(64, 1024)
    got = ops.gather_rows(device, np.arange(64, dtype=np.int32), table)
    np.testing.assert_array_equal(got.view(np.uint32), table.astype(np.uint32) << 16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_may_lie_apart_and_be_aligned_to_their_element_only(
    device: Any, rng: np.random.Generator, dtype: str
) -> None:
    table, rows = table_of(rng, dtype), np.array([49, 0, 3], np.int32)
    want = ops.gather_rows(device, rows, table)
    assert same_bits(ops.gather_rows(device, rows, in_wider_rows(table)), want)
    assert same_bits(ops.gather_rows(device, rows, misaligned(table)), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("end", [True, False])
def test_nothing_outside_the_table_is_read(
    device: Any, rng: np.random.Generator, dtype: str, end: bool
) -> None:
    table, rows = table_of(rng, dtype, cols=21), np.array([0, 49], np.int32)
    guarded = Guarded(table, end)
    want = ops.gather_rows(device, rows, table)
    assert same_bits(ops.gather_rows(device, rows, guarded.array), want)
