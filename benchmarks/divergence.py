"""How far bfloat16 takes the logits from float32: this engine's and Transformers' own.

    python benchmarks/divergence.py --model MODEL_DIR [--device cuda]

KL(softmax(truth) || softmax(logits)) of each position of some random sequences, in nats; the truth
is Transformers in float32, without TF32. Needs Transformers in the Python that runs it.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyvllm import _core

SEQUENCES, LENGTH = 5, 513

Logits = npt.NDArray[np.float32]  # [LENGTH, vocab]


def transformers_logits(model: str, dtype: str, device: str, prompts: list[Any]) -> list[Logits]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    network: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).to(device)
    with torch.inference_mode():
        return [
            network(torch.from_numpy(prompt[None].astype(np.int64)).to(device), use_cache=False)
            .logits[0]
            .float()
            .cpu()
            .numpy()
            for prompt in prompts
        ]


def divergence(truth: Logits, other: Logits) -> npt.NDArray[np.float64]:
    """KL of each position, in float64. [LENGTH, vocab] twice -> [LENGTH]."""

    def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
        shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        result: npt.NDArray[np.float64] = shifted - np.log(
            np.exp(shifted).sum(axis=-1, keepdims=True)
        )
        return result

    log_p, log_q = log_softmax(truth), log_softmax(other)
    result: npt.NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="python -m tinyvllm.dummy makes one")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    arguments = parser.parse_args()
    model, device = arguments.model, arguments.device
    draw = random.Random(0)
    prompts = [
        np.array([draw.randrange(3, 30000) for _ in range(LENGTH)], np.int32)
        for _ in range(SEQUENCES)
    ]
    truth = transformers_logits(model, "float32", device, prompts)
    engine = _core.Model(model, device=device, dtype="bfloat16")
    both = {
        "tinyvllm": [engine.logits(prompt, 0) for prompt in prompts],
        "transformers": transformers_logits(model, "bfloat16", device, prompts),
    }
    for name, logits in both.items():
        values = np.concatenate([divergence(*pair) for pair in zip(truth, logits, strict=True)])
        print(
            f"{name:12}  mean {values.mean():.4f}  largest {values.max():.4f}  "
            f"of {len(values)} positions"
        )


if __name__ == "__main__":
    main()
