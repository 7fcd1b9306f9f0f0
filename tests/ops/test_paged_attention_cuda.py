"""paged_attention on CUDA against float64: decodes in splits, chunks in tiles, many shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_paged_attention import Context, Pool
from test_rope_and_attend import Step

from numeric import Array, cast, in_wider_rows, poison, relative_error, same_bits
from tinyvllm import _core

ops = _core.ops

SPLIT = 256  # of the decodes of few sequences
LONG_SPLIT = 512  # of the same, with contexts of more than 5120 positions
KEYS = 64  # positions of a tile of a chunk
DTYPES = ["float32", "bfloat16"]
# q and the weights of the softmax are rounded to bfloat16 where the tensor cores are used.
BOUND = {"float32": 2e-6, "bfloat16": 1e-2}


def context_of(
    rng: np.random.Generator,
    length: int,
    num_queries: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: str,
) -> Context:
    """q is of the dtype, too."""
    context = Context.random(rng, length, num_queries, heads, kv_heads, dim, dtype)
    context.q = cast(context.q, dtype)
    return context


def attend(
    device: Any,
    pool: Pool,
    scale: float,
    window: int = 0,
    padding: int = 0,
    as_chunks: bool = False,
    queries: Array | None = None,
) -> Array:
    """The result, with `padding` padded rows behind the decodes, which come first."""
    decodes = sum(len(context.q) == 1 for context in pool.contexts)
    sequences = [
        (context.first_position, len(context.q), table.tolist())
        for context, table in zip(pool.contexts, pool.tables, strict=True)
    ]
    sequences[decodes:decodes] = [(-1, 1, [])] * padding
    dtype = "bfloat16" if pool.keys.dtype == np.uint16 else "float32"
    if queries is None:
        rows = pool.queries()
        queries = np.insert(rows, [decodes] * padding, poison((1, rows.shape[1]), dtype), axis=0)
    result = ops.paged_attention(
        device,
        queries,
        pool.keys,
        pool.values,
        sequences,
        pool.contexts[0].q.shape[1],
        window,
        scale,
        dtype,
        as_chunks,
    )
    return np.asarray(result)


def error(got: Array, contexts: list[Context], scale: float, window: int = 0) -> float:
    want = np.concatenate([context.attention(scale, window) for context in contexts])
    return relative_error(got, want)


# --- Against float64 ------------------------------------------------------------------------------

SHAPES = [  # heads, KV heads, head_dim: groups of 1, 3, 4, 7, 8 and 20; the last row is plain
    (2, 2, 64),
    (3, 1, 80),
    (8, 2, 64),
    (7, 1, 96),
    (8, 1, 128),
    (20, 1, 64),
    (4, 2, 40),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
def test_decodes_match_float64(
    device: Any, rng: np.random.Generator, heads: int, kv_heads: int, dim: int, dtype: str
) -> None:
    contexts = [
        context_of(rng, length, 1, heads, kv_heads, dim, dtype) for length in (1, 16, 33, 200)
    ]
    scale = dim**-0.5
    got = attend(device, Pool(contexts, 16), scale)
    assert error(got, contexts, scale) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
def test_chunks_match_float64(
    device: Any, rng: np.random.Generator, heads: int, kv_heads: int, dim: int, dtype: str
) -> None:
    # From the start, behind a prefix, one tile of queries and several, within one tile of keys.
    contexts = [
        context_of(rng, length, count, heads, kv_heads, dim, dtype)
        for length, count in [(33, 33), (75, 42), (131, 2), (7, 3)]
    ]
    scale = dim**-0.5
    got = attend(device, Pool(contexts, 16), scale)
    assert error(got, contexts, scale) < BOUND[dtype]


@pytest.mark.parametrize("block_size", [1, 3, 16, 32, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixed_batch_in_blocks_of_any_size_matches_float64(
    device: Any, rng: np.random.Generator, block_size: int, dtype: str
) -> None:
    contexts = [
        context_of(rng, length, count, 8, 2, 64, dtype)
        for length, count in [(50, 1), (1, 1), (33, 33), (47, 7)]
    ]
    got = attend(device, Pool(contexts, block_size), 0.125)
    assert error(got, contexts, 0.125) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 19])
def test_a_decode_of_several_splits_matches_float64(
    device: Any, rng: np.random.Generator, length: int, dtype: str
) -> None:
    # Scores spread enough that the maximum moves from tile to tile and from split to split.
    contexts = [context_of(rng, n, 1, 4, 1, 64, dtype) for n in (length, 5, length + 64)]
    got = attend(device, Pool(contexts, 16), 0.5)
    assert error(got, contexts, 0.5) < BOUND[dtype]


@pytest.mark.parametrize("length", [5121, 33 * LONG_SPLIT + 7])  # and more than are merged at once
def test_a_long_decode_in_longer_splits_matches_float64(
    device: Any, rng: np.random.Generator, length: int
) -> None:
    contexts = [context_of(rng, n, 1, 4, 1, 64, "bfloat16") for n in (length, 300)]
    got = attend(device, Pool(contexts, 16), 0.5)
    assert error(got, contexts, 0.5) < BOUND["bfloat16"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_decodes_in_longer_splits_match_float64(
    device: Any, rng: np.random.Generator, dtype: str
) -> None:
    lengths = [2 * SPLIT + 19, *[5] * 14, 2 * SPLIT]  # 16 sequences of 2 KV heads: splits of 512
    contexts = [context_of(rng, n, 1, 4, 2, 64, dtype) for n in lengths]
    got = attend(device, Pool(contexts, 16), 0.5)
    assert error(got, contexts, 0.5) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 5, 16, 17, 100, SPLIT + 3])
def test_a_window_hides_what_lies_before_it_and_does_not_read_it(
    device: Any, rng: np.random.Generator, window: int, dtype: str
) -> None:
    contexts = [
        context_of(rng, length, count, 4, 2, 64, dtype)
        for length, count in [(2 * SPLIT + 70, 1), (40, 1), (150, 40)]
    ]
    got = attend(device, Pool(contexts, 16), 0.3, window)
    assert error(got, contexts, 0.3, window) < BOUND[dtype]
    for context in contexts:
        alone = attend(device, Pool([context], 16), 0.3, window)
        oldest = max(0, context.first_position - window + 1)  # the first that the first query sees
        forgotten = attend(device, Pool([context], 16, forget_before=oldest), 0.3, window)
        assert same_bits(forgotten, alone)


@pytest.mark.parametrize("num_queries", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_may_be_far_apart_and_far_from_zero(
    device: Any, rng: np.random.Generator, dtype: str, num_queries: int
) -> None:
    context = context_of(rng, 100, num_queries, 3, 1, 64, dtype)
    context.q[...], context.k[...] = cast(-1e9, dtype), cast(1e9, dtype)
    got = attend(device, Pool([context], 16), 1.0)  # every score is -6.4e19: the mean of the values
    assert error(got, [context], 1.0) < BOUND[dtype]


@pytest.mark.parametrize("num_queries", [1, 40])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_that_is_seen_is_not_swallowed(
    device: Any, rng: np.random.Generator, where: str, dtype: str, num_queries: int
) -> None:
    context = context_of(rng, 40, num_queries, 1, 1, 64, dtype)
    getattr(context, where)[0, 0, 23] = cast(np.nan, dtype)
    assert np.isnan(Context.attention(context, 0.2)).any()
    got = attend(device, Pool([context], 16), 0.2)
    assert relative_error(got, np.zeros(got.shape)) == np.inf


# --- Bit for bit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (9, 3)])
def test_a_token_of_a_chunk_gives_the_same_bits_in_any_chunking(
    device: Any, rng: np.random.Generator, dtype: str, window: int, heads: int, kv_heads: int
) -> None:
    length = KEYS + 60  # 124: tiles of 32 tokens at a group of 4, of 42 at a group of 3
    context = context_of(rng, length, length, heads, kv_heads, 64, dtype)
    whole = attend(device, Pool([context], 16), 0.2, window)
    for chunk in (1, 7, 33, 100):
        parts = []
        for first in range(0, length, chunk):
            end = min(first + chunk, length)
            if chunk == 1 and end % 9 != 0:  # some of them
                parts.append(whole[first:end])
                continue
            pool = Pool([context.up_to(end, end - first)], 16)
            parts.append(attend(device, pool, 0.2, window, as_chunks=True))
        assert same_bits(np.concatenate(parts), whole), f"chunks of {chunk}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_gives_the_same_bits_in_any_batch_and_with_padding(
    device: Any, rng: np.random.Generator, dtype: str
) -> None:
    contexts = [
        context_of(rng, length, count, 4, 1, 64, dtype)
        for length, count in [(SPLIT + 70, 1), (3, 1), (90, 1), (70, 40), (9, 2)]
    ]
    batch = attend(device, Pool(contexts, 16), 0.2)
    padded = attend(device, Pool(contexts, 16), 0.2, padding=2)
    assert same_bits(np.delete(padded, [3, 4], axis=0), batch)
    assert not padded[3:5].any()
    row = 0
    for context in contexts:
        alone = attend(device, Pool([context], 16), 0.2)
        assert same_bits(batch[row : row + len(context.q)], alone)
        row += len(context.q)


@pytest.mark.parametrize("num_queries", [1, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_size_and_order_of_blocks_change_no_bit(
    device: Any, rng: np.random.Generator, dtype: str, num_queries: int
) -> None:
    context = context_of(rng, SPLIT + 30, num_queries, 4, 2, 64, dtype)
    want = attend(device, Pool([context], 16), 0.2)
    for block_size in (32, 256):
        for seed in (2, 3):
            got = attend(device, Pool([context], block_size, seed), 0.2)
            assert same_bits(got, want), f"blocks of {block_size}, order {seed}"


@pytest.mark.parametrize("margin", [3, 8])  # elements; 8 keep rows aligned to 16 bytes
@pytest.mark.parametrize("dtype", DTYPES)
def test_q_may_be_a_part_of_wider_rows(
    device: Any, rng: np.random.Generator, dtype: str, margin: int
) -> None:
    contexts = [context_of(rng, 33, count, 4, 2, 64, dtype) for count in (1, 7)]
    pool = Pool(contexts, 16)
    got = attend(device, pool, 0.2, queries=in_wider_rows(pool.queries(), margin))
    assert error(got, contexts, 0.2) < BOUND[dtype]
    if margin == 8:
        assert same_bits(got, attend(device, pool, 0.2))


def test_padded_rows_of_rope_and_attend_write_nothing(
    device: Any, rng: np.random.Generator
) -> None:
    alone = Step(rng, [(33, 1), (5, 1)], 4, 2, 64, "bfloat16", True, "bfloat16")
    padded = Step(rng, [(33, 1), (5, 1)], 4, 2, 64, "bfloat16", True, "bfloat16")
    padded.__dict__.update(alone.__dict__)
    padded.sequences = [*alone.sequences, (-1, 1, []), (-1, 1, [])]
    padded.slots = np.append(alone.slots, [-1, -1])
    padded.qkv = np.vstack([alone.qkv, poison((2, alone.qkv.shape[1]), "bfloat16")])
    padded.cos_sin = np.vstack([alone.cos_sin, np.zeros((2, 64), np.float32)])
    out, keys, values = padded.together(device, 0)
    want, want_keys, want_values = alone.together(device, 0)
    assert same_bits(out[:2], want)
    assert not out[2:].any()
    assert same_bits(keys, want_keys)
    assert same_bits(values, want_values)


# --- Limits ---------------------------------------------------------------------------------------


def test_a_head_wider_than_the_plain_path_takes_is_refused(
    device: Any, rng: np.random.Generator
) -> None:
    context = context_of(rng, 3, 1, 1, 1, 264, "float32")
    with pytest.raises(Exception, match="head_dim is 264; on CUDA it is at most 256"):
        attend(device, Pool([context], 16), 1.0)
