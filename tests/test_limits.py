"""The machine's limits: real rates, checked against NumPy doing the same kind of work."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

import devices
from tinyvllm import _core
from tinyvllm.errors import DeviceError, InvalidRequestError
from tinyvllm.limits import measure_cuda_limits, measure_limits


@pytest.mark.parametrize("given", [False, True])
def test_no_copy_reads_faster_than_the_limit(given: bool) -> None:
    """A copy reads each byte and writes it, too; half the margin is for a restless machine."""
    source = np.ones(1 << 26, np.float32)
    target = np.zeros_like(source)
    best = min(_seconds_of_copy(source, target) for _ in range(3))
    weights = source.view(np.uint8) if given else None
    limit = measure_limits("cpu", 1, weights).read_bandwidth_bytes_per_second
    assert limit > 0.5 * source.nbytes / best


def _seconds_of_copy(source: np.ndarray, target: np.ndarray) -> float:
    began = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - began


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (np.zeros(0, np.uint8), "Of 0 bytes no read bandwidth"),
        (np.zeros((1 << 20) - 1, np.uint8), "Of 1048575 bytes .* give 1 MiB or more"),
        (np.zeros(2 << 20, np.uint8)[1:], "a multiple of 4"),
    ],
)
def test_memory_that_cannot_be_measured_is_refused(memory: np.ndarray, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        _core.measure_read_bandwidth(_core.CpuContext(1), 0.01, memory)
    with pytest.raises(InvalidRequestError, match=said):
        measure_limits("cpu", 1, memory)


def test_memory_is_measured_where_it_lies_or_not_at_all() -> None:
    """A copy of it would be other memory."""
    with pytest.raises(TypeError, match="incompatible"):
        _core.measure_read_bandwidth(_core.CpuContext(1), 0.01, np.zeros(4 << 20, np.uint8)[::2])


@pytest.mark.parametrize("isa", _core.supported_isas())
def test_no_matmul_multiplies_faster_than_the_limit_of_its_instruction_set(isa: str) -> None:
    ctx = _core.CpuContext(1, isa)
    x = np.full((96, 1024), 0x3F80, np.uint16)  # ones
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        _core.ops.matmul(ctx, x, [x])
        best = min(best, time.perf_counter() - began)
    limit = max(_core.measure_arithmetic(ctx, 0.02) for _ in range(3))
    assert limit > 2 * 96 * 96 * 1024 / best


def test_a_better_instruction_set_has_a_higher_limit_and_comes_first() -> None:
    rates = {
        isa: max(_core.measure_arithmetic(_core.CpuContext(1, isa), 0.02) for _ in range(3))
        for isa in _core.supported_isas()
    }
    # 512 bits may be two times 256, and Intel's vdpbf16ps four multiply-adds of 256.
    for better, worse in itertools.pairwise(rates.values()):
        assert better > 0.8 * worse
    if "avx2" in rates:
        assert rates["avx2"] > 1.5 * rates["portable"]
    if "amx" in rates:
        assert rates["amx"] > 2 * max(rates["avx512bf16"], rates["avx512"])


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), 61.0])
@pytest.mark.parametrize("measure", [_core.measure_arithmetic, _core.measure_read_bandwidth])
def test_a_time_that_makes_no_sense_is_refused(measure: object, seconds: float) -> None:
    with pytest.raises(InvalidRequestError, match="seconds is"):
        measure(_core.CpuContext(1), seconds)  # type: ignore[operator]


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match='device is "tpu"'):
        measure_limits("tpu")


@pytest.mark.skipif(_core.cuda_build() != "none", reason="this build has CUDA")
def test_a_build_without_cuda_says_so_and_auto_takes_the_cpu() -> None:
    with pytest.raises(DeviceError, match="device cuda: this build has no CUDA backend"):
        measure_limits("cuda")
    assert measure_limits("auto").bf16_flops_per_second > 0


@pytest.mark.skipif(not devices.has_cuda(), reason="needs CUDA, real or emulated")
def test_a_card_has_limits() -> None:
    limits = measure_cuda_limits(rows=16, outputs=64, depth=64)
    assert limits.read_bandwidth_bytes_per_second > 0
    assert limits.bf16_flops_per_second > 0
