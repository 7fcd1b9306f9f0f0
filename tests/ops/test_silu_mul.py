"""silu_mul against float64, and through it the accuracy of our e^x."""

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

SIZES = [(1, 1), (1, 31), (7, 250), (33, 64), (2, 1024), (3, 2053)]  # a share is 1,024 columns


def silu(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(x / (1 + np.exp(-x)))


def some(rng: np.random.Generator, tokens: int, intermediate: int) -> Array:
    return (rng.standard_normal((tokens, 2 * intermediate)) * 4).astype(np.float32)


@pytest.mark.parametrize(("tokens", "intermediate"), SIZES)
def test_silu_mul_matches_float64(
    device: Any, rng: np.random.Generator, tokens: int, intermediate: int
) -> None:
    gate_up = some(rng, tokens, intermediate)
    gate, up = np.split(widen(gate_up), 2, axis=-1)
    want = silu(gate) * up
    assert relative_error(ops.silu_mul(device, gate_up), want, np.abs(want)) < 1e-6


def test_e_to_the_x_is_exact_to_a_few_last_bits_where_float32_can_hold_it(device: Any) -> None:
    gate = np.linspace(-87.0, 100.0, 200_001).astype(np.float32)
    gate_up = np.concatenate([gate, np.ones_like(gate)])[None]
    want = silu(widen(gate))[None]
    nonzero = np.where(want == 0, 1.0, np.abs(want))
    assert relative_error(ops.silu_mul(device, gate_up), want, nonzero) < 4e-7


def test_large_inputs_end_at_zero_and_at_themselves(device: Any) -> None:
    gate = np.array([-3e38, -1e30, -1000, -104, -88.5, -88, 88, 1000, 3e38], dtype=np.float32)
    got = ops.silu_mul(device, np.concatenate([gate, np.ones_like(gate)])[None])[0]
    np.testing.assert_allclose(got, silu(widen(gate)), rtol=4e-7, atol=1e-35)


@pytest.mark.parametrize("gate", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_become_finite(device: Any, gate: float) -> None:
    gate_up = np.ones((1, 66), np.float32)
    gate_up[0, 32] = gate  # the last gate, in the partial vector
    got = ops.silu_mul(device, gate_up)
    assert not np.isfinite(got[0, 32])
    assert np.isfinite(got[0, :32]).all()


@pytest.mark.parametrize(("tokens", "intermediate"), SIZES)
def test_bfloat16_output_is_the_float32_output_rounded(
    device: Any, rng: np.random.Generator, tokens: int, intermediate: int
) -> None:
    gate_up = some(rng, tokens, intermediate)
    got = ops.silu_mul(device, gate_up, dtype="bfloat16")
    assert same_bits(got, to_bfloat16(ops.silu_mul(device, gate_up)))


def test_an_element_gives_the_same_bits_wherever_it_stands(
    device: Any, other_device: Any, rng: np.random.Generator
) -> None:
    gate_up = some(rng, 5, 1030)
    whole = ops.silu_mul(other_device, gate_up)
    gate, up = np.split(gate_up, 2, axis=-1)
    for first, last in [(0, 1), (3, 20), (1023, 1030)]:
        part = np.concatenate([gate[2:3, first:last], up[2:3, first:last]], axis=-1)
        assert same_bits(ops.silu_mul(device, part), whole[2:3, first:last].copy())


def test_rows_may_lie_apart_and_be_aligned_to_their_element_only(
    device: Any, rng: np.random.Generator
) -> None:
    gate_up = some(rng, 7, 77)
    want = ops.silu_mul(device, gate_up)
    assert same_bits(ops.silu_mul(device, in_wider_rows(gate_up)), want)
    assert same_bits(ops.silu_mul(device, misaligned(gate_up)), want)


@pytest.mark.parametrize("end", [True, False])
def test_nothing_outside_the_operands_is_read(
    device: Any, rng: np.random.Generator, end: bool
) -> None:
    gate_up = some(rng, 3, 45)
    guarded = Guarded(gate_up, end)
    assert same_bits(ops.silu_mul(device, guarded.array), ops.silu_mul(device, gate_up))
