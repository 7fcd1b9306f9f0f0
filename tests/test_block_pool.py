"""BlockPool and the prefix cache in it, driven by hypothesis: exact bookkeeping after every step
(docs/promises.md, 4), and which block comes next."""

from __future__ import annotations

import itertools
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
)

from tinyvllm import _core
from tinyvllm.errors import TinyvllmError

START = _core.ContentKey()
Content = tuple[int, tuple[int, ...]]  # which content comes before, and the tokens of this block


def take(pool: Any, count: int) -> list[int]:
    return [pool.allocate() for _ in range(count)]


def known_block(pool: Any, tokens: list[int], before: Any = START) -> tuple[int, Any]:
    """A used block that the cache knows by these tokens, and the key of its content."""
    block = pool.allocate()
    return block, pool.publish(block, before, tokens)


class BlockPoolMachine(RuleBasedStateMachine):
    """Blocks that tables take, share and drop, beside a plain model of them.

    The model: how many tables hold each block, the content of the blocks that have one, and the
    free blocks in the order in which they must be used: those without content first, the last one
    freed before the others, then those with content, the first one freed before the others.
    """

    @initialize(num_blocks=st.integers(0, 12), mask=st.sampled_from([0, 1, 2**64 - 1]))
    def make(self, num_blocks: int, mask: int) -> None:
        self.pool = _core.BlockPool(num_blocks, mask)
        self.counts = [0] * num_blocks
        self.empty = list(range(num_blocks))[::-1]
        self.cached: list[int] = []
        self.keys = [START]  # of all contents that ever were; each has its index for a name
        self.known: dict[Content, int] = {}  # content -> its name
        self.contents: dict[int, Content] = {}  # block -> content

    def used(self) -> list[int]:
        return [block for block, count in enumerate(self.counts) if count]

    @rule()
    def allocate(self) -> None:
        if not self.empty and not self.cached:
            with pytest.raises(TinyvllmError, match=f"All {len(self.counts)} blocks are in use"):
                self.pool.allocate()
            return
        want = self.empty.pop() if self.empty else self.cached.pop(0)
        if want in self.contents:
            del self.known[self.contents.pop(want)]
        assert self.pool.allocate() == want
        self.counts[want] = 1

    @precondition(lambda self: self.used())
    @rule(data=st.data(), tokens=st.tuples(st.integers(0, 1), st.integers(0, 1)))
    def publish(self, data: st.DataObject, tokens: tuple[int, ...]) -> None:
        free_of_content = [block for block in self.used() if block not in self.contents]
        if not free_of_content:
            return
        block = data.draw(st.sampled_from(free_of_content))
        before = data.draw(st.integers(0, len(self.keys) - 1))  # its block may be gone by now
        content = (before, tokens)
        key = self.pool.publish(block, self.keys[before], list(tokens))
        if content in self.known:
            assert key == self.keys[self.known[content]]
        else:
            assert key not in self.keys
            self.known[content] = len(self.keys)
            self.keys.append(key)
            self.contents[block] = content

    @precondition(lambda self: self.used() or self.cached)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.used() + self.cached))
        self.pool.share(block)
        if self.counts[block] == 0:
            self.cached.remove(block)
        self.counts[block] += 1

    @precondition(lambda self: self.used())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.used()))
        self.pool.release(block)
        self.counts[block] -= 1
        if self.counts[block] == 0:
            (self.cached if block in self.contents else self.empty).append(block)

    @precondition(lambda self: self.counts)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block = data.draw(st.integers(0, len(self.counts) - 1))
        self.pool.forget(block)
        if block in self.contents:
            del self.known[self.contents.pop(block)]
            if self.counts[block] == 0:
                self.cached.remove(block)
                self.empty.append(block)

    @rule(data=st.data())
    def release_what_is_free(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([*self.empty, *self.cached, -1, len(self.counts)]))
        with pytest.raises(TinyvllmError, match=f"Block {block} is freed but not in use"):
            self.pool.release(block)

    @precondition(lambda self: self.empty)
    @rule(data=st.data())
    def share_what_is_free_and_without_content(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.empty))
        with pytest.raises(TinyvllmError, match=f"Block {block} is shared but free"):
            self.pool.share(block)

    @invariant()
    def the_pool_is_as_the_model(self) -> None:
        pool = self.pool
        assert [pool.count(block) for block in range(len(self.counts))] == self.counts
        assert pool.num_cached == len(self.cached)
        assert pool.num_free == len(self.empty) + len(self.cached)
        assert pool.num_used == len(self.used())
        assert pool.num_free + pool.num_used == pool.num_blocks

    @invariant()
    def exactly_the_known_contents_are_found(self) -> None:
        by_content = {content: block for block, content in self.contents.items()}
        for before, key in enumerate(self.keys):
            for tokens in itertools.product((0, 1), repeat=2):
                assert self.pool.find(key, list(tokens)) == by_content.get((before, tokens))


BlockPoolMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None
)
TestBlockPool = BlockPoolMachine.TestCase


def test_a_fresh_pool_gives_its_lowest_blocks_first() -> None:
    pool = _core.BlockPool(10)
    assert take(pool, 4) == [0, 1, 2, 3]


def test_a_block_without_content_is_used_before_any_with_content() -> None:
    pool = _core.BlockPool(3)
    known, _ = known_block(pool, [1, 2])
    other = pool.allocate()
    pool.release(other)
    pool.release(known)
    assert take(pool, 3) == [other, 2, known]


def test_blocks_with_content_go_in_the_order_in_which_they_were_freed() -> None:
    pool = _core.BlockPool(4)
    blocks = [known_block(pool, [number])[0] for number in range(4)]
    for index in (2, 0, 3, 1):
        pool.release(blocks[index])
    pool.share(blocks[2])  # used once more: now it is the last
    pool.release(blocks[2])
    assert take(pool, 4) == [blocks[index] for index in (0, 3, 1, 2)]


def test_what_is_evicted_is_found_no_more() -> None:
    pool = _core.BlockPool(1)
    block, key = known_block(pool, [5, 6])
    pool.release(block)
    assert pool.find(START, [5, 6]) == block
    assert pool.allocate() == block
    assert pool.find(START, [5, 6]) is None
    assert (
        pool.publish(block, START, [5, 6]) != key
    )  # a new content: chains of the old one are dead


def test_equal_content_is_known_once_and_chains_go_on_from_it() -> None:
    pool = _core.BlockPool(4)
    first, key = known_block(pool, [5, 6])
    second, same = known_block(pool, [5, 6])
    assert (pool.find(START, [5, 6]), same) == (first, key)
    third, _ = known_block(pool, [7, 8], before=same)
    assert pool.find(key, [7, 8]) == third
    pool.release(second)
    assert pool.num_cached == 0  # it holds nothing that could be found


def test_equal_tokens_after_another_beginning_are_another_content() -> None:
    pool = _core.BlockPool(4)
    _, a = known_block(pool, [1])
    _, b = known_block(pool, [2])
    block, _ = known_block(pool, [3], before=a)
    assert pool.find(a, [3]) == block
    assert pool.find(b, [3]) is None
    assert pool.find(START, [3]) is None


@pytest.mark.parametrize("other", [[1, 3], [2, 1], [1], [1, 2, 2], [1, 2, 0]])
def test_when_all_hashes_collide_only_equal_tokens_hit(other: list[int]) -> None:
    pool = _core.BlockPool(4, prefix_hash_mask=0)
    block, key = known_block(pool, [1, 2])
    assert pool.find(START, other) is None
    second, other_key = known_block(pool, other)
    assert (pool.find(START, [1, 2]), pool.find(START, other)) == (block, second)
    assert key != other_key


def test_a_pool_without_blocks_says_that_none_is_free() -> None:
    with pytest.raises(TinyvllmError, match="All 0 blocks are in use"):
        _core.BlockPool(0).allocate()
