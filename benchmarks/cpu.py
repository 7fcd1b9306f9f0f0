"""The CPU engine against what else one could run on a CPU, row by row.

    python benchmarks/cpu.py [ROW ...] [--rounds N] [--peers-python PYTHON]

Figures go to benchmarks/results/cpu.json and cpu.md; results.py says what is in them.
requirements-bench.txt installs the peers.
"""

from __future__ import annotations

import command
import results
from runner import Row

_REPACKED = {"repacked": {"repack_weights": True}}  # for prefill and many sequences
_LLAMA, _SMOLLM = "llama-3.2-1b", "smollm2-135m"


def _rows_of(model: str, title: str, prefix: str, musts: dict[str, float]) -> list[Row]:
    sequences = [
        Row(
            f"{prefix}sequences-{count}",
            f"{title}: {count} sequences, 32 in, 64 out each",
            model,
            "throughput",
            num_prompts=count,
            prompt_len=32,
            must=musts[f"sequences-{count}"],
            variants=_REPACKED,
        )
        for count in (8, 16, 32)
    ]
    return [
        Row(
            f"{prefix}decode",
            f"{title}: decode, batch 1, 16 in, 64 out",
            model,
            "decode",
            must=musts["decode"],
            variants=_REPACKED,
        ),
        Row(
            f"{prefix}prefill",
            f"{title}: prefill of 512 tokens",
            model,
            "prefill",
            prompt_len=512,
            max_tokens=1,
            must=musts["prefill"],
            variants=_REPACKED,
        ),
        *sequences,
    ]


ROWS = [
    *_rows_of(
        _LLAMA,
        "Llama-3.2-1B",
        "",
        {
            "decode": 1.0,
            "prefill": 1.0,
            "sequences-8": 1.15,
            "sequences-16": 1.25,
            "sequences-32": 1.2,
        },
    ),
    Row(
        "start",
        "Llama-3.2-1B: process start to first token, 16 ids",
        _LLAMA,
        "start",
        max_tokens=1,
        must=2.0,
    ),
    Row(
        "start-text",
        "the same, a text and a tokenizer of 128k tokens",
        _LLAMA,
        "start_text",
        max_tokens=1,
        must=1.0,
    ),
    Row("memory", "Llama-3.2-1B: resident memory, batch 1", _LLAMA, "memory", must=1.0),
    *_rows_of(
        _SMOLLM,
        "SmolLM2-135M",
        "smollm-",
        {
            "decode": 1.1,
            "prefill": 1.0,
            "sequences-8": 1.25,
            "sequences-16": 1.25,
            "sequences-32": 1.25,
        },
    ),
]

if __name__ == "__main__":
    command.main(
        __doc__ or "",
        ROWS,
        ["llama.cpp", "openvino", "transformers"],
        results.DIRECTORY / "cpu.json",
    )
