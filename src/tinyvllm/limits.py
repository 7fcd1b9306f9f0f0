"""The machine's own limits, which every speed is held against.

A decode step reads every weight once, so it takes at least their bytes / read bandwidth; a prefill
of many tokens multiplies, so it takes at least its floating-point operations / arithmetic rate.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinyvllm import _core
from tinyvllm.errors import DeviceError, InvalidRequestError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class MachineLimits:
    """What the device reaches when it only reads, and when it only multiplies."""

    read_bandwidth_bytes_per_second: float
    bf16_flops_per_second: float  # a multiply-add counts as two


def measure_limits(
    device: str = "auto", num_threads: int | None = None, weights: np.ndarray | None = None
) -> MachineLimits:
    """Measures the limits now, in about a second, or in what four passes over `weights` take. They
    move on a shared machine: measure beside.

    device: auto, cpu or cuda, as for LLM. num_threads: None for as many as an LLM would use.
    weights: bytes to read, say the mapped file of a model (numpy.memmap), since how fast a memory
    reads depends on how much of it there is and in which pages it lies; None: 1 GiB of this
    function's own. A GPU has no use for the last two.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InvalidRequestError(f'device is "{device}"; it must be auto, cpu or cuda.')
    if device != "cpu":
        try:
            return measure_cuda_limits()
        except DeviceError:
            if device == "cuda":
                raise
    ctx = _core.CpuContext(num_threads or 0)
    return MachineLimits(
        read_bandwidth_bytes_per_second=_core.measure_read_bandwidth(ctx, memory=weights),
        bf16_flops_per_second=_core.measure_arithmetic(ctx),
    )


def measure_cuda_limits(
    rows: int = 8192, outputs: int = 16384, depth: int = 16384
) -> MachineLimits:
    """What the card reads from a matrix of 512 MiB, and what its best matrix product multiplies.

    The sizes are those at which a large card is at its limit; the emulator takes smaller ones.
    """
    _core.require_cuda_build()
    ctx = _core.CudaContext()
    timer = _core.MatmulTimer(ctx, [("store", outputs, depth)], rows)
    read = statistics.median(timer.read_milliseconds(passes=10, repetitions=9)) / 1e3
    product = [
        seconds / 1e3
        for plan in timer.plans(rows)
        for seconds in timer.milliseconds(rows, [plan], passes=3, repetitions=9)
    ]
    return MachineLimits(
        read_bandwidth_bytes_per_second=timer.weight_bytes / read,
        bf16_flops_per_second=2.0 * rows * outputs * depth / statistics.median(product),
    )
