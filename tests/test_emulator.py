"""The emulator of a GPU finds the mistakes that are easily made on one, and nothing where none is.

The programs are in csrc/cuda/emulator/traps.cu, each with its mistake and without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from devices import cuda
from tinyvllm import _core
from tinyvllm.errors import TinyvllmError

if _core.cuda_build() != "emulated":
    pytest.skip("needs the emulated build (make emulate)", allow_module_level=True)

# What the emulator refuses to run, and words of its message; it says nothing of the others, whose
# results are wrong.
REFUSED = {
    "divergent_shuffle": "the threads do not meet",
    "exit_before_barrier": "32..63 ended",
    "stale_captured_pointer": "not in allocated device memory",
    "wait_for_previous": "never calls wait_for_previous",
}
ASAN = "libasan" in Path("/proc/self/maps").read_text()
# What ends the process under AddressSanitizer, and its word for it. Without it only freed memory is
# found, because it is NaN.
ASAN_FINDS = {
    "freed_memory": "use-after-poison",
    "shared_write_out_of_bounds": "heap-buffer-overflow",
    "write_out_of_bounds": "heap-buffer-overflow",
}
WRONG = sorted(set(_core.trap_names()) - REFUSED.keys() - ASAN_FINDS.keys())
WRONG += [] if ASAN else ["freed_memory"]


@pytest.mark.parametrize("name", _core.trap_names())
def test_nothing_is_found_where_there_is_no_mistake(name: str) -> None:
    for _ in range(5):  # the order is another one each time
        assert _core.run_trap(cuda(), name, False)


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_makes_the_result_wrong(name: str) -> None:
    assert not _core.run_trap(cuda(), name, True)


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_that_no_gpu_would_survive_is_refused_and_named(name: str) -> None:
    with pytest.raises(TinyvllmError, match=REFUSED[name]) as caught:
        _core.run_trap(cuda(), name, True)
    assert caught.value.exit_code == 1  # the device is there
    assert _core.run_trap(cuda(), name, False)  # the device is as good as before


@pytest.mark.skipif(not ASAN, reason="needs AddressSanitizer (make asan)")
@pytest.mark.parametrize("name", ASAN_FINDS)
def test_asan_ends_the_process_at_a_wrong_address(name: str, tmp_path: Path) -> None:
    code = f"from tinyvllm import _core; _core.run_trap(_core.CudaContext(), {name!r}, True)"
    options = f"detect_leaks=0:exitcode=99:log_path={tmp_path / 'report'}"
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"ASAN_OPTIONS": options}, check=False
    )
    assert result.returncode == 99
    (report,) = tmp_path.glob("report.*")
    assert ASAN_FINDS[name] in report.read_text()


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_the_order_comes_from_the_seed(seed: str) -> None:
    # Whether two streams come in the right order by chance is drawn.
    code = (
        "from tinyvllm import _core; ctx = _core.CudaContext();"
        "print([_core.run_trap(ctx, 'streams_without_event', True) for _ in range(3)])"
    )
    environment = os.environ | {"TINYVLLM_EMULATOR_SEED": seed}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, check=True
        ).stdout
        for _ in range(2)
    )
    assert first == second


def test_an_unknown_trap_is_refused() -> None:
    with pytest.raises(Exception, match="no trap"):
        _core.run_trap(cuda(), "none", True)
