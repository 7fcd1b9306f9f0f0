"""The Python front end: prompts in every form, streams, stop conditions, errors, defaults."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families import FAMILIES
from tinyvllm import LLM, SamplingParams, _core
from tinyvllm.errors import (
    CapacityError,
    CheckpointError,
    DeviceError,
    InvalidRequestError,
    TinyvllmError,
)
from tinyvllm.text_engine import BUNDLED_MODEL

GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama-3.2-v5"].write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with LLM(directory) as llm:
        yield llm


def text_of(llm: LLM, prompt: Any, params: SamplingParams = GREEDY) -> str:
    return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].text


# --- Prompts and outputs ----------------------------------------------------------------------


def test_a_prompt_means_the_same_in_every_form(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("Hello")
    forms = ["Hello", ["Hello"], ids, [ids], {"prompt": "Hello"}, [{"prompt_token_ids": ids}]]
    forms += [tuple(ids), np.array(ids), np.array([ids])]
    assert len({text_of(llm, form) for form in forms}) == 1


def test_outputs_are_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["one", "two", "three"]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [output.outputs[0].text for output in outputs] == [text_of(llm, p) for p in prompts]


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (3, 5)]
    outputs = llm.generate(["one", "two"], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 5]


def test_deltas_join_to_the_whole_output(llm: LLM) -> None:
    (whole,) = llm.generate("Hello", GREEDY, use_tqdm=False)
    deltas = list(llm.stream("Hello", GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.outputs[0].text
    assert [token for delta in deltas for token in delta.token_ids] == whole.outputs[0].token_ids
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]


def test_a_stream_that_is_dropped_frees_its_request(llm: LLM) -> None:
    stream = llm.stream("Hello", GREEDY)
    next(stream)
    stream.close()
    assert text_of(llm, "Hello") != ""
    assert llm.stats()["num_requests_running"] == llm.stats()["num_requests_waiting"] == 0
    assert llm.stats()["num_free_blocks"] == llm.stats()["num_blocks"]


def test_n_outputs_differ_and_the_first_is_that_of_n_1(llm: LLM) -> None:
    one, many = (
        SamplingParams(n=n, seed=3, temperature=1.5, max_tokens=12, ignore_eos=True) for n in (1, 4)
    )
    outputs = llm.generate("Hello", many, use_tqdm=False)[0].outputs
    assert [output.index for output in outputs] == [0, 1, 2, 3]
    assert len({output.text for output in outputs}) == 4
    assert outputs[0] == llm.generate("Hello", one, use_tqdm=False)[0].outputs[0]
    texts = [""] * 4
    for delta in llm.stream("Hello", many):
        texts[delta.index] += delta.text
    assert texts == [output.text for output in outputs]


def test_two_streams_can_be_read_in_turn(llm: LLM) -> None:
    first, second = llm.stream("one", GREEDY), llm.stream("two", GREEDY)
    texts = [next(first).text, next(second).text]  # which runs the first one to its end
    for i, stream in enumerate((first, second)):
        texts[i] += "".join(delta.text for delta in stream)
    assert texts == [text_of(llm, "one"), text_of(llm, "two")]


def test_progress_goes_to_stderr(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate(["one", "two"], GREEDY)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Processed prompts: 100%" in captured.err
    assert "2/2" in captured.err
    assert re.search(r"est\. speed input: [\d.]+ toks/s, output: [\d.]+ toks/s", captured.err)


def test_logprobs_name_the_taken_token_and_the_best(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=8, logprobs=3, seed=5, ignore_eos=True)
    output = llm.generate("Hello", params, use_tqdm=False)[0].outputs[0]
    assert output.logprobs is not None
    taken = [
        entries[token] for token, entries in zip(output.token_ids, output.logprobs, strict=True)
    ]
    assert output.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in taken))
    for token, entries in zip(output.token_ids, output.logprobs, strict=True):
        assert len(entries) == (3 if (entries[token].rank or 0) <= 3 else 4)
        assert sorted(entry.rank or 0 for entry in entries.values())[:3] == [1, 2, 3]


def test_prompt_logprobs_are_those_of_the_bare_model(llm: LLM, directory: Path) -> None:
    ids = llm.get_tokenizer().encode("Hello there, and welcome")
    params = SamplingParams(max_tokens=1, prompt_logprobs=2)
    (output,) = llm.generate([ids], params, use_tqdm=False)
    logits = _core.Model(directory).logits(ids).astype("f8")
    want = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(ids)
    assert output.prompt_logprobs[0] is None
    for row, token, entries in zip(want, ids[1:], output.prompt_logprobs[1:], strict=False):
        assert entries is not None
        assert {token, *np.argsort(-row)[:2].tolist()} == set(entries)
        for id, entry in entries.items():
            assert entry.logprob == pytest.approx(row[id], abs=1e-4)
            assert entry.rank == 1 + (row > row[id]).sum()


def test_no_logprobs_unless_asked(llm: LLM) -> None:
    output = llm.generate("Hello", GREEDY, use_tqdm=False)[0].outputs[0]
    assert output.logprobs is None
    assert output.cumulative_logprob is None


# --- Where an output ends ---------------------------------------------------------------------


def test_content_in_parts_is_one_text() -> None:
    parts = [{"type": "text", "text": "Tell me"}, {"type": "text", "text": "a story"}]
    with LLM() as llm:
        whole, split = llm.chat(
            [[{"role": "user", "content": content}] for content in ("Tell me\na story", parts)],
            GREEDY,
            use_tqdm=False,
        )
        assert split.prompt == whole.prompt
        image = [{"type": "image_url", "image_url": "x"}]
        with pytest.raises(InvalidRequestError, match=r"messages\[1\] has .*image_url"):
            llm.chat([{"role": "user", "content": "Hi"}, {"role": "user", "content": image}])
        with pytest.raises(InvalidRequestError, match="a message is a int"):
            llm.parse_chat([3])  # type: ignore[list-item]


def test_a_stop_string_that_spans_tokens_is_cut_off(llm: LLM) -> None:
    whole = text_of(llm, "Hello")
    stop = whole[6:11]
    params = SamplingParams(temperature=0, max_tokens=24, stop=[stop, "never seen"])
    output = llm.generate("Hello", params, use_tqdm=False)[0].outputs[0]
    assert output.text == whole[: whole.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert "".join(delta.text for delta in llm.stream("Hello", params)) == output.text


def test_a_stop_token_ends_and_is_no_part_of_the_text(llm: LLM) -> None:
    whole = llm.generate("Hello", GREEDY, use_tqdm=False)[0].outputs[0]
    stop = whole.token_ids[4]
    end = whole.token_ids.index(stop)
    params = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[stop])
    output = llm.generate("Hello", params, use_tqdm=False)[0].outputs[0]
    assert output.token_ids == whole.token_ids[: end + 1]
    assert output.text == llm.get_tokenizer().decode(whole.token_ids[:end])
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("where", ["generation_config.json", "config.json", "tokenizer"])
def test_every_file_that_names_an_end_token_counts(
    directory: Path, tmp_path: Path, where: str
) -> None:
    from tinyvllm.generation_config import eos_token_ids

    files: dict[str, Any] = {"generation_config.json": {}, "config.json": {}, "tokenizer": None}
    files[where] = 7 if where == "tokenizer" else {"eos_token_id": [5, 7]}
    assert 7 in eos_token_ids(
        files["generation_config.json"], files["config.json"], files["tokenizer"]
    )


def test_generation_config_overrides_config_and_the_tokenizer_adds() -> None:
    from tinyvllm.generation_config import eos_token_ids

    assert eos_token_ids({"eos_token_id": 1}, {"eos_token_id": 2}, 3) == [1, 3]


@pytest.mark.parametrize("token", [-2, 1 << 31, True, "5"])
@pytest.mark.parametrize("where", ["generation_config.json", "config.json", "tokenizer.json"])
def test_an_end_token_that_is_no_token_id_names_its_file(where: str, token: Any) -> None:
    from tinyvllm.generation_config import eos_token_ids

    files: dict[str, Any] = {"generation_config.json": {}, "config.json": {}}
    if where in files:
        files[where] = {"eos_token_id": [5, token]}
    with pytest.raises(CheckpointError, match=rf"^{where}: the end token is {token!r}"):
        eos_token_ids(*files.values(), token if where == "tokenizer.json" else None)


# --- Options and errors -----------------------------------------------------------------------


def test_an_unknown_argument_names_the_nearest(directory: Path) -> None:
    with pytest.raises(TypeError, match=r"max_modellen.*max_model_len"):
        LLM(directory, max_modellen=5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("max_model_len", 2**70),
        ("max_num_seqs", 2.5),
        ("max_num_batched_tokens", "4"),
        ("block_size", True),
        ("num_threads", 2**40),
        ("kv_cache_memory_bytes", 1.5e9),
        ("gpu_memory_utilization", "half"),
        ("dtype", 16),
        ("device", 0),
    ],
)
def test_an_argument_of_another_kind_is_named(directory: Path, name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{name} is "):
        LLM(directory, **{name: value})


@pytest.mark.parametrize("name", ["max_model_len", "max_num_seqs", "max_num_batched_tokens"])
def test_a_limit_of_0_is_refused(directory: Path, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{name} is 0"):
        LLM(directory, **{name: 0})  # type: ignore[arg-type]


def test_what_vllm_has_is_accepted_at_its_neutral_value_only(directory: Path) -> None:
    LLM(directory, tensor_parallel_size=1, trust_remote_code=False).close()
    with pytest.raises(InvalidRequestError, match="tensor_parallel_size is 2"):
        LLM(directory, tensor_parallel_size=2)


def test_a_pool_too_small_for_max_model_len_says_the_numbers(directory: Path) -> None:
    with pytest.raises(CapacityError, match=r"max_model_len 1024 .* holds 160 tokens"):
        LLM(directory, max_model_len=1024, num_gpu_blocks_override=10)


def test_without_max_model_len_it_is_what_the_pool_holds(directory: Path) -> None:
    with LLM(directory, num_gpu_blocks_override=10) as small:
        assert small.stats()["max_model_len"] == 160


def test_devices(directory: Path) -> None:
    with pytest.raises(DeviceError, match="cuda"):
        LLM(directory, device="cuda")
    with pytest.raises(InvalidRequestError, match="tpu"):
        LLM(directory, device="tpu")


def test_a_closed_engine_says_so(directory: Path) -> None:
    llm = LLM(directory)
    llm.close()
    llm.close()
    with pytest.raises(Exception, match="closed"):
        llm.generate("Hello", GREEDY)


def test_a_stream_outlives_its_engine_and_says_so(directory: Path) -> None:
    llm = LLM(directory)
    dropped, read = llm.stream("Hello", GREEDY), llm.stream("Hello", GREEDY)
    next(dropped)
    next(read)
    llm.close()
    dropped.close()
    with pytest.raises(TinyvllmError, match="closed"):
        list(read)


@pytest.mark.parametrize(
    "prompt",
    [
        {"text": "x"},
        {"prompt": "x", "multi_modal_data": {}},
        {"prompt": 5},
        [["a"]],
        [[1.5]],
        [[True]],
        5,
        [None],
    ],
)
def test_what_is_no_prompt_is_refused(llm: LLM, prompt: Any) -> None:
    with pytest.raises((InvalidRequestError, TypeError)):
        llm.generate(prompt, GREEDY, use_tqdm=False)


def test_one_bad_prompt_queues_none(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError):
        llm.generate([[1, 2], [10**6]], GREEDY, use_tqdm=False)
    assert llm.stats()["num_requests_waiting"] == 0


def test_of_several_prompts_the_bad_one_is_named(llm: LLM) -> None:
    for bad in ([10**6], {"prompt": 5}, "\ud800"):
        prompts: Any = ["one", bad, "three"]
        for call in (llm.generate, lambda p: list(llm.stream(p))):
            with pytest.raises(InvalidRequestError, match=r"^prompt 2 of 3: "):
                call(prompts)
    with pytest.raises(InvalidRequestError, match=r"^(?!prompt)"):
        llm.generate([[10**6]])
    with LLM() as chat_model, pytest.raises(InvalidRequestError, match=r"^prompt 2 of 2: "):
        chat_model.chat([[{"role": "user", "content": "Hi"}], [{"role": "pirate"}]])


@pytest.mark.parametrize("token", [1 << 31, 3_000_000_000, -(1 << 31) - 1])
def test_a_token_id_that_no_model_has_is_told_the_range(llm: LLM, token: int) -> None:
    with pytest.raises(InvalidRequestError, match=r"token ids: whole numbers from 0 to 2\^31 - 1"):
        llm.generate([[token]])


@pytest.mark.parametrize(("name", "bits"), [("max_tokens", 64), ("top_k", 32)])
def test_a_number_that_fits_no_type_is_told_the_bits(name: str, bits: int) -> None:
    limit = 1 << (bits - 1)
    SamplingParams(**{name: limit - 1})
    with pytest.raises(InvalidRequestError, match=f"{name} is {limit}; .* fit in {bits} bits"):
        SamplingParams(**{name: limit})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 10**400),
        ("temperature", True),
        ("top_p", 0),
        ("top_k", -2),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("logprobs", 21),
        ("seed", -1),
        ("seed", 2**64),
        ("n", 0),
        ("n", 65),
        ("prompt_logprobs", 21),
        ("stop", [""]),
        ("stop_token_ids", ["x"]),
        ("ignore_eos", 1),
        ("max_tokens", 1.5),
        ("logit_bias", {1: 101}),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field.split("_id")[0].rstrip("s")):
        SamplingParams(**{field: value})


def test_fields_may_be_assigned_and_are_checked_when_used(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    params.max_tokens, params.ignore_eos = 3, True
    assert len(llm.generate("Hello", params, use_tqdm=False)[0].outputs[0].token_ids) == 3
    params.top_p = 2
    with pytest.raises(InvalidRequestError, match="top_p is 2"):
        llm.generate("Hello", params, use_tqdm=False)


def test_a_running_request_keeps_the_parameters_it_came_with(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[])
    stream = llm.stream("Hello", params)
    tokens = next(stream).token_ids
    params.include_stop_str_in_output, params.stop_token_ids = True, list(range(3, 380))
    text = "".join(delta.text for delta in stream)
    assert (llm.get_tokenizer().decode(tokens) + text) == text_of(llm, "Hello")


def test_generation_config_may_be_vllms_word_for_none(directory: Path) -> None:
    with LLM(directory, generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


def test_a_file_cut_off_while_running_fails_the_request_and_not_the_process(tmp_path: Path) -> None:
    directory = FAMILIES["llama-3.2-v5"].write(tmp_path)
    with LLM(directory, dtype="bfloat16") as llm:
        stream = llm.stream("Hello", SamplingParams(temperature=0, max_tokens=500, ignore_eos=True))
        next(stream)
        os.truncate(directory / "model.safetensors", 4096)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            list(stream)
        assert llm.stats()["num_free_blocks"] == llm.stats()["num_blocks"]


def test_dummy_weights_need_only_a_config(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    texts = []
    for seed in (1, 1, 2):
        with LLM(tmp_path, load_format="dummy", seed=seed) as llm:
            texts.append(text_of(llm, [3, 4, 5]))
    assert texts[0] == texts[1] != texts[2]


# --- Defaults of the model --------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"temperature": 0.6, "top_p": 0.9},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1},
    ],
)
def test_generation_config_means_what_transformers_makes_of_it(
    transformers: Any, directory: Path, config: dict[str, Any]
) -> None:
    """The same logits processors: top_k is 50 where do_sample is true and the file is silent."""
    from tinyvllm.generation_config import sampling_defaults

    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    model.generation_config = transformers.GenerationConfig(**config)
    prepared = model._prepare_generation_config(None)
    if isinstance(prepared, tuple):
        prepared = prepared[0]
    ours = SamplingParams(**sampling_defaults(config).fields)
    if not prepared.do_sample:
        assert ours.temperature == 0
    else:
        assert ours.temperature == pytest.approx(prepared.temperature)
        assert ours.top_k == prepared.top_k
        assert ours.top_p == pytest.approx(prepared.top_p)
        assert ours.min_p == pytest.approx(prepared.min_p or 0)
    assert ours.repetition_penalty == pytest.approx(prepared.repetition_penalty or 1)


def test_a_models_min_tokens_forbids_no_short_output(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text('{"min_new_tokens": 30}')
    with LLM(directory, generation_config=path) as llm:
        params = llm.get_default_sampling_params()
    assert (params.min_tokens, params.max_tokens) == (16, 16)


@pytest.mark.parametrize("values", ['{"top_p": 1.5}', '{"do_sample": true, "top_k": 2.5}'])
def test_a_generation_config_out_of_range_is_named(tmp_path: Path, values: str) -> None:
    from tinyvllm.generation_config import sampling_defaults
    from tinyvllm.model_files import read_json

    path = tmp_path / "generation_config.json"
    path.write_text(values)
    with pytest.raises(CheckpointError, match=r"generation_config.json: top_. is .*config none"):
        sampling_defaults(read_json(path), str(path))


def test_a_pipe_in_the_place_of_a_json_file_is_refused_without_waiting(tmp_path: Path) -> None:
    from tinyvllm.model_files import read_json

    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: is not a file"):
        read_json(tmp_path / "config.json")


def test_what_is_not_obeyed_is_said() -> None:
    from tinyvllm.generation_config import sampling_defaults

    warnings = sampling_defaults({"no_repeat_ngram_size": 3, "num_beams": 1}).warnings
    assert len(warnings) == 1
    assert "no_repeat_ngram_size = 3" in warnings[0]


def test_a_deferred_tokenizer_changes_neither_tokens_nor_text() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20)
    prompt = [5, 6, 7, 8]
    with LLM() as llm:
        want = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]
    with LLM(defer_tokenizer=True) as llm:
        assert "tokenizer" not in llm.load_seconds()
        deltas = list(llm.stream([prompt], params))
        assert "tokenizer" in llm.load_seconds()
    assert deltas[0].token_ids == want.token_ids[:1]
    assert deltas[0].text == ""  # it follows with the next token
    assert [token for delta in deltas for token in delta.token_ids] == want.token_ids
    assert "".join(delta.text for delta in deltas) == want.text


def test_a_single_token_does_not_wait_for_a_deferred_tokenizer() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=1)
    prompt = [5, 6, 7, 8]
    with LLM() as llm:
        want = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]
    with LLM(defer_tokenizer=True) as llm:
        deltas = llm.stream([prompt], params)
        first = next(deltas)
        assert (first.token_ids, first.text, first.finish_reason) == (want.token_ids, "", None)
        assert "tokenizer" not in llm.load_seconds()
        (last,) = deltas
        assert "tokenizer" in llm.load_seconds()
        assert (last.token_ids, last.text, last.finish_reason) == ([], want.text, "length")
    with LLM(defer_tokenizer=True) as llm:
        got = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]
    assert (got.token_ids, got.text) == (want.token_ids, want.text)


def test_a_deferred_tokenizer_that_is_broken_is_an_error_when_it_is_needed(tmp_path: Path) -> None:
    shutil.copytree(BUNDLED_MODEL, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(path.read_text()[:-20])
    with LLM(tmp_path / "model", defer_tokenizer=True) as llm, pytest.raises(CheckpointError):
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3), use_tqdm=False)
