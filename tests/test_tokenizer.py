"""A checkpoint's tokenizer files give the ids and the text that Transformers gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

import small_tokenizers
from small_tokenizers import llama2, llama3, with_decoder, write
from tinyvllm.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from tinyvllm.tokenizer import Tokenizer, TokenizerLoader

TEXTS = [
    "",
    " ",
    "Once upon a time",
    "  two spaces,\n\ta tab  ",
    "Grüße, 世界! 🦊",
    "fox</s>\nfox <s>fox",
    "<|eot_id|>fox <|eot_id|>",
    "<tool call>1234</tool call>",
    "\x00\ufffd",
]

LLAMA3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
LLAMA2 = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def open_both(transformers, directory: Path) -> tuple[Tokenizer, Any]:
    oracle = transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    return Tokenizer.from_dir(directory), oracle


def assert_same(ours: Tokenizer, oracle: Any) -> None:
    for text in TEXTS:
        if not text.startswith(ours.bos_token or "\0"):
            assert ours.encode(text) == oracle(text)["input_ids"], text
        ids = oracle(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip), text
    assert ours.vocab_size == max(oracle.get_vocab().values()) + 1
    for name in (
        "bos_token",
        "bos_token_id",
        "eos_token",
        "eos_token_id",
        "unk_token",
        "pad_token",
    ):
        assert getattr(ours, name) == getattr(oracle, name), name


@pytest.mark.parametrize("add_bos_token", [True, False, None])
@pytest.mark.parametrize("post_processor", [True, False])
@pytest.mark.parametrize(
    "cls", ["PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", None]
)
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_sentencepiece_style_is_as_in_transformers(
    transformers, tmp_path, add_bos_token, post_processor, cls, model_type
):
    config = {**LLAMA2, "add_bos_token": add_bos_token, "tokenizer_class": cls}
    config = {key: value for key, value in config.items() if value is not None}
    write(tmp_path, llama2(bos=post_processor), config, config={"model_type": model_type})
    assert_same(*open_both(transformers, tmp_path))


@pytest.mark.parametrize(
    "options", [{"legacy": True}, {"legacy": False}, {"add_prefix_space": False}]
)
def test_llama_tokenizer_s_space_options_are_as_in_transformers(transformers, tmp_path, options):
    config = {**LLAMA2, "tokenizer_class": "LlamaTokenizer", **options}
    write(tmp_path, llama2(), config, config={"model_type": "llama"})
    assert_same(*open_both(transformers, tmp_path))


def test_llama_tokenizer_has_the_default_tokens_of_transformers(transformers, tmp_path):
    write(tmp_path, llama2(), {"tokenizer_class": "LlamaTokenizer"})
    ours, oracle = open_both(transformers, tmp_path)
    assert_same(ours, oracle)
    assert ours.special_tokens == oracle.special_tokens_map == LLAMA2


@pytest.mark.parametrize("cls", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer"])
@pytest.mark.parametrize("add_bos_token", [True, False])
def test_byte_level_style_is_as_in_transformers(transformers, tmp_path, cls, add_bos_token):
    config = {**LLAMA3, "tokenizer_class": cls, "add_bos_token": add_bos_token}
    config["unk_token"] = "<|end_of_text|>"
    write(tmp_path, llama3(), config, config={"model_type": "llama"})
    assert_same(*open_both(transformers, tmp_path))


NEW = {"content": "<extra>", "lstrip": True, "rstrip": False, "single_word": False}
EXTRA_CONFIGS: dict[str, dict[str, Any]] = {
    "tokens as objects": {"eos_token": {"__type": "AddedToken", "content": "</s>"}},
    "a token that tokenizer.json lacks": {"pad_token": "<pad>"},
    "one that it lacks, as an object": {"pad_token": {"content": "<pad>", "__type": "AddedToken"}},
    "a list of more": {"additional_special_tokens": ["<a>", "</s>", "<b>"]},
    "a list of more, new name": {"extra_special_tokens": ["<a>"]},
    "named ones": {"extra_special_tokens": {"image_token": "<image>"}},
    "its own kind of token": {"boi_token": "<boi>"},
    "declared": {
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True, "normalized": False},
            "9999": {**NEW, "normalized": False, "special": False},
            "2": {"content": "</s>", "special": False, "normalized": False},
        }
    },
    "truncation": {"model_max_length": 3},
}


@pytest.mark.parametrize("name", EXTRA_CONFIGS)
def test_special_tokens_of_the_config_are_as_in_transformers(transformers, tmp_path, name):
    write(tmp_path, llama2(), {**LLAMA2, **EXTRA_CONFIGS[name]})
    ours, oracle = open_both(transformers, tmp_path)
    assert_same(ours, oracle)
    for text in ("fox <extra>", "a <pad><a> b</s>", "<image><boi>"):
        ids = ours.encode(text)
        assert ids == oracle(text)["input_ids"]
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert ours.special_tokens == oracle.special_tokens_map


@pytest.mark.parametrize("modern", [True, False])
def test_special_tokens_map_counts_as_in_transformers(transformers, tmp_path, modern):
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "<s>"}
    if modern:
        config["added_tokens_decoder"] = {"1": {"content": "<s>", "special": True}}
    mapped = {"eos_token": {"content": "</s>", "lstrip": False}, "unk_token": "<unk>"}
    write(tmp_path, llama2(), config, special_tokens_map=mapped)
    ours, oracle = open_both(transformers, tmp_path)
    assert ours.special_tokens == oracle.special_tokens_map
    assert ours.eos_token == ("<s>" if modern else "</s>")


def test_transformers_encodes_a_chat_the_same(transformers, tmp_path):
    config = {
        **LLAMA3,
        "chat_template": "{{ bos_token }}{% for m in messages %}<|start_header_id|>"
        "{{ m.role }}<|end_header_id|>{{ m.content }}{{ eos_token }}{% endfor %}",
    }
    write(tmp_path, llama3(), config)
    ours, oracle = open_both(transformers, tmp_path)
    messages = [
        {"role": "user", "content": "Grüße 🦊"},
        {"role": "assistant", "content": "<|eot_id|>"},
    ]
    want = oracle.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.encode_chat(messages)[1] == want
    assert want.count(ours.bos_token_id) == 1


def test_truncation_and_padding_of_the_training_run_are_off(tmp_path):
    backend = llama3()
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    tokenizer = Tokenizer.from_dir(write(tmp_path, backend, LLAMA3))
    assert len(tokenizer.encode("Once")) < 9
    assert len(tokenizer.encode("Once upon a time there was a brave fox")) > 4


# Golden values, for machines without Transformers.


@pytest.fixture
def byte_level(tmp_path) -> Tokenizer:
    return Tokenizer.from_dir(write(tmp_path, llama3(), LLAMA3))


@pytest.fixture
def sentencepiece(tmp_path) -> Tokenizer:
    return Tokenizer.from_dir(write(tmp_path, llama2(), LLAMA2))


def spelt(tokenizer: Tokenizer, ids: list[int]) -> list[str | None]:
    return [tokenizer.id_to_token(i) for i in ids]


def test_bos_stands_once(byte_level, sentencepiece):
    for tokenizer in (byte_level, sentencepiece):
        bos, plain = tokenizer.bos_token_id, tokenizer.encode("fox", add_special_tokens=False)
        assert tokenizer.encode("fox") == [bos, *plain]
        assert tokenizer.encode("") == [bos]
        assert bos not in plain


def test_bos_in_the_text_is_not_doubled(byte_level):
    bos = byte_level.bos_token_id
    assert byte_level.encode("<|begin_of_text|>fox") == byte_level.encode("fox")
    assert byte_level.encode("<|begin_of_text|>") == [bos]
    assert byte_level.encode("fox<|begin_of_text|>").count(bos) == 2  # asked for, and kept


def test_bos_that_the_tokenizer_does_not_add_is_the_text_s_own(tmp_path):
    tokenizer = Tokenizer.from_dir(write(tmp_path, llama2(bos=False), LLAMA2))
    assert tokenizer.encode("<s><s>", True) == [tokenizer.bos_token_id] * 2
    assert tokenizer.bos_token_id not in tokenizer.encode("fox")


def test_llama_tokenizer_puts_a_space_before_the_first_text_only(tmp_path):
    config = {**LLAMA2, "tokenizer_class": "LlamaTokenizer"}
    rebuilt = Tokenizer.from_dir(write(tmp_path / "a", llama2(), config))
    as_written = Tokenizer.from_dir(write(tmp_path / "b", llama2(), LLAMA2))
    text = "a</s>\n"
    assert spelt(rebuilt, rebuilt.encode(text)) == ["<s>", "▁a", "</s>", "<0x0A>"]
    assert spelt(as_written, as_written.encode(text)) == ["<s>", "▁a", "</s>", "▁", "<0x0A>"]
    assert rebuilt.decode(rebuilt.encode("a b 🦊")) == "a b 🦊"


def test_special_tokens_are_skipped_on_request(byte_level):
    ids = byte_level.encode("a<|eot_id|>b<tool call>")
    assert byte_level.decode(ids) == "ab<tool call>"
    assert byte_level.decode(ids, False) == "<|begin_of_text|>a<|eot_id|>b<tool call>"


def test_ids_without_a_token_add_nothing(byte_level):
    a, b = byte_level.encode("ab", False)
    assert byte_level.decode([a, byte_level.vocab_size, 10**9, b]) == "ab"
    assert byte_level.id_to_token(byte_level.vocab_size) is None


def test_vocab_size_is_the_highest_id_and_one_more():
    backend = Backend(models.BPE({"a": 0, "b": 7}, []))
    assert Tokenizer(backend, {}, {}).vocab_size == 8
    backend.add_special_tokens(["<s>", "</s>"])
    highest = max(backend.token_to_id(token) for token in ("b", "<s>", "</s>"))
    assert Tokenizer(backend, {}, {}).vocab_size == highest + 1


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_token_bytes_add_up_to_the_text(request, name):
    tokenizer = request.getfixturevalue(name)
    text = "a fox, 🦊 世界\n"
    data = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text, False))
    assert data.decode().removeprefix(" ") == text


def test_token_text_shows_spaces_special_tokens_and_parts_of_characters(byte_level, sentencepiece):
    [the] = byte_level.encode(" a", False)
    assert byte_level.token_text(the) == " a"
    assert byte_level.token_text(byte_level.eos_token_id) == "<|eot_id|>"
    assert sentencepiece.token_text(sentencepiece.encode("a", False)[0]) == " a"
    assert sentencepiece.token_text(sentencepiece.eos_token_id) == "</s>"
    for tokenizer in (byte_level, sentencepiece):
        assert tokenizer.token_text(tokenizer.encode("猫", False)[-1]) == "�"
        assert tokenizer.token_bytes(tokenizer.encode("猫", False)[-1]) == b"\xab"


@pytest.mark.parametrize(
    ("token", "byte"),
    [("<0x0A>", b"\n"), ("<0xfF>", b"\xff"), ("<0x+A>", b"\n"), ("<0x0>", None), ("<0xGG>", None)],
)
def test_byte_tokens_are_read_as_tokenizers_reads_them(token, byte):
    from tinyvllm.tokenizer import byte_of

    assert byte_of(token) == byte
    backend = with_decoder(decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]), token)
    want = token if byte is None else byte.decode(errors="replace")
    assert backend.decode([backend.token_to_id(token)]) == want


def test_text_that_is_no_unicode_is_refused(byte_level):
    with pytest.raises(InvalidRequestError, match=r"U\+DCFF at character 3"):
        byte_level.encode("fox" + b"\xff".decode(errors="surrogateescape"))


# Chat templates.

MESSAGES = [{"role": "user", "content": "hi"}]


def templates(directory: Path, config: Any = None, **files: str) -> Tokenizer:
    extra = {} if config is None else {"chat_template": config}
    write(directory, llama3(), {**LLAMA3, **extra})
    for name, text in files.items():
        path = directory / "chat_template.jinja"
        if name != "default":
            path = directory / "additional_chat_templates" / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Tokenizer.from_dir(directory)


def test_a_model_without_a_template_says_so(tmp_path):
    tokenizer = templates(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match='no chat template "default" \\(it has: none\\)'):
        tokenizer.apply_chat_template(MESSAGES)


def test_the_config_s_template_sees_special_tokens_and_variables(tmp_path):
    tokenizer = templates(tmp_path, "{{ bos_token }}{{ messages[0].content }}{{ mood }}")
    assert tokenizer.apply_chat_template(MESSAGES, mood="!") == "<|begin_of_text|>hi!"
    assert tokenizer.apply_chat_template(MESSAGES, bos_token="") == "hi"


def test_the_file_wins_over_the_config(tmp_path):
    assert templates(tmp_path, "config", default="file").apply_chat_template(MESSAGES) == "file"


def test_templates_have_names(tmp_path):
    listed = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    tokenizer = templates(tmp_path, listed)
    assert tokenizer.apply_chat_template(MESSAGES) == "D"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{}]) == "T"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{}], template="default") == "D"
    with pytest.raises(InvalidRequestError, match=r'"rag" \(it has: default, tool_use\)'):
        tokenizer.apply_chat_template(MESSAGES, template="rag")


def test_additional_templates_are_files_by_name(tmp_path):
    tokenizer = templates(tmp_path, "config", default="D", rag="R")
    assert tokenizer.apply_chat_template(MESSAGES) == "D"
    assert tokenizer.apply_chat_template(MESSAGES, template="rag") == "R"


def test_a_template_can_be_given_as_text(tmp_path):
    tokenizer = templates(tmp_path, "D")
    assert tokenizer.apply_chat_template(MESSAGES, template="{{ messages | length }}") == "1"
    with pytest.raises(InvalidRequestError, match="the template given, line 1"):
        tokenizer.apply_chat_template(MESSAGES, template="{{")


@pytest.mark.parametrize(
    "files", [{}, {"default": "D{{ 1 }}"}, {"rag": "R"}, {"default": "D", "rag": "R"}]
)
@pytest.mark.parametrize(
    "config",
    [None, "C", [{"name": "default", "template": "L"}, {"name": "tool_use", "template": "T"}]],
)
def test_transformers_chooses_the_same_template(transformers, tmp_path, files, config):
    templates(tmp_path, config, **files)
    ours, oracle = open_both(transformers, tmp_path)
    for tools in (None, [{}]):
        for name in (None, "default", "tool_use", "rag"):
            if name is not None and not isinstance(oracle.chat_template, dict):
                continue  # Transformers then takes the name itself for the template
            try:
                want = oracle.get_chat_template(name, tools)
            except ValueError:
                with pytest.raises(InvalidRequestError):
                    ours.apply_chat_template(MESSAGES, template=name, tools=tools)
                continue
            if want == name:  # the same: an unknown name
                continue
            got = ours.apply_chat_template(MESSAGES, template=name, tools=tools)
            assert got == want.replace("{{ 1 }}", "1")


def test_a_broken_template_names_its_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja, line 2"):
        templates(tmp_path, default="\n{% if %}").apply_chat_template(MESSAGES)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json, line 1"):
        templates(tmp_path, "{% if %}").apply_chat_template(MESSAGES)


# Files that are missing, damaged or made to do harm.


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


def test_a_sentencepiece_model_alone_comes_with_the_command_that_converts_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(
        CheckpointError, match=r"AutoTokenizer\.from_pretrained\(.*save_pretrained\("
    ):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": 1}'),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b'{"bos_token": {"content": 1}}'),
        ("tokenizer_config.json", b'{"bos_token": {}}'),
        ("tokenizer_config.json", b'{"bos_token": "\\ud800"}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": 2}}'),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"1": {"content": "a", "special": 3}}}',
        ),
        ("tokenizer_config.json", b'{"extra_special_tokens": 5}'),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "a"}]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "a", "template": 1}]}'),
        ("tokenizer_config.json", b'{"chat_template": {"a": "b"}}'),
        ("special_tokens_map.json", b"1"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_damaged_file_is_an_error_with_its_name(tmp_path, name, content):
    write(tmp_path, llama3(), {"bos_token": "<|begin_of_text|>"})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        Tokenizer.from_dir(tmp_path)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_huge_file_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("tinyvllm.model_files.MAX_FILE_BYTES", 1000)
    write(tmp_path, llama3(), {})
    with pytest.raises(CheckpointError, match="more than 1000 bytes"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_pipe_in_the_place_of_a_file_is_refused_without_waiting(tmp_path, name):
    write(tmp_path, llama3(), {})
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name}: is not a file"):
        Tokenizer.from_dir(tmp_path)


def test_a_panic_in_the_library_is_an_error_with_the_file_s_name(tmp_path, capfd):
    write(tmp_path, llama2(), LLAMA2)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    spec["post_processor"]["single"][0]["SpecialToken"]["id"] = "nowhere"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*damaged"):
        Tokenizer.from_dir(tmp_path)


def test_a_merge_prefix_is_refused_since_it_can_end_the_process(tmp_path):
    write(tmp_path, llama2(), LLAMA2)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["continuing_subword_prefix"] = "x"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="continuing_subword_prefix"):
        Tokenizer.from_dir(tmp_path)


def test_an_id_beyond_31_bits_is_a_damaged_file():
    words = Backend(models.WordLevel({"a": (1 << 31) - 1, "b": 3_000_000_000}, unk_token="a"))
    tokenizer = Tokenizer(words, {}, {})
    assert tokenizer.encode("a") == [(1 << 31) - 1]
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*3000000000"):
        tokenizer.encode("b")


def test_clean_up_is_left_out_for_bpe_and_refused_for_others(tmp_path):
    config = {**LLAMA3, "clean_up_tokenization_spaces": True}
    tokenizer = Tokenizer.from_dir(write(tmp_path / "bpe", llama3(), config))
    assert tokenizer.decode(tokenizer.encode("it is n't .")) == "it is n't ."
    words = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    write(tmp_path / "words", words, {"clean_up_tokenization_spaces": True})
    with pytest.raises(UnsupportedModelError, match="clean_up_tokenization_spaces"):
        Tokenizer.from_dir(tmp_path / "words")


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]),
    ],
    ids=["CTC", "BPEDecoder", "Replace", "Strip 2", "Strip the end", "ByteFallback after Fuse"],
)
def test_a_decoder_that_needs_the_whole_text_is_refused(decoder):
    with pytest.raises(UnsupportedModelError, match="needs the whole text"):
        Tokenizer(with_decoder(decoder), {}, {})


def test_every_file_is_read_once(tmp_path, monkeypatch):
    small_tokenizers.write(tmp_path, llama3(), LLAMA3, special_tokens_map={})
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    opened: list[str] = []
    plain_open = Path.open

    def counting_open(self, *args, **kwargs):
        opened.append(self.name)
        return plain_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counting_open)
    tokenizer = Tokenizer.from_dir(tmp_path)
    tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert sorted(opened) == [
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_importing_the_tokenizer_does_not_import_jinja():
    code = "import sys, tinyvllm.tokenizer; assert 'jinja2' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- The end-of-text token, before the tokenizer is loaded ----------------------------------------


def _loader(directory: Path, tokenizer_json: str) -> TokenizerLoader:
    (directory / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (directory / "tokenizer_config.json").write_text('{"eos_token": {"content": "<eöt>"}}')
    return TokenizerLoader(directory)


ADDED = json.dumps([{"id": 7, "content": "<bot>"}, {"id": 9, "content": "<eöt>"}])


@pytest.mark.parametrize("before", [0, 100, (1 << 20) - 40, (1 << 20) - 39, 5_000_001])
def test_eos_is_found_wherever_the_added_tokens_lie(tmp_path: Path, before: int) -> None:
    # With some of these a piece that is read ends within the list, within an ö, or before it.
    text = f'{{"version": "{"ö" * (before // 2)}{"x" * (before % 2)}", "added_tokens": {ADDED}}}'
    loader = _loader(tmp_path, text)
    assert loader.eos_token_id() == 9
    assert not loader.is_loaded


@pytest.mark.parametrize("text", ["", "{}", '{"added_tokens": [{"id": 7', '{"added_tokens": 3}'])
def test_eos_that_is_not_found_is_the_tokenizers_to_say(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        _loader(tmp_path, text).eos_token_id()


def test_added_tokens_that_lie_too_deep_are_a_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: RecursionError"):
        _loader(tmp_path, '{"added_tokens": ' + "[" * 100_000).eos_token_id()


def test_threads_that_need_the_tokenizer_at_once_load_it_once(tmp_path: Path, monkeypatch) -> None:
    loads: list[Path] = []
    load = Tokenizer.from_dir

    def slow_load(directory: Path) -> Tokenizer:
        loads.append(directory)
        time.sleep(0.1)
        return load(directory)

    monkeypatch.setattr(Tokenizer, "from_dir", slow_load)
    loader = TokenizerLoader(write(tmp_path, llama3(), LLAMA3))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: loader.result(), range(4)))
    assert len(loads) == 1
    assert len(set(map(id, found))) == 1
