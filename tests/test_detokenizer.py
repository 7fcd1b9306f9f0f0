"""The stream of text is the decode of all ids, whatever the ids and however they are cut up."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders as dec

import small_tokenizers
from tinyvllm.detokenizer import IncrementalDetokenizer
from tinyvllm.errors import InvalidRequestError
from tinyvllm.tokenizer import Tokenizer


def make(backend: Backend) -> Tokenizer:
    return Tokenizer(backend, {}, {})


LLAMA3 = make(small_tokenizers.llama3())
LLAMA2 = make(small_tokenizers.llama2())
TOKENIZERS = {
    "byte-level": LLAMA3,
    "byte-fallback": LLAMA2,
    "byte-fallback, no strip": make(
        small_tokenizers.with_decoder(
            dec.Sequence([dec.Replace("▁", " "), dec.ByteFallback(), dec.Fuse()])
        )
    ),
    "byte-fallback, empty token": make(
        small_tokenizers.with_decoder(
            dec.Sequence(
                [dec.Replace("▁", " "), dec.ByteFallback(), dec.Fuse(), dec.Strip(" ", 1, 0)]
            ),
            "",
            "�",
            "�a",
        )
    ),
    "metaspace": make(small_tokenizers.with_decoder(dec.Metaspace())),
    "metaspace, byte-fallback": make(
        small_tokenizers.with_decoder(dec.Sequence([dec.ByteFallback(), dec.Metaspace()]))
    ),
    "wordpiece, cleanup": make(
        small_tokenizers.with_decoder(dec.WordPiece(cleanup=True), "##ing", ".", "'s", "n't", "")
    ),
    "no decoder": make(small_tokenizers.with_decoder(None, "")),
}


def stream(tokenizer, ids, cuts=None, **options):
    """Pushes ids in pieces of the given lengths (one by one by default); returns the detokenizer
    and what it emitted."""
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    pieces, at, lengths = [], 0, iter(cuts or ())
    while at < len(ids):
        length = next(lengths, 1)
        pieces.append(detokenizer.push(ids[at : at + length]))
        at += length
    pieces.append(detokenizer.finish())
    assert detokenizer.text == "".join(pieces)
    return detokenizer, pieces


def first_stop(text, stops, early=0):
    """The stop string that is complete first in a text, and where; of several, the longest. None
    counts that ends within the first `early` characters."""
    ends = []
    for stop in stops:
        at = text.find(stop, max(early + 1 - len(stop), 0))
        if at >= 0:
            ends.append((at + len(stop), -len(stop), stop))
    return (min(ends)[2], min(ends)[0]) if ends else (None, len(text))


def num_complete(tokenizer, ids, min_tokens):
    """Characters of the text that the first min_tokens ids complete."""
    text = tokenizer.decode(ids)
    decoded = [tokenizer.decode(ids[:k]) for k in range(min_tokens + 1)]
    heads = [*decoded, *(head.rstrip("�") for head in decoded)]  # which may become a character
    return max(len(head) for head in heads if text.startswith(head))


def ids_of(tokenizer: Tokenizer):
    """Lists of ids, known and unknown, in which bytes and pieces of characters are frequent."""
    size = tokenizer.vocab_size
    partial = [i for i in range(size) if "�" in tokenizer.decode([i], False)]
    spaces = [i for i in range(size) if not tokenizer.decode([i], False).strip()]
    some = st.sampled_from(partial[:: max(1, len(partial) // 40)] + partial[-4:] or [size - 1])
    one = st.one_of(st.integers(0, size + 2), some, some, st.sampled_from(spaces or [0]))
    runs = st.lists(some, max_size=24)
    text = st.text("aé你🦊 �\n", max_size=8).map(lambda t: tokenizer.encode(t, False))
    return st.lists(st.one_of(st.lists(one, max_size=6), runs, text), max_size=8).map(
        lambda parts: [i for part in parts for i in part]
    )


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_stream_is_the_decode_of_all_ids(name):
    tokenizer = TOKENIZERS[name]

    @settings(max_examples=150, deadline=None)
    @given(ids_of(tokenizer), st.lists(st.integers(1, 30), max_size=20), st.booleans())
    def check(ids, cuts, skip):
        _, pieces = stream(tokenizer, ids, cuts, skip_special_tokens=skip)
        assert "".join(pieces) == tokenizer.decode(ids, skip)

    check()


@pytest.mark.parametrize("before", range(20))
def test_a_token_without_text_may_follow_where_a_run_of_bytes_leaves_the_window(before):
    """What is left of the run decodes to U+FFFD then, which is no text of its own."""
    tokenizer = TOKENIZERS["byte-fallback, empty token"]
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size)]
    fox, letter = (
        [tokens.index(f"<0x{byte:02X}>") for byte in text.encode()] for text in ("🦊", "a")
    )
    ids = [tokens.index("a")] * before + fox * 3 + letter + [tokenizer.empty_token_id]
    for tail in ([], fox, [tokens.index("a")]):
        _, pieces = stream(tokenizer, ids + tail)
        assert "".join(pieces) == tokenizer.decode(ids + tail, False)


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback", "metaspace"])
def test_the_stream_with_stop_strings_is_the_decode_cut_at_the_first_that_counts(name):
    tokenizer = TOKENIZERS[name]
    anything = st.text("ab �é\n", min_size=1, max_size=4)

    @settings(max_examples=150, deadline=None)
    @given(ids_of(tokenizer), st.lists(st.integers(1, 9), max_size=9), st.booleans(), st.data())
    def check(ids, cuts, include, data):
        text = tokenizer.decode(ids)
        begins = st.integers(0, max(len(text) - 1, 0))
        part = st.tuples(begins, st.integers(1, 6)).map(lambda p: text[p[0] : sum(p)] or "a")
        stops = data.draw(st.lists(st.one_of(anything, part), min_size=1, max_size=4))
        min_tokens = data.draw(st.one_of(st.just(0), st.integers(0, len(ids) + 2)))
        if min_tokens:  # of which token a character is that is none, nobody can say
            stops = [stop.rstrip("�") or "a" for stop in stops]
        detokenizer, pieces = stream(
            tokenizer,
            ids,
            cuts,
            stop=stops,
            include_stop_str_in_output=include,
            min_tokens=min_tokens,
        )
        stop, end = first_stop(text, stops, num_complete(tokenizer, ids, min_tokens))
        assert detokenizer.stop_reason == stop
        assert "".join(pieces) == text[: end if include or not stop else end - len(stop)]

    check()


BYTES = st.lists(st.sampled_from([0x41, 0x80, 0x9F, 0xA6, 0xC3, 0xE2, 0xED, 0xF0, 0xF4, 0xFF]))


@settings(max_examples=150, deadline=None)
@given(BYTES)
@example([0xF0, 0x9F, 0xA6, 0x8A])
@example([0xFF, 0x41, 0x41, 0x41, 0x41, 0x41])
@example([0xE2, 0x82] * 20)
def test_bytes_come_out_as_python_and_the_byte_fallback_rule_read_them(values):
    """The same promise without `tokenizers` as the judge."""
    data = bytes(values)
    one_by_one = [LLAMA3.encode("A", False)[0] if b == 0x41 else byte_level_id(b) for b in values]
    assert "".join(stream(LLAMA3, one_by_one)[1]) == data.decode(errors="replace")
    try:
        want = data.decode()
    except UnicodeDecodeError:
        want = "�" * len(data)  # one byte that does not fit spoils its whole run
    ids = [LLAMA2._backend.token_to_id(f"<0x{byte:02X}>") for byte in values]
    assert "".join(stream(LLAMA2, ids)[1]) == want.removeprefix(" ")


def byte_level_id(byte: int) -> int:
    return next(i for i in range(LLAMA3.vocab_size) if LLAMA3.token_bytes(i) == bytes([byte]))


def byte_tokens(data: bytes) -> list[int]:
    return [byte_level_id(byte) for byte in data]


def fallback_tokens(data: bytes) -> list[int]:
    return [LLAMA2._backend.token_to_id(f"<0x{byte:02X}>") for byte in data]


def test_an_incomplete_character_is_held_back():
    _, pieces = stream(LLAMA3, byte_tokens("a🦊b".encode()))
    assert pieces == ["a", "", "", "", "🦊", "b", ""]


def test_a_character_of_byte_tokens_is_held_back_until_its_run_ends():
    fox = [*LLAMA2.encode("a", False), *fallback_tokens("🦊".encode()), *LLAMA2.encode("b", False)]
    _, pieces = stream(LLAMA2, fox)
    assert [piece for piece in pieces if piece] == ["a", "🦊 b"]
    assert pieces[-2] == "🦊 b"


def test_a_byte_that_can_never_fit_is_replaced_as_soon_as_the_next_one_is_there():
    _, pieces = stream(LLAMA3, byte_tokens(b"a\xffb"))
    assert pieces == ["a", "", "�b", ""]


def test_bytes_that_never_fit_are_not_held_back_for_ever():
    for tokenizer, ids in (
        (LLAMA3, byte_tokens(b"\xff" * 50)),
        (LLAMA2, fallback_tokens(b"\xff" * 50)),
    ):
        _, pieces = stream(tokenizer, ids)
        assert pieces == ["", *["�"] * 49, "�"]


def test_a_run_that_has_been_broken_stays_broken():
    _, pieces = stream(LLAMA2, fallback_tokens(b"\xff" + b"A" * 40))
    assert pieces == ["", *["�"] * 40, "�"]


def test_a_valid_run_waits_since_a_later_byte_may_break_it():
    valid = fallback_tokens("Привет".encode())
    assert stream(LLAMA2, valid)[1] == [*[""] * 12, "Привет"]
    broken = stream(LLAMA2, [*valid, *fallback_tokens(b"\xff")])[1]
    assert broken == [*[""] * 12, "�" * 12, "�"]


def test_finish_replaces_an_incomplete_character():
    assert stream(LLAMA3, byte_tokens("a🦊".encode()[:-1]))[1] == ["a", "", "", "", "�"]
    assert stream(LLAMA2, fallback_tokens("é🦊".encode()[:-1]))[1] == [*[""] * 5, "�" * 5]


def test_a_window_may_be_cut_at_any_byte():
    for begin in range(20):
        text = "a" * begin + "🦊é世" * 4 + "b"
        assert "".join(stream(LLAMA3, byte_tokens(text.encode()))[1]) == text


def test_tokens_without_text_do_not_end_the_memory_of_what_came_before():
    """The leading space of "▁a" would be dropped a second time if "" counted as context."""
    tokenizer = TOKENIZERS["byte-fallback, empty token"]
    [a] = tokenizer.encode("a", False)
    assert tokenizer.empty_token_id is not None
    ids = [a, *[tokenizer.empty_token_id] * 40, a]
    assert "".join(stream(tokenizer, ids)[1]) == "a a"


def test_tokens_that_no_character_boundary_touches_stream():
    inner = max(
        range(LLAMA3.vocab_size), key=lambda i: LLAMA3.token_bytes(i) == b"\x9f\xa6\x8a\xf0"
    )
    ids = [byte_level_id(0xF0), *[inner] * 100]
    _, pieces = stream(LLAMA3, ids)
    assert pieces == ["", *["🦊"] * 100, "�"]


def test_the_leading_space_is_dropped_at_the_true_start_only():
    ids = LLAMA2.encode("the fox", False)
    assert LLAMA2.id_to_token(ids[0]).startswith("▁")
    assert "".join(stream(LLAMA2, ids)[1]) == "the fox"
    assert "".join(stream(LLAMA2, ids + ids)[1]) == "the fox the fox"
    special = LLAMA2._backend.token_to_id("</s>")
    assert (
        "".join(stream(LLAMA2, [special] * 9 + ids + [special] * 9 + ids)[1]) == "the fox the fox"
    )


def test_special_tokens_in_the_middle_of_a_character_are_as_if_they_were_not_there():
    fox, special = "🦊".encode(), LLAMA3._backend.token_to_id("<|eot_id|>")
    ids = [*byte_tokens(fox[:2]), special, special, *byte_tokens(fox[2:])]
    assert "".join(stream(LLAMA3, ids)[1]) == "🦊"
    assert "".join(stream(LLAMA3, ids, skip_special_tokens=False)[1]) == ("�<|eot_id|><|eot_id|>��")


def test_a_possible_stop_string_is_held_back_over_three_tokens():
    ids = [i for char in "a<END" for i in LLAMA3.encode(char, False)]
    detokenizer = IncrementalDetokenizer(LLAMA3, stop=["<END>"])
    assert [detokenizer.push([i]) for i in ids] == ["a", "", "", "", ""]
    assert detokenizer.push(LLAMA3.encode(">b", False)) == ""
    assert (detokenizer.stop_reason, detokenizer.text) == ("<END>", "a")


def test_what_looked_like_a_stop_string_comes_out_when_it_is_none():
    ids = [i for char in "aabaac" for i in LLAMA3.encode(char, False)]
    detokenizer, pieces = stream(LLAMA3, ids, stop=["aabaad"])
    assert pieces == ["", "", "", "", "", "aabaac", ""]
    assert detokenizer.stop_reason is None
    assert stream(LLAMA3, ids[:5], stop=["aabaad"])[1] == ["", "", "", "", "", "aabaa"]


@pytest.mark.parametrize(
    ("text", "stops", "want", "reason"),
    [
        ("abcd", ["bcd", "c"], "ab", "c"),  # the one that is complete first
        ("abcd", ["c", "bc", "abc"], "", "abc"),  # complete at one character: the first to begin
        ("aaab", ["aab"], "a", "aab"),  # overlaps its own beginning
        ("abab", ["abab", "b"], "a", "b"),
        ("ab", ["c"], "ab", None),
    ],
)
def test_of_several_stop_strings_the_first_to_be_complete_wins(text, stops, want, reason):
    ids = [i for char in text for i in LLAMA3.encode(char, False)]
    for cuts in ([1] * len(ids), [len(ids)]):
        detokenizer, pieces = stream(LLAMA3, ids, cuts, stop=stops)
        assert ("".join(pieces), detokenizer.stop_reason) == (want, reason)


@pytest.mark.parametrize(
    ("text", "stop", "min_tokens", "want"),
    [
        ("abab", "abab", 3, ""),  # it ends after the third token, wherever it begins
        ("ababab", "abab", 4, "ab"),  # the one that counts overlaps one that does not
        ("abababab", "abab", 6, "abab"),
        ("aaaa", "aa", 2, "a"),
        ("abxab", "ab", 2, "abx"),
        ("abab", "abab", 4, "abab"),
        ("ab", "b", 9, "ab"),
    ],
)
def test_a_stop_string_counts_only_behind_the_first_min_tokens(text, stop, min_tokens, want):
    ids = [i for char in text for i in LLAMA3.encode(char, False)]
    for cuts in ([1] * len(ids), [len(ids)], [2] * len(ids)):
        options = {"stop": [stop], "min_tokens": min_tokens}
        detokenizer, pieces = stream(LLAMA3, ids, cuts, **options)
        reason = None if want == text else stop
        assert ("".join(pieces), detokenizer.stop_reason) == (want, reason)
        kept = "".join(stream(LLAMA3, ids, cuts, include_stop_str_in_output=True, **options)[1])
        assert kept == want + (reason or "")


def test_a_character_is_of_the_token_that_completes_it():
    fox = byte_tokens("🦊".encode())
    for min_tokens, want in ((3, ""), (4, "🦊")):
        assert "".join(stream(LLAMA3, fox, stop=["🦊"], min_tokens=min_tokens)[1]) == want
    ids = [*fallback_tokens("é🦊".encode()), *LLAMA2.encode("a", False)]
    all_of_it = "é🦊 a"
    for stop, min_tokens, want in (
        ("é", 1, ""),
        ("é", 2, all_of_it),
        ("é", 4, all_of_it),
        ("🦊", 5, "é"),
        ("🦊", 6, all_of_it),
    ):
        assert "".join(stream(LLAMA2, ids, stop=[stop], min_tokens=min_tokens)[1]) == want


def test_the_stop_string_is_kept_on_request():
    ids = LLAMA3.encode("one two three", False)
    detokenizer, pieces = stream(LLAMA3, ids, stop=["two"], include_stop_str_in_output=True)
    assert ("".join(pieces), detokenizer.stop_reason) == ("one two", "two")


def test_nothing_comes_after_a_stop_string_or_the_end():
    ids = LLAMA3.encode("one two three", False)
    stopped = IncrementalDetokenizer(LLAMA3, stop=["two"])
    assert stopped.push(ids) == "one "
    assert (stopped.push(ids), stopped.finish(), stopped.text) == ("", "", "one ")
    finished = IncrementalDetokenizer(LLAMA3)
    assert finished.push(ids) + finished.finish() == "one two three"
    assert (finished.push(ids), finished.finish(), finished.text) == ("", "", "one two three")


def test_a_stop_string_in_the_held_back_end_is_found_at_finish():
    detokenizer = IncrementalDetokenizer(LLAMA2, stop=["\n"])
    assert detokenizer.push([*LLAMA2.encode("fox", False), *fallback_tokens(b"\n")]) == "fox"
    assert (detokenizer.finish(), detokenizer.stop_reason) == ("", "\n")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InvalidRequestError, match="stop string is empty"):
        IncrementalDetokenizer(LLAMA3, stop=["a", ""])


class Counting(Tokenizer):
    """Counts the ids that it decodes."""

    decoded = 0

    def decode(self, ids, skip_special_tokens=True):
        self.decoded += len(ids)
        return super().decode(ids, skip_special_tokens)


HARD_IDS = {
    "words": ("llama3", lambda: LLAMA3.encode("Once upon a time there was a brave fox. ", False)),
    "no boundaries": ("llama3", lambda: [max(range(LLAMA3.vocab_size), key=LLAMA3.token_bytes)]),
    "broken bytes": ("llama3", lambda: byte_tokens(b"\xff\x80")),
    "special tokens": ("llama3", lambda: [LLAMA3._backend.token_to_id("<|eot_id|>")]),
    "a valid run": ("llama2", lambda: fallback_tokens("é🦊".encode())),
    "a broken run": ("llama2", lambda: fallback_tokens(b"\xff\x80AA")),
    "broken runs": ("llama2", lambda: [*fallback_tokens(b"A\xff"), *LLAMA2.encode("a", False)]),
}


@pytest.mark.parametrize("name", HARD_IDS)
def test_the_cost_of_a_token_does_not_grow_with_the_text(name):
    maker, ids = HARD_IDS[name][0], HARD_IDS[name][1]()
    per_token = []
    for length in (1_024, 16_384):
        tokenizer = Counting(getattr(small_tokenizers, maker)(), {}, {})
        stream(tokenizer, (ids * length)[:length])
        per_token.append(tokenizer.decoded / length)
    assert per_token[1] <= per_token[0] + 0.1
    assert per_token[1] <= 12


def test_a_long_stop_string_costs_no_more_than_the_text_is_long():
    """A search that starts again at each character would take 10^8 steps; this takes a second."""
    stop = "a" * 8_000 + "b"
    ids = LLAMA3.encode("a", False) * 16_000
    detokenizer, pieces = stream(LLAMA3, ids, [1] * len(ids), stop=[stop])
    assert "".join(pieces) == "a" * 16_000
    assert detokenizer.stop_reason is None
    assert pieces.index("a") == 8_000  # held back are exactly the 8,000 that might be its beginning
