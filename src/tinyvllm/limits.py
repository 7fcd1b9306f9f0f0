"""The machine's own limits, which every speed is held against.

A decode step reads every weight once, so it takes at least their bytes / read bandwidth; a prefill
of many tokens multiplies, so it takes at least its floating-point operations / arithmetic rate.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinyvllm import _core
from tinyvllm.errors import DeviceError, InvalidRequestError


@dataclass(frozen=True)
class MachineLimits:
    """What the device reaches when it only reads, and when it only multiplies."""

    read_bandwidth_bytes_per_second: float
    bf16_flops_per_second: float  # a multiply-add counts as two


def measure_limits(device: str = "auto", num_threads: int | None = None) -> MachineLimits:
    """Measures the limits now, in about a second. They move on a shared machine: measure beside.

    device: auto, cpu or cuda, as for LLM. num_threads: None for as many as an LLM would use.
    """
    if device == "cuda":
        raise DeviceError("device cuda: this build has the CPU engine only. Use --device cpu.")
    if device not in ("auto", "cpu"):
        raise InvalidRequestError(f'device is "{device}"; it must be auto, cpu or cuda.')
    ctx = _core.CpuContext(num_threads or 0)
    return MachineLimits(
        read_bandwidth_bytes_per_second=_core.measure_read_bandwidth(ctx),
        bf16_flops_per_second=_core.measure_arithmetic(ctx),
    )
