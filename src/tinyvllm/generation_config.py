"""The sampling defaults that a checkpoint brings, and the tokens that end its output.

generation_config.json has the meaning that Transformers gives it: without `do_sample: true`
decoding is greedy; with it, top_k is 50 unless the file says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tinyvllm.errors import CheckpointError, InvalidRequestError

FILE = "generation_config.json"

# Transformers' name -> ours, for those that have the same meaning.
_SAME = {
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}
_TRANSFORMERS_TOP_K = 50

# Options that change the text in Transformers and do nothing here, with their neutral values.
_NOT_OBEYED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "top_h": (),
}


@dataclass(frozen=True)
class SamplingDefaults:
    """The SamplingParams fields that the file sets, and what was found odd about it."""

    fields: dict[str, float | int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def merge(self, given: Mapping[str, Any], *, max_tokens: int | None) -> dict[str, Any]:
        """SamplingParams fields: those that were given, not checked yet, else the file's.

        max_tokens: where neither says. The file's min_tokens, for which nobody has asked, gives way
        to a smaller max_tokens.
        """
        values = {"max_tokens": max_tokens, **self.fields, **given}
        if "min_tokens" in self.fields and "min_tokens" not in given:
            limit = values["max_tokens"]
            if isinstance(limit, int) and 0 < limit < self.fields["min_tokens"]:
                values["min_tokens"] = limit
        return values


def sampling_defaults(config: Mapping[str, Any], origin: str = FILE) -> SamplingDefaults:
    """What the contents of a generation_config.json mean as SamplingParams fields."""
    fields: dict[str, float | int] = {}
    for theirs, ours in _SAME.items():
        if config.get(theirs) is not None:
            fields[ours] = _number(config, theirs, origin)
    if config.get("do_sample") is True:
        fields["temperature"] = _number(config, "temperature", origin, 1.0)
        fields["top_k"] = _number(config, "top_k", origin, _TRANSFORMERS_TOP_K)
    else:
        fields["temperature"] = 0
    _check(fields, origin)
    warnings = [
        f"{origin}: {name} = {config[name]!r} is not obeyed; the output may differ."
        for name, neutral in _NOT_OBEYED.items()
        if config.get(name) is not None and config[name] not in neutral
    ]
    return SamplingDefaults(fields, warnings)


def _check(fields: Mapping[str, Any], origin: str) -> None:
    """What is out of range is said to be the file's: nobody else has asked for it."""
    from tinyvllm.sampling_params import SamplingParams

    try:
        SamplingParams(**{"max_tokens": None, **fields})
    except InvalidRequestError as error:
        raise CheckpointError(
            f"{origin}: {error} Correct it, or pass --generation-config none."
        ) from None


def _number(config: Mapping[str, Any], key: str, origin: str, default: float = 0) -> float | int:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(
            f"{origin}: {key} is {value!r}, not a number. Correct it, or pass "
            "--generation-config none."
        )
    return value


def eos_token_ids(
    generation_config: Mapping[str, Any],
    model_config: Mapping[str, Any],
    tokenizer_eos: int | None,
) -> list[int]:
    """Every token that ends an output: generation_config's (else config's), and the tokenizer's.

    Each file may hold a number, a list or nothing. Leaving one of them out is how a chat model
    never stops.
    """
    found: dict[str, list[Any]] = {}
    for origin, config in ((FILE, generation_config), ("config.json", model_config)):
        value = config.get("eos_token_id")
        if value is not None:
            found[origin] = value if isinstance(value, list) else [value]
            break
    if tokenizer_eos is not None:
        found["tokenizer.json"] = [tokenizer_eos]
    for origin, tokens in found.items():
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not -1 <= token < 1 << 31:
                raise CheckpointError(
                    f"{origin}: the end token is {token!r:.60}, no token id. Correct the file."
                )
    return sorted({token for tokens in found.values() for token in tokens})
