"""The product that makes logits finds the largest of each block of them on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from numeric import Array, same_bits, to_bfloat16
from tinyvllm import _core

ops = _core.ops
BLOCK = 256

# (rows, vocab, hidden): one block, a part of one, several shares, more rows than are few, and more
# weights in a block than a share has memory for.
SHAPES = [(1, 256, 64), (3, 31, 33), (2, 300, 96), (5, 5003, 64), (70, 2049, 40), (70, 600, 4100)]


def operands(rng: np.random.Generator, rows: int, vocab: int, hidden: int) -> tuple[Any, Any]:
    x = rng.standard_normal((rows, hidden)).astype(np.float32)
    weight = rng.standard_normal((vocab, hidden)).astype(np.float32)
    return to_bfloat16(x), to_bfloat16(weight)


def largest_of_blocks(logits: Array) -> Array:
    starts = range(0, logits.shape[1], BLOCK)
    return np.stack([logits[:, first : first + BLOCK].max(axis=1) for first in starts], axis=1)


@pytest.mark.parametrize(("rows", "vocab", "hidden"), SHAPES)
def test_maxima_are_those_of_the_logits_and_these_the_products(
    cpu_device: Any, rng: np.random.Generator, rows: int, vocab: int, hidden: int
) -> None:
    x, weight = operands(rng, rows, vocab, hidden)
    for layout in ("rows", "panels"):
        logits, maxima = ops.matmul_logits(cpu_device, x, weight, layout=layout)
        assert same_bits(logits, ops.matmul(cpu_device, x, [weight], layout=layout))
        assert same_bits(maxima, largest_of_blocks(logits))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("token", [0, 255, 256, 511, 515])
def test_a_block_with_a_logit_that_is_not_finite_is_no_number(
    cpu_device: Any, rng: np.random.Generator, value: float, token: int
) -> None:
    x, weight = operands(rng, 2, 516, 32)
    weight[token] = to_bfloat16(np.full((1, 32), value, np.float32))
    x[:] = to_bfloat16(np.ones((2, 32), np.float32))
    _, maxima = ops.matmul_logits(cpu_device, x, weight)
    where = np.arange(maxima.shape[1]) == token // BLOCK
    assert np.isnan(maxima[:, where]).all()
    assert np.isfinite(maxima[:, ~where]).all()
