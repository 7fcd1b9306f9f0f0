"""Fixtures of the op tests: every set of kernels that this machine can run, and seeded numbers."""

from __future__ import annotations

import numpy as np
import pytest

from tinyvllm import _core


@pytest.fixture(scope="session", params=_core.supported_isas())
def device(request: pytest.FixtureRequest) -> _core.CpuContext:
    """A context on two threads, once for each instruction set."""
    return _core.CpuContext(2, request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2024)


@pytest.fixture(params=[1, 2, 4])
def other_device(request: pytest.FixtureRequest, device: _core.CpuContext) -> _core.CpuContext:
    """The same kernels as `device` on another number of threads."""
    return _core.CpuContext(request.param, device.isa)
