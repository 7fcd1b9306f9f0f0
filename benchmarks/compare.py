"""tinyvllm beside every other engine that is installed: a table, JSON, and a plot.

    python benchmarks/compare.py [ROW ...] [--rounds N] [--peers-python PYTHON]

The same weights, prompts and threads for all. An engine that gives fewer tokens, or other ones than
rounding explains, is not compared, and the exit code is 1. The figures go to
benchmarks/results/compare.json and .md, the plot to compare.png and .svg; requirements-bench.txt
installs the peers.
"""

from __future__ import annotations

import plots
import results
import runner
from runner import Row

_MODEL = "llama-3.2-1b"
ROWS = [
    Row("decode", "one sequence, 16 in, 64 out", _MODEL, "decode"),
    Row("prefill", "a prompt of 512 tokens", _MODEL, "prefill", prompt_len=512, max_tokens=1),
    Row("batch", "8 sequences, 32 in, 64 out", _MODEL, "throughput", num_prompts=8, prompt_len=32),
    Row("start", "process start to first token", _MODEL, "start", max_tokens=1),
]

if __name__ == "__main__":
    rows = runner.main(
        __doc__ or "",
        ROWS,
        ["llama.cpp", "openvino", "transformers", "ctranslate2"],
        results.DIRECTORY / "compare.json",
    )
    plots.draw_comparison(rows, results.DIRECTORY / "compare")
