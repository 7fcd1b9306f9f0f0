"""benchmarks/tune_gemm.py on a tiny model: what it measures becomes a table for the next build."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from devices import cuda, has_cuda

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ROW = re.compile(
    r"\{(\d+), (\d+), MatmulUse::k(Store|Add|Norm|NormSwiGlu), (\d+), "
    r"(cublaslt\(\d+\)|streaming\(\{\d+(, \d+){3}\}, \d+(, true)?\))\},"
)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("tune_gemm")


@pytest.mark.skipif(not has_cuda(), reason="needs a GPU, or the emulator")
def test_a_table_names_the_card_and_the_library_that_it_holds_for(module: Any) -> None:
    header = "\n".join(module.table_header(cuda()))
    assert all(line.startswith("// ") for line in header.splitlines())
    assert cuda().name in header
    assert f"cuBLASLt {cuda().cublaslt}" in header


@pytest.mark.parametrize("rows", [[1, 9]] if has_cuda() else [])
def test_a_table_has_a_plan_for_every_matrix_and_number_of_rows(
    rows: list[int], module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("CUBLASLT_RANKS", 1), ("FINALISTS", 1)):
        monkeypatch.setattr(module, name, value)
    model = module.Model(layers=1, hidden=32, query=64, qkv=96, intermediate=40, vocab=56)
    results = module.tune(cuda(), model, rows)
    table = [ROW.fullmatch(line) for line in module.table_rows(model, results)]
    assert all(table)
    found = {(int(m[1]), int(m[2]), m[3], int(m[4])) for m in table if m}
    want = {(96, 32, "Norm"), (32, 64, "Add"), (80, 32, "NormSwiGlu"), (32, 40, "Add")}
    want.add((56, 32, "Norm"))
    assert found == {(*matrix, count) for matrix in want for count in rows}
