"""Small tokenizers in the styles of the supported families, and the directories that hold them.

They are trained here on a few lines, so that no file has to be kept. Their vocabularies hold every
byte, and pieces that cut characters in two, so that random ids are as bad as ids can be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as dec

CORPUS = [
    'Once upon a time there was a brave fox. The fox said: "What\'s the matter?"\n',
    "def add(a, b):\n    return a + b  # 1234 + 5678\n",
    "Straße, naïve café, Привет мир, 你好世界, 🦊🌲 👩‍👩‍👧\n",
] * 8

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
_BYTE_CHARS = sorted(pre_tokenizers.ByteLevel.alphabet())


def llama3() -> Tokenizer:
    """Byte-level BPE, with BOS from the post-processor, as in Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = dec.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=_BYTE_CHARS,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # The end of one fox and the beginning of the next: a token that no character boundary touches.
    spec = json.loads(tokenizer.to_str())
    split_fox = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fox = split_fox.pre_tokenize_str("🦊🦊")[0][0]
    vocab = spec["model"]["vocab"]
    for piece in (fox[1:5], fox[3:6], fox[2:4]):
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens(["<|start_header_id|>", "<|end_header_id|>"])
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False)])
    tokenizer.post_processor = _with_bos(tokenizer, "<|begin_of_text|>")
    return tokenizer


def llama2(*, bos: bool = True) -> Tokenizer:
    """BPE with byte fallback and spaces written as ▁, as Transformers 4 wrote it for Llama 2."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        [re.sub(r"[^!-~é ]", "", text) for text in CORPUS],  # other characters are left to bytes
        trainers.BpeTrainer(vocab_size=150, limit_alphabet=60, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *model["vocab"]]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spec = json.loads(tokenizer.to_str())
    spec["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = dec.Sequence(
        [dec.Replace("▁", " "), dec.ByteFallback(), dec.Fuse(), dec.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if bos:
        tokenizer.post_processor = _with_bos(tokenizer, "<s>")
    return tokenizer


def with_decoder(decoder: Any, *more_tokens: str) -> Tokenizer:
    """Llama 2's vocabulary and more tokens, under another decoder (None is allowed)."""
    spec = json.loads(llama2().to_str())
    for token in more_tokens:
        spec["model"]["vocab"].setdefault(token, len(spec["model"]["vocab"]))
    tokenizer = Tokenizer.from_str(json.dumps(spec | {"decoder": None}))
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def write(
    directory: Path,
    tokenizer: Tokenizer,
    tokenizer_config: Mapping[str, Any] | None = None,
    **files: Any,
) -> Path:
    """Writes tokenizer.json, tokenizer_config.json and others: `special_tokens_map={...}`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    if tokenizer_config is not None:
        files["tokenizer_config"] = tokenizer_config
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return directory


def _with_bos(tokenizer: Tokenizer, bos: str) -> Any:
    return processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
