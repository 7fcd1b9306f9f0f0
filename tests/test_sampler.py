"""The sampler: its random numbers, every option in the order of csrc/engine/sampler.h, draws and
logprobs.

The reference is plain float64 NumPy that sorts and masks whole rows, with a Philox of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvllm import _core
from tinyvllm.errors import InvalidRequestError, TinyvllmError

Floats = npt.NDArray[np.float64]

words = st.integers(0, 2**32 - 1)


# --- The reference --------------------------------------------------------------------------------


def philox(key: Any, counter: Any) -> list[npt.NDArray[np.uint64]]:
    """Philox4x32-10 of Salmon et al. 2011, figure 4, over arrays of 32-bit words."""
    mask = np.uint64(0xFFFFFFFF)
    low_key, high_key = (np.uint64(word) for word in key)
    a, b, c, d = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    for number in range(10):
        round_keys = [
            (low_key + np.uint64(number * 0x9E3779B9)) & mask,
            (high_key + np.uint64(number * 0xBB67AE85)) & mask,
        ]
        left, right = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)  # 64-bit products
        a, b, c, d = (
            (right >> np.uint64(32)) ^ b ^ round_keys[0],
            right & mask,
            (left >> np.uint64(32)) ^ d ^ round_keys[1],
            left & mask,
        )
    return [a, b, c, d]


def gumbel(seed: int, position: int, tokens: Any, sample_index: int = 0) -> Floats:
    """Four neighbouring tokens share a counter, and take a word of its answer each."""
    tokens = np.asarray(tokens)
    key = (seed & 0xFFFFFFFF, seed >> 32)
    bits = np.choose(tokens % 4, philox(key, (tokens // 4, position, sample_index, 0)))
    return np.asarray(-np.log(-np.log((bits + 0.5) / 2.0**32)))


@dataclasses.dataclass
class Case:
    """What a request has so far, and what it asks for."""

    logits: npt.NDArray[np.float32]
    options: dict[str, Any]
    prompt: list[int] = dataclasses.field(default_factory=lambda: [0])
    output: list[int] = dataclasses.field(default_factory=list)
    eos: list[int] = dataclasses.field(default_factory=list)

    def token(self, seed: int) -> int:
        return int(self._sample(seed)[0])

    def logprobs(self, seed: int = 0) -> Any:
        return self._sample(seed)[1]

    def _sample(self, seed: int) -> Any:
        params = _core.SamplingParams(**self.options)
        logits = self.logits.tolist()
        return _core.sample(params, logits, self.prompt, self.output, seed, self.eos)

    def scores(self) -> Floats:
        """Logits after all options; what a filter has dropped is -inf."""
        option = {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logit_bias": [],
            "min_tokens": 0,
            "stop_token_ids": [],
            "ignore_eos": False,
            **self.options,
        }
        x = self.logits.astype(np.float64)
        for token, bias in option["logit_bias"]:
            x[token] += bias
        if len(self.output) < option["min_tokens"]:
            x[option["stop_token_ids"]] = -np.inf
            if not option["ignore_eos"]:
                x[self.eos] = -np.inf
        seen = sorted({*self.prompt, *self.output})
        repetition = option["repetition_penalty"]
        x[seen] = np.where(x[seen] > 0, x[seen] / repetition, x[seen] * repetition)
        counts = np.bincount(self.output, minlength=len(x))
        x -= option["frequency_penalty"] * counts + option["presence_penalty"] * (counts > 0)
        if option["temperature"] == 0:
            return x
        x = x / option["temperature"]

        order = np.lexsort((np.arange(len(x)), -x))  # by falling score, then by rising id
        probability = softmax(x)
        x[probability < option["min_p"] * probability.max()] = -np.inf
        if option["top_k"] > 0:
            x[order[option["top_k"] :]] = -np.inf
        before = np.cumsum(softmax(x)[order]) - softmax(x)[order]  # mass of all that are better
        if option["top_p"] < 1:
            x[order[before >= option["top_p"]]] = -np.inf
        scores: Floats = x
        return scores

    def want(self, seed: int) -> int:
        scores = self.scores()
        if self.options.get("temperature") == 0:
            return int(np.argmax(scores))
        position = len(self.prompt) + len(self.output)
        return int(np.argmax(scores + gumbel(seed, position, np.arange(len(scores)))))


def softmax(x: Floats) -> Floats:
    weights = np.exp(x - x.max())
    result: Floats = weights / weights.sum()
    return result


def random_logits(seed: int, vocab: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 2, vocab).astype(np.float32)


def row(values: list[float]) -> npt.NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def of(*probabilities: float) -> npt.NDArray[np.float32]:
    """Logits whose softmax these are."""
    return row([math.log(probability) for probability in probabilities])


def drawn(logits: npt.NDArray[np.float32], seeds: int = 300, **options: Any) -> set[int]:
    """All tokens that some seed gives."""
    case = Case(logits, options)
    return {case.token(seed) for seed in range(seeds)}


# --- Random numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [  # kat_vectors of Random123
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: str, key: str, want: str) -> None:
    c, k, w = ([int(word, 16) for word in text.split()] for text in (counter, key, want))
    assert _core.philox(k, c) == w
    assert [int(word) for word in philox(k, c)] == w  # the reference of this file, too


@given(key=st.tuples(words, words), counter=st.tuples(words, words, words, words))
def test_philox_equals_the_reference(key: tuple[int, ...], counter: tuple[int, ...]) -> None:
    assert _core.philox(key, counter) == [int(word) for word in philox(key, counter)]


@given(seed=st.integers(0, 2**64 - 1), sample=words, position=words, token=words)
def test_noise_is_keyed_by_seed_sample_position_and_token(
    seed: int, sample: int, position: int, token: int
) -> None:
    want = float(gumbel(seed, position, token, sample))
    assert math.isfinite(want)
    assert _core.gumbel_noise(seed, sample, position, token) == pytest.approx(want, rel=1e-12)


# --- Options, one by one and together -------------------------------------------------------------

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "bias": [{}, {"logit_bias": [(1, 2.5), (4, -100.0)]}],
    "repetition": [{}, {"repetition_penalty": 1.7}, {"repetition_penalty": 0.6}],
    "counts": [{}, {"presence_penalty": 1.5, "frequency_penalty": -0.7}],
    "temperature": [{}, {"temperature": 0.3}, {"temperature": 3.0}, {"temperature": 0.0}],
    "min_p": [{}, {"min_p": 0.13}],
    "top_k": [{}, {"top_k": 5}],
    "top_p": [{}, {"top_p": 0.81}],
}
ALONE = [choice for choices in OPTIONS.values() for choice in choices[1:]] + [
    {},
    {"top_k": 1},
    {"top_k": -1},
    {"top_k": 10_000},
    {"top_p": 1e-9},
    {"min_p": 1.0},
    {"temperature": 100.0},
]


@pytest.mark.parametrize("options", ALONE, ids=str)
@pytest.mark.parametrize("vocab", [7, 333])
def test_each_option_does_what_the_reference_does(options: dict[str, Any], vocab: int) -> None:
    for seed in range(60):
        case = Case(random_logits(seed, vocab), options, [1, 2, 2], [2, 3, 3, 5])
        assert case.token(seed) == case.want(seed)


# Rows of many blocks, flat and steep, where nearly all tokens are passed over by a bound.
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.3},
        {"temperature": 3.0},
        {"min_p": 0.02},
        {"top_k": 2},
        {"top_k": 40, "top_p": 0.7},
        {"top_k": 3000},
        {"top_p": 0.9},
        {"top_p": 0.02},
        {"top_p": 0.5, "min_p": 0.001},
        {"top_p": 0.5, "logit_bias": [(3000, 9.0)], "repetition_penalty": 1.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_long_rows_give_what_the_reference_gives(options: dict[str, Any], spread: float) -> None:
    for seed in range(25):
        logits = random_logits(seed, 5003) * np.float32(spread)
        case = Case(logits, options, [1, 2, 2], [2, 3, 3, 5])
        assert case.token(seed) == case.want(seed)


def test_greedy_ties_far_apart_go_to_the_lowest_id() -> None:
    for first in (0, 255, 256, 700):
        logits = np.zeros(1001, np.float32)
        logits[[first, 900, 1000]] = 2.0
        assert Case(logits, {"temperature": 0.0}).token(0) == first


@pytest.mark.parametrize("place", [0, 17, 255, 256, 1000])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_found_anywhere(place: int, bad: float) -> None:
    logits = np.zeros(1001, np.float32)
    logits[place] = bad
    with pytest.raises(TinyvllmError, match="not a finite number"):
        Case(logits, {}).token(0)


def test_all_options_together_do_what_the_reference_does() -> None:
    for number, choice in enumerate(itertools.product(*OPTIONS.values())):
        options = {key: value for part in choice for key, value in part.items()}
        for seed in range(3):
            case = Case(random_logits(number, 21), options, [1, 4, 2], [2, 3, 3, 5, 20])
            assert case.token(seed) == case.want(seed), options


def test_temperature_comes_before_the_filters() -> None:
    logits = of(0.6, 0.2, 0.15, 0.05)
    assert drawn(logits, top_p=0.55) == {0}
    assert drawn(logits, top_p=0.55, temperature=2.0) == {0, 1}


def test_top_p_is_of_what_top_k_has_left() -> None:
    logits = of(0.4, 0.3, 0.2, 0.1)
    assert drawn(logits, top_p=0.5) == {0, 1}
    assert drawn(logits, top_p=0.5, top_k=2) == {0}  # 0.4 / 0.7 is more than half


def test_top_p_is_of_what_min_p_has_left() -> None:
    logits = of(0.4, 0.3, 0.1, 0.1, 0.1)
    assert drawn(logits, top_p=0.5, min_p=0.5) == {0}


def test_the_token_that_crosses_top_p_is_kept() -> None:
    assert drawn(of(0.5, 0.3, 0.2), top_p=0.51) == {0, 1}


def test_min_p_is_a_share_of_the_best() -> None:
    assert drawn(of(0.5, 0.3, 0.11, 0.09), min_p=0.2) == {0, 1, 2}


def test_bias_comes_before_repetition() -> None:
    # (-1 + 2) / 2 = 0.5 wins over 0.25; the other way round it would be -1 * 2 + 2 = 0.
    options = {"temperature": 0.0, "repetition_penalty": 2.0, "logit_bias": [(0, 2.0)]}
    assert Case(row([-1, 0.25]), options).token(0) == 0


def test_repetition_comes_before_presence_and_frequency() -> None:
    # 1 / 2 - 0.5 = 0 loses to 0.1; the other way round it would be (1 - 0.5) / 2 = 0.25.
    for penalty in ("presence_penalty", "frequency_penalty"):
        options = {"temperature": 0.0, "repetition_penalty": 2.0, penalty: 0.5}
        assert Case(row([1, 0.1, -9]), options, prompt=[2], output=[0]).token(0) == 1


def test_presence_counts_once_and_frequency_every_time() -> None:
    logits = row([1.0, 0.3, -9])
    for options, want in [
        ({"presence_penalty": 0.5}, 0),
        ({"frequency_penalty": 0.5}, 1),
        ({"presence_penalty": 0.8}, 1),
    ]:
        case = Case(logits, {"temperature": 0.0, **options}, prompt=[2], output=[0, 0])
        assert case.token(0) == want


def test_presence_and_frequency_do_not_look_at_the_prompt() -> None:
    options = {"temperature": 0.0, "presence_penalty": 2.0, "frequency_penalty": 2.0}
    assert Case(row([1, 0]), options, prompt=[0, 0, 0]).token(0) == 0
    options = {"temperature": 0.0, "repetition_penalty": 3.0}
    assert Case(row([1, 0.5]), options, prompt=[0]).token(0) == 1


def test_a_temperature_next_to_zero_is_greedy() -> None:
    logits = row([1.0, 1.0 + 1e-6, 0.0])
    assert drawn(logits, temperature=1e-6) == {1}


@pytest.mark.parametrize("min_p", [0.0, 0.5])
def test_a_temperature_without_end_draws_from_what_is_allowed_with_even_odds(min_p: float) -> None:
    options = {"temperature": 1e300, "min_p": min_p, "min_tokens": 2}
    case = Case(random_logits(1, 5), options, eos=[0])
    assert {case.token(seed) for seed in range(100)} == {1, 2, 3, 4}


@pytest.mark.parametrize("penalty", [1e300, 1e-300])
@pytest.mark.parametrize("min_p", [0.0, 0.5])
def test_an_extreme_repetition_penalty_leaves_tokens_to_choose(
    penalty: float, min_p: float
) -> None:
    logits = row([0.0, 1.0, -1.0, 0.5])  # 0 times infinity would be no number
    case = Case(logits, {"repetition_penalty": penalty, "min_p": min_p}, prompt=[0, 1])
    tokens = {case.token(seed) for seed in range(100)}
    assert tokens == {1} if penalty < 1 else tokens >= {0, 3}


# --- min_tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "outputs_so_far", "want"),
    [
        ({"min_tokens": 2}, 1, {2, 3}),
        ({"min_tokens": 2}, 2, {0, 1, 2, 3}),
        ({"min_tokens": 2, "stop_token_ids": [2]}, 1, {3}),
        ({"min_tokens": 2, "ignore_eos": True}, 1, {0, 1, 2, 3}),
        ({"min_tokens": 2, "ignore_eos": True, "stop_token_ids": [2]}, 1, {0, 1, 3}),
        ({"min_tokens": 2, "logit_bias": [(0, 100.0)]}, 1, {2, 3}),
    ],
)
def test_before_min_tokens_no_token_that_ends_can_be_chosen(
    options: dict[str, Any], outputs_so_far: int, want: set[int]
) -> None:
    case = Case(of(0.25, 0.25, 0.25, 0.25), options, output=[3] * outputs_so_far, eos=[0, 1])
    assert {case.token(seed) for seed in range(200)} == want


def test_when_min_tokens_leaves_nothing_to_choose_that_is_an_error() -> None:
    case = Case(row([1, 2]), {"min_tokens": 3, "stop_token_ids": [0]}, eos=[1])
    with pytest.raises(TinyvllmError, match=r"min_tokens is 3 .* leave no token"):
        case.token(0)


# --- Ties -----------------------------------------------------------------------------------------


def test_greedy_ties_go_to_the_lowest_id() -> None:
    assert Case(row([0, 3, 1, 3, 3]), {"temperature": 0.0}).token(0) == 1


def test_ties_at_the_edge_of_a_filter_go_to_the_lowest_ids() -> None:
    even = np.zeros(10, np.float32)
    assert drawn(even, top_k=3) == {0, 1, 2}
    assert drawn(even, top_p=0.25) == {0, 1, 2}
    mixed = row([1, 0, 2, 1, 1, 0])
    assert drawn(mixed, top_k=3) == {0, 2, 3}


# --- Draws ----------------------------------------------------------------------------------------

PROBABILITIES = np.array([0.35, 0.25, 0.15, 0.1, 0.08, 0.04, 0.02, 0.01])
CHI_SQUARE = 29.9  # of 7 degrees of freedom: exceeded once in 10,000 times


def chi_square(tokens: list[int]) -> float:
    counts = np.bincount(tokens, minlength=len(PROBABILITIES))
    expected = len(tokens) * PROBABILITIES
    return float(((counts - expected) ** 2 / expected).sum())


def test_over_seeds_draws_follow_the_softmax() -> None:
    case = Case(of(*PROBABILITIES), {})
    assert chi_square([case.token(seed) for seed in range(20_000)]) < CHI_SQUARE


def test_over_positions_of_one_request_draws_follow_the_softmax() -> None:
    logits = of(*PROBABILITIES)
    tokens = [Case(logits, {}, prompt=[0] * length).token(7) for length in range(1, 3_000)]
    assert chi_square(tokens) < CHI_SQUARE


def test_with_a_temperature_draws_follow_the_softmax_of_the_scaled_logits() -> None:
    case = Case((of(*PROBABILITIES) * np.float32(0.7)), {"temperature": 0.7})
    assert chi_square([case.token(seed) for seed in range(20_000)]) < CHI_SQUARE


def test_dropping_tokens_that_did_not_win_changes_no_draw() -> None:
    logits = random_logits(3, 12)
    for seed in range(100):
        winner = Case(logits, {}).token(seed)
        for dropped in range(12):
            others = [(token, -100.0) for token in range(dropped) if token != winner]
            assert Case(logits, {"logit_bias": others}).token(seed) == winner


def test_the_params_seed_wins_over_the_derived_one() -> None:
    logits = np.zeros(100, np.float32)
    tokens = {Case(logits, {"seed": 5}).token(derived) for derived in range(10)}
    assert tokens == {Case(logits, {}).token(5)}


# --- Logprobs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"temperature": 0.2, "top_k": 3}])
def test_logprobs_are_the_log_softmax_of_the_raw_logits(options: dict[str, Any]) -> None:
    options = options | {"logprobs": 5, "logit_bias": [(3, 50.0)], "repetition_penalty": 1.5}
    for seed in range(20):
        case = Case(random_logits(seed, 50) * np.float32(10), options)
        token, (chosen, rank, ids, values) = case.token(seed), case.logprobs(seed)
        want = np.log(softmax(case.logits.astype(np.float64)))
        assert chosen == pytest.approx(want[token], rel=1e-6, abs=1e-6)
        assert rank == 1 + np.count_nonzero(want > want[token])
        assert ids == np.argsort(-want)[:5].tolist()
        np.testing.assert_allclose(values, want[ids], rtol=1e-6, atol=1e-6)


def test_logprobs_of_ties_come_by_rising_id_and_share_the_rank() -> None:
    case = Case(row([1, 2, 1, 2]), {"temperature": 0.0, "logprobs": 4})
    _, rank, ids, _ = case.logprobs()
    assert (rank, ids) == (1, [1, 3, 0, 2])


def test_no_more_logprobs_than_asked_for_or_than_there_are_tokens() -> None:
    logits = row([1, 2])
    assert Case(logits, {}).logprobs() is None
    assert Case(logits, {"logprobs": 0}).logprobs()[2:] == ([], [])
    assert Case(logits, {"logprobs": 20, "temperature": 0.0}).logprobs()[2] == [1, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_an_error(bad: float) -> None:
    with pytest.raises(TinyvllmError, match=r"a logit at position 2 is not a finite number"):
        Case(row([1, bad]), {}, prompt=[0, 1], output=[1]).token(0)


# --- Validation -----------------------------------------------------------------------------------

BAD = [
    ("n", 0),
    ("n", 65),
    ("temperature", -0.1),
    ("temperature", math.inf),
    ("temperature", math.nan),
    ("top_p", 0),
    ("top_p", 1.0000001),
    ("top_p", math.nan),
    ("top_k", -2),
    ("min_p", -0.01),
    ("min_p", 1.01),
    ("repetition_penalty", 0),
    ("repetition_penalty", math.inf),
    ("presence_penalty", 2.1),
    ("presence_penalty", -2.1),
    ("frequency_penalty", 2.1),
    ("frequency_penalty", math.nan),
    ("max_tokens", 0),
    ("min_tokens", -1),
    ("min_tokens", 17),  # more than the default max_tokens of 16
    ("logprobs", -1),
    ("logprobs", 21),
    ("prompt_logprobs", -1),
    ("prompt_logprobs", 21),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_value_out_of_range_is_refused_with_field_and_value(field: str, value: float) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        _core.SamplingParams(**{field: value})
    assert str(caught.value).startswith(f"{field} is {value}; it must be ")


@pytest.mark.parametrize("bias", [100.5, -math.inf, math.nan])
def test_a_logit_bias_out_of_range_is_refused(bias: float) -> None:
    with pytest.raises(InvalidRequestError, match=f"logit_bias is {bias}; .* from -100 to 100"):
        _core.SamplingParams(logit_bias=[(1, bias)])


RANGES = {  # both ends allowed, unless `above` says that the lower one is not
    "temperature": (0.0, 1e6),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 1e6),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
ABOVE = {"top_p", "repetition_penalty"}


@given(field=st.sampled_from(sorted(RANGES)), value=st.floats(-1e6, 1e6))
def test_a_number_is_accepted_exactly_when_it_is_in_its_range(field: str, value: float) -> None:
    low, high = RANGES[field]
    allowed = low <= value <= high and not (field in ABOVE and value == low)
    if allowed:
        _core.SamplingParams(**{field: value})
    else:
        with pytest.raises(InvalidRequestError, match=f"^{field} is "):
            _core.SamplingParams(**{field: value})


@pytest.mark.parametrize("token", [-1, 4, 100])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    logits = np.zeros(4, np.float32)
    with pytest.raises(InvalidRequestError, match=f"logit_bias is {token}; .* from 0 to 3"):
        Case(logits, {"logit_bias": [(token, 1.0)]}).token(0)
    with pytest.raises(InvalidRequestError, match=f"stop_token_id is {token}; .* from 0 to 3"):
        Case(logits, {"stop_token_ids": [token]}).token(0)


# --- Transformers as the second opinion -----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "processor"),
    [
        ({"temperature": 0.4}, ("TemperatureLogitsWarper", 0.4)),
        ({"repetition_penalty": 1.6}, ("RepetitionPenaltyLogitsProcessor", 1.6)),
        ({"top_k": 6}, ("TopKLogitsWarper", 6)),
        ({"top_p": 0.77}, ("TopPLogitsWarper", 0.77)),
        ({"min_p": 0.08}, ("MinPLogitsWarper", 0.08)),
    ],
)
def test_filters_and_repetition_mean_what_transformers_means(
    transformers: ModuleType, options: dict[str, Any], processor: tuple[str, float]
) -> None:
    import torch

    name, value = processor
    process = getattr(transformers, name)(value)
    history = [3, 1, 4, 1, 5]
    for seed in range(100):
        logits = random_logits(seed, 40)
        scores = process(torch.tensor([history]), torch.from_numpy(logits[None].copy()))[0].numpy()
        noise = gumbel(seed, len(history), np.arange(40))
        case = Case(logits, options, prompt=history[:3], output=history[3:])
        assert case.token(seed) == np.argmax(scores + noise)
