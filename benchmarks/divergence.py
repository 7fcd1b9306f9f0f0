"""How far bfloat16 takes the logits from float32: this engine's and Transformers' own.

    python benchmarks/divergence.py --model MODEL_DIR [--device cuda]

KL(softmax(truth) || softmax(logits)) of each position of some random sequences, in nats; the truth
is Transformers in float32, without TF32. Needs Transformers in the Python that runs it.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyvllm import _core

# The criterion is the one that the tests hold the promise to.
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from oracle import kl_divergences

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
        values = np.concatenate([kl_divergences(*pair) for pair in zip(truth, logits, strict=True)])
        print(
            f"{name:12}  mean {values.mean():.4f}  largest {values.max():.4f}  "
            f"of {len(values)} positions"
        )


if __name__ == "__main__":
    main()
