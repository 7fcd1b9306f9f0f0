"""The command line as a process."""

from __future__ import annotations

import os
import subprocess
import sys

COMMAND = [sys.executable, "-m", "tinyvllm.cli"]


def imported_by(*arguments: str, **environment: str) -> set[str]:
    """The modules that a run imports, by Python's own account."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *COMMAND[1:], *arguments],
        capture_output=True,
        timeout=60,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0
    lines = result.stderr.decode().splitlines()
    return {line.split("|")[2].strip() for line in lines if line.startswith("import time:")}
