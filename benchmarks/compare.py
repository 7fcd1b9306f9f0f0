"""tinyvllm beside every other engine that is installed: a table, JSON, and a plot.

    python benchmarks/compare.py [ROW ...] [--rounds N] [--peers-python PYTHON]

The same weights, prompts and threads for all. An engine that gives fewer tokens, or other ones than
rounding explains, is not compared, and the exit code is 1. The figures go to
benchmarks/results/compare.json and .md, the plot to compare.png and .svg, and both into README.md;
with --output or --scaled-by to another place, and README.md stays as it is. requirements-bench.txt
installs the peers.
"""

from __future__ import annotations

from pathlib import Path

import command
import plots
import results
from peer_process import ROOT
from results import Json
from runner import Row

README = ROOT.parent / "README.md"

_MODEL = "llama-3.2-1b"
ROWS = [
    Row("decode", "decode: 1 sequence, 16 tokens in, 64 out", _MODEL, "decode"),
    Row("prefill", "prefill: 512 tokens in", _MODEL, "prefill", prompt_len=512, max_tokens=1),
    Row(
        "batch",
        "batch: 8 sequences, 32 tokens in, 64 out",
        _MODEL,
        "throughput",
        num_prompts=8,
        prompt_len=32,
    ),
    Row("start", "cold start: process start to first token", _MODEL, "start", max_tokens=1),
]

_BEGIN, _END = "<!-- benchmarks/compare.py writes this: -->\n", "<!-- to here -->\n"


def pasted(readme: str, rows: list[Json]) -> str:
    """The README with the plot and the table of these rows in their place."""
    head, begin, rest = readme.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not end:
        raise ValueError(f"README.md has no {_BEGIN.strip()} ... {_END.strip()}")
    figures = ""
    if rows:
        alt = "Each engine's speed beside what the machine allows; the table below has the figures"
        figures = f"![{alt}](benchmarks/results/compare.svg)\n\n{results.to_markdown(rows)}"
    return head + begin + figures + end + tail


def show(path: Path) -> None:
    """The plot beside the figures, and both in README.md if the figures are those of results/."""
    rows = results.read_rows(path)
    plots.draw_comparison(rows, path.with_suffix(""))
    if path.parent == results.DIRECTORY:
        readme = README.read_text(encoding="utf-8")
        README.write_text(pasted(readme, rows), encoding="utf-8")


if __name__ == "__main__":
    plots.pyplot()  # what is missing for the plot is found out now, not when all is measured
    command.main(
        __doc__ or "",
        ROWS,
        ["llama.cpp", "openvino", "transformers", "ctranslate2"],
        results.DIRECTORY / "compare.json",
        finish=show,
    )
