"""AsyncEngine: streams beside each other, aborts, slow readers, failures, and its one thread."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from families import FAMILIES
from tinyvllm import LLM, AsyncEngine, RequestOutput, SamplingParams
from tinyvllm.errors import CheckpointError, InvalidRequestError, TinyvllmError
from tinyvllm.request import ParsedPrompt

FOREVER = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama-3.2-v5"].write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(directory: Path) -> Iterator[AsyncEngine]:
    """A pool so small that requests wait and are preempted."""
    engine = AsyncEngine(directory, max_num_seqs=8, num_gpu_blocks_override=65, num_threads=1)
    yield engine
    engine.close()


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, timeout=30))


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    async for output in outputs:
        final = output
    assert final.finished
    return final


async def is_empty(engine: AsyncEngine) -> bool:
    stats = await engine.stats()
    return bool(
        stats["num_requests_running"] == stats["num_requests_waiting"] == 0
        and stats["num_free_blocks"] == stats["num_blocks"]
    )


async def wait_for_abort(engine: AsyncEngine, most_tokens: int) -> None:
    """Waits until the pool is empty, and before the requests could have ended by themselves."""
    before = (await engine.stats())["generation_tokens"]
    while not await is_empty(engine):
        await asyncio.sleep(0)
    assert (await engine.stats())["generation_tokens"] - before < most_tokens


def step_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "tinyvllm-step"]


# --- Outputs ------------------------------------------------------------------------------------


def test_streams_beside_each_other_equal_the_same_requests_alone(
    directory: Path, engine: AsyncEngine
) -> None:
    rng = random.Random(0)
    requests = [
        (
            [rng.randrange(3, 380) for _ in range(rng.randrange(1, 60))],
            SamplingParams(
                n=rng.choice([1, 1, 3]),
                temperature=rng.choice([0.0, 1.0]),
                seed=number,
                max_tokens=rng.randrange(1, 40),
                logprobs=rng.choice([None, 2]),
                prompt_logprobs=rng.choice([None, 1]),
                ignore_eos=True,
            ),
        )
        for number in range(40)
    ]

    async def all_at_once() -> list[RequestOutput]:
        return await asyncio.gather(*(last(engine.generate(*request)) for request in requests))

    together = run(all_at_once())
    with LLM(directory, num_threads=1, enable_prefix_caching=False) as llm:
        for request, output in zip(requests, together, strict=True):
            (alone,) = llm.generate(*request, use_tqdm=False)
            assert output.outputs == alone.outputs
            assert output.prompt_logprobs == alone.prompt_logprobs
            assert output.prompt_token_ids == request[0]


def test_an_output_begins_with_the_one_before_it_and_stays_as_it_is(engine: AsyncEngine) -> None:
    async def collect() -> list[RequestOutput]:
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=1)
        return [output async for output in engine.generate("Hello", params)]

    outputs = run(collect())
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    for before, after in itertools.pairwise(outputs):
        old, new = before.outputs[0], after.outputs[0]
        assert new.text.startswith(old.text)
        assert new.token_ids[: len(old.token_ids)] == old.token_ids
        assert len(old.token_ids) < len(new.token_ids)
        assert len(old.logprobs or []) == len(old.token_ids)


def test_what_the_last_output_says_of_its_prompt(engine: AsyncEngine) -> None:
    prompt = list(range(3, 53))

    async def twice() -> list[RequestOutput]:
        params = SamplingParams(max_tokens=1)
        return [await last(engine.generate(prompt, params, f"number {i}")) for i in range(2)]

    first, second = run(twice())
    assert (first.request_id, second.request_id) == ("number 0", "number 1")
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 48)


def test_a_stop_string_ends_the_stream(engine: AsyncEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=24)
    whole = run(last(engine.generate("Hello", params))).outputs[0].text
    params.stop = whole[6:11]
    output = run(last(engine.generate("Hello", params))).outputs[0]
    assert output.text == whole[: whole.index(params.stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", params.stop)


def test_a_prompt_that_takes_long_to_parse_stops_no_other_task(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_task_ran = threading.Event()
    parse = engine._engine.parse

    def slow_parse(prompt: str) -> ParsedPrompt:
        assert other_task_ran.wait(10)
        return parse(prompt)

    async def both() -> None:
        reader = asyncio.create_task(last(engine.generate("Hello", SamplingParams(max_tokens=2))))
        await asyncio.sleep(0.01)
        other_task_ran.set()
        await reader

    monkeypatch.setattr(engine._engine, "parse", slow_parse)
    run(both())


def test_a_slow_reader_delays_nobody_and_its_steps_are_merged(engine: AsyncEngine) -> None:
    async def slow_and_quick() -> tuple[int, RequestOutput]:
        params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        async with aclosing(engine.generate("slow", params)) as slow:
            await anext(slow)  # and no further, until the others are through
            await asyncio.gather(*(last(engine.generate("quick", params)) for _ in range(3)))
            while (await engine.stats())["num_requests_running"]:
                await asyncio.sleep(0)
            rest = [output async for output in slow]
        return len(rest), rest[-1]

    num_outputs, final = run(slow_and_quick())
    assert num_outputs == 1
    assert len(final.outputs[0].token_ids) == 100


def test_engines_and_event_loops_beside_each_other(directory: Path, engine: AsyncEngine) -> None:
    """Two engines in one process, one of them read from three event loops."""
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    texts: list[str] = []

    def one_loop() -> None:
        texts.append(run(last(engine.generate("Hello", params))).outputs[0].text)

    async def other_engine() -> str:
        async with AsyncEngine(directory, num_threads=1) as other:
            return (await last(other.generate("Hello", params))).outputs[0].text

    threads = [threading.Thread(target=one_loop) for _ in range(3)]
    for thread in threads:
        thread.start()
    texts.append(run(other_engine()))
    for thread in threads:
        thread.join()
    assert len(texts) == 4
    assert len(set(texts)) == 1


# --- Aborts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_tasks_cancelled_at_random_points_leave_the_pool_empty(
    engine: AsyncEngine, seed: int
) -> None:
    rng = random.Random(seed)

    async def cancel_all() -> None:
        async def one(delay: float) -> bool:
            prompt = [rng.randrange(3, 380) for _ in range(50)]
            task = asyncio.create_task(last(engine.generate(prompt, FOREVER)))
            await asyncio.sleep(delay)
            if not task.cancel():  # it has come to its end
                return False
            with pytest.raises(asyncio.CancelledError):
                await task
            return True

        delays = [rng.choice([0, rng.random() * 0.1]) for _ in range(30)]
        assert any(await asyncio.gather(*map(one, delays)))
        assert await is_empty(engine)

    run(cancel_all())


def test_leaving_the_loop_aborts(engine: AsyncEngine) -> None:
    async def leave() -> None:
        async for output in engine.generate("Hello", FOREVER):
            assert not output.finished
            break
        await wait_for_abort(engine, most_tokens=500)

    run(leave())


def test_an_exception_in_the_loop_aborts(engine: AsyncEngine) -> None:
    async def read() -> None:
        async with aclosing(engine.generate("Hello", FOREVER)) as outputs:
            async for _ in outputs:
                raise ZeroDivisionError

    async def fail() -> None:
        with pytest.raises(ZeroDivisionError):
            await read()
        assert await is_empty(engine)

    run(fail())


def test_abort_by_id_gives_the_reader_its_last_output(engine: AsyncEngine) -> None:
    async def abort() -> RequestOutput:
        async for output in engine.generate("Hello", FOREVER, request_id="mine"):
            final = output
            await engine.abort("mine")
            await engine.abort(["mine", "nobody's"])
        await engine.abort("mine")  # when it has ended
        assert await is_empty(engine)
        return final

    final = run(abort())
    assert final.finished
    assert final.outputs[0].finish_reason == "abort"


def test_a_request_that_waits_can_be_aborted(engine: AsyncEngine) -> None:
    async def abort() -> RequestOutput:
        running = [engine.generate("Hello", FOREVER) for _ in range(8)]  # max_num_seqs
        for outputs in running:
            await anext(outputs)
        waiting = asyncio.create_task(last(engine.generate("Hello", FOREVER, "waits")))
        while not (await engine.stats())["num_requests_waiting"]:
            await asyncio.sleep(0)
        await engine.abort("waits")
        final = await waiting
        assert (await engine.stats())["num_requests_running"] == 8
        for outputs in running:
            await outputs.aclose()
        assert await is_empty(engine)
        return final

    (output,) = run(abort()).outputs
    assert (output.token_ids, output.finish_reason) == ([], "abort")


def test_requests_of_a_loop_that_is_gone_are_aborted(engine: AsyncEngine) -> None:
    """Their tasks cannot be told any more."""
    loop = asyncio.new_event_loop()
    outputs = engine.generate("Hello", FOREVER)
    loop.run_until_complete(anext(outputs))
    loop.close()
    run(wait_for_abort(engine, most_tokens=500))
    del outputs


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ([10**6], FOREVER),
        ([], FOREVER),
        ([3] * 100_000, FOREVER),
        ({"text": "Hello"}, FOREVER),
        ("Hello", {"temperature": 0}),
        ("Hello", SamplingParams(n=9)),  # above max_num_seqs
        ("Hello", SamplingParams(logit_bias={10**6: 1.0})),
    ],
)
def test_what_cannot_be_served_raises_and_queues_nothing(
    engine: AsyncEngine, prompt: Any, params: Any
) -> None:
    async def refused() -> None:
        steps = (await engine.stats())["num_steps"]
        with pytest.raises(InvalidRequestError):
            await anext(engine.generate(prompt, params, request_id="again"))
        assert (await engine.stats())["num_steps"] == steps
        await last(engine.generate("Hello", SamplingParams(max_tokens=1), request_id="again"))

    run(refused())


def test_an_id_in_use_is_refused(engine: AsyncEngine) -> None:
    async def twice() -> None:
        async with aclosing(engine.generate("Hello", FOREVER, request_id="mine")) as first:
            await anext(first)
            with pytest.raises(InvalidRequestError, match='"mine" is in use'):
                await anext(engine.generate("Hello", FOREVER, request_id="mine"))
            await anext(first)  # it goes on

    run(twice())


def test_ids_that_are_made_up_avoid_those_in_use(engine: AsyncEngine) -> None:
    async def collide() -> None:
        short = SamplingParams(max_tokens=1)
        number = int((await last(engine.generate("Hello", short))).request_id.split("-")[1])
        async with aclosing(engine.generate("Hello", FOREVER, f"request-{number + 1}")) as first:
            await anext(first)
            output = await last(engine.generate("Hello", short))
            assert output.request_id == f"request-{number + 2}"

    run(collide())


# --- Failures -----------------------------------------------------------------------------------


def test_a_file_cut_off_while_running_reaches_every_reader(tmp_path: Path) -> None:
    directory = FAMILIES["llama-3.2-v5"].write(tmp_path)

    async def cut_off() -> None:
        async with AsyncEngine(directory, dtype="bfloat16", num_threads=1) as engine:
            tasks = [asyncio.create_task(last(engine.generate("Hello", FOREVER))) for _ in range(5)]
            async for _ in engine.generate("Hello", SamplingParams(max_tokens=1)):
                os.truncate(directory / "model.safetensors", 4096)
            errors = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(error, CheckpointError) for error in errors)
            assert len({id(error) for error in errors}) == 5  # a traceback each
            assert await is_empty(engine)
            assert engine.is_running

    run(cut_off())


def test_a_step_that_fails_reaches_every_reader_and_later_calls(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cause = RuntimeError("a bug")

    async def fail() -> None:
        engine = AsyncEngine(directory, num_threads=1)
        tasks = [asyncio.create_task(last(engine.generate("Hello", FOREVER))) for _ in range(5)]
        await anext(engine.generate("Hello", SamplingParams(max_tokens=1)))

        def step() -> None:
            raise cause

        monkeypatch.setattr(engine._engine, "step", step)
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        for error in errors:
            assert isinstance(error, TinyvllmError)
            assert error.__cause__ is cause
        assert not engine.is_running
        for later in (anext(engine.generate("Hello", FOREVER)), engine.stats()):
            with pytest.raises(TinyvllmError, match="a bug") as refused:
                await later
            assert refused.value.__cause__ is cause
        await engine.abort("request-0")
        engine.close()

    run(fail())
    assert not [thread for thread in step_threads() if not thread.daemon]


# --- Its thread ---------------------------------------------------------------------------------


def test_close_while_running_reaches_every_reader(directory: Path) -> None:
    before = step_threads()

    async def close() -> None:
        engine = AsyncEngine(directory, num_threads=1)
        tasks = [asyncio.create_task(last(engine.generate("Hello", FOREVER))) for _ in range(5)]
        await anext(engine.generate("Hello", SamplingParams(max_tokens=1)))
        async with engine:
            assert len(step_threads()) == len(before) + 1
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, TinyvllmError)
            assert "closed" in str(error)
        assert not engine.is_running
        engine.close()
        with pytest.raises(TinyvllmError, match="closed"):
            await anext(engine.generate("Hello", FOREVER))

    run(close())
    assert step_threads() == before


def test_the_last_reference_takes_the_thread_with_it(directory: Path) -> None:
    before = step_threads()
    engine = AsyncEngine(directory, num_threads=1)
    run(last(engine.generate("Hello", SamplingParams(max_tokens=3))))
    del engine
    gc.collect()
    assert step_threads() == before


def test_an_idle_engine_uses_no_cpu_and_wakes_at_once(engine: AsyncEngine) -> None:
    async def one_token() -> None:
        await last(engine.generate("Hello", SamplingParams(max_tokens=1)))

    run(one_token())
    used = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - used < 0.1
    run(one_token())  # which hangs if it sleeps on


def test_a_process_ends_with_an_engine_open(directory: Path) -> None:
    script = f"""
import asyncio
from tinyvllm import AsyncEngine, SamplingParams

engine = AsyncEngine({str(directory)!r}, num_threads=1)
outputs = engine.generate("Hello", SamplingParams(max_tokens=None, ignore_eos=True))
loop = asyncio.new_event_loop()
loop.run_until_complete(anext(outputs))
print("ends", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr


def test_a_fork_says_whose_engine_it_is(engine: AsyncEngine) -> None:
    """The child has neither the step thread nor the engine's; it may leave, and end."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            run(last(engine.generate("Hello", FOREVER)))
        except TinyvllmError as error:
            engine.close()
            os.write(writer, f"{engine.is_running} {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert text.startswith("False This engine belongs to process")
    assert engine.is_running
