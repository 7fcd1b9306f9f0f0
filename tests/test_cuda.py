"""A build with CUDA: what it needs, what it says where there is no GPU, the way to the device."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import numpy as np
import pytest

from devices import cuda, has_cuda
from tinyvllm import _core
from tinyvllm.errors import CapacityError, DeviceError

on_a_device = pytest.mark.skipif(not has_cuda(), reason="needs a GPU, or the emulator")


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


without_driver = pytest.mark.skipif(
    _core.cuda_build() != "gpu" or has_driver(),
    reason="needs a build with CUDA on a machine without a driver",
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_the_import_loads_no_library_of_nvidia() -> None:
    result = run("-c", "import tinyvllm._core; print(open('/proc/self/maps').read())")
    assert result.returncode == 0, result.stderr
    for library in ("libcuda", "libcublas", "libcudart", "libnvidia"):
        assert library not in result.stdout


@without_driver
def test_a_context_without_a_driver_says_so() -> None:
    with pytest.raises(DeviceError, match=r"^device cuda: no NVIDIA driver"):
        _core.CudaContext()


@without_driver
def test_the_command_line_without_a_driver_exits_with_5() -> None:
    result = run("-m", "tinyvllm.cli", "generate", "--device", "cuda", "--prompt", "x")
    assert result.returncode == 5
    assert result.stdout == ""
    assert "device cuda: no NVIDIA driver" in result.stderr


@on_a_device
def test_a_gpu_that_is_not_there_is_refused_by_number() -> None:
    with pytest.raises(DeviceError, match="there is no GPU 99"):
        _core.CudaContext(99)


@on_a_device
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_what_is_uploaded_comes_back(num_threads: int) -> None:
    rng = np.random.default_rng(7)
    # Nothing, a byte, less than a buffer of 2 MiB, just that and a byte more, and several of them.
    sizes = [0, 1, 1000, 2 << 20, (2 << 20) + 1, 13 << 20]
    arrays = [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    back = _core.upload_and_read_back(cuda(), arrays, num_threads)
    assert [array.tobytes() for array in back] == [array.tobytes() for array in arrays]


@pytest.mark.skipif(_core.cuda_build() != "emulated", reason="the emulator's memory is small")
def test_memory_that_the_device_lacks_is_named_with_the_numbers() -> None:
    array = np.zeros(1 << 30, np.uint8)  # of which the kernel gives no page before it is written
    with pytest.raises(CapacityError, match=r"1073741824 bytes are needed, [0-9]+ of [0-9]+ are"):
        _core.upload_and_read_back(cuda(), [array], 1)
