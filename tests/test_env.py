"""`tinyvllm env`: it says what is there, says what is not, and never fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tinyvllm import _core

COMMAND = [sys.executable, "-m", "tinyvllm.cli", "env"]


def env(*arguments: str, environment: Mapping[str, str] | None = None) -> bytes:
    result = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        timeout=60,
        env={**os.environ, **(environment or {})},
    )
    assert (result.returncode, result.stderr) == (0, b"")
    return result.stdout


def report(environment: Mapping[str, str] | None = None) -> Any:
    return json.loads(env("--json", environment=environment))


def program(directory: Path, text: str) -> dict[str, str]:
    """A PATH on which nvidia-smi is this shell script."""
    file = directory / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return {"PATH": f"{directory}:/usr/bin:/bin"}


def test_it_says_what_the_core_says() -> None:
    found = report()
    assert found["schema"] == 1
    assert found["versions"]["tinyvllm"] == _core.__version__ == found["build"]["core"]
    assert found["build"]["kernels"] == _core.supported_isas()
    assert re.match(r"(GCC|Clang|Apple).* \d+\.", found["build"]["compiler"])
    assert found["cpu"]["isa"] == _core.supported_isas()[0]
    assert found["cpu"]["threads"] == _core.default_num_threads()
    assert found["memory"]["available_to_tinyvllm"] <= found["memory"]["total"]
    assert all(found["versions"][name] for name in ("python", "numpy", "tokenizers", "click"))
    assert not any("error" in section for section in found.values() if isinstance(section, dict))


def test_text_has_every_section() -> None:
    lines = env().decode().splitlines()
    assert [line for line in lines if not line.startswith(" ")][:6] == [
        "versions", "build", "cpu", "memory", "limits", "gpu",
    ]  # fmt: skip
    assert any(line.split()[:1] == ["isa"] for line in lines)


def test_gpus_that_nvidia_smi_names(tmp_path: Path) -> None:
    text = 'echo "NVIDIA H200, 570.1, 9.0, 143771 MiB, 143000 MiB, 5"'
    gpu = report(program(tmp_path, f"{text}; {text}"))["gpu"]
    assert gpu["driver"] == "570.1"
    assert [device["name"] for device in gpu["devices"]] == ["NVIDIA H200"] * 2
    assert gpu["devices"][0]["memory.total"] == "143771 MiB"


@pytest.mark.parametrize("text", ["exit 9", "echo No devices were found", "kill -9 $$"])
@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="this machine has a driver")
def test_no_gpu_is_said_in_words(tmp_path: Path, text: str) -> None:
    environment = program(tmp_path, text)
    gpu = report(environment)["gpu"]
    assert gpu["devices"] == []
    assert gpu["driver"].startswith("none found")
    assert b"none found" in env(environment=environment)


def test_an_unknown_isa_is_said_and_does_not_hide_the_rest() -> None:
    found = report({"TINYVLLM_CPU_ISA": "mmx"})
    assert "mmx" in found["cpu"]["error"]
    assert found["cpu"]["logical_cpus"] == os.cpu_count()
    assert found["variables"]["TINYVLLM_CPU_ISA"] == "mmx"


def test_a_core_that_cannot_be_imported_is_said() -> None:
    script = "import sys; sys.modules['tinyvllm._core'] = None\n"
    script += "sys.argv = ['tinyvllm', 'env', '--json']; from tinyvllm.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert result.returncode == 0
    found = json.loads(result.stdout)
    assert "_core" in found["build"]["error"]
    assert found["memory"]["total"] > 0
    assert found["versions"]["numpy"]


def test_tokens_are_not_shown() -> None:
    assert b"secret" not in env(environment={"HF_TOKEN": "hf_secret", "HF_HOME": "/tmp/hf"})
