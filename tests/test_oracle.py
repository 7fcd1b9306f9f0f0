"""The engine says what Transformers says, on every family (docs/promises.md, 1).

Also here: the proof that this file can fail. The same checkpoint under a slightly wrong config,
or with two heads swapped, is far outside the bound for Transformers itself.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families import FAMILIES, Family
from oracle import (
    LOGIT_BOUND,
    MIN_CLEAR_SHARE,
    MIN_KL_POSITIONS,
    NUM_GREEDY,
    Logits,
    Oracle,
    TokenIds,
    clear_positions,
    kl_divergences,
    logit_error,
    max_abs,
    record,
)
from tinyvllm import dummy

NUM_KL_PROMPTS, KL_LENGTH = 7, 300  # 2,100 positions, besides the prompts themselves
MAX_CHUNK = 7  # odd, so that chunks end inside blocks of 16


@dataclasses.dataclass(frozen=True, eq=False)
class Sequence:
    """A prompt, what Transformers continues it with, and both its opinions on the whole."""

    prompt_length: int
    token_ids: TokenIds  # prompt and continuation
    truth: Logits  # float32
    theirs: Logits  # Transformers' own bfloat16

    @property
    def continuation(self) -> TokenIds:
        return self.token_ids[self.prompt_length :]

    def rows_that_continue(self, logits: Logits) -> Logits:
        """The rows whose greedy tokens are the continuation."""
        return logits[self.prompt_length - 1 : -1]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A family on disk, with everything that is asked of the oracle about it."""

    family: Family
    directory: Path
    sequences: list[Sequence]
    kl_prompts: TokenIds  # [prompts, length]
    kl_truth: Logits
    kl_theirs: Logits

    @functools.cache  # noqa: B019  (emptied when the module's fixture ends)
    def engine(self, dtype: str, num_threads: int = 2) -> Any:
        from tinyvllm import _core  # not at the top: the oracle's own checks need no build

        return _core.Model(str(self.directory), dtype=dtype, num_threads=num_threads, block_size=16)

    @functools.cache  # noqa: B019
    def ours(self, dtype: str, chunk_size: int) -> list[Logits]:
        """What the engine says of each sequence."""
        engine = self.engine(dtype)
        return [engine.logits(s.token_ids, chunk_size=chunk_size) for s in self.sequences]


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    transformers: types.ModuleType,
) -> Iterator[Case]:
    family = FAMILIES[request.param]
    directory = family.write(tmp_path_factory.mktemp(family.name))
    exact, rounded = Oracle(directory, "float32"), Oracle(directory, "bfloat16")
    sequences = []
    for length in family.prompt_lengths:
        prompt = family.prompt(length)
        token_ids = np.concatenate([prompt, exact.greedy(prompt)])
        sequences.append(
            Sequence(length, token_ids, exact.logits(token_ids), rounded.logits(token_ids))
        )
    kl_prompts = np.stack([family.prompt(KL_LENGTH, 1 + n) for n in range(NUM_KL_PROMPTS)])
    yield Case(
        family,
        directory,
        sequences,
        kl_prompts,
        exact.logits(kl_prompts),
        rounded.logits(kl_prompts),
    )
    Case.engine.cache_clear()
    Case.ours.cache_clear()


def test_greedy_tokens_are_seldom_in_doubt(case: Case) -> None:
    truths = [sequence.truth for sequence in case.sequences] + list(case.kl_truth)
    clear = np.concatenate([clear_positions(truth) for truth in truths])
    assert record(
        "positions whose greedy token is clear",
        case.family.name,
        clear.mean(),
        MIN_CLEAR_SHARE,
        higher_is_better=True,
    )


@pytest.mark.parametrize("chunk_size", [0, MAX_CHUNK])
def test_float32_logits_equal_the_oracles(case: Case, chunk_size: int) -> None:
    ours = case.ours("float32", chunk_size)
    errors = [logit_error(o, s.truth) for o, s in zip(ours, case.sequences, strict=True)]
    assert record(
        "float32 max |logit - oracle| / max |oracle|",
        case.family.name,
        max(errors),
        LOGIT_BOUND,
    ), f"prompts of {case.family.prompt_lengths} tokens: {errors}"


@pytest.mark.parametrize("chunk_size", [0, MAX_CHUNK])
def test_float32_greedy_tokens_equal_the_oracles(case: Case, chunk_size: int) -> None:
    for ours, sequence in zip(case.ours("float32", chunk_size), case.sequences, strict=True):
        clear = clear_positions(sequence.truth)
        picked, wanted = ours.argmax(axis=-1), sequence.truth.argmax(axis=-1)
        np.testing.assert_array_equal(picked[clear], wanted[clear])


@pytest.mark.parametrize("chunk_size", [0, MAX_CHUNK])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_64_greedy_tokens_equal_the_oracles(case: Case, dtype: str, chunk_size: int) -> None:
    # In bfloat16 the oracle itself is off by a known amount; a token counts where its lead is
    # more than twice that.
    wrong = num_clear = 0
    for ours, sequence in zip(case.ours(dtype, chunk_size), case.sequences, strict=True):
        truth = sequence.rows_that_continue(sequence.truth)
        error = LOGIT_BOUND * max_abs(sequence.truth)
        if dtype == "bfloat16":
            error = max_abs(sequence.rows_that_continue(sequence.theirs) - truth)
        clear = clear_positions(truth, error)
        picked = sequence.rows_that_continue(ours).argmax(axis=-1)
        wrong += int((picked != sequence.continuation)[clear].sum())
        num_clear += int(clear.sum())
    assert num_clear >= NUM_GREEDY // 8  # else this test says nothing
    assert record(f"{dtype} greedy tokens that differ, of 64 a prompt", case.family.name, wrong, 0)


def test_bfloat16_is_no_further_from_the_truth_than_the_oracles(case: Case) -> None:
    engine = case.engine("bfloat16")
    ours = case.ours("bfloat16", 0) + [engine.logits(prompt) for prompt in case.kl_prompts]
    theirs = [s.theirs for s in case.sequences] + list(case.kl_theirs)
    truths = [s.truth for s in case.sequences] + list(case.kl_truth)
    assert sum(map(len, truths)) >= MIN_KL_POSITIONS
    our_kl, their_kl = (
        np.concatenate([kl_divergences(*pair) for pair in zip(truths, logits, strict=True)])
        for logits in (ours, theirs)
    )
    assert record(
        "bfloat16 mean KL, as a share of Transformers'",
        case.family.name,
        our_kl.mean() / their_kl.mean(),
        1.0,
    ), f"ours {our_kl.mean():.3g}, Transformers' {their_kl.mean():.3g}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_size", [1, MAX_CHUNK, 64])
def test_chunks_change_no_bit(case: Case, dtype: str, chunk_size: int) -> None:
    token_ids = _middle_sequence(case).token_ids
    whole = case.engine(dtype).logits(token_ids)
    chunked = case.engine(dtype).logits(token_ids, chunk_size=chunk_size)
    np.testing.assert_array_equal(chunked.view(np.uint32), whole.view(np.uint32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_change_no_bit(case: Case, dtype: str) -> None:
    token_ids = _middle_sequence(case).token_ids
    two = case.engine(dtype, num_threads=2).logits(token_ids)
    one = case.engine(dtype, num_threads=1).logits(token_ids)
    np.testing.assert_array_equal(one.view(np.uint32), two.view(np.uint32))


def test_dtype_auto_is_bfloat16_unless_the_file_is_float32(case: Case) -> None:
    dtype = "float32" if case.family.dtype == "float32" else "bfloat16"
    token_ids = case.family.prompt(17)
    auto = case.engine("auto").logits(token_ids)
    np.testing.assert_array_equal(auto, case.engine(dtype).logits(token_ids))


def _middle_sequence(case: Case) -> Sequence:
    """The longest one that is cheap to run a token at a time."""
    return max(
        (s for s in case.sequences if s.prompt_length <= KL_LENGTH), key=lambda s: s.prompt_length
    )


# --- The oracle can tell ------------------------------------------------------------------------

FAR_OUTSIDE = 50 * LOGIT_BOUND

Change = Callable[[Any], None]


def _set(**values: object) -> Change:
    return lambda config: config.update(values)


def _set_rope(**values: object) -> Change:
    return lambda config: _rope(config).update(values)


def _drop_rope(key: str) -> Change:
    return lambda config: _rope(config).pop(key)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = config.get("rope_scaling") or config["rope_parameters"]
    return rope


# Each is a mistake that a reader of config.json can make.
WRONG_CONFIGS: dict[str, tuple[str, Change]] = {
    "llama3 scaling dropped": ("llama-3.2-tied", _set(rope_scaling=None)),
    "llama3 factor 8, not 32": ("llama-3.2-tied", _set_rope(factor=8.0)),
    "llama3 blend bounds": ("llama-3.2-tied", _set_rope(high_freq_factor=2.0)),
    "rope_parameters ignored": ("llama-3.2-v5", _set(rope_parameters=None)),
    "its theta ignored": ("llama-3.2-v5", _drop_rope("rope_theta")),
    "linear scaling dropped": ("llama-linear", _set(rope_scaling=None)),
    "theta dropped": ("smollm2", _set(rope_theta=10000.0)),
    "yarn dropped": ("qwen3-yarn", _set(rope_scaling=None)),
    "yarn without its attention factor": ("qwen3-yarn", _set_rope(attention_factor=1.0)),
    "yarn attention_factor ignored": ("llama-yarn-explicit", _drop_rope("attention_factor")),
    "yarn beta_fast ignored": ("llama-yarn-explicit", _drop_rope("beta_fast")),
    "yarn beta_slow ignored": ("llama-yarn-explicit", _drop_rope("beta_slow")),
    "yarn truncate ignored": ("llama-yarn-explicit", _drop_rope("truncate")),
    "yarn mscale ignored": ("mistral-yarn-mscale", _drop_rope("mscale")),
    "window ignored": ("mistral-window", _set(sliding_window=None)),
    "window one too short": ("mistral-window", _set(sliding_window=63)),
    "window one too long": ("mistral-window", _set(sliding_window=65)),
    "use_sliding_window false ignored": ("qwen2", _set(use_sliding_window=True)),
    "use_sliding_window true ignored": ("qwen2-window", _set(use_sliding_window=False)),
    "max_window_layers one too few": ("qwen2-window", _set(max_window_layers=0)),
    "max_window_layers one too many": ("qwen2-window", _set(max_window_layers=2)),
    "layer_types ignored": ("qwen2-layer-types", _set(layer_types=None)),
    "layer_types in another order": (
        "qwen2-layer-types",
        _set(layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
    ),
    "rms_norm_eps ignored": ("qwen3-bias", _set(rms_norm_eps=1e-06)),
}


def _attention(model: Any) -> Any:
    return model.model.layers[0].self_attn


def _permute_rows(weight: Any, heads: int, order: Callable[[int], list[int]]) -> None:
    """Reorders the rows of each of `heads` equal parts; `order` gets the size of a part."""
    rows = weight.data.view(heads, -1, weight.shape[-1])
    weight.data = rows[:, order(rows.shape[1])].reshape(weight.shape)


def _swap_first_two_heads(weight: Any, heads: int) -> None:
    rows = weight.data.view(heads, -1, weight.shape[-1]).clone()
    rows[[0, 1]] = rows[[1, 0]]
    weight.data = rows.reshape(weight.shape)


def _interleave_rope(model: Any) -> None:
    """What a rotation of pairs (2i, 2i + 1) instead of (i, i + half) amounts to."""

    def evens_then_odds(size: int) -> list[int]:
        return [*range(0, size, 2), *range(1, size, 2)]

    config = model.config
    _permute_rows(_attention(model).q_proj.weight, config.num_attention_heads, evens_then_odds)
    _permute_rows(_attention(model).k_proj.weight, config.num_key_value_heads, evens_then_odds)


# Each is a mistake that the forward pass can make, in one layer.
WRONG_MODELS: dict[str, tuple[str, Change]] = {
    "two query heads swapped": (
        "smollm2",
        lambda model: _swap_first_two_heads(_attention(model).q_proj.weight, 9),
    ),
    "two kv heads swapped": (
        "smollm2",
        lambda model: _swap_first_two_heads(_attention(model).k_proj.weight, 3),
    ),
    "interleaved rotation": ("llama-3.1-sharded", _interleave_rope),
    "q bias dropped": ("qwen2", lambda model: _attention(model).q_proj.bias.data.zero_()),
    "o bias dropped": ("llama-biases", lambda model: _attention(model).o_proj.bias.data.zero_()),
    "down bias dropped": (
        "llama-biases",
        lambda model: model.model.layers[0].mlp.down_proj.bias.data.zero_(),
    ),
    "k norm weight dropped": ("qwen3", lambda model: _attention(model).k_norm.weight.data.fill_(1)),
    "last norm weight dropped": ("qwen3", lambda model: model.model.norm.weight.data.fill_(1)),
}


@pytest.mark.parametrize("mistake", WRONG_CONFIGS)
def test_the_oracle_can_tell_a_wrong_config(
    mistake: str, tmp_path: Path, transformers: types.ModuleType
) -> None:
    name, change = WRONG_CONFIGS[mistake]
    directory, prompt = FAMILIES[name].write(tmp_path), FAMILIES[name].prompt(300)
    truth = Oracle(directory, "float32").logits(prompt)
    _edit_config(directory, change)
    assert logit_error(Oracle(directory, "float32").logits(prompt), truth) > FAR_OUTSIDE


@pytest.mark.parametrize("mistake", WRONG_MODELS)
def test_the_oracle_can_tell_a_wrong_forward_pass(
    mistake: str, tmp_path: Path, transformers: types.ModuleType
) -> None:
    name, change = WRONG_MODELS[mistake]
    oracle, prompt = Oracle(FAMILIES[name].write(tmp_path), "float32"), FAMILIES[name].prompt(300)
    truth = oracle.logits(prompt)
    change(oracle.model)
    assert logit_error(oracle.logits(prompt), truth) > FAR_OUTSIDE


def test_an_absent_mistral_window_begins_to_matter_after_4096_tokens(
    tmp_path: Path, transformers: types.ModuleType
) -> None:
    family = FAMILIES["mistral-window-absent"]
    directory, prompt = family.write(tmp_path), family.prompt(4160)
    absent = Oracle(directory, "float32").logits(prompt)
    _edit_config(directory, _set(sliding_window=None))
    null = Oracle(directory, "float32").logits(prompt)
    assert logit_error(null[:4096], absent[:4096]) < LOGIT_BOUND
    assert logit_error(null[4096:], absent[4096:]) > FAR_OUTSIDE


@pytest.mark.parametrize("name", dummy.NAMED_CONFIGS)
def test_published_configs_have_the_tensors_that_transformers_expects(
    name: str, transformers: types.ModuleType
) -> None:
    import torch

    config = dict(dummy.NAMED_CONFIGS[name])
    model_type = config.pop("model_type")
    with torch.device("meta"):  # shapes without memory
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(model_type, **config)
        )
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del expected["lm_head.weight"]  # listed there, but the embedding under a second name
    assert dummy.tensor_shapes(dummy.NAMED_CONFIGS[name]) == expected


def _edit_config(directory: Path, change: Change) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
