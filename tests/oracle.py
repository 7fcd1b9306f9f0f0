"""Runs Transformers as the second opinion; the criteria of docs/promises.md, 1, as functions.

`Oracle` gives the logits and the greedy tokens that Transformers computes with eager attention.
The criteria below it are plain numpy, so that the golden tests use the same ones without torch.
Every figure that a test measures goes through `record`; conftest prints `summary_lines()`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int32]

LOGIT_BOUND = 1e-4  # of max |oracle|: how far a float32 logit may be off
MIN_CLEAR_SHARE = 0.99  # positions whose greedy token no such error can change
NUM_GREEDY = 64
MIN_KL_POSITIONS = 2000


# --- Transformers -------------------------------------------------------------------------------


class Oracle:
    """One checkpoint, loaded by Transformers in one dtype."""

    def __init__(self, directory: Path, dtype: str) -> None:
        import torch  # not at the top: the criteria below work without it
        from transformers import AutoModelForCausalLM

        self.model: Any
        self.model, loading = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            output_loading_info=True,
        )
        wrong = {kind: names for kind, names in loading.items() if names}
        if wrong:
            raise AssertionError(f"{directory}: Transformers does not take it as it is: {wrong}")

    def logits(self, token_ids: TokenIds) -> Logits:
        """Teacher-forced. [T] -> [T, vocab]; [B, T], a batch of equal lengths, -> [B, T, vocab]."""
        import torch

        batch = torch.from_numpy(np.atleast_2d(token_ids).astype(np.int64))
        with torch.inference_mode():
            result: Logits = self.model(batch, use_cache=False).logits.float().numpy()
        return result[0] if token_ids.ndim == 1 else result

    def greedy(self, prompt: TokenIds, num_tokens: int = NUM_GREEDY) -> TokenIds:
        """The ids that generate() appends, with its KV cache; no end-of-text token stops it."""
        import torch

        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        batch = torch.from_numpy(prompt[None].astype(np.int64))
        with torch.inference_mode():
            output = self.model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                do_sample=False,
                max_new_tokens=num_tokens,
            )
        new: TokenIds = output[0, len(prompt) :].numpy().astype(np.int32)
        assert len(new) == num_tokens
        return new


# --- The criteria -------------------------------------------------------------------------------


def max_abs(logits: Logits) -> float:
    return float(np.abs(logits).max())


def logit_error(ours: Logits, truth: Logits) -> float:
    """max |ours - truth| / max |truth|; infinite if a logit is missing or not finite."""
    if ours.shape != truth.shape or not np.isfinite(ours).all():
        return float("inf")
    return max_abs(ours - truth) / max_abs(truth)


def top_two_gap(truth: Logits) -> Logits:
    """[T, vocab] -> [T]: by how much the best token leads the second."""
    best_two = np.partition(truth, -2, axis=-1)[..., -2:]
    gap: Logits = best_two[..., 1] - best_two[..., 0]
    return gap


def clear_positions(truth: Logits, error: float | None = None) -> npt.NDArray[np.bool_]:
    """Where two logits that are each off by `error` cannot change the greedy token."""
    if error is None:
        error = LOGIT_BOUND * max_abs(truth)
    clear: npt.NDArray[np.bool_] = top_two_gap(truth) > 2 * error
    return clear


def kl_divergences(truth: Logits, other: Logits) -> npt.NDArray[np.float64]:
    """KL(softmax(truth) || softmax(other)) of each position, in float64. [..., vocab] -> [...]."""
    log_p, log_q = (_log_softmax(x.astype(np.float64)) for x in (truth, other))
    result: npt.NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return result


def _log_softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = x - x.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


# --- The figures --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number. `higher_is_better` tells which end is the worst one."""

    what: str
    family: str
    value: float
    limit: float
    higher_is_better: bool = False

    @property
    def margin(self) -> float:
        """Above 1: the limit is broken."""
        over, under = (
            (self.limit, self.value) if self.higher_is_better else (self.value, self.limit)
        )
        if under == 0:
            return 0.0 if over == 0 else float("inf")
        return over / under


FIGURES: list[Figure] = []


def record(
    what: str, family: str, value: float, limit: float, *, higher_is_better: bool = False
) -> bool:
    """Keeps a figure for the end of the run. Returns whether it is within its limit."""
    FIGURES.append(Figure(what, family, float(value), float(limit), higher_is_better))
    return value >= limit if higher_is_better else value <= limit


def summary_lines() -> list[str]:
    """For each kind of figure the one that comes nearest to its limit, or goes past it."""
    lines = []
    for what in dict.fromkeys(figure.what for figure in FIGURES):
        figures = [figure for figure in FIGURES if figure.what == what]
        worst = max(figures, key=lambda figure: figure.margin)
        sign = ">=" if worst.higher_is_better else "<="
        families = len({figure.family for figure in figures})
        lines.append(
            f"{what:<44} worst {worst.value:.3g} ({sign} {worst.limit:.3g}), "
            f"{worst.family}, of {families} families"
        )
    return lines
