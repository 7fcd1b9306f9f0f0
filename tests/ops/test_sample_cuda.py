"""Sampling on CUDA: the same tokens as the CPU's Sampler takes from the same logits.

The Sampler has tests of its own against plain NumPy (tests/test_sampler.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from numeric import Array, in_wider_rows, same_bits
from tinyvllm import _core
from tinyvllm.errors import TinyvllmError

NOT_FINITE, NO_TOKEN = 1, 2  # SampleError
PART = 2048  # the fewest tokens of a row that a block takes
LIST = 512  # tokens that a block sorts at once
EOS = [2, 5]


@dataclasses.dataclass
class Row:
    """One token to draw: what a request has so far, and what it asks for."""

    logits_row: int
    options: dict[str, Any]
    prompt: list[int] = dataclasses.field(default_factory=lambda: [0])
    output: list[int] = dataclasses.field(default_factory=list)
    seed: int = 0
    sample: int = 0

    def on_cpu(self, logits: Array) -> tuple[int, Any]:
        result: tuple[int, Any] = _core.sample(
            _core.SamplingParams(**self.options),
            logits[self.logits_row].tolist(),
            self.prompt,
            self.output,
            self.seed,
            EOS,
            self.sample,
        )
        return result


def draw(device: Any, logits: Array, rows: list[Row | None]) -> list[tuple[int, int, Any]]:
    """(token, error, logprobs) of each row. What was edited in the logits is put back."""
    before = logits.copy()
    described = [
        row
        and (
            row.logits_row,
            _core.SamplingParams(**row.options),
            row.prompt,
            row.output,
            row.seed,
            row.sample,
        )
        for row in rows
    ]
    results: list[tuple[int, int, Any]] = _core.cuda_sample(device, logits, described, EOS)
    assert same_bits(logits.copy(), before)
    return results


def assert_same_tokens(device: Any, logits: Array, rows: list[Row]) -> None:
    got = [token for token, error, _ in draw(device, logits, list(rows)) if error == 0]
    want = [row.on_cpu(logits)[0] for row in rows]
    different = [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]
    assert not different, [(rows[i], got[i], want[i]) for i in different[:3]]


def random_logits(rng: np.random.Generator, rows: int, vocab: int, spread: float = 2.0) -> Array:
    return rng.normal(0, spread, (rows, vocab)).astype(np.float32)


def random_options(rng: np.random.Generator) -> dict[str, Any]:
    options: dict[str, Any] = {"temperature": float(rng.choice([0, 0.3, 1, 1.7]))}
    if rng.random() < 0.5:
        options["top_k"] = int(rng.choice([1, 2, 5, 40, 600]))
    if rng.random() < 0.5:
        options["top_p"] = float(rng.choice([1e-6, 0.3, 0.9, 0.999]))
    if rng.random() < 0.3:
        options["min_p"] = float(rng.choice([1e-4, 0.05, 0.5, 1.0]))
    return options


# --- The best token, and a draw -------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 3, 130, PART + 1, 5 * PART + 3])
def test_greedy_takes_the_largest_and_of_equals_the_lowest_id(
    device: Any, rng: np.random.Generator, vocab: int
) -> None:
    logits = random_logits(rng, 12, vocab)
    for row in logits[:6]:
        row[rng.integers(0, vocab, 3)] = 9.0
    tokens = [
        token
        for token, _, _ in draw(device, logits, [Row(i, {"temperature": 0}) for i in range(12)])
    ]
    assert tokens == np.argmax(logits, axis=1).tolist()


@pytest.mark.parametrize("vocab", [7, 700, 2 * PART + 5])
def test_draws_are_those_of_the_cpu(device: Any, rng: np.random.Generator, vocab: int) -> None:
    logits = random_logits(rng, 16, vocab)
    logits[3] = 0  # nothing but noise decides
    rows = [
        Row(
            i % 16,
            {"temperature": float(rng.choice([0.2, 0.7, 1, 3]))},
            prompt=[0] * int(rng.integers(1, 9)),
            seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
            sample=int(rng.integers(0, 64)),
        )
        for i in range(400)
    ]
    assert_same_tokens(device, logits, rows)


def test_a_seed_gives_the_same_token_in_any_batch(device: Any, rng: np.random.Generator) -> None:
    logits = random_logits(rng, 5, 3 * PART)
    rows: list[Row | None] = [
        Row(i, {"temperature": 1.0, "top_p": 0.9 if i % 2 else 1.0}, seed=i) for i in range(5)
    ]
    together = draw(device, logits, rows)
    for row, want in zip(rows, together, strict=True):
        assert draw(device, logits, [row]) == [want]
    assert draw(device, logits, rows) == together


# --- Filters --------------------------------------------------------------------------------------


def test_thousands_of_rows_with_filters_are_those_of_the_cpu(
    device: Any, rng: np.random.Generator
) -> None:
    logits = random_logits(rng, 20, 1200)
    logits[:5] *= 4
    logits[5:10] = np.round(logits[5:10] * 2) / 2  # many equal ones
    logits[10] -= 60
    logits[11] *= 1e-3
    logits[12, 7] = 80
    for _ in range(10):
        rows = [
            Row(i % 20, random_options(rng), seed=int(rng.integers(0, 2**63))) for i in range(200)
        ]
        assert_same_tokens(device, logits, rows)


FILTERS = [
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 3000},
    {"top_p": 0.05},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"top_k": 700, "top_p": 0.8, "min_p": 1e-3},
]


@pytest.mark.parametrize("options", FILTERS)
@pytest.mark.parametrize("kind", ["flat", "steep", "equal", "two values", "negative", "one nat"])
def test_filters_cut_where_the_cpu_cuts(
    device: Any, rng: np.random.Generator, kind: str, options: dict[str, Any]
) -> None:
    vocab = 4 * LIST + 3000
    logits = {
        "flat": lambda: random_logits(rng, 1, vocab, 0.1),
        "steep": lambda: random_logits(rng, 1, vocab, 30),
        "equal": lambda: np.full((1, vocab), 1.25, np.float32),
        "two values": lambda: rng.choice([0.0, -0.5], (1, vocab)).astype(np.float32),
        "negative": lambda: random_logits(rng, 1, vocab) - 1000,
        "one nat": lambda: rng.random((1, vocab), dtype=np.float32) + np.float32(7.5),
    }[kind]()
    rows = [Row(0, {"temperature": 1.0, **options}, seed=seed) for seed in range(25)]
    assert_same_tokens(device, logits, rows)


@pytest.mark.parametrize(("options", "kept"), [({"top_k": 600}, 600), ({"top_p": 0.625}, 688)])
def test_the_last_token_within_a_filter_can_be_drawn_and_the_next_cannot(
    device: Any, options: dict[str, Any], kept: int
) -> None:
    logits = np.zeros((1, 1100), np.float32)  # equal: their order is that of ids
    seeds: dict[int, int] = {}  # one that gives the token where nothing is filtered
    while not {kept - 1, kept} <= seeds.keys():
        seed = len(seeds) if not seeds else max(seeds.values()) + 1
        while (token := Row(0, {}, seed=seed).on_cpu(logits)[0]) not in (kept - 1, kept):
            seed += 1
        seeds[token] = seed
    rows = [Row(0, options, seed=seeds[token]) for token in (kept - 1, kept)]
    tokens = [token for token, _, _ in draw(device, logits, list(rows))]
    assert tokens[0] == kept - 1
    assert tokens[1] < kept


# --- Edits ----------------------------------------------------------------------------------------


def test_bias_masks_and_penalties_are_those_of_the_cpu(
    device: Any, rng: np.random.Generator
) -> None:
    vocab = 300
    logits = random_logits(rng, 40, vocab)
    rows = []
    for i in range(40):
        options = random_options(rng)
        biased = rng.choice(vocab, 5, replace=False)
        options["logit_bias"] = [(int(token), float(rng.normal(0, 20))) for token in biased]
        options["min_tokens"] = int(rng.integers(0, 6))
        options["max_tokens"] = 20
        options["stop_token_ids"] = rng.choice(vocab, 3).tolist()
        options["ignore_eos"] = bool(rng.random() < 0.3)
        options["repetition_penalty"] = float(rng.choice([1, 0.5, 1.3]))
        options["presence_penalty"] = float(rng.choice([0, -1.5, 2]))
        options["frequency_penalty"] = float(rng.choice([0, 0.4, -2]))
        prompt = rng.integers(0, vocab, 20).tolist()
        output = rng.integers(0, vocab, int(rng.integers(0, 10))).tolist()
        rows.append(Row(i, options, prompt, output, seed=i))
    assert_same_tokens(device, logits, rows)


def test_the_samples_of_a_request_share_a_row_of_logits(
    device: Any, rng: np.random.Generator
) -> None:
    logits = random_logits(rng, 2, 500)
    options = {"temperature": 2.0, "top_k": 50, "logit_bias": [(7, 3.0)], "n": 8}
    assert_same_tokens(device, logits, [Row(1, options, sample=sample) for sample in range(8)])


def test_a_masked_token_is_not_drawn_even_where_no_other_is_likely(
    device: Any,
) -> None:
    logits = np.full((1, 100), -80, np.float32)
    logits[0, EOS] = 80
    rows: list[Row | None] = [
        Row(0, {"temperature": 5.0, "min_tokens": 1, **options}, seed=seed)
        for seed in range(20)
        for options in ({}, {"top_p": 0.99}, {"top_k": 99})
    ]
    assert not {token for token, _, _ in draw(device, logits, rows)} & set(EOS)


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.5}])
def test_a_logit_that_is_not_finite_is_an_error_of_its_row_alone(
    device: Any, rng: np.random.Generator, bad: float, options: dict[str, Any]
) -> None:
    logits = random_logits(rng, 4, PART + 50)
    logits[1, PART + 3], logits[2, 9] = bad, bad
    masked = {**options, "logit_bias": [(9, 1.0)]}  # an edit does not hide it
    rows = [Row(0, options), Row(1, options), Row(2, masked), Row(3, options)]
    got = draw(device, logits, list(rows))
    assert [error for _, error, _ in got] == [0, NOT_FINITE, NOT_FINITE, 0]
    for i in (0, 3):
        assert got[i][0] == rows[i].on_cpu(logits)[0]
    with pytest.raises(TinyvllmError, match="not a finite number"):
        rows[1].on_cpu(logits)


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.5}])
def test_masks_that_leave_no_token_are_an_error(
    device: Any, rng: np.random.Generator, options: dict[str, Any]
) -> None:
    logits = random_logits(rng, 2, 6)
    everything = {**options, "min_tokens": 3, "stop_token_ids": list(range(6))}
    got = draw(device, logits, [Row(0, everything), Row(1, options)])
    assert [error for _, error, _ in got] == [NO_TOKEN, 0]


def test_a_padded_row_is_left_alone(device: Any, rng: np.random.Generator) -> None:
    logits = random_logits(rng, 2, 50)
    got = draw(device, logits, [None, Row(1, {"logprobs": 2, "top_k": 5}), None])
    assert got[0] == got[2] == (-1, -1, None)  # what was there before
    assert got[1][1] == 0


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [701, 704])
@pytest.mark.parametrize("margin", [3, 4])  # floats around a row: not aligned to 16 bytes, aligned
def test_logits_may_be_a_part_of_wider_rows(
    device: Any, rng: np.random.Generator, vocab: int, margin: int
) -> None:
    logits = random_logits(rng, 3, vocab)
    rows: list[Row | None] = [
        Row(i, {"logprobs": 3, **options})
        for i in range(3)
        for options in ({"temperature": 0}, {}, {"top_k": 9}, {"top_p": 0.4})
    ]
    assert draw(device, in_wider_rows(logits, margin), rows) == draw(device, logits, rows)


# --- Logprobs -------------------------------------------------------------------------------------


def assert_same_logprobs(got: Any, want: Any) -> None:
    assert got[1:3] == want[1:3]  # rank and ids
    assert got[0] == pytest.approx(want[0], rel=1e-6, abs=1e-6)
    assert got[3] == pytest.approx(want[3], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("vocab", [6, 700, PART + 77])
def test_logprobs_are_those_of_the_cpu(device: Any, rng: np.random.Generator, vocab: int) -> None:
    logits = random_logits(rng, 8, vocab, 4)
    logits[1] = np.round(logits[1])  # equal ones, at the end of the best k, too
    logits[2] = 0
    rows = [
        Row(
            i,
            {
                "temperature": float(rng.choice([0, 1])),
                "logprobs": k,
                "logit_bias": [(1, 30.0)],  # the logprobs are those before it
            },
            seed=i,
        )
        for i, k in enumerate([0, 1, 5, 20, 20, 2, 3, 20])
    ]
    got = draw(device, logits, list(rows))
    for row, (token, error, logprobs) in zip(rows, got, strict=True):
        want_token, want = row.on_cpu(logits)
        assert (token, error) == (want_token, 0)
        assert_same_logprobs(logprobs, want)


def test_logprobs_of_a_prompt_are_those_of_the_cpu(device: Any, rng: np.random.Generator) -> None:
    logits = random_logits(rng, 30, 333, 4)
    tokens = rng.integers(0, 333, 30).tolist()
    got = _core.cuda_logprobs(device, logits, tokens, 6)
    for row, token in enumerate(tokens):
        options = {"temperature": 0, "logprobs": 6, "logit_bias": [(token, 100.0)]}  # takes it
        assert_same_logprobs(got[row], Row(row, options).on_cpu(logits)[1])


# --- The next step --------------------------------------------------------------------------------


def test_sampled_tokens_go_where_the_next_step_wants_them(device: Any) -> None:
    sources = [-1, 2, 0, -1, 2]
    assert _core.cuda_feed_tokens(device, [50, 60, 70], sources, [1, 2, 3, 4, 5]) == [
        1,
        70,
        50,
        4,
        70,
    ]
