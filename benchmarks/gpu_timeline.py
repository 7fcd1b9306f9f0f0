"""Shows a decode step on the GPU kernel by kernel, and for how long nothing runs.

    python benchmarks/gpu_timeline.py [--model MODEL_DIR] [--batch 1] [--context 128] [--trace FILE]

PyTorch's profiler records every kernel of the process, the engine's too. For each kernel the report
has how often it runs, for how long, and by how much it moves the end of the step: kernels overlap
(programmatic dependent launch), so that the last is what it costs. --trace keeps the timeline for
chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tinyvllm import LLM, SamplingParams

STEPS = 48
FIRST_KERNEL = "spread_kernel"  # of a step: ops/block_tables_cuda.cu


def record(llm: LLM, batch: int, context: int, trace: Path) -> list[dict[str, Any]]:
    """The kernels of some steps, in the order of their beginnings; times in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    draw = random.Random(0)
    prompts = [[draw.randrange(3, 30000) for _ in range(context)] for _ in range(batch)]
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=STEPS)
    llm.generate(prompts, params, use_tqdm=False)  # graphs, prefix cache
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        llm.generate(prompts, params, use_tqdm=False)
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    return sorted(kernels, key=lambda kernel: float(kernel["ts"]))


def name_of(kernel: dict[str, Any]) -> str:
    """Without return type, namespaces and arguments."""
    name = str(kernel["name"]).replace("(anonymous namespace)::", "")
    return re.sub(r"^void ", "", re.split(r"[<(]", name)[0]).rpartition("::")[2]


def report(kernels: list[dict[str, Any]]) -> str:
    starts = [i for i, kernel in enumerate(kernels) if name_of(kernel) == FIRST_KERNEL]
    steps = list(itertools.pairwise(starts))[8:-8]  # no prompt, no end
    if not steps:
        raise SystemExit("error: no decode steps among the recorded kernels")
    periods, idle = [], []
    cost: dict[str, list[float]] = {}
    for first, last in steps:
        step, end = kernels[first:last], float(kernels[first]["ts"])
        gap = 0.0
        for kernel in step:
            begin, duration = float(kernel["ts"]), float(kernel["dur"])
            entry = cost.setdefault(name_of(kernel), [0, 0.0, 0.0])
            entry[0] += 1
            entry[1] += duration
            entry[2] += max(0.0, begin + duration - max(end, begin))
            gap += max(0.0, begin - end)
            end = max(end, begin + duration)
        following = float(kernels[last]["ts"])
        periods.append(following - float(step[0]["ts"]))
        idle.append((gap + max(0.0, following - end)) / periods[-1])
    count = len(steps)
    lines = [
        f"{statistics.median(periods):.1f} us a step, median of {count}; "
        f"nothing runs for {statistics.median(idle):.2%} of it",
        f"{'kernel':48} {'number':>6} {'runs, us':>9} {'costs, us':>9}",
    ]
    for name, (number, runs, costs) in sorted(cost.items(), key=lambda item: -item[1][2]):
        lines.append(
            f"{name[:48]:48} {number / count:6.0f} {runs / count:9.1f} {costs / count:9.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="python -m tinyvllm.dummy makes one")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--trace", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, LLM(arguments.model, device="cuda") as llm:
        trace = arguments.trace or Path(scratch) / "trace.json"
        print(report(record(llm, arguments.batch, arguments.context, trace)))


if __name__ == "__main__":
    main()
