"""The product of which only the largest result of each row is kept, for greedy sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from numeric import Array, same_bits, to_bfloat16
from tinyvllm import _core

ops = _core.ops

# (rows, vocab, hidden): one output, a part of a panel, several strips, more rows than are few, and
# rows of x for which a cache has no room.
SHAPES = [(1, 1, 64), (1, 5003, 64), (3, 31, 33), (5, 300, 96), (70, 2049, 40), (70, 600, 4100)]


def both(device: Any, x: Any, weight: Any, layout: str) -> tuple[Array, tuple[Array, Array]]:
    logits = ops.matmul(device, x, [weight], layout=layout)
    return logits, ops.matmul_largest(device, x, weight, layout=layout)


@pytest.mark.parametrize("dtypes", ["bfloat16", "float32 x bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "vocab", "hidden"), SHAPES)
def test_it_is_the_first_of_the_largest_of_the_same_product(
    cpu_device: Any, rng: np.random.Generator, rows: int, vocab: int, hidden: int, dtypes: str
) -> None:
    x: Any = rng.standard_normal((rows, hidden)).astype(np.float32)
    weight: Any = rng.standard_normal((vocab, hidden)).astype(np.float32)
    x = to_bfloat16(x) if dtypes == "bfloat16" else x
    weight = weight if dtypes == "float32" else to_bfloat16(weight)
    for layout in ("rows", "panels"):
        logits, (values, outputs) = both(cpu_device, x, weight, layout)
        assert same_bits(values, logits.max(axis=1))
        assert (outputs == logits.argmax(axis=1)).all()


def test_of_equal_results_it_is_the_lowest(cpu_device: Any, rng: np.random.Generator) -> None:
    """In one vector, in one strip, in strips of two threads; below zero, too."""
    x = to_bfloat16(np.concatenate([np.ones((1, 32)), -np.ones((1, 32))]).astype(np.float32))
    for tokens in ([3, 4], [40, 41, 250], [7, 4000, 9999], [9998, 9999], [0, 9999]):
        weight = rng.standard_normal((10_000, 32)).astype(np.float32)
        weight[tokens] = 9
        for layout in ("rows", "panels"):
            _, outputs = ops.matmul_largest(cpu_device, x, to_bfloat16(weight), layout=layout)
            assert outputs[0] == tokens[0]
        _, outputs = ops.matmul_largest(cpu_device, x, to_bfloat16(-abs(weight[:1]).repeat(99, 0)))
        assert list(outputs) == [0, 0]


@pytest.mark.parametrize("rows", [2, 40, 70])  # on AMX 40 are few
def test_of_equal_results_it_is_the_lowest_in_whatever_order_they_come(
    cpu_device: Any, rows: int
) -> None:
    """A thread that helps another one takes strips from the end (strips.h)."""
    x, weight = np.ones((rows, 64), np.float32), np.ones((6000, 64), np.float32)
    many = _core.CpuContext(4, cpu_device.isa)
    for lowest in range(0, 6000, 100):
        weight[:lowest] = 0
        _, outputs = ops.matmul_largest(many, to_bfloat16(x), to_bfloat16(weight))
        assert (outputs == lowest).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("token", [0, 31, 700, 9999])
def test_a_row_with_a_result_that_is_not_finite_has_no_largest(
    cpu_device: Any, rng: np.random.Generator, value: float, token: int
) -> None:
    x = np.ones((3, 32), np.float32)
    x[1, 5] = 0
    weight = rng.standard_normal((10_000, 32)).astype(np.float32)
    weight[token, 5] = value if np.isnan(value) else np.sign(value) * 3e38
    x[0] *= 3  # overflows where the value is large
    values, _ = ops.matmul_largest(cpu_device, to_bfloat16(x), to_bfloat16(weight))
    finite = [False, not np.isnan(value), not np.isnan(value)]
    assert list(np.isfinite(values)) == finite


def test_sizes_that_do_not_fit_are_refused(cpu_device: Any) -> None:
    x = to_bfloat16(np.ones((2, 32), np.float32))
    with pytest.raises(Exception, match=r"matmul_largest: x \[2, 32\], weight \[5, 40\]"):
        ops.matmul_largest(cpu_device, x, to_bfloat16(np.ones((5, 40), np.float32)))
