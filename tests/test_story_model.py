"""The bundled story model: its files, its size, its tokenizer, and the grammar that taught it."""

from __future__ import annotations

import json
import math
import random
import re
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "src" / "tinyvllm" / "story_model"
RECIPE = ROOT / "examples" / "train_story_model"


def read_json(name: str) -> dict[str, Any]:
    return dict(json.loads((MODEL / name).read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def header() -> dict[str, Any]:
    """The safetensors header, read by hand: 8 bytes of length, then JSON."""
    data = (MODEL / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    tensors = json.loads(data[8 : 8 + length])
    tensors.pop("__metadata__", None)
    return dict(tensors)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture
def grammar(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPE))
    monkeypatch.delitem(sys.modules, "story_grammar", raising=False)
    import story_grammar

    return story_grammar


def test_directory_has_the_six_files_and_fits_in_8_megabytes():
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert sum(sizes.values()) <= 8_000_000


def test_weights_are_2_to_4_million_bfloat16_numbers(header):
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert 2_000_000 <= sum(math.prod(t["shape"]) for t in header.values()) <= 4_000_000


def test_weights_have_the_shapes_that_config_json_says(header):
    config = read_json("config.json")
    hidden, inner, head = (config[key] for key in ("hidden_size", "intermediate_size", "head_dim"))
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    want = {
        "model.embed_tokens.weight": [config["vocab_size"], hidden],
        "model.norm.weight": [hidden],
    }
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": [hidden],
            "self_attn.q_proj": [queries, hidden],
            "self_attn.k_proj": [keys, hidden],
            "self_attn.v_proj": [keys, hidden],
            "self_attn.o_proj": [hidden, queries],
            "post_attention_layernorm": [hidden],
            "mlp.gate_proj": [inner, hidden],
            "mlp.up_proj": [inner, hidden],
            "mlp.down_proj": [hidden, inner],
        }.items():
            want[f"model.layers.{layer}.{name}.weight"] = shape
    assert {name: tensor["shape"] for name, tensor in header.items()} == want
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == 2048


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time",
        "  two spaces, a tab\t and\r\na new line \n",
        "Ein Bär läuft über die Straße; 狐が走る; Лиса",
        "\N{FOX FACE} \N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET} e\N{COMBINING ACUTE ACCENT}",
        "\x00\x01\x7f\u200b\ufeff\U0010fffd",
    ],
)
def test_tokenizer_gives_any_text_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_every_byte_that_utf_8_can_use_has_a_token(tokenizer):
    code_points = [*range(0x800), *range(0x800, 0xD800, 61), *range(0xE000, 0x110000, 61)]
    text = "".join(map(chr, code_points))
    assert len(set(text.encode())) == 256 - 13  # C0, C1 and F5 to FF never occur
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_bos_is_added_once(tokenizer):
    ids = tokenizer.encode("Once upon a time").ids
    bos = read_json("config.json")["bos_token_id"]
    assert ids[0] == bos
    assert ids.count(bos) == 1


def test_vocabulary_is_as_large_as_the_embedding(tokenizer):
    assert tokenizer.get_vocab_size() == read_json("config.json")["vocab_size"]


def test_generation_stops_at_the_end_of_a_story_and_of_a_turn(tokenizer):
    stops = read_json("generation_config.json")["eos_token_id"]
    assert stops == [tokenizer.token_to_id("<|eos|>"), tokenizer.token_to_id("<|end|>")]


def test_chat_template_is_the_format_of_the_training_text(grammar, monkeypatch, tokenizer):
    monkeypatch.delitem(sys.modules, "train_tokenizer", raising=False)
    import train_tokenizer

    turns = grammar.make_conversation(random.Random(1))
    template = jinja2.Environment().from_string(
        (MODEL / "chat_template.jinja").read_text(encoding="utf-8")
    )
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    rendered = template.render(messages=messages, bos_token="<|bos|>")
    want = tokenizer.encode(train_tokenizer.chat_text(turns)).ids  # BOS comes from the tokenizer
    assert tokenizer.encode(rendered, add_special_tokens=False).ids == want


def test_grammar_depends_on_the_seed_alone(grammar):
    first, again, other = (
        [grammar.make_story(random.Random(seed)) for _ in range(3)] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_a_thousand_stories_are_a_thousand_stories(grammar):
    rng = random.Random(0)
    stories = {grammar.make_story(rng) for _ in range(1000)}
    assert len(stories) == 1000
    # Without the paragraph that brings in the hero they differ too.
    assert len({story.split("\n\n", 1)[1] for story in stories}) == 1000


def test_stories_hold_to_their_hero(grammar):
    rng = random.Random(0)
    for _ in range(300):
        hero = grammar.make_hero(rng)
        story = grammar.make_story(rng, hero)
        assert f"{hero.adjective} {hero.animal}" in story
        assert story.count(hero.name) >= 3
        assert not re.search(r"[{}|_]|\b[Aa] (?!uni|one)[aeiou]|  ", story), story


def test_held_out_pairs_are_never_drawn(grammar):
    rng = random.Random(0)
    heroes = [grammar.make_hero(rng) for _ in range(5000)]
    assert not any(grammar.is_held_out(hero.adjective, hero.animal) for hero in heroes)
    share = sum(grammar.is_held_out(j, a) for j in grammar.ADJECTIVES for a in grammar.ANIMALS)
    assert share / (len(grammar.ADJECTIVES) * len(grammar.ANIMALS)) == pytest.approx(0.1, abs=0.02)
