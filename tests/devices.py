"""The devices that tests can run ops on, each context made once."""

from __future__ import annotations

import functools
from typing import Any

from tinyvllm import _core
from tinyvllm.errors import DeviceError

Device = Any  # _core.CpuContext or, in a build with CUDA, _core.CudaContext


@functools.cache
def cpu(isa: str, num_threads: int) -> Device:
    return _core.CpuContext(num_threads, isa)


@functools.cache
def cuda(number: int = 0) -> Device:
    """A context on the GPU, or on the emulator in a build with it; all share the device."""
    return _core.CudaContext()


@functools.cache
def has_cuda() -> bool:
    """Whether this build has CUDA and, unless it is emulated, this machine a GPU."""
    if _core.cuda_build() == "none":
        return False
    try:
        cuda()
    except DeviceError:
        return False
    return True


def is_cuda(device: Device) -> bool:
    return not isinstance(device, _core.CpuContext)
