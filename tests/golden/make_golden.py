"""Asks Transformers for the golden outputs beside this file. Run it when a test model changes.

    python tests/golden/make_golden.py

A golden holds no weights: the checkpoint is made again from its seed, and the digest kept here
says whether it is still the same one. `NAME.npz` has

    weights_sha256  of the safetensors files, in order of their names
    token_ids       [T]        a prompt, and the 64 tokens that greedy decoding appends to it
    greedy          [T]        the oracle's best token at each position, float32
    clear           [T]        where an error within the bound cannot change it
    max_abs         []         max |logit| over all positions
    positions       [P]        the positions whose logits are kept
    logits          [P, vocab] float32, of these
    bfloat16_kl     []         Transformers' own bfloat16: mean KL from float32, over all positions
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from families import FAMILIES, Family  # noqa: E402
from oracle import Oracle, clear_positions, kl_divergences, max_abs  # noqa: E402

# One of each thing that a family can do differently.
GOLDEN_FAMILIES = (
    "llama-2-f16",
    "llama-3.1-sharded",
    "llama-yarn-explicit",
    "mistral-window",
    "qwen2-window",
    "qwen3",
)
PROMPT_LENGTH = 300
NUM_POSITIONS = 24


def weights_sha256(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def make(family: Family, path: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        directory = family.write(Path(scratch))
        exact, rounded = Oracle(directory, "float32"), Oracle(directory, "bfloat16")
        prompt = family.prompt(PROMPT_LENGTH)
        token_ids = np.concatenate([prompt, exact.greedy(prompt)])
        truth, theirs = exact.logits(token_ids), rounded.logits(token_ids)
        digest = weights_sha256(directory)
    positions = np.linspace(0, len(token_ids) - 1, NUM_POSITIONS).astype(np.int32)
    np.savez_compressed(
        path,
        weights_sha256=np.array(digest),
        token_ids=token_ids.astype(np.int32),
        greedy=truth.argmax(axis=-1).astype(np.int32),
        clear=clear_positions(truth),
        max_abs=np.float64(max_abs(truth)),
        positions=positions,
        logits=truth[positions],
        bfloat16_kl=np.float64(kl_divergences(truth, theirs).mean()),
    )


if __name__ == "__main__":
    for name in GOLDEN_FAMILIES:
        make(FAMILIES[name], HERE / f"{name}.npz")
