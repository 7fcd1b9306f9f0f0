"""Fixtures of the op tests: every device and set of kernels that there is, and seeded numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from devices import Device, cpu, cuda, has_cuda, is_cuda
from tinyvllm import _core

# Ops that run on the CPU only, and on CUDA only.
CPU_ONLY = {"test_paged_attention"}
CUDA_ONLY = {"test_matmul_cuda", "test_paged_attention_cuda", "test_sample_cuda"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test with `device` once for each instruction set of the CPU, and once on CUDA.

    One with `cpu_device` is about the kernels of the CPU alone.
    """
    module = metafunc.module.__name__
    names = [] if module in CUDA_ONLY else list(_core.supported_isas())
    if "cpu_device" in metafunc.fixturenames:
        metafunc.parametrize("cpu_device", names, indirect=True)
    if "device" in metafunc.fixturenames:
        devices = [*names, *(["cuda"] if has_cuda() and module not in CPU_ONLY else [])]
        choices = {  # CUDA has no use for threads, and no panels
            "device": lambda name: [name],
            "other_device": lambda name: [1] if name == "cuda" else [1, 2, 4],
            "layout": lambda name: ["rows"] if name == "cuda" else ["rows", "panels"],
        }
        arguments = [name for name in choices if name in metafunc.fixturenames]
        cases = [
            case
            for device in devices
            for case in itertools.product(*(choices[name](device) for name in arguments))
        ]
        metafunc.parametrize(arguments, cases, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Device:
    """A context: two threads on the CPU, or CUDA."""
    return cuda() if request.param == "cuda" else cpu(request.param, 2)


@pytest.fixture
def layout(request: pytest.FixtureRequest) -> str:
    """How the weights of a product lie: csrc/ops/matmul.h."""
    return str(request.param)


@pytest.fixture
def cpu_device(request: pytest.FixtureRequest) -> Device:
    """A context of two threads."""
    return cpu(request.param, 2)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2024)


@pytest.fixture
def other_device(request: pytest.FixtureRequest, device: Device) -> Device:
    """The same kernels as `device` on another number of threads, or another context on CUDA."""
    return cuda(1) if is_cuda(device) else cpu(device.isa, request.param)
