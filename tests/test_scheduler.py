"""The scheduler, driven through the engine by hypothesis: random arrivals, lengths, forks, aborts
and failures under pools and budgets that are too small, and docs/promises.md, 4 and 5, after every
step. Then the same ideas one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine_driver import MODEL, Driver
from tinyvllm import _core, dummy
from tinyvllm.errors import InvalidRequestError, TinyvllmError

TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7]
MAX_MODEL_LEN = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = dummy.write_checkpoint(
        tmp_path_factory.mktemp("scheduler"), MODEL, seed=3, dtype="float32", tokenizer=False
    )
    return directory


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, fork and go in any order; each gets what it would have got alone."""

    model: Path
    reference: Driver
    alone: dict[str, Any] = {}  # noqa: RUF012 -- shared by all examples

    @initialize(
        block_size=st.sampled_from([1, 3, 4, 16]),
        extra_blocks=st.integers(0, 6),
        max_num_seqs=st.integers(1, 6),
        extra_tokens=st.integers(0, 20),
        prefix_caching=st.booleans(),
        mask=st.sampled_from([0, 2**64 - 1]),
        static_batching=st.sampled_from([False, False, True]),
        fail_at_step=st.sampled_from([0, 0, 0, 4, 9]),
    )
    def make(
        self,
        block_size: int,
        extra_blocks: int,
        max_num_seqs: int,
        extra_tokens: int,
        prefix_caching: bool,
        mask: int,
        static_batching: bool,
        fail_at_step: int,
    ) -> None:
        self.driver = Driver(
            self.model,
            block_size=block_size,
            num_blocks=-(-MAX_MODEL_LEN // block_size) + extra_blocks,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra_tokens,
            prefix_caching=prefix_caching,
            prefix_hash_mask=mask,
            static_batching=static_batching,
            fail_at_step=fail_at_step,
        )
        self.cut_off: dict[tuple[int, int], str] = {}  # outputs that finish() or abort() has ended

    @rule(
        length=st.integers(1, 30),
        start=st.integers(0, 2),
        max_tokens=st.integers(1, 16),
        n=st.sampled_from([1, 1, 2, 3, 4]),
        prompt_logprobs=st.sampled_from([None, None, 1]),
    )
    def add(
        self, length: int, start: int, max_tokens: int, n: int, prompt_logprobs: int | None
    ) -> None:
        self.driver.add(
            [start, *TEXT][:length],
            n=min(n, self.driver.options["max_num_seqs"]),
            max_tokens=max_tokens,
            seed=length + start,
            logprobs=2,
            prompt_logprobs=prompt_logprobs,
        )

    @rule(length=st.integers(MAX_MODEL_LEN, MAX_MODEL_LEN + 8))
    def refuse_what_can_never_fit(self, length: int) -> None:
        before = self.driver.engine.snapshot()
        with pytest.raises(InvalidRequestError, match=f"has {length} tokens .* at most 31"):
            self.driver.add([1] * length)
        assert self.driver.engine.snapshot() == before

    @rule()
    def refuse_more_outputs_than_slots(self) -> None:
        slots = self.driver.options["max_num_seqs"]
        with pytest.raises(
            InvalidRequestError, match=f"n is {slots + 1} and max_num_seqs is {slots}"
        ):
            self.driver.add([1], n=slots + 1)

    @precondition(lambda self: self.driver.records)
    @rule(data=st.data(), reason=st.sampled_from(["stop", "length", "abort"]))
    def finish_one_output(self, data: st.DataObject, reason: str) -> None:
        request = data.draw(st.integers(0, len(self.driver.records)))  # the last is not there
        sample = data.draw(st.integers(0, 3))
        self.driver.engine.finish(request, sample, reason)
        if request == len(self.driver.records) or sample >= len(self.outputs(request)):
            return
        is_forked = len(self.outputs(request)) == 1 or self.outputs(request)[0].tokens
        if is_forked and self.outputs(request)[sample].finish is None:
            self.cut_off.setdefault((request, sample), reason)

    @precondition(lambda self: self.driver.records)
    @rule(data=st.data(), times=st.integers(1, 2))
    def abort(self, data: st.DataObject, times: int) -> None:
        request = data.draw(st.integers(0, len(self.driver.records)))
        for _ in range(times):
            self.driver.engine.abort(request)
        if request == len(self.driver.records):
            return
        for sample, output in enumerate(self.outputs(request)):
            if output.finish is None:
                self.cut_off.setdefault((request, sample), "abort")

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.driver.checked_step()

    @rule()
    def reset_prefix_cache(self) -> None:
        is_idle = not self.driver.engine.snapshot()["sequences"]
        assert self.driver.engine.reset_prefix_cache() == is_idle
        assert not is_idle or self.driver.engine.snapshot()["cached_blocks"] == []

    @invariant()
    def the_books_are_right(self) -> None:
        if hasattr(self, "driver"):
            self.driver.check_books(self.driver.engine.snapshot())

    def outputs(self, request: int) -> Any:
        return self.driver.records[request].outputs

    def alone_result(self, prompt: list[int], options: dict[str, Any]) -> Any:
        key = repr((prompt, options))
        if key not in self.alone:
            self.alone[key] = self.reference.run_alone(prompt, **options)
        return self.alone[key]

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        self.driver.drain()
        for request, record in enumerate(self.driver.records):
            want = self.alone_result(record.prompt, record.options)
            if record.prompt_logprobs is not None:
                assert record.prompt_logprobs == want.prompt_logprobs
            for sample, (got, one) in enumerate(zip(record.outputs, want.outputs, strict=True)):
                assert got.tokens == one.tokens[: len(got.tokens)]
                assert got.logprobs == one.logprobs[: len(got.tokens)]
                if got.finish != "error":
                    assert got.finish == self.cut_off.get((request, sample), "length")
                if got.finish == "length" and (request, sample) not in self.cut_off:
                    assert got.tokens == one.tokens
                    assert record.prompt_logprobs == want.prompt_logprobs
            assert record.error is None or self.driver.options["fail_at_step"]
        assert self.driver.engine.reset_prefix_cache()
        assert self.driver.engine.stats()["num_cached_blocks"] == 0


def test_every_promise_holds_after_every_step(model: Path) -> None:
    SchedulerMachine.model = model
    SchedulerMachine.reference = Driver(model, prefix_caching=False, max_model_len=MAX_MODEL_LEN)
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(max_examples=200, stateful_step_count=30, deadline=None),
    )


# --- One by one -----------------------------------------------------------------------------------


def state(driver: Driver) -> dict[tuple[int, int], dict[str, Any]]:
    return {(one["request"], one["sample"]): one for one in driver.engine.snapshot()["sequences"]}


def running(driver: Driver) -> list[int]:
    return [request for (request, _), one in state(driver).items() if one["running"]]


def num_tokens(driver: Driver) -> list[int]:
    return [len(record.outputs[0].tokens) for record in driver.records]


def test_decode_goes_on_while_a_long_prompt_is_computed_in_chunks(model: Path) -> None:
    driver = Driver(model, max_num_batched_tokens=8)
    driver.add(TEXT[:4], max_tokens=9)
    driver.checked_step()
    driver.add(TEXT[4:], max_tokens=9)  # 26 tokens, of which 7 fit beside one of decode
    for step in range(2, 5):
        driver.checked_step()
        assert num_tokens(driver) == [step, 0]
    driver.checked_step()
    assert num_tokens(driver) == [5, 1]


def test_a_short_prompt_does_not_overtake_a_long_one(model: Path) -> None:
    driver = Driver(model, max_num_batched_tokens=8)
    driver.add(TEXT, max_tokens=9)
    driver.add([1], max_tokens=9)
    for _ in range(3):
        driver.checked_step()
        assert running(driver) == [0]
    driver.checked_step()  # the last 6 tokens of the long one, and there is room for the short one
    assert num_tokens(driver) == [1, 1]


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_who_came_last_is_preempted_and_is_the_next_to_return(
    model: Path, prefix_caching: bool
) -> None:
    driver = Driver(model, num_blocks=6, max_model_len=24, prefix_caching=prefix_caching)
    for start in range(3):  # a block each for the prompt, and up to four in all
        driver.add([start, *TEXT[:3]], max_tokens=12)
    while running(driver) in ([], [0, 1, 2]):
        driver.checked_step()
    assert running(driver) == [0, 1]
    preempted = state(driver)[2, 0]
    assert (preempted["block_table"], preempted["num_computed"]) == ([], 0)
    assert preempted["tokens"] == driver.records[2].prompt + driver.records[2].outputs[0].tokens
    driver.add([3, *TEXT[:3]], max_tokens=1)
    driver.drain()
    assert driver.engine.stats()["num_preemptions"] >= 1
    alone = Driver(model)
    for record in driver.records:
        assert record.result() == alone.run_alone(record.prompt, **record.options).result()


def test_a_request_that_does_not_fit_yet_changes_nothing_while_it_waits(model: Path) -> None:
    def books(driver: Driver) -> Any:
        stats = driver.engine.stats()
        snapshot = driver.engine.snapshot()
        first = [one for one in snapshot["sequences"] if one["request"] == 0]
        counted = ("num_free_blocks", "num_cached_blocks", "prefix_cache_queries", "num_steps")
        return first, snapshot["block_counts"], [stats[name] for name in counted]

    results = []
    for waits in (False, True):
        driver = Driver(model, num_blocks=6, max_model_len=24)
        driver.add(TEXT[:13], max_tokens=3)
        driver.checked_step()
        if waits:
            driver.add(TEXT[:5] + TEXT[:8], max_tokens=1)  # hits a block, and needs three more
        driver.checked_step()
        assert running(driver) == [0]
        results.append(books(driver))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("length", "used", "own"), [(6, 4, 3), (8, 5, 3), (3, 3, 3), (16, 7, 3)]
)  # prompts that end within a block, and at its end
def test_forks_share_what_is_full_and_copy_what_they_write_to(
    model: Path, length: int, used: int, own: int
) -> None:
    driver = Driver(model)
    driver.add(TEXT[:length], n=3, max_tokens=5)
    driver.checked_step()
    tables = [one["block_table"] for one in state(driver).values()]
    assert len(tables) == 3
    assert tables[0] == tables[1] == tables[2]
    driver.checked_step()
    tables = [one["block_table"] for one in state(driver).values()]
    assert len({table[-1] for table in tables}) == own
    assert len({tuple(table[:-1]) for table in tables}) == 1
    assert sum(count > 0 for count in driver.engine.snapshot()["block_counts"]) == used
    driver.drain()


def test_each_fork_draws_for_itself_from_one_prefill(model: Path) -> None:
    driver = Driver(model)
    driver.add(TEXT, n=4, max_tokens=10, temperature=2.0)
    driver.drain()
    assert len({tuple(output.tokens) for output in driver.records[0].outputs}) == 4
    assert driver.engine.stats()["prompt_tokens"] == len(TEXT)
    assert driver.engine.stats()["generation_tokens"] == 40


def test_a_group_waits_for_all_of_its_slots_and_is_not_overtaken(model: Path) -> None:
    driver = Driver(model, max_num_seqs=4)
    driver.add([1], max_tokens=3)
    driver.add([2], max_tokens=6)
    driver.add([3], n=3, max_tokens=6)
    driver.add([4], max_tokens=6)
    for _ in range(2):
        driver.checked_step()
        assert running(driver) == [0, 1]  # the group finds two slots, the last one may not pass it
    driver.checked_step()
    assert driver.records[0].ended
    driver.checked_step()
    assert running(driver) == [1, 2, 2, 2]
    driver.drain()


def test_finishing_one_fork_leaves_the_others_as_they_are(model: Path) -> None:
    want = Driver(model).run_alone(TEXT, n=3, max_tokens=10)
    driver = Driver(model)
    driver.add(TEXT, n=3, max_tokens=10)
    for _ in range(4):
        driver.checked_step()
    driver.engine.finish(0, 1, "stop")
    driver.engine.finish(0, 1, "length")  # too late
    driver.drain()
    outputs = driver.records[0].outputs
    assert [output.finish for output in outputs] == ["length", "stop", "length"]
    assert outputs[1].tokens == want.outputs[1].tokens[:4]
    assert outputs[0] == want.outputs[0]
    assert outputs[2] == want.outputs[2]


def test_an_output_cannot_be_finished_before_the_request_has_forked(model: Path) -> None:
    driver = Driver(model)
    driver.add(TEXT, n=2, max_tokens=2)
    driver.engine.finish(0, 1, "stop")
    driver.drain()
    assert [output.finish for output in driver.records[0].outputs] == ["length", "length"]


def test_an_abort_in_any_state_ends_every_output_once(model: Path) -> None:
    driver = Driver(model, max_num_batched_tokens=20, max_num_seqs=4)
    driver.add(TEXT[:5], n=3, max_tokens=9)
    driver.checked_step()
    driver.add(TEXT, max_tokens=9)  # in the middle of its prompt after the next step
    driver.add([1], max_tokens=9)  # waiting
    driver.checked_step()
    for request in (0, 1, 2, 2):
        driver.engine.abort(request)
    assert driver.engine.stats()["num_free_blocks"] == driver.options["num_blocks"]
    driver.drain()
    for record in driver.records:
        assert {output.finish for output in record.outputs} == {"abort"}


def test_static_batching_admits_nothing_while_something_runs(model: Path) -> None:
    driver = Driver(model, static_batching=True)
    driver.add([1], max_tokens=2)
    driver.add([2], max_tokens=5)
    driver.checked_step()
    driver.add([3], max_tokens=2)
    for _ in range(4):
        driver.checked_step()
        assert len(driver.records[2].outputs[0].tokens) == 0
    driver.checked_step()
    assert num_tokens(driver) == [2, 5, 1]


@pytest.mark.parametrize("n", [1, 4])
def test_the_longest_request_that_fits_the_pool_runs_to_its_end(model: Path, n: int) -> None:
    driver = Driver(model, num_blocks=7)  # 28 tokens, the last of which is never stored
    with pytest.raises(InvalidRequestError, match="has 28 tokens and max_model_len is 28"):
        driver.add(TEXT[:28], n=n)
    driver.add(TEXT[:20], n=n, max_tokens=None)
    driver.add(TEXT[:27], n=n, max_tokens=None)
    driver.drain()
    assert [len(output.tokens) for output in driver.records[0].outputs] == [8] * n
    assert [len(output.tokens) for output in driver.records[1].outputs] == [1] * n


def test_a_sequence_that_cannot_be_sampled_ends_its_request_and_no_other(model: Path) -> None:
    driver = Driver(model)
    impossible = {"min_tokens": 1, "stop_token_ids": list(range(MODEL["vocab_size"]))}
    driver.add(TEXT, max_tokens=5)
    driver.add(TEXT, n=3, max_tokens=5, **impossible)
    driver.add(TEXT[:9], max_tokens=5)
    driver.drain()
    assert isinstance(driver.records[1].error, TinyvllmError)
    assert [output.finish for output in driver.records[1].outputs] == ["error"] * 3
    for number in (0, 2):
        record = driver.records[number]
        want = Driver(model).run_alone(record.prompt, **record.options)
        assert record.result() == want.result()


def test_an_id_may_be_used_again_only_after_its_end_was_reported(model: Path) -> None:
    driver = Driver(model)
    driver.add(TEXT)
    driver.engine.abort(0)
    with pytest.raises(InvalidRequestError, match="Request id 0 is in use"):
        driver.engine.add_request(0, TEXT, _core.SamplingParams())
    driver.step()
    driver.engine.add_request(0, TEXT, _core.SamplingParams())
