"""What a branch of a layer begins and ends with: norm_matmul, norm_swiglu, matmul_add."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from numeric import Array, cast, relative_error, same_bits, widen
from tinyvllm import _core
from tinyvllm.errors import TinyvllmError

ops = _core.ops

# (rows that enter the product, weight)
PAIRS = [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float32", "float32")]
pairs = pytest.mark.parametrize(("dtype", "w_dtype"), PAIRS)
sizes = pytest.mark.parametrize(
    ("tokens", "outputs", "depth"), [(1, 96, 64), (5, 38, 77), (33, 130, 200)]
)
# Of the product's operands; what is summed is float32.
ROUNDING = {"bfloat16": 1e-2, "float32": 1e-6}


def normalized(x: Array, norm: Array) -> Array:
    wide = np.asarray(x, np.float64)
    return wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * norm


@pairs
@sizes
def test_norm_matmul_matches_float64(
    device: Any,
    rng: np.random.Generator,
    dtype: str,
    w_dtype: str,
    tokens: int,
    outputs: int,
    depth: int,
) -> None:
    x = cast(rng.standard_normal((tokens, depth)), "float32")
    norm = cast(rng.standard_normal(depth), "float32")
    weight = cast(rng.standard_normal((outputs, depth)), w_dtype)
    bias = cast(rng.standard_normal(outputs), "float32")
    want = normalized(x, norm) @ widen(weight).T + bias
    sizes = np.abs(normalized(x, norm)) @ np.abs(widen(weight)).T + np.abs(bias)
    got = ops.norm_matmul(device, x, norm, 1e-5, [weight], dtype, [bias])
    assert relative_error(got, want, sizes) < ROUNDING[dtype]


@pairs
@sizes
def test_norm_swiglu_matches_float64(
    device: Any,
    rng: np.random.Generator,
    dtype: str,
    w_dtype: str,
    tokens: int,
    outputs: int,
    depth: int,
) -> None:
    x = cast(rng.standard_normal((tokens, depth)), "float32")
    norm = cast(rng.standard_normal(depth), "float32")
    gate, up = (cast(rng.standard_normal((outputs, depth)), w_dtype) for _ in range(2))
    g, u = (normalized(x, norm) @ widen(half).T for half in (gate, up))
    want = g / (1 + np.exp(-g)) * u
    got = widen(ops.norm_swiglu(device, x, norm, 1e-5, [gate, up], dtype))
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < ROUNDING[dtype]


@pairs
@sizes
def test_matmul_add_adds_the_product_to_the_residual(
    device: Any,
    layout: str,
    rng: np.random.Generator,
    dtype: str,
    w_dtype: str,
    tokens: int,
    outputs: int,
    depth: int,
) -> None:
    x = cast(rng.standard_normal((tokens, depth)), dtype)
    weight = cast(rng.standard_normal((outputs, depth)), w_dtype)
    bias = cast(rng.standard_normal(outputs), "float32")
    residual = cast(rng.standard_normal((tokens, outputs)), "float32")
    product = ops.matmul(device, x, [weight], [bias], layout=layout)
    got = ops.matmul_add(device, x, [weight], residual, [bias], layout=layout)
    assert same_bits(got, residual + product)


@pairs
@pytest.mark.parametrize(
    "shape",  # tokens, outputs, depth
    # Strips of one size and of another, whole and not; the last x has no room in the cache.
    [(7, 29, 77), (1, 300, 40), (33, 530, 64), (64, 530, 160), (330, 200, 96), (600, 330, 900)],
)
def test_on_the_cpu_the_fused_ops_are_the_separate_ones_bit_for_bit(
    cpu_device: Any, rng: np.random.Generator, dtype: str, w_dtype: str, shape: tuple[int, int, int]
) -> None:
    tokens, outputs, depth = shape
    x = cast(rng.standard_normal((tokens, depth)), "float32")
    norm = cast(rng.standard_normal(depth), "float32")
    blocks = [cast(rng.standard_normal((outputs, depth)), w_dtype) for _ in range(2)]
    biases = [cast(rng.standard_normal(outputs), "float32") for _ in range(2)]
    entering = ops.rms_norm(cpu_device, x, norm, 1e-5, dtype)
    for layout in ["panels", "rows"]:
        product = ops.matmul(cpu_device, entering, blocks, biases, layout=layout)
        activated = ops.silu_mul(cpu_device, product, dtype)
        got = ops.norm_swiglu(cpu_device, x, norm, 1e-5, blocks, dtype, biases, layout)
        assert same_bits(got, activated)
    assert same_bits(ops.norm_matmul(cpu_device, x, norm, 1e-5, blocks, dtype, biases), product)


def test_on_the_cpu_gate_and_up_are_a_row_block_each(cpu_device: Any) -> None:
    x, norm = np.ones((1, 4), np.float32), np.ones(4, np.float32)
    with pytest.raises(TinyvllmError, match=r"gate \[6, 4\], up \[0, 4\], out \[1, 3\]"):
        ops.norm_swiglu(cpu_device, x, norm, 1e-5, [np.ones((6, 4), np.float32)])
