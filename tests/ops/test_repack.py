"""repack: what a matrix is in panels (csrc/ops/repack.h)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from numeric import cast, misaligned
from tinyvllm import _core

ops = _core.ops


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (32, 16), (33, 17), (70, 50), (64, 31)])
def test_a_panel_has_32_rows_side_by_side_in_lanes_of_4_bytes(
    cpu_device: Any, rng: np.random.Generator, dtype: str, rows: int, depth: int
) -> None:
    w = cast(rng.standard_normal((rows, depth)), dtype)
    pair = 2 if dtype == "bfloat16" else 1
    padded = np.pad(w, [(0, -rows % 32), (0, -depth % pair)])
    want = padded.reshape(-1, 32, padded.shape[1] // pair, pair).transpose(0, 2, 1, 3)
    for given in (w, misaligned(w)):
        got = np.asarray(ops.repack(cpu_device, given))
        np.testing.assert_array_equal(got.ravel(), want.ravel())
