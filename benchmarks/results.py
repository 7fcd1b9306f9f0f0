"""The figures: their schema, their files, and the Markdown that shows them.

A results file is {"schema": 1, "rows": [row, ...]}; a new run of a row takes the place of the old
one. Every row stands for itself:

    row, what       its name, and the work in words
    model           the shape of the seeded random weights (python -m tinyvllm.dummy)
    measures        decode, prefill, throughput, first_token, load, start, start_text or memory:
                    runner.py defines them
    unit            of the values: tok/s, s or bytes
    commit, date    of this engine, "+" behind it where the work tree had changes; UTC
    machine         cpu, memory_bytes, device; num_threads that every peer was given; on a GPU its
                  name and driver; on a CPU isa, the kernels of this engine
    command         arguments that repeat the row
    must            the ratio to the best peer that is asked for, or null
    limits          read_bandwidth_bytes_per_second and bf16_flops_per_second, one value a round. On
                    a CPU the former is of the model's own file; before commit 6d77b5d of 1 GiB
    limit           the value that these limits allow (tinyvllm.model_cost), the median over
                    rounds, or null
    peers           one object a peer:
      peer, version   as the adapter says
      options         arguments of LLM, where it is this engine in another configuration
      missing         why it did not run, in which case nothing follows
      values          one a round; the peers take turns within a round
      median, min, max
      ratio           how many times better this engine is: the median over rounds, each against
                      the same round. null for itself
      share_of_limit  the median over rounds, each against the limits of the same round, or null
      tokens          tokens of all prompts and of all outputs
      agreement       against this engine's greedy tokens: sequences, how many are identical, the
                      shortest common prefix, and the largest gap (nats) at a first difference
      refused         why it is not compared, in which case ratio is null

There is no name of a host, a user or a directory in it.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tinyvllm._core import CpuContext
from tinyvllm.cli.env import gpu_driver

Json = dict[str, Any]

DIRECTORY = Path(__file__).parent / "results"
_SCHEMA = 1


def read_rows(path: Path) -> list[Json]:
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    if content.get("schema") != _SCHEMA:
        raise ValueError(f"{path.name} has schema {content.get('schema')}, not {_SCHEMA}; move it.")
    rows: list[Json] = content["rows"]
    return rows


def write_rows(path: Path, rows: Iterable[Json]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": _SCHEMA, "rows": list(rows)}, indent=1) + "\n")


def put_row(path: Path, row: Json, order: list[str]) -> None:
    """Adds the row, or puts it in the old one's place. `order` is that of the names."""
    rows = [old for old in read_rows(path) if old["row"] != row["row"]] + [row]
    known = [name for name in order if any(row["row"] == name for row in rows)]
    rows.sort(key=lambda r: known.index(r["row"]) if r["row"] in known else len(known))
    write_rows(path, rows)


def provenance() -> Json:
    """Commit and date."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../src", "../csrc")
    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    now = datetime.now(timezone.utc)
    return {"commit": commit + ("+" if changed else ""), "date": f"{now:%Y-%m-%d %H:%M}"}


def machine(device: str, num_threads: int) -> Json:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            memory = int(line.split()[1]) * 1024
    where = {"cpu": cpu, "memory_bytes": memory, "device": device, "num_threads": num_threads}
    if device == "cpu":
        where["isa"] = CpuContext(1).isa
    else:
        found = gpu_driver()
        where["gpu"] = ", ".join(gpu["name"] for gpu in found["devices"]) or "unknown"
        where["driver"] = found["driver"]
    return where


# --- Markdown -------------------------------------------------------------------------------------


def shown(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "bytes":
        return f"{value / 1e9:.2f} GB"
    if unit == "s":
        return f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.2f} ms"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def to_markdown(rows: list[Json]) -> str:
    """One table: a line a row, a column a peer, with the ratio that this engine reaches.

    A peer that ran in no row has no column, but a line that says why.
    """
    ran: dict[str, bool] = {}
    for row in rows:
        for peer in row["peers"]:
            ran[peer["peer"]] = ran.get(peer["peer"], False) or "missing" not in peer
    names = [name for name in ran if ran[name]]
    lines = [
        "| work | " + " | ".join(names) + " | limit | share | best ratio |",
        "|---" * (len(names) + 4) + "|",
    ]
    for row in rows:
        cells = {peer["peer"]: _cell(peer, row["unit"]) for peer in row["peers"]}
        ours = row["peers"][0]
        best = best_ratio(row)
        must = f" (must {row['must']:.2f}x)" if row["must"] else ""
        share = ours.get("share_of_limit")
        lines.append(
            f"| {row['what']} | "
            + " | ".join(cells.get(name, "") for name in names)
            + f" | {shown(row['limit'], row['unit'])} | {'' if share is None else f'{share:.0%}'}"
            + f" | {'' if best is None else f'{best:.2f}x'}{must} |"
        )
    versions = sorted(
        {peer["version"] for row in rows for peer in row["peers"] if "version" in peer}
    )
    machines: dict[str, list[str]] = {}
    for row in rows:
        machines.setdefault(_machine_line(row), []).append(row["row"])
    lines += ["", "A figure without a unit is tokens a second. A ratio says how many times better "]
    lines[-1] += "tinyvllm is than that peer in the same rounds; the last column is the least of "
    lines[-1] += "them. The limit is what the machine allows, measured in the same rounds"
    limits = _limits_line(rows)
    lines[-1] += f": it {limits}." if limits else "."
    lines.append("")
    for machine_line, on_it in machines.items():
        lines.append(f"- {machine_line}" + (f": {', '.join(on_it)}" if len(machines) > 1 else ""))
    lines += [f"- {version}" for version in versions]
    lines += [f"- {row['row']}: {note}" for row in rows for note in _notes(row, names)]
    for name in [name for name in ran if not ran[name]]:
        reasons = {p["missing"]: None for row in rows for p in row["peers"] if p["peer"] == name}
        lines.append(f"- {name} did not run: {'; '.join(reasons)}")
    return "\n".join(lines) + "\n"


def best_ratio(row: Json) -> float | None:
    """Against the best of the other engines: the least of the ratios."""
    others = [peer for peer in row["peers"] if not peer.get("options")]
    ratios = [peer["ratio"] for peer in others if peer.get("ratio") is not None]
    return min(ratios, default=None)


def _limits_line(rows: list[Json]) -> str:
    reads = [value for row in rows for value in row["limits"]["read_bandwidth_bytes_per_second"]]
    rates = [value for row in rows for value in row["limits"]["bf16_flops_per_second"]]
    if not reads:
        return ""
    return (
        f"read {min(reads) / 1e9:.0f} to {max(reads) / 1e9:.0f} GB/s and multiplied "
        f"{min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} GFLOP/s"
    )


def measured_where(rows: list[Json]) -> str:
    """The caption of a plot: model, machine and limits."""
    models = ", ".join(dict.fromkeys(row["model"] for row in rows))
    machines = "; ".join(
        dict.fromkeys(
            f"{row['machine']['cpu']}, {row['machine']['num_threads']} threads" for row in rows
        )
    )
    rounds = max(len(peer.get("values", [])) for row in rows for peer in row["peers"])
    return (
        f"Random weights in the shape of {models}, bfloat16; {machines}. Bars are medians of "
        f"{rounds} rounds, thin lines go from the least to the most. The strip behind a bar is "
        f"what the machine allows: in these rounds it {_limits_line(rows)}."
    )


def _cell(peer: Json, unit: str) -> str:
    if "missing" in peer:
        return "did not run"
    if peer.get("refused"):
        return "refused"
    text = shown(peer["median"], unit)
    return text if peer.get("ratio") is None else f"{text} ({peer['ratio']:.2f}x)"


def _agreement_line(row: Json) -> str:
    """What was checked: tokens counted, and greedy ones compared."""
    peers = [peer for peer in row["peers"] if peer.get("agreement")]
    same = ", ".join(
        f"{peer['peer']} {peer['agreement']['identical']} of {peer['agreement']['sequences']}"
        for peer in peers
    )
    gap = max(peer["agreement"]["largest_gap"] for peer in peers)
    first = f"; the others part at a near tie, of {gap:.2f} nats at the most" if gap else ""
    count = row["peers"][0]["tokens"]["output"]
    tokens = "1 token" if count == 1 else f"{count} tokens"
    return f"{tokens} from each engine; sequences with the very same: {same}{first}"


def _machine_line(row: Json) -> str:
    where = row["machine"]
    kernels = f" ({where['isa']})" if "isa" in where else ""
    gpu = f"{where['gpu']}, driver {where['driver']}, beside " if "gpu" in where else ""
    return (
        f"{gpu}{where['cpu']}, {where['memory_bytes'] / 2**30:.0f} GiB, device "
        f"{where['device']}{kernels}, {where['num_threads']} threads; commit {row['commit']}, "
        f"{row['date'].split()[0]}"
    )


def _notes(row: Json, names: list[str]) -> list[str]:
    notes = []
    if any(peer.get("agreement") for peer in row["peers"]):
        notes.append(_agreement_line(row))
    for peer in row["peers"]:
        if peer["peer"] not in names:
            continue
        if "missing" in peer:
            notes.append(f"{peer['peer']} did not run: {peer['missing']}")
        elif peer.get("refused"):
            notes.append(f"{peer['peer']} is not compared: {peer['refused']}")
    return notes
