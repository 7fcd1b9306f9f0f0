"""The thread pool under every op: parallel_for, its errors, its end, and fork."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from tinyvllm import _core
from tinyvllm.errors import InvalidRequestError


def run_python(code: str) -> str:
    """What the code prints in a process of its own, which must end well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 1000])
def test_each_index_is_called_once(num_threads: int, count: int) -> None:
    seen: list[int] = []
    _core.CpuContext(num_threads).parallel_for(count, lambda index, _: seen.append(index))
    assert sorted(seen) == list(range(count))


def test_no_two_calls_at_a_time_share_a_worker() -> None:
    inside = [0] * 4
    most = [0] * 4

    def call(index: int, worker: int) -> None:
        inside[worker] += 1
        most[worker] = max(most[worker], inside[worker])
        time.sleep(0.001)  # lets the others in
        inside[worker] -= 1

    _core.CpuContext(4).parallel_for(40, call)
    assert max(most) == 1


def test_the_work_is_spread_over_the_threads() -> None:
    names = collections.Counter[int]()
    both = threading.Barrier(2, timeout=30)  # broken if one thread has to do it all

    def call(index: int, worker: int) -> None:
        names[worker] += 1
        both.wait()

    _core.CpuContext(2).parallel_for(2, call)
    assert names == {0: 1, 1: 1}


def test_jobs_that_follow_at_once_and_after_a_sleep_all_run() -> None:
    ctx = _core.CpuContext(3)
    total = 0

    def call(index: int, worker: int) -> None:
        nonlocal total
        total += 1

    for job in range(300):
        ctx.parallel_for(4, call)
        if job % 50 == 0:
            time.sleep(0.002)  # longer than the threads spin: they have to be woken
    assert total == 1200


@pytest.mark.parametrize("bad_index", [0, 99])
def test_an_exception_reaches_the_caller_and_the_pool_goes_on(bad_index: int) -> None:
    ctx = _core.CpuContext(3)

    def call(index: int, worker: int) -> None:
        if index == bad_index:
            raise KeyError(f"index {index}")

    for _ in range(20):
        with pytest.raises(KeyError, match=f"index {bad_index}"):
            ctx.parallel_for(100, call)
    seen: list[int] = []
    ctx.parallel_for(100, lambda index, _: seen.append(index))
    assert sorted(seen) == list(range(100))


@pytest.mark.parametrize("failing", [0, 1])
def test_an_exception_reaches_the_caller_from_every_thread(failing: int) -> None:
    both = threading.Barrier(2, timeout=30)  # so that each thread makes one of the two calls

    def call(index: int, worker: int) -> None:
        both.wait()
        if worker == failing:
            raise KeyError(f"worker {worker}")

    with pytest.raises(KeyError, match=f"worker {failing}"):
        _core.CpuContext(2).parallel_for(2, call)


def test_when_all_calls_fail_one_of_their_exceptions_comes_out() -> None:
    def call(index: int, worker: int) -> None:
        raise KeyError(index)

    with pytest.raises(KeyError):
        _core.CpuContext(4).parallel_for(100, call)


def test_pools_of_one_process_do_not_disturb_each_other() -> None:
    counts = [0] * 4

    def use(number: int) -> None:
        ctx = _core.CpuContext(2)

        def call(index: int, worker: int) -> None:
            counts[number] += 1

        for _ in range(30):
            ctx.parallel_for(10, call)

    users = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for user in users:
        user.start()
    for user in users:
        user.join(60)
    assert counts == [300] * 4


@pytest.mark.parametrize("num_threads", [-1, 1025])
def test_a_number_of_threads_out_of_range_is_refused(num_threads: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"num_threads is {num_threads}; .* 1 to 1024"):
        _core.CpuContext(num_threads)


def test_by_default_there_is_a_thread_for_each_core_that_we_may_use() -> None:
    allowed = len(os.sched_getaffinity(0))
    assert 1 <= _core.default_num_threads() <= allowed
    assert _core.CpuContext().num_threads == _core.default_num_threads()


def test_the_affinity_mask_bounds_the_default() -> None:
    code = """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from tinyvllm import _core
        print(_core.default_num_threads())
    """
    assert run_python(code).split() == ["1"]


def test_an_unknown_instruction_set_is_refused_with_those_that_run_here() -> None:
    known = ", ".join(_core.supported_isas())
    with pytest.raises(InvalidRequestError, match=f'"mmx" do not run here; .* has: {known}'):
        _core.CpuContext(1, "mmx")


def test_the_environment_forces_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYVLLM_CPU_ISA", "portable")
    assert _core.CpuContext(1).isa == "portable"
    monkeypatch.delenv("TINYVLLM_CPU_ISA")
    assert _core.CpuContext(1).isa == _core.supported_isas()[0]


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer ends where memory ends"
)
def test_threads_that_the_system_does_not_give_are_an_error_with_the_numbers() -> None:
    code = """
        import resource
        from tinyvllm import _core
        from tinyvllm.errors import CapacityError
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        limit = size + (256 << 20)  # room for the stacks of some of them
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            _core.CpuContext(1024)
        except CapacityError as error:
            print(error)
        done = []
        _core.CpuContext(2).parallel_for(3, lambda index, _: done.append(index))
        print(sorted(done))
    """
    message, done = run_python(code).splitlines()
    assert message.startswith("num_threads is 1024, but after ")
    assert message.endswith("Lower num_threads.")
    assert done == "[0, 1, 2]"


@pytest.mark.parametrize("num_threads", [1, 3])
def test_use_after_fork_is_an_error_that_says_so(num_threads: int) -> None:
    code = f"""
        import os, sys
        from tinyvllm import _core
        ctx = _core.CpuContext({num_threads})
        ctx.parallel_for(10, lambda index, _: None)
        if os.fork() == 0:
            try:
                ctx.parallel_for(10, lambda index, _: None)
            except Exception as error:
                print(type(error).__name__, error, flush=True)
            os._exit(0)
        assert os.wait()[1] == 0
        done = []
        ctx.parallel_for(10, lambda index, _: done.append(index))
        print(len(done))
    """
    message, parent = run_python(code).splitlines()
    assert message.startswith("TinyvllmError This engine was made in process ")
    assert message.endswith("Make the engine after the fork.")
    assert parent == "10"


def test_a_forked_child_may_drop_its_parents_pool_and_make_its_own() -> None:
    code = """
        import os
        from tinyvllm import _core
        ctx = _core.CpuContext(4)
        ctx.parallel_for(10, lambda index, _: None)
        if os.fork() == 0:
            own = _core.CpuContext(4)  # its threads may get the memory of those that are gone
            del ctx
            done = []
            own.parallel_for(10, lambda index, _: done.append(index))
            del own  # joins them
            print(len(done), flush=True)
            os._exit(0)
        print(os.wait()[1])
    """
    assert run_python(code).split() == ["10", "0"]


def test_available_memory_is_within_the_machines() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < _core.available_memory() <= total
