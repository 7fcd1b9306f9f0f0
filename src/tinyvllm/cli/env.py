"""`tinyvllm env`: what a bug report needs to know. It never fails: what cannot be found is said."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from tinyvllm.cli.options import Command, option
from tinyvllm.cli.terminal import Output
from tinyvllm.stderr import printable

SCHEMA = 1  # of --json; it changes when a key changes its meaning

_PACKAGES = ("numpy", "tokenizers", "click", "jinja2", "huggingface-hub", "tqdm", "prompt_toolkit")
# By name, and none that may hold a secret (HF_TOKEN).
_VARIABLES = (
    "TINYVLLM_CPU_ISA",
    "TINYVLLM_DEBUG",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "LD_PRELOAD",
    "MALLOC_ARENA_MAX",
)
_CPU_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)
_TIMEOUT_SECONDS = 10

_EPILOG = """\b
Examples:
  tinyvllm env
  tinyvllm env --json
"""

Section = dict[str, Any]


@click.command(cls=Command, epilog=_EPILOG)
@option("--json", "as_json", section="Output", is_flag=True, help="One JSON object.")
def command(as_json: bool) -> None:
    """Versions, build, CPU, memory, limits and GPUs: what a bug report needs.

    Nothing is sent anywhere. No token is shown; paths may have your name in them.
    """
    report = {"schema": SCHEMA, **collect()}
    output = Output()
    if as_json:
        output.write(json.dumps(report) + "\n")
    else:
        output.write("".join(f"{line}\n" for line in _text(report)))
    output.flush()


def collect() -> dict[str, Section]:
    """Section -> name -> value. A section that cannot be had is {"error": why}."""
    sections: dict[str, Callable[[], Section]] = {
        "versions": _versions,
        "build": _build,
        "cpu": _cpu,
        "memory": _memory,
        "limits": _limits,
        "gpu": _gpu,
        "variables": _variables,
    }
    return {name: _guarded(section) for name, section in sections.items()}


def _guarded(section: Callable[[], Section]) -> Section:
    try:
        return section()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _versions() -> Section:
    from importlib import metadata

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "tinyvllm": version("tinyvllm"),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "executable": sys.executable,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip() or None,
        **{package: version(package) for package in _PACKAGES},
    }


def _build() -> Section:
    from tinyvllm import _core

    core: Any = _core  # what it offers depends on the build
    return {
        "core": core.__version__,
        "file": core.__file__,
        "compiler": core.compiler,
        "kernels": core.supported_isas(),
        "cuda": core.cuda_build(),
    }


def _cpu() -> Section:
    found: Section = {"model": cpu_model(), "flags": _cpu_flags()}
    found["logical_cpus"] = os.cpu_count()
    found["allowed_cpus"] = len(os.sched_getaffinity(0))

    def engine() -> Section:
        from tinyvllm import _core

        context = _core.CpuContext()  # obeys TINYVLLM_CPU_ISA
        return {"isa": context.isa, "threads": context.num_threads}

    return {**found, **_guarded(engine)}


def cpu_model() -> str:
    for key, value in _pairs(Path("/proc/cpuinfo")):
        if key in ("model name", "Model", "cpu model"):
            return value
    return platform.processor() or "unknown"


def _cpu_flags() -> list[str]:
    for key, value in _pairs(Path("/proc/cpuinfo")):
        if key in ("flags", "Features"):
            present = set(value.split())
            return [flag for flag in _CPU_FLAGS if flag in present]
    return []


def _memory() -> Section:
    sizes = dict(_pairs(Path("/proc/meminfo")))
    huge_pages = _first_line(Path("/sys/kernel/mm/transparent_hugepage/enabled")) or ""

    def available() -> Section:
        from tinyvllm import _core

        return {"available_to_tinyvllm": _core.available_memory()}

    return {
        "total": _kilobytes(sizes.get("MemTotal")),
        "available": _kilobytes(sizes.get("MemAvailable")),
        "swap": _kilobytes(sizes.get("SwapTotal")),
        "huge_pages": huge_pages.partition("[")[2].partition("]")[0] or None,
        **_guarded(available),
    }


def _limits() -> Section:
    """Of the cgroups that this process is in; None: no limit."""
    import resource

    memory: list[int] = []
    cpus: list[float] = []
    for directory in _cgroup_directories():
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _first_line(directory / name)
            # Version 1 writes a number near 2^63 where there is no limit.
            if text is not None and text.isdigit() and int(text) < 1 << 60:
                memory.append(int(text))
        quota, period = (_first_line(directory / "cpu.max") or "").split() or ("max", "0")
        if quota == "max":
            quota = _first_line(directory / "cpu.cfs_quota_us") or "-1"
            period = _first_line(directory / "cpu.cfs_period_us") or "0"
        if int(quota) > 0 and int(period) > 0:
            cpus.append(int(quota) / int(period))
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    return {
        "cgroup_memory": min(memory, default=None),
        "cgroup_cpus": min(cpus, default=None),
        "address_space": None if address_space == resource.RLIM_INFINITY else address_space,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def _cgroup_directories() -> Iterator[Path]:
    """This process's cgroup and those above it, in version 2's tree or version 1's."""
    root = Path("/sys/fs/cgroup")
    for line in _lines(Path("/proc/self/cgroup")):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for mount in {root, *(root / name for name in controllers.split(",") if name)}:
            place = mount / path.lstrip("/")
            yield from (one for one in (place, *place.parents) if one.is_relative_to(mount))


def _gpu() -> Section:
    found: Section = {**gpu_driver(), **_guarded(_cuda_engine)}
    if not found["devices"] and found["driver"] is None:
        found["driver"] = "none found: no /proc/driver/nvidia, and no nvidia-smi that answers"
    return found


def gpu_driver() -> Section:
    """From nvidia-smi where it answers, else from what the kernel module shows."""
    devices = []
    query = "name,driver_version,compute_cap,memory.total,memory.free,pcie.link.gen.current"
    driver = None
    program = shutil.which("nvidia-smi")
    if program is not None:
        try:
            result = subprocess.run(
                [program, f"--query-gpu={query}", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_SECONDS,
            )
        except (OSError, subprocess.SubprocessError):
            result = None
        if result is not None and result.returncode == 0:
            for line in result.stdout.splitlines():
                values = [value.strip() for value in line.split(",")]
                if len(values) == len(query.split(",")):
                    device = dict(zip(query.split(","), values, strict=True))
                    driver = device.pop("driver_version")
                    devices.append(device)
    proc = Path("/proc/driver/nvidia")
    if driver is None:
        driver = _first_line(proc / "version")
    if not devices:
        for file in sorted(proc.glob("gpus/*/information")):
            devices.append({"name": dict(_pairs(file)).get("Model", "unknown")})
    return {"driver": driver, "devices": devices}


def _cuda_engine() -> Section:
    """Whether this build can use a GPU of this machine, or why not."""
    from tinyvllm import _core

    core: Any = _core
    if core.cuda_build() == "emulated":
        return {"engine": "this build emulates a GPU on the CPU, for tests"}
    try:
        core.require_cuda_build()
        context = core.CudaContext()
    except Exception as error:
        return {"engine": f"not usable: {error}"}
    return {
        "engine": f"usable: compute capability {context.compute_capability}, "
        f"{context.num_multiprocessors} multiprocessors, cuBLASLt {context.cublaslt}"
    }


def _variables() -> Section:
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


# --- Files of the system --------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _first_line(path: Path) -> str | None:
    return next(iter(_lines(path)), None)


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    """The lines `key: value` of a file."""
    for line in _lines(path):
        key, colon, value = line.partition(":")
        if colon:
            yield key.strip(), value.strip()


def _kilobytes(text: str | None) -> int | None:
    return None if text is None else int(text.split()[0]) * 1024


# --- Text -----------------------------------------------------------------------------------------


def _text(report: dict[str, Any]) -> Iterator[str]:
    for section, values in report.items():
        if section == "schema" or not values:
            continue
        yield section
        for name, value in values.items():
            yield printable(f"  {name:<22}{_shown(section, name, value)}")


def _shown(section: str, name: str, value: Any) -> str:
    if value is None:
        return "no limit" if section == "limits" else "none"
    is_size = section == "memory" or name in ("cgroup_memory", "address_space")
    if is_size and isinstance(value, int):
        return f"{value / 2**30:.2f} GiB"
    if isinstance(value, list):
        texts = [
            ", ".join(f"{key} {item}" for key, item in entry.items())
            if isinstance(entry, dict)
            else str(entry)
            for entry in value
        ]
        return ("; " if section == "gpu" else ", ").join(texts) or "none"
    return str(value)
