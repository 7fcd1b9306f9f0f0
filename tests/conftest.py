"""Fixtures that the whole suite shares."""

from __future__ import annotations

import importlib
import os
import signal
from types import ModuleType
from typing import Any

import pytest


def pytest_configure() -> None:
    """A shell's background jobs ignore SIGINT, and so would what tests of Ctrl-C start from one."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """The oracle. Where it is not installed its tests are skipped, and fail if it is required."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        if os.environ.get("TINYVLLM_REQUIRE_ORACLE") == "1":
            pytest.fail(f"TINYVLLM_REQUIRE_ORACLE=1, but Transformers cannot be imported: {error}")
        pytest.skip("needs Transformers (pip install -r requirements-oracle.txt)")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the worst figures that the oracle tests have measured."""
    import oracle

    for line in oracle.summary_lines():
        terminalreporter.line(line)
