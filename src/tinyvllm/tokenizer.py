"""The tokenizer of a checkpoint: text to token ids and back, special tokens, chat templates.

The `tokenizers` library does the work, from tokenizer.json. This file adds what the files beside it
say (tokenizer_config.json, special_tokens_map.json, *.jinja), in the way of Transformers 5, so that
a prompt becomes the same token ids here and there.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvllm.chat_template import ChatTemplate, Message, with_one_text
from tinyvllm.errors import (
    CheckpointError,
    InvalidRequestError,
    TinyvllmError,
    UnsupportedModelError,
)
from tinyvllm.model_files import MAX_FILE_BYTES, read_json, read_text

if TYPE_CHECKING:
    import tokenizers

_METASPACE = "\u2581"  # SentencePiece writes a space as this character

# Byte-level vocabularies write these bytes as themselves, the others as U+0100, U+0101, ...
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF_CHAR = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(0x100)) - set(_PRINTABLE)))
}


class Tokenizer:
    """Text to token ids and back, for one checkpoint: `Tokenizer.from_dir(directory)`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, ChatTemplate],
    ) -> None:
        """`special_tokens` holds the tokens that have a name: {"bos_token": "<s>", ...}."""
        backend.no_truncation()  # tokenizer.json may carry the settings of a training run
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_templates = dict(chat_templates)
        self.bos_token, self.bos_token_id = self._named("bos_token")
        self.eos_token, self.eos_token_id = self._named("eos_token")
        self.unk_token, self.unk_token_id = self._named("unk_token")
        self.pad_token, self.pad_token_id = self._named("pad_token")
        self.empty_token_id: int | None = backend.token_to_id("")
        added = backend.get_added_tokens_decoder().values()
        self._skipped = frozenset(token.content for token in added if token.special)
        steps = _decoder_steps(backend)
        self.byte_fallback = "ByteFallback" in steps  # tokens such as <0x0A> stand for bytes
        self._byte_level = "ByteLevel" in steps
        begin = backend.encode("").ids[:1]
        self._adds_bos = self.bos_token_id is not None and begin == [self.bos_token_id]

    @classmethod
    def from_dir(cls, directory: Path) -> Tokenizer:
        """Reads the files, each once. A flaw in one is a CheckpointError with its name."""
        path, config_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
        text = read_text(path)
        if text is None:
            raise CheckpointError(_missing(directory))
        config = read_json(config_path)
        if "added_tokens_decoder" not in config:  # written by a Transformers before 4.34
            config |= read_json(directory / "special_tokens_map.json")
        if _is_llama_tokenizer(directory, text, config):
            text = _with_llama_spaces(path, text, config)
            config = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | config
        with _flaws_in(path):
            backend = _load(path, text)
        with _flaws_in(config_path):
            special_tokens = _add_special_tokens(backend, config)
            chat_templates = _chat_templates(directory, config)
        with _flaws_in(path):
            return cls(backend, special_tokens, chat_templates)

    def _named(self, name: str) -> tuple[str | None, int | None]:
        token = self.special_tokens.get(name)
        return token, None if token is None else self._backend.token_to_id(token)

    @cached_property
    def vocab_size(self) -> int:
        """The highest id + 1, added tokens included. A model may have more rows than that."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, with what tokenizer.json's post-processor adds: BOS, as a rule.

        As in Transformers 5, `add_bos_token` in tokenizer_config.json has no say beside a
        tokenizer.json. Unlike there, a text that begins with BOS does not get a second one.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text has U+{ord(text[error.start]):04X} at character {error.start}, which is "
                "half a character or a byte that is not UTF-8. Give it in UTF-8."
            ) from error
        with _flaws_in("tokenizer.json"):
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        if ids and max(ids) >= 1 << 31:
            raise CheckpointError(
                f"tokenizer.json: gives the token id {max(ids)}, ids go up to 2^31 - 1. The file "
                "is damaged; download it again."
            )
        if add_special_tokens and self._adds_bos and ids[1:2] == [self.bos_token_id]:
            del ids[0]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids. Ids that the vocabulary lacks add nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it: `Ġworld`, `▁world`, `<0x0A>`."""
        return self._backend.id_to_token(token_id)

    def is_special(self, token: str) -> bool:
        """Whether decode leaves the token out when it skips special tokens."""
        return token in self._skipped

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text that has begun, maybe a part of a character only."""
        token = self.id_to_token(token_id) or ""
        if self._byte_level:
            if _BYTE_OF_CHAR.keys() >= set(token):
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            return token.encode()  # an added token, spelt as it is
        if self.byte_fallback and (byte := byte_of(token)) is not None:
            return byte
        once, twice = (self.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        return twice[len(once) :].encode()

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, for people; a part of a character becomes U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_templates)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt of a chat. `template` is the name of one of the model's, or Jinja text.

        `kwargs` are variables of the template, such as `enable_thinking` or `date_string`.
        """
        return self._chat_template(template, tools is not None).render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            variables={**self.special_tokens, **kwargs},
        )

    def encode_chat(self, messages: Sequence[Message], **kwargs: Any) -> tuple[str, list[int]]:
        """The prompt of a chat as text and as ids; kwargs are those of `apply_chat_template`.

        BOS stands where the template writes it; no other is added. A content in parts is joined.
        """
        texts = [
            # What is no message, the template's renderer refuses.
            with_one_text(message, f"messages[{i}]") if isinstance(message, Mapping) else message
            for i, message in enumerate(messages)
        ]
        text = self.apply_chat_template(texts, **kwargs)
        return text, self.encode(text, add_special_tokens=False)

    def _chat_template(self, template: str | None, with_tools: bool) -> ChatTemplate:
        names = ["tool_use", "default"] if with_tools else ["default"]
        if template is not None:
            names = [template]
        for name in names:
            if name in self.chat_templates:
                return self.chat_templates[name]
        if template is not None and "{" in template:
            return ChatTemplate(template, "the template given", flaw=InvalidRequestError)
        known = ", ".join(sorted(self.chat_templates)) or "none"
        raise InvalidRequestError(
            f'the model has no chat template "{names[-1]}" (it has: {known}). '
            "Name one that it has, give a template, or prompt it with plain text."
        )


class TokenizerLoader:
    """Loads a tokenizer when it is first needed. A large one takes half a second, and holds
    Python's lock meanwhile, so that no thread could hide it behind the first steps.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tokenizer: Tokenizer | None = None
        self._lock = threading.Lock()  # of loading
        self.seconds: float | None = None  # that it took, once it is loaded

    @property
    def is_loaded(self) -> bool:
        return self._tokenizer is not None

    def result(self) -> Tokenizer:
        """From any thread; it is loaded once."""
        with self._lock:
            if self._tokenizer is None:
                began = time.perf_counter()
                self._tokenizer = Tokenizer.from_dir(self._directory)
                self.seconds = time.perf_counter() - began
            return self._tokenizer

    def eos_token_id(self) -> int | None:
        """The tokenizer's; without loading it where tokenizer.json lists the token as added."""
        if self._tokenizer is None:
            declared = read_json(self._directory / "tokenizer_config.json").get("eos_token")
            name = declared.get("content") if isinstance(declared, dict) else declared
            path = self._directory / "tokenizer.json"
            for entry in _added_tokens(path) if isinstance(name, str) else ():
                token_id = entry.get("id")
                if entry.get("content") == name and isinstance(token_id, int):
                    return token_id  # whoever uses it looks at its range
        return self.result().eos_token_id


def byte_of(token: str) -> bytes | None:
    """The byte for which a byte-fallback token such as `<0x0A>` stands, else None."""
    match = re.fullmatch(r"<0x([0-9A-Fa-f+][0-9A-Fa-f])>", token)  # +A is a number for `tokenizers`
    return bytes([int(match[1], 16)]) if match else None


@contextmanager
def _flaws_in(path: Path | str) -> Iterator[None]:
    """Turns what a broken file makes Python or `tokenizers` raise into an error that names it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, TinyvllmError):
        raise
    except BaseException as error:  # a panic in `tokenizers` is no Exception
        raise CheckpointError(
            f"{path}: {type(error).__name__}: {error}. The file is damaged; download it again."
        ) from error


def _added_tokens(path: Path) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json, [] if not found; of the rest, which may take longer to
    read than a small model, nothing behind them."""
    if not path.is_file():
        return []
    data = b""
    with _flaws_in(path), path.open("rb") as file:
        while len(data) <= MAX_FILE_BYTES and (more := file.read(max(len(data), 1 << 20))):
            data += more
            if match := re.search(rb'"added_tokens"\s*:\s*(?=\[)', data):
                text = data[match.end() :].decode(errors="ignore")  # it may end within a character
                with suppress(ValueError):
                    entries, _ = json.JSONDecoder().raw_decode(text)
                    return [entry for entry in entries if isinstance(entry, dict)]
    return []


def _missing(directory: Path) -> str:
    if (directory / "tokenizer.model").is_file():
        return (
            f"{directory} has a tokenizer.model and no tokenizer.json. Convert it in Python: from "
            "transformers import AutoTokenizer; "
            f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
        )
    return f"{directory} has no tokenizer.json. Download it, or name the directory that has it."


def _load(path: Path, text: str) -> tokenizers.Tokenizer:
    # `tokenizers` cuts merges at this prefix even within a character, and a file made for it ends
    # the process. It belongs to WordPiece; no supported family has it.
    key = '"continuing_subword_prefix"'
    if any(re.match(r'\s*:\s*"[^"]', rest) for rest in text.split(key)[1:]):
        raise UnsupportedModelError(f"{path}: {key} is set. Use a model with a BPE tokenizer.")
    import tokenizers  # not before: a prompt of ids gets its first token without

    return tokenizers.Tokenizer.from_str(text)


def _is_llama_tokenizer(directory: Path, text: str, config: Mapping[str, Any]) -> bool:
    """Whether Transformers 5 replaces the normalizer and decoder of tokenizer.json by its own."""
    if config.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return False
    if '"ByteLevel"' in text:  # a Llama 3 tokenizer with the wrong class
        return False
    return read_json(directory / "config.json").get("model_type") not in ("mistral", "qwen2")


def _with_llama_spaces(path: Path, text: str, config: Mapping[str, Any]) -> str:
    """tokenizer.json with the spaces of Transformers 5's LlamaTokenizer.

    Files of Llama 1 and 2 put a space after every special token, as Transformers 4 did. Now one
    stands before the first text only, unless the config says "legacy": true.
    """
    decoder: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _METASPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    scheme = "never"
    if config.get("add_prefix_space") in (None, True):
        scheme = "always" if config.get("legacy") else "first"
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    with _flaws_in(path):
        spec = json.loads(text)
        spec["normalizer"] = None
        spec["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": _METASPACE,
            "prepend_scheme": scheme,
            "split": False,
        }
        spec["decoder"] = {"type": "Sequence", "decoders": decoder}
        return json.dumps(spec)


def _added_token(value: Any) -> tokenizers.AddedToken:
    """A token as the JSON files write it: its text, or an object with its text and flags."""
    from tokenizers import AddedToken

    if isinstance(value, str):
        return AddedToken(value, special=True)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(value["content"], **{flag: value[flag] for flag in flags if flag in value})


def _add_special_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    """Adds the tokens that tokenizer.json lacks or flags otherwise. Returns those with a name."""
    if config.get("clean_up_tokenization_spaces") and type(backend.model).__name__ != "BPE":
        raise UnsupportedModelError(
            "tokenizer_config.json: clean_up_tokenization_spaces is true and the tokenizer is "
            f"{type(backend.model).__name__}, not BPE. Set it to false, or use another model."
        )
    present = backend.get_added_tokens_decoder().values()
    as_they_are = {repr(token) for token in present}
    declared = config.get("added_tokens_decoder") or {}
    tokens = [_added_token(declared[key]) for key in sorted(declared, key=int)]
    tokens = [token for token in tokens if repr(token) not in as_they_are]

    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    entries = {**config, **(extra if isinstance(extra, dict) else {})}
    named = {
        name: _added_token(value)
        for name, value in entries.items()
        if name.endswith("_token") and isinstance(value, (str, dict))
    }
    unnamed = [] if isinstance(extra, dict) else [_added_token(value) for value in extra]
    known = {token.content for token in (*present, *tokens)}
    for token in [*named.values(), *unnamed]:
        if token.content not in known:
            known.add(token.content)
            token.special = True
            tokens.append(token)
    backend.add_tokens(tokens)
    return {name: token.content for name, token in named.items()}


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """The templates by name. One .jinja file puts all of tokenizer_config.json's out of force."""
    paths = {path.stem: path for path in (directory / "additional_chat_templates").glob("*.jinja")}
    paths["default"] = directory / "chat_template.jinja"
    files = {name: (read_text(path), str(path)) for name, path in paths.items()}
    templates = {
        name: ChatTemplate(text, origin)
        for name, (text, origin) in files.items()
        if text is not None
    }
    if templates:
        return templates
    listed = config.get("chat_template") or []
    if isinstance(listed, str):
        listed = [{"name": "default", "template": listed}]
    origin = str(directory / "tokenizer_config.json")
    for entry in listed:
        if not isinstance(entry["name"], str) or not isinstance(entry["template"], str):
            raise TypeError("chat_template has a name or a template that is not a string")
        templates[entry["name"]] = ChatTemplate(entry["template"], origin)
    return templates


_TOKEN_STEPS = ("ByteFallback", "ByteLevel", "Metaspace", "Replace", "Strip", "WordPiece")


def _decoder_steps(backend: tokenizers.Tokenizer) -> set[str]:
    """The types of the decoder's steps, once it is clear that its text can be streamed.

    For that, a token's text may depend on its neighbours only. So steps may work token by token;
    when Fuse or ByteLevel has joined the tokens, what follows may replace single characters and
    drop one leading space. This holds for every supported family.
    """
    if backend.decoder is None:
        return set()
    spec = json.loads(backend.decoder.__getstate__())
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    joined = False
    for step in steps:
        kind = step["type"]
        local = (
            kind == "Fuse"
            or (kind == "Replace" and len(step["pattern"].get("String", "")) == 1)
            or (kind == "Strip" and step["start"] <= 1 and step["stop"] == 0)
            or (kind in _TOKEN_STEPS and not joined)
        )
        if not local:
            raise UnsupportedModelError(
                f"tokenizer.json: the decoder has the step {json.dumps(step)}, which needs the "
                "whole text at once. Use a model of a supported family."
            )
        joined = joined or kind in ("Fuse", "ByteLevel")
    return {step["type"] for step in steps}
