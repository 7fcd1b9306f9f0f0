"""The prefix cache through the engine: what is found again, what is evicted and when, what hits may
never change, and what a step that fails leaves behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine_driver import MODEL, Driver
from tinyvllm import dummy
from tinyvllm.errors import CheckpointError, TinyvllmError

# No two of its blocks begin alike, so that a hit on one is no hit on another.
TEXT = [7 * i % 64 for i in range(60)]
OTHER = [(11 * i + 5) % 64 for i in range(60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = dummy.write_checkpoint(
        tmp_path_factory.mktemp("prefix"),
        MODEL | {"max_position_embeddings": 1200},
        seed=3,
        dtype="float32",
        tokenizer=False,
    )
    return directory


def run(driver: Driver, prompt: list[int], **options: Any) -> Any:
    """The record of a request that nothing else runs beside."""
    request = driver.add(prompt, **{"max_tokens": 1, "logprobs": 5, **options})
    driver.drain()
    return driver.records[request]


def computed(driver: Driver) -> int:
    return int(driver.engine.stats()["prompt_tokens"])


def want(model: Path, record: Any) -> Any:
    """What the request gets where nothing was ever cached."""
    driver = Driver(model, prefix_caching=False, num_blocks=300)
    return driver.run_alone(record.prompt, **record.options).result()


# --- Hits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 9, 16, 17])
def test_a_repeated_prompt_computes_only_what_is_not_in_whole_blocks_and_its_last_token(
    model: Path, length: int
) -> None:
    driver = Driver(model)
    first = run(driver, TEXT[:length])
    again = run(driver, TEXT[:length])
    hit = (length - 1) // 4 * 4  # a whole prompt in the cache still computes its last block
    assert (first.num_cached, again.num_cached) == (0, hit)
    assert computed(driver) == length + length - hit
    stats = driver.engine.stats()
    assert (stats["prefix_cache_queries"], stats["prefix_cache_hits"]) == (2 * length, hit)
    assert again.result() == first.result() == want(model, first)


@pytest.mark.parametrize(("common", "hit"), [(3, 0), (4, 4), (9, 8), (20, 20)])
def test_a_common_beginning_is_found_in_whole_blocks(model: Path, common: int, hit: int) -> None:
    driver = Driver(model)
    run(driver, TEXT[:30])
    record = run(driver, TEXT[:common] + OTHER[:10])
    assert record.num_cached == hit
    assert record.result() == want(model, record)


def test_equal_blocks_after_another_beginning_are_no_hit(model: Path) -> None:
    driver = Driver(model)
    run(driver, TEXT[:20])
    assert run(driver, OTHER[:4] + TEXT[4:20]).num_cached == 0
    assert run(driver, TEXT[4:20]).num_cached == 0


def test_the_next_turn_of_a_conversation_finds_the_answer_too(model: Path) -> None:
    driver = Driver(model)
    first = run(driver, TEXT[:10], max_tokens=11)
    turn = first.prompt + first.outputs[0].tokens + OTHER[:5]
    record = run(driver, turn)
    assert record.num_cached == 20  # of 21, whose last token was never computed
    assert record.result() == want(model, record)


def test_requests_of_one_step_hit_what_that_step_computes(model: Path) -> None:
    driver = Driver(model, max_num_batched_tokens=100)
    for _ in range(3):
        driver.add(TEXT[:20], max_tokens=4, logprobs=5)
    driver.checked_step()
    assert computed(driver) == 20 + 4 + 4
    assert driver.engine.stats()["num_steps"] == 1
    driver.drain()
    assert [record.num_cached for record in driver.records] == [0, 16, 16]
    for record in driver.records:
        assert record.result() == want(model, record)


def test_a_shared_prefix_of_1000_tokens_is_computed_once(model: Path) -> None:
    prefix = [(i * i + i // 7) % 64 for i in range(1000)]
    totals = []
    for prefix_caching in (False, True):
        driver = Driver(
            model,
            block_size=16,
            num_blocks=300,
            max_num_batched_tokens=512,
            prefix_caching=prefix_caching,
        )
        for number in range(4):
            driver.add([*prefix, number, *TEXT[:7]], max_tokens=3)
        driver.drain()
        totals.append(computed(driver))
        for record in driver.records:
            assert record.num_cached in ({0, 992} if prefix_caching else {0})
    assert totals == [4 * 1008, 1008 + 3 * 16]


def test_without_prefix_caching_nothing_is_kept_or_counted(model: Path) -> None:
    driver = Driver(model, prefix_caching=False)
    records = [run(driver, TEXT[:20]) for _ in range(2)]
    assert [record.num_cached for record in records] == [0, 0]
    stats = driver.engine.stats()
    names = ("num_cached_blocks", "prefix_cache_queries", "prefix_cache_hits")
    assert [stats[name] for name in names] == [0, 0, 0]
    assert computed(driver) == 40


def test_prompt_logprobs_read_no_hits_but_fill_the_cache(model: Path) -> None:
    driver = Driver(model)
    first = run(driver, TEXT[:20], prompt_logprobs=3)
    again = run(driver, TEXT[:20], prompt_logprobs=3)
    assert (first.num_cached, again.num_cached) == (0, 0)
    assert len(first.prompt_logprobs) == 19
    assert again.result() == first.result()
    assert run(driver, TEXT[:20]).num_cached == 16


def test_prompt_logprobs_come_once_although_the_request_is_preempted(model: Path) -> None:
    driver = Driver(model, num_blocks=16, max_num_batched_tokens=10)
    for start in range(4):
        driver.add([start, *TEXT[:29]], max_tokens=12, prompt_logprobs=3, logprobs=5)
    driver.drain()
    assert driver.engine.stats()["num_preemptions"] > 0
    for record in driver.records:
        assert record.result() == want(model, record)


def test_who_was_preempted_finds_its_own_blocks_again(model: Path) -> None:
    driver = Driver(model, num_blocks=8, max_model_len=32)
    driver.add(TEXT[:8], max_tokens=20, logprobs=5)
    driver.add(OTHER[:8], max_tokens=20, logprobs=5)
    driver.drain()
    stats = driver.engine.stats()
    assert stats["num_preemptions"] > 0
    assert stats["prefix_cache_hits"] > 0
    assert [record.num_cached for record in driver.records] == [0, 0]  # of the prompt, at first
    for record in driver.records:
        assert record.result() == want(model, record)


def test_who_was_preempted_and_evicted_is_published_anew_from_its_beginning(model: Path) -> None:
    driver = Driver(model, num_blocks=7)
    driver.add(TEXT[:8], max_tokens=20, logprobs=5)  # needs all seven blocks before its end
    driver.add(OTHER[:8], max_tokens=20, logprobs=5)
    driver.drain()
    stats = driver.engine.stats()
    assert stats["num_preemptions"] == 1
    assert stats["prefix_cache_hits"] == 0
    record = driver.records[1]
    assert record.result() == want(model, record)
    again = run(driver, record.prompt + record.outputs[0].tokens[:13])
    assert again.num_cached == 20
    assert again.result() == want(model, again)


# --- Eviction -------------------------------------------------------------------------------------


def test_nothing_is_evicted_while_blocks_without_content_are_free(model: Path) -> None:
    driver = Driver(model, num_blocks=16)
    run(driver, TEXT[:17])  # four full blocks, and one that is not
    for start in range(5):
        run(driver, [start, *OTHER[:7]])
    assert driver.engine.stats()["num_cached_blocks"] == 4 + 5 * 2
    assert run(driver, TEXT[:17]).num_cached == 16


@pytest.mark.parametrize(("prompt", "hit"), [(TEXT[:13], 12), (OTHER[:13], 4)])
def test_the_least_recently_used_are_evicted_first_and_ends_before_beginnings(
    model: Path, prompt: list[int], hit: int
) -> None:
    driver = Driver(model, num_blocks=8)
    run(driver, TEXT[:13])
    run(driver, OTHER[:13])
    assert driver.engine.stats()["num_cached_blocks"] == 6
    assert run(driver, TEXT[:13]).num_cached == 12  # used again: now the others are older
    run(driver, [63, *TEXT[:15]])  # four blocks, for which the last two of OTHER have to go
    assert run(driver, prompt).num_cached == hit


def test_a_block_in_use_is_never_evicted(model: Path) -> None:
    driver = Driver(model, num_blocks=10)
    driver.add(TEXT[:16], max_tokens=24)
    driver.checked_step()
    table = driver.engine.snapshot()["sequences"][0]["block_table"]
    for start in range(6):
        driver.add([start, *OTHER[:11]], max_tokens=1)
        driver.checked_step()
        snapshot = driver.engine.snapshot()
        assert snapshot["sequences"][0]["block_table"][: len(table)] == table
        assert set(table) <= set(snapshot["cached_blocks"])
    driver.drain()
    assert driver.records[0].result() == want(model, driver.records[0])


def test_reset_forgets_everything_and_only_when_nothing_runs(model: Path) -> None:
    driver = Driver(model)
    driver.add(TEXT[:20], max_tokens=5)
    driver.checked_step()
    assert driver.engine.reset_prefix_cache() is False
    driver.drain()
    assert driver.engine.stats()["num_cached_blocks"] > 0
    assert driver.engine.reset_prefix_cache() is True
    assert driver.engine.stats()["num_cached_blocks"] == 0
    assert run(driver, TEXT[:20]).num_cached == 0


# --- Collisions -----------------------------------------------------------------------------------


def test_when_all_hashes_collide_hits_are_the_same_and_right(model: Path) -> None:
    def cached(mask: int) -> list[Any]:
        driver = Driver(model, prefix_hash_mask=mask)
        prompts = [TEXT[:20], OTHER[:20], TEXT[:8] + OTHER[8:20], OTHER[:4] + TEXT[4:20], TEXT[:9]]
        records = [run(driver, prompt) for prompt in prompts + prompts]
        for record in records:
            assert record.result() == want(model, record)
        return [record.num_cached for record in records]

    hits = cached(2**64 - 1)
    assert hits == [0, 0, 8, 4, 8, 16, 16, 16, 16, 8]
    assert cached(0) == hits


# --- Steps that fail ------------------------------------------------------------------------------


def test_a_step_that_throws_unpublishes_its_blocks_and_the_engine_goes_on(model: Path) -> None:
    driver = Driver(model, fail_at_step=4, max_num_batched_tokens=40)
    before = run(driver, TEXT[:13], max_tokens=2)  # two steps
    driver.add(OTHER[:9], max_tokens=9)
    driver.checked_step()
    cached = set(driver.engine.snapshot()["cached_blocks"])
    driver.add(TEXT[:16], n=2, max_tokens=9)  # in the step that fails: hits 12, fills one more
    driver.add(TEXT[20:40], max_tokens=9)
    driver.add(TEXT[20:40], max_tokens=9)  # hits what the one before it was to compute
    driver.add(TEXT[20:60], max_tokens=9)  # does not fit into that step: what remains is a chunk
    driver.add(OTHER[30:50], max_tokens=9)  # waits, and lives on
    driver.checked_step()
    for record in driver.records[1:6]:
        assert record.ended
        assert isinstance(record.error, TinyvllmError)
        assert str(record.error) == "This step fails, as asked for."
        assert {output.finish for output in record.outputs} == {"error"}
    assert len(driver.records[1].outputs[0].tokens) == 1  # of the step before
    snapshot = driver.engine.snapshot()
    assert set(snapshot["cached_blocks"]) == cached
    assert [one["request"] for one in snapshot["sequences"]] == [6]
    assert set(snapshot["block_counts"]) == {0}

    driver.drain()
    again = [run(driver, TEXT[20:40]), run(driver, TEXT[:16]), run(driver, before.prompt)]
    assert [record.num_cached for record in again] == [0, 12, 12]
    for record in [driver.records[6], *again]:
        assert record.result() == want(model, record)


def test_after_a_file_was_cut_off_every_request_gets_its_error_and_a_new_engine_works(
    model: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(model, tmp_path / "model"))
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    driver = Driver(directory)
    for start in range(3):
        driver.add([start, *TEXT[:17]], max_tokens=20)
    for _ in range(3):
        driver.checked_step()
    cached = set(driver.engine.snapshot()["cached_blocks"])
    os.truncate(file, 4096)
    driver.add(OTHER[:20], max_tokens=20)
    driver.drain()
    for record in driver.records:
        assert isinstance(record.error, CheckpointError)
        assert [output.finish for output in record.outputs] == ["error"]
    assert set(driver.engine.snapshot()["cached_blocks"]) <= cached
    late = driver.add(OTHER[:20])  # refused by every step from now on, and never lost
    driver.drain()
    assert isinstance(driver.records[late].error, CheckpointError)

    file.write_bytes(whole)
    record = run(Driver(directory), TEXT[:20], max_tokens=5)
    assert record.result() == want(model, record)
