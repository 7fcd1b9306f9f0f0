"""The kernels and plans of matrix products on CUDA: each against float64, and bit for bit."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from numeric import Array, cast, in_wider_rows, misaligned, relative_error, same_bits, widen
from tinyvllm import _core
from tinyvllm.errors import TinyvllmError

ops = _core.ops

SHAPES = range(len(_core.streaming_shapes()) if _core.cuda_build() != "none" else 0)
shapes = pytest.mark.parametrize("shape", SHAPES)
# A product of bfloat16 operands is exact; their sum in float32 is off by a share of the sizes.
SUM = 5e-7
BFLOAT16 = 6e-3  # rounded results, and operands rounded after another scale than the reference's


def streaming(shape: int, blocks: int = 0, fuses_norm: bool = False) -> Any:
    return _core.MatmulPlan(
        "streaming",
        shape=shape,
        blocks_per_multiprocessor=blocks,
        fuses_norm=fuses_norm,
    )


@functools.cache
def invariant() -> Any:
    return _core.CudaContext(batch_invariant=True)


class Case:
    """Operands of a product, and what it is in float64."""

    def __init__(
        self, rng: np.random.Generator, rows: int, outputs: int, depth: int, biased: bool = False
    ) -> None:
        self.x = cast(rng.standard_normal((rows, depth)), "bfloat16")
        self.residual = cast(rng.standard_normal((rows, outputs)), "float32")
        self.stream = cast(rng.standard_normal((rows, depth)), "float32")
        self.norm = cast(1 + rng.standard_normal(depth) / 4, "float32")
        self.weight = cast(rng.standard_normal((outputs, depth)), "bfloat16")
        self.bias = cast(rng.standard_normal(outputs), "float32") if biased else None
        self.biases = [self.bias]

    def _product(self, x: Array) -> Array:
        bias = 0 if self.bias is None else self.bias
        product: Array = x @ widen(self.weight).T + bias
        return product

    @property
    def sizes(self) -> Array:
        sizes: Array = np.abs(widen(self.x)) @ np.abs(widen(self.weight)).T
        return sizes

    @property
    def store(self) -> Array:
        return self._product(widen(self.x))

    @property
    def normalised(self) -> Array:
        x = widen(self.stream)
        return self._product(x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * self.norm)

    @property
    def swiglu(self) -> Array:
        gate, up = np.split(self.normalised, 2, axis=-1)
        activated: Array = gate / (1 + np.exp(-gate)) * up
        return activated


def error(got: Array, want: Array) -> float:
    return float(np.linalg.norm(widen(got) - want) / np.linalg.norm(want))


@shapes
@pytest.mark.parametrize(
    ("rows", "outputs", "depth", "blocks"),
    [
        (1, 72, 584, 0),  # outputs and depth end inside a tile and a step
        (5, 200, 72, 1),  # a block has several tiles, and most warps nothing to multiply
        (9, 40, 1096, 2),
        (67, 24, 136, 1),
    ],
)
def test_every_shape_matches_float64(
    device: Any,
    rng: np.random.Generator,
    shape: int,
    rows: int,
    outputs: int,
    depth: int,
    blocks: int,
) -> None:
    case = Case(rng, rows, outputs, depth, biased=rows % 2 == 1)
    plan = streaming(shape, blocks)
    got = ops.matmul_by_plan(device, plan, "store", case.x, [case.weight], case.biases)
    assert relative_error(got, case.store, case.sizes) < SUM
    rounded = ops.matmul_by_plan(
        device, plan, "store", case.x, [case.weight], case.biases, out_dtype="bfloat16"
    )
    assert same_bits(rounded, cast(got, "bfloat16"))
    added = ops.matmul_by_plan(
        device, plan, "add", case.x, [case.weight], case.biases, residual=case.residual
    )
    assert same_bits(added, case.residual + got)


@shapes
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("fuses_norm", [False, True])
def test_every_shape_normalises_and_activates(
    device: Any, rng: np.random.Generator, shape: int, rows: int, fuses_norm: bool
) -> None:
    takes = shape < _core.num_normalising_shapes() and rows <= 8
    case = Case(rng, rows, 104, 328, biased=rows == 3)
    plan = streaming(shape, 1, fuses_norm)

    def multiply(use: str, out_dtype: str) -> Array:
        return np.asarray(
            ops.matmul_by_plan(
                device, plan, use, case.stream, [case.weight], case.biases, case.norm, 1e-5,
                out_dtype=out_dtype,
            )
        )  # fmt: skip

    if fuses_norm and not takes:
        with pytest.raises(TinyvllmError, match="this plan does not take x"):
            multiply("norm", "float32")
        return
    assert error(multiply("norm", "float32"), case.normalised) < BFLOAT16
    assert error(multiply("norm", "bfloat16"), case.normalised) < BFLOAT16
    assert error(multiply("swiglu", "bfloat16"), case.swiglu) < BFLOAT16


@pytest.mark.parametrize("depth", [8, 64, 1000, 1544])
def test_all_shapes_give_the_same_bits_for_a_row_in_every_batch(
    device: Any, rng: np.random.Generator, depth: int
) -> None:
    case = Case(rng, 70, 48, depth)
    alone = [
        ops.matmul_by_plan(device, streaming(0), "store", case.x[m : m + 1], [case.weight])
        for m in (0, 1, 69)
    ]
    for shape in SHAPES:
        whole = ops.matmul_by_plan(device, streaming(shape, 1), "store", case.x, [case.weight])
        assert same_bits(whole[[0, 1, 69]], np.concatenate(alone)), f"shape {shape}"


# Both sides of each number of rows at which a plan changes.
THRESHOLDS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65]


@pytest.mark.parametrize("rows", THRESHOLDS)
def test_the_ops_match_float64_at_every_threshold(
    device: Any, rng: np.random.Generator, rows: int
) -> None:
    case = Case(rng, rows, 48, 72, biased=rows % 4 == 0)
    biases, weights = case.biases, [case.weight]
    got = ops.matmul(device, case.x, weights, biases)
    assert relative_error(got, case.store, case.sizes) < SUM
    rounded = ops.matmul(device, case.x, weights, biases, "bfloat16")
    assert error(rounded, case.store) < BFLOAT16
    added = ops.matmul_add(device, case.x, weights, case.residual, biases)
    assert relative_error(added, case.residual + case.store, case.sizes + 3) < SUM
    normalised = ops.norm_matmul(
        device, case.stream, case.norm, 1e-5, weights, "bfloat16", biases, "bfloat16"
    )
    assert error(normalised, case.normalised) < BFLOAT16
    activated = ops.norm_swiglu(device, case.stream, case.norm, 1e-5, weights, "bfloat16", biases)
    assert error(activated, case.swiglu) < BFLOAT16


def test_a_batch_invariant_context_gives_a_row_the_same_bits_in_every_batch(
    device: Any, rng: np.random.Generator
) -> None:
    ctx, case = invariant(), Case(rng, 2048, 16, 64)
    weights = [case.weight]

    def results(rows: slice) -> list[Array]:
        x, stream, residual = case.x[rows], case.stream[rows], case.residual[rows]
        return [
            ops.matmul(ctx, x, weights),
            ops.matmul_add(ctx, x, weights, residual),
            ops.norm_matmul(ctx, stream, case.norm, 1e-5, weights, "bfloat16"),
            ops.norm_swiglu(ctx, stream, case.norm, 1e-5, weights, "bfloat16"),
        ]

    whole = results(slice(0, 2048))
    for rows in (*THRESHOLDS, 300):
        first = (37 * rows) % 1500
        for part, all_rows in zip(results(slice(first, first + rows)), whole, strict=True):
            assert same_bits(part, all_rows[first : first + rows]), f"{rows} rows"


@pytest.mark.parametrize("rows", [1, 8, 33, 100])
def test_a_run_gives_the_bits_of_the_run_before(
    device: Any, rng: np.random.Generator, rows: int
) -> None:
    case = Case(rng, rows, 64, 520)
    once, again = (
        ops.norm_swiglu(device, case.stream, case.norm, 1e-5, [case.weight], "bfloat16")
        for _ in range(2)
    )
    assert same_bits(once, again)


def test_rows_and_addresses_that_no_vector_load_takes_are_multiplied_all_the_same(
    device: Any, rng: np.random.Generator
) -> None:
    case = Case(rng, 9, 40, 64)
    want = ops.matmul(device, case.x, [case.weight])
    for x in (misaligned(case.x), in_wider_rows(case.x)):
        got = ops.matmul(device, x, [case.weight])
        assert relative_error(got, widen(want), case.sizes) < SUM
    got = ops.matmul(device, case.x, [misaligned(case.weight)])
    assert relative_error(got, widen(want), case.sizes) < SUM
    stream, norm = misaligned(case.stream), misaligned(case.norm)
    got = ops.norm_matmul(device, stream, norm, 1e-5, [case.weight], "bfloat16")
    assert error(got, case.normalised) < BFLOAT16


@shapes
def test_a_nan_reaches_its_own_row_or_output_and_no_other(device: Any, shape: int) -> None:
    x, weight = np.ones((11, 64)), np.ones((40, 64))
    x[3, 63] = weight[17, 0] = np.nan
    got = ops.matmul_by_plan(
        device, streaming(shape), "store", cast(x, "bfloat16"), [cast(weight, "bfloat16")]
    )
    want = np.full((11, 40), 64.0)
    want[3] = want[:, 17] = np.nan
    np.testing.assert_array_equal(got, want)


def test_a_bfloat16_result_of_a_float32_product_is_refused(
    device: Any, rng: np.random.Generator
) -> None:
    case = Case(rng, 2, 8, 8)
    with pytest.raises(TinyvllmError, match="out cannot be bfloat16"):
        ops.matmul(device, case.stream, [case.weight], [], "bfloat16")


def test_a_plan_that_does_not_take_the_operands_is_refused(
    device: Any, rng: np.random.Generator
) -> None:
    case = Case(rng, 2, 8, 12)
    for plan in (streaming(0), _core.MatmulPlan("cublaslt")):
        with pytest.raises(TinyvllmError, match="this plan does not take x"):
            ops.matmul_by_plan(device, plan, "store", case.x, [case.weight])
    case = Case(rng, 2, 8, 16)
    with pytest.raises(TinyvllmError, match="this plan does not take x"):
        ops.matmul_by_plan(device, streaming(len(SHAPES)), "store", case.x, [case.weight])
