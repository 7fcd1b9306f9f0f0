"""paged_attention against float64, and its independence of batch, chunks, blocks and threads."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from numeric import (
    Array,
    Guarded,
    cast,
    in_wider_rows,
    poison,
    relative_error,
    same_bits,
    to_bfloat16,
    widen,
)
from tinyvllm import _core

ops = _core.ops

SPLIT, TILE = 1024, 64  # where long contexts are cut, and the tiles between


def rounds_to_bfloat16(device: Any, dtype: str) -> bool:
    """Whether queries and softmax weights are rounded, for an instruction on pairs of bfloat16."""
    return bool(device.isa in ("avx512bf16", "amx")) and dtype == "bfloat16"


@dataclasses.dataclass
class Context:
    """One sequence: q [n, heads, dim] of its last tokens, k and v [T, kv_heads, dim] of all."""

    q: Array
    k: Array
    v: Array

    @classmethod
    def random(
        cls,
        rng: np.random.Generator,
        length: int,
        num_queries: int,
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: str = "float32",
    ) -> Context:
        return cls(
            rng.standard_normal((num_queries, heads, dim)).astype(np.float32),
            cast(rng.standard_normal((length, kv_heads, dim)), dtype),
            cast(rng.standard_normal((length, kv_heads, dim)), dtype),
        )

    @property
    def first_position(self) -> int:
        return len(self.k) - len(self.q)

    def last(self, count: int) -> Context:
        """The same with fewer queries."""
        return Context(self.q[len(self.q) - count :], self.k, self.v)

    def up_to(self, length: int, count: int) -> Context:
        """The queries at the `count` positions before `length`, when no more tokens are there."""
        end = length - self.first_position
        return Context(self.q[end - count : end], self.k[:length], self.v[:length])

    def attention(self, scale: float, window: int = 0) -> Array:
        """softmax(scale q K^T) V in float64, with the whole score matrix at once."""
        group = self.q.shape[1] // self.k.shape[1]
        k, v = (np.repeat(widen(x), group, axis=1) for x in (self.k, self.v))
        scores = scale * np.einsum("qhd,phd->hqp", widen(self.q), k)
        query = np.arange(self.first_position, len(self.k))[:, None]
        position = np.arange(len(self.k))
        seen = position <= query
        if window:
            seen &= position > query - window
        scores[:, ~seen] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hqp,phd->qhd", weights, v).reshape(len(self.q), -1)


class Pool:
    """A paged cache full of NaN in which contexts get scattered blocks."""

    def __init__(
        self, contexts: list[Context], block_size: int, seed: int = 1, forget_before: int = 0
    ) -> None:
        """Positions before `forget_before` stay NaN: nobody may read them."""
        self.contexts = contexts
        _, self.kv_heads, self.dim = contexts[0].k.shape
        counts = [-(-len(context.k) // block_size) for context in contexts]
        blocks = np.random.default_rng(seed).permutation(sum(counts) + 3).astype(np.int32)
        dtype = "bfloat16" if contexts[0].k.dtype == np.uint16 else "float32"
        shape = (len(blocks), self.kv_heads, block_size, self.dim)
        self.keys, self.values = poison(shape, dtype), poison(shape, dtype)
        self.tables = np.split(blocks[: sum(counts)], np.cumsum(counts)[:-1])
        for context, table in zip(contexts, self.tables, strict=True):
            for position in range(forget_before, len(context.k)):
                block, slot = table[position // block_size], position % block_size
                self.keys[block, :, slot] = context.k[position]
                self.values[block, :, slot] = context.v[position]

    def queries(self) -> Array:
        return np.concatenate([context.q.reshape(len(context.q), -1) for context in self.contexts])

    def attend(
        self,
        device: Any,
        scale: float,
        window: int = 0,
        dtype: str = "float32",
        queries: Array | None = None,
    ) -> Array:
        sequences = [
            (context.first_position, len(context.q), table.tolist())
            for context, table in zip(self.contexts, self.tables, strict=True)
        ]
        result = ops.paged_attention(
            device,
            self.queries() if queries is None else queries,
            self.keys,
            self.values,
            sequences,
            self.contexts[0].q.shape[1],
            window,
            scale,
            dtype,
        )
        return np.asarray(result)


def attend(device: Any, contexts: list[Context], scale: float, window: int = 0) -> Array:
    return Pool(contexts, block_size=16).attend(device, scale, window)


# --- Against float64 ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [1, 16, 32])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(1, 1, 2), (2, 1, 10), (9, 3, 64), (5, 5, 80), (4, 2, 96), (8, 1, 128)],
)
def test_a_mixed_batch_matches_float64(
    device: Any,
    rng: np.random.Generator,
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    dtype: str,
) -> None:
    # A prefill from the start, a decode token, a chunk that begins inside a tile, a first token;
    # and all of these where some tiles are seen as a whole.
    contexts = [
        Context.random(rng, length, count, heads, kv_heads, dim, dtype)
        for length, count in [(33, 33), (50, 1), (47, 7), (1, 1), (200, 200), (130, 1), (150, 40)]
    ]
    scale = dim**-0.5
    got = Pool(contexts, block_size).attend(device, scale)
    bound = 1e-6
    if rounds_to_bfloat16(device, dtype):
        bound = 2**-8  # a weight is off by up to 2^-9 of itself, and so is their total
        for context in contexts:
            context.q = widen(to_bfloat16(context.q)).astype(np.float32)
    want = np.concatenate([context.attention(scale) for context in contexts])
    assert relative_error(got, want) < bound


@pytest.mark.parametrize("length", [SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + TILE + 3])
def test_long_contexts_match_float64(device: Any, rng: np.random.Generator, length: int) -> None:
    context = Context.random(rng, length, 3, 4, 2, 24)
    # Scores spread enough that the maximum moves from tile to tile and from split to split.
    got = attend(device, [context], 0.5)
    assert relative_error(got, context.attention(0.5)) < 2e-6


@pytest.mark.parametrize("window", [1, 5, 16, 17, 64, 65, 70, 1000, 5000])
@pytest.mark.parametrize("length", [40, SPLIT + 40])
@pytest.mark.parametrize(("dim", "dtype"), [(24, "float32"), (64, "bfloat16")])
def test_a_window_hides_what_lies_before_it(
    device: Any, rng: np.random.Generator, window: int, length: int, dim: int, dtype: str
) -> None:
    context = Context.random(rng, length, 7, 3, 1, dim, dtype)
    got = attend(device, [context], 0.3, window)
    bound = 2e-6
    if rounds_to_bfloat16(device, dtype):
        bound = 2**-8
        context.q = widen(to_bfloat16(context.q)).astype(np.float32)
    assert relative_error(got, context.attention(0.3, window)) < bound


@pytest.mark.parametrize("window", [20, 70])
@pytest.mark.parametrize("length", [40, SPLIT + 40])
@pytest.mark.parametrize(("dim", "dtype"), [(24, "float32"), (64, "bfloat16")])
def test_what_lies_before_the_window_is_not_read(
    device: Any, rng: np.random.Generator, window: int, length: int, dim: int, dtype: str
) -> None:
    context = Context.random(rng, length, 5, 3, 1, dim, dtype)
    oldest = max(0, context.first_position - window + 1)  # the first that the first query sees
    whole = Pool([context], 16).attend(device, 0.3, window=window)
    forgotten = Pool([context], 16, forget_before=oldest).attend(device, 0.3, window=window)
    assert same_bits(forgotten, whole)


def test_scores_may_be_far_apart_and_far_from_zero(device: Any, rng: np.random.Generator) -> None:
    context = Context.random(rng, 100, 9, 3, 1, 16)
    got = attend(device, [context], 1000.0)  # in effect an argmax
    want = context.attention(1000.0)
    assert relative_error(got, want) < 1e-3  # a score of 4,000 is rounded by up to 2^-13
    context.q[...], context.k[...] = -1e9, 1e9  # every score is -1.6e19: the mean of the values
    got = attend(device, [context], 1.0)
    assert relative_error(got, context.attention(1.0)) < 1e-6


@pytest.mark.parametrize("rise", [0.5, 3.0, 4.5])  # sums are scaled down past ln(2^6) = 4.2
def test_scores_may_rise_from_tile_to_tile(
    device: Any, rng: np.random.Generator, rise: float
) -> None:
    context = Context.random(rng, 6 * TILE, 2, 2, 1, 16)
    context.q[..., 0] = 1
    context.k[..., 0] = rise * (np.arange(6 * TILE) // TILE)[:, None]
    want = context.attention(1.0)
    assert relative_error(attend(device, [context], 1.0), want) < 1e-6


def test_each_softmax_weight_is_right_down_to_the_end_of_float32(device: Any) -> None:
    # Scores 0, -1, ... -127 and one-hot values: the output is the weights themselves.
    steps = np.arange(128.0)
    context = Context(
        np.ones((1, 1, 128), np.float32),
        np.zeros((128, 1, 128), np.float32),
        np.eye(128, dtype=np.float32)[:, None],
    )
    context.k[:, 0, 0] = -steps
    weights = widen(attend(device, [context], 1.0))[0]
    want = np.exp(-steps) / np.exp(-steps).sum()
    # The difference of two scores is rounded once more when it becomes a power of 2.
    bound = 4e-7 + 2**-23 * steps[:87]
    np.testing.assert_array_less(np.abs(weights[:87] / want[:87] - 1), bound)
    np.testing.assert_allclose(weights[87:], want[87:], rtol=0, atol=2e-38)


@pytest.mark.parametrize("length", [40, 100, SPLIT + 100])
def test_the_weights_of_bfloat16_values_add_up_to_one(
    device: Any, rng: np.random.Generator, length: int
) -> None:
    context = Context.random(rng, length, 5, 3, 1, 24, "bfloat16")
    context.v[...] = context.v[0]
    got = widen(attend(device, [context], 0.3)).reshape(5 * 3, 24)
    assert relative_error(got, np.tile(widen(context.v[0]), (15, 1))) < 3e-6


def test_bfloat16_output_is_the_float32_output_rounded(
    device: Any, rng: np.random.Generator
) -> None:
    pool = Pool([Context.random(rng, 33, 7, 9, 3, 80, "bfloat16")], 16)
    got = pool.attend(device, 0.1, dtype="bfloat16")
    assert same_bits(got, to_bfloat16(pool.attend(device, 0.1)))


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_a_nan_that_is_seen_is_not_swallowed(
    device: Any, rng: np.random.Generator, where: str
) -> None:
    context = Context.random(rng, 40, 1, 1, 1, 24)
    getattr(context, where)[0, 0, 23] = np.nan
    assert np.isnan(attend(device, [context], 0.2)).any()


# --- Bit for bit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [0, 20])
def test_a_token_gives_the_same_bits_alone_and_in_any_chunking(
    device: Any, other_device: Any, rng: np.random.Generator, dtype: str, window: int
) -> None:
    length = 70
    context = Context.random(rng, length, length, 9, 3, 24, dtype)
    whole = attend(other_device, [context], 0.2, window)
    for chunk in (1, 2, 7, 16, 33, 69):
        parts = []
        for first in range(0, length, chunk):
            end = min(first + chunk, length)
            parts.append(attend(device, [context.up_to(end, end - first)], 0.2, window))
        assert same_bits(np.concatenate(parts), whole), f"chunks of {chunk}"


def test_a_long_context_gives_the_same_bits_alone_and_in_a_batch(
    device: Any, other_device: Any, rng: np.random.Generator
) -> None:
    long = Context.random(rng, SPLIT + 70, 40, 2, 1, 24)
    others = [Context.random(rng, n, n, 2, 1, 24) for n in (1, 17)]
    batch = attend(other_device, [others[0], long, others[1]], 0.2)
    alone = attend(device, [long.last(1)], 0.2)
    assert same_bits(batch[40:41], alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("window", "dim"), [(0, 64), (70, 24), (70, 64), (100, 96), (SPLIT + 5, 10)]
)
def test_chunks_across_tiles_and_splits_change_no_bit(
    device: Any, other_device: Any, rng: np.random.Generator, dtype: str, window: int, dim: int
) -> None:
    # The last 150 tokens of a context lie on both sides of a split; slots that are not theirs yet
    # are NaN when they are alone. One token spreads its splits over the threads, many need not.
    length, count = 2 * SPLIT + 75, 150
    context = Context.random(rng, length, count, 4, 2, dim, dtype)
    whole = attend(other_device, [context], 0.2, window)
    for chunk in (1, 8, 41, 64):
        for end in {length, length - 74, length - 75, length - 76, length - count + chunk}:
            got = attend(device, [context.up_to(end, chunk)], 0.2, window)
            first = end - chunk - context.first_position
            assert same_bits(got, whole[first : first + chunk]), f"{chunk} tokens up to {end}"


# Few rows of bfloat16 have a path of their own on AMX where blocks are of whole vectors.
@pytest.mark.parametrize("length", [70, SPLIT + 70])
@pytest.mark.parametrize(
    ("count", "dim", "dtype"),
    [
        (9, 24, "float32"),
        (1, 64, "bfloat16"),
        (3, 96, "bfloat16"),
        (4, 256, "bfloat16"),
        (9, 64, "bfloat16"),
    ],
)
def test_the_size_and_order_of_blocks_change_no_bit(
    device: Any, rng: np.random.Generator, length: int, count: int, dim: int, dtype: str
) -> None:
    context = Context.random(rng, length, count, 4, 2, dim, dtype)
    want = Pool([context], block_size=16).attend(device, 0.2)
    for block_size in (1, 3, 32, 48, 256):
        for seed in (2, 3):
            got = Pool([context], block_size, seed).attend(device, 0.2)
            assert same_bits(got, want), f"blocks of {block_size}, order {seed}"


# --- Memory ---------------------------------------------------------------------------------------


def test_q_may_be_a_part_of_wider_rows(device: Any, rng: np.random.Generator) -> None:
    pool = Pool([Context.random(rng, 33, 7, 9, 3, 24)], 16)
    want = pool.attend(device, 0.2)
    assert same_bits(pool.attend(device, 0.2, queries=in_wider_rows(pool.queries())), want)


@pytest.mark.parametrize(
    ("dim", "block_size", "dtype"),
    [(10, 1, "float32"), (10, 1, "bfloat16"), (32, 16, "bfloat16")],
)
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("end", [True, False])
def test_nothing_outside_the_operands_is_read(
    device: Any,
    rng: np.random.Generator,
    dim: int,
    block_size: int,
    dtype: str,
    window: int,
    end: bool,
) -> None:
    context = Context.random(rng, 7, 2, 2, 2, dim, dtype)
    pool = Pool([context], block_size, seed=2 if end else 4 if block_size == 1 else 1)
    last = len(pool.keys) - 1
    assert (last if end else 0) in pool.tables[0]  # a block beside the guarded page
    want = pool.attend(device, 0.2, window)
    guarded = [Guarded(array, end) for array in (pool.queries(), pool.keys, pool.values)]
    queries, pool.keys, pool.values = (guard.array for guard in guarded)
    assert same_bits(pool.attend(device, 0.2, window, queries=queries), want)


def test_more_query_heads_on_a_kv_head_than_the_kernel_takes_are_refused(
    device: Any, rng: np.random.Generator
) -> None:
    assert attend(device, [Context.random(rng, 3, 1, 256, 1, 2)], 1.0).shape == (1, 512)
    with pytest.raises(Exception, match="257 query heads over 1 KV heads; on a CPU at most 256"):
        attend(device, [Context.random(rng, 3, 1, 257, 1, 2)], 1.0)
