"""Trains the byte-level BPE tokenizer, and holds the chat format.

All 256 bytes are in the vocabulary, so any text can be encoded and comes back unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable

from story_grammar import Turn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, END = "<|bos|>", "<|eos|>", "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = [BOS, EOS, END, *ROLES.values()]

# The same format as `chat_text` below. It starts with BOS itself, as chat templates do.
CHAT_TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role not in ["system", "user", "assistant"] -%}
        {{- raise_exception("unknown role: " ~ message.role) -}}
    {%- endif -%}
    {{- "<|" ~ message.role ~ "|>" ~ message.content | trim ~ "<|end|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|assistant|>" -}}
{%- endif -%}
"""


def chat_text(turns: Iterable[Turn]) -> str:
    """A conversation as one string, without BOS, which the tokenizer's post-processor adds."""
    return "".join(ROLES[turn.role] + turn.content + END for turn in turns)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must be in the vocabulary."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"{token!r} is not in the vocabulary: train the tokenizer again")
    return found


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns the merges from the texts; encoding puts BOS in front, once."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the texts give {tokenizer.get_vocab_size()} tokens, the model wants {vocab_size}: "
            "train on more text or lower vocab_size"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, token_id(tokenizer, BOS))],
    )
    return tokenizer
