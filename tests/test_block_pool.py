"""BlockPool, driven by hypothesis: exact bookkeeping after every step (DESIGN 4.4)."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tinyvllm import _core
from tinyvllm.errors import TinyvllmError


class BlockPoolMachine(RuleBasedStateMachine):
    """Sequences that grow and end, beside a plain set of the blocks that are free."""

    @initialize(num_blocks=st.integers(0, 20), block_size=st.integers(1, 7))
    def make(self, num_blocks: int, block_size: int) -> None:
        self.pool = _core.BlockPool(num_blocks)
        self.block_size = block_size
        self.free = set(range(num_blocks))
        self.tables: dict[int, list[int]] = {}

    @rule(sequence=st.integers(0, 4), num_tokens=st.integers(0, 60))
    def grow(self, sequence: int, num_tokens: int) -> None:
        table = self.tables.get(sequence, [])
        missing = max(0, -(-num_tokens // self.block_size) - len(table))
        grown, result = self.pool.grow(table, num_tokens, self.block_size)
        assert grown == (missing <= len(self.free))
        if not grown:
            assert result == table
            return
        new = result[len(table) :]
        assert result[: len(table)] == table
        assert len(new) == missing
        assert self.free.issuperset(new)
        self.free -= set(new)
        self.tables[sequence] = result

    @rule(sequence=st.integers(0, 4))
    def release(self, sequence: int) -> None:
        table = self.tables.pop(sequence, [])
        self.pool.release(table)
        self.free |= set(table)

    @rule(data=st.data())
    def release_what_is_free(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([*sorted(self.free), -1, self.pool.num_blocks]))
        with pytest.raises(TinyvllmError, match=f"Block {block} is freed but not in use"):
            self.pool.release([block])

    @invariant()
    def every_block_is_free_or_in_one_table(self) -> None:
        used = [block for table in self.tables.values() for block in table]
        assert len(used) == len(set(used))
        assert self.pool.num_used == len(used)
        assert self.pool.num_free == len(self.free)
        assert self.pool.num_free + self.pool.num_used == self.pool.num_blocks


BlockPoolMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)
TestBlockPool = BlockPoolMachine.TestCase


def test_a_fresh_pool_gives_its_lowest_blocks_first() -> None:
    pool = _core.BlockPool(10)
    assert pool.grow([], 33, 16) == (True, [0, 1, 2])
    assert pool.grow([], 16, 16) == (True, [3])


def test_freed_blocks_are_used_again_before_others_and_in_the_same_order() -> None:
    pool = _core.BlockPool(10)
    _, first = pool.grow([], 48, 16)
    pool.grow([], 16, 16)
    pool.release(first)
    assert pool.grow([], 64, 16) == (True, [*first, 4])


def test_a_pool_is_whole_again_when_all_is_released() -> None:
    pool = _core.BlockPool(7)
    _, table = pool.grow([], 7, 1)
    assert pool.grow(table, 8, 1) == (False, table)
    pool.release(table)
    assert (pool.num_free, pool.num_used) == (7, 0)
