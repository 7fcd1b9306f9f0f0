"""The figures of a benchmark, and their forms: a Markdown table, CSV, JSON, JSON lines.

Names are those of vLLM's benchmarks. TTFT: time to the first token. ITL: between two tokens of a
request. E2EL: to the last token. TPOT = (E2EL - TTFT) / (output tokens - 1). A figure that has no
value, such as the TPOT of one token, is null.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tinyvllm.cli.bench_run import RequestTimes, Run
from tinyvllm.cli.terminal import Output
from tinyvllm.model_cost import Cost, ModelCost

if TYPE_CHECKING:
    from tinyvllm.limits import MachineLimits

SCHEMA = 1  # of the JSON forms; it changes when a key changes its meaning
METRICS = ("ttft", "tpot", "itl", "e2el")
_STATISTICS = ("mean", "median", "std", "p90", "p99")

Row = dict[str, Any]


# --- Figures --------------------------------------------------------------------------------------


def latency_row(point: Row, runs: list[Run], cost: ModelCost, limits: MachineLimits | None) -> Row:
    """One point of `bench latency`, over its repeats. `point`: what was asked for."""
    prefill, decode = Cost(), Cost()
    prefill_seconds, decode_seconds, decode_rates = [], [], []
    for run in runs:
        split = max(request.token_times[0] for request in run.requests)
        prefill_seconds.append(split)
        decoded = 0  # a sequence may have tokens before another one has its first
        for request in run.requests:
            early = sum(now <= split for now in request.token_times)  # the first one included
            late = len(request.token_times) - early
            decoded += late
            prefill += cost.prefill(request.num_prompt, request.num_cached)
            prefill += cost.decode(request.num_prompt, early - 1)
            decode += cost.decode(request.num_prompt + early - 1, late)
        for now in run.step_times:
            if now <= split:
                prefill += cost.step()
            else:
                decode += cost.step()
        if decoded:
            decode_seconds.append(run.seconds - split)
            decode_rates.append(decoded / decode_seconds[-1])
    requests = [request for run in runs for request in run.requests]
    return {
        **point,
        "repeats": len(runs),
        **_totals(requests, sum(run.seconds for run in runs)),
        **_metrics(requests),
        "prefill_throughput": sum(r.num_prompt for r in runs[0].requests)
        / statistics.median(prefill_seconds),
        "decode_throughput": statistics.median(decode_rates) if decode_rates else None,
        **_shares("prefill_", prefill, sum(prefill_seconds), limits),
        **_shares("decode_", decode, sum(decode_seconds), limits),
        "durations": [run.seconds for run in runs],
        **_raw(requests),
    }


def throughput_row(point: Row, run: Run, cost: ModelCost, limits: MachineLimits | None) -> Row:
    """The run of `bench throughput`, or what there is of it. `point`: what was asked for."""
    total = Cost()
    for request in run.requests:
        if request.token_times:
            total += cost.prefill(request.num_prompt, request.num_cached)
            total += cost.decode(request.num_prompt, len(request.token_times) - 1)
    for _ in run.step_times:
        total += cost.step()
    return {
        **point,
        **_totals(run.requests, run.seconds),
        "num_steps": len(run.step_times),
        "cached_tokens": sum(request.num_cached for request in run.requests),
        **_shares("", total, run.seconds, limits),
        **_metrics(run.requests),
        **_raw(run.requests),
    }


def _totals(requests: list[RequestTimes], seconds: float) -> Row:
    completed = sum(request.completed for request in requests)
    num_input = sum(request.num_prompt for request in requests if request.token_times)
    num_output = sum(len(request.token_times) for request in requests)
    return {
        "completed": completed,
        "failed": sum(request.error is not None for request in requests),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "duration": seconds,
        "request_throughput": completed / seconds,
        "output_throughput": num_output / seconds,
        "total_token_throughput": (num_input + num_output) / seconds,
    }


def _metrics(requests: Iterable[RequestTimes]) -> Row:
    """mean_ttft_ms and so on."""
    samples: dict[str, list[float]] = {name: [] for name in METRICS}
    for request in requests:
        times = request.token_times
        if not times:
            continue
        samples["ttft"].append(times[0])
        samples["itl"] += _gaps(times)
        if request.completed:
            samples["e2el"].append(times[-1])
            if len(times) > 1:
                samples["tpot"].append((times[-1] - times[0]) / (len(times) - 1))
    return {
        f"{statistic}_{name}_ms": None if value is None else 1e3 * value
        for name in METRICS
        for statistic, value in _statistics(samples[name]).items()
    }


def _statistics(values: list[float]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys(_STATISTICS)
    ordered = sorted(values)
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "std": statistics.pstdev(values),
        "p90": percentile(ordered, 90),
        "p99": percentile(ordered, 99),
    }


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of ascending values, linear between two of them, as numpy's default and vLLM's."""
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _gaps(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def _shares(prefix: str, cost: Cost, seconds: float, limits: MachineLimits | None) -> Row:
    """How much of the machine's limits the work has reached in its time."""
    measured = limits is not None and seconds > 0
    return {
        f"{prefix}arithmetic_share": cost.flops / seconds / limits.bf16_flops_per_second
        if limits and measured
        else None,
        f"{prefix}bandwidth_share": cost.bytes / seconds / limits.read_bandwidth_bytes_per_second
        if limits and measured
        else None,
    }


def _raw(requests: list[RequestTimes]) -> Row:
    """Each request's own figures, in seconds."""
    return {
        "input_lens": [request.num_prompt for request in requests],
        "output_lens": [len(request.token_times) for request in requests],
        "ttfts": [request.token_times[0] if request.token_times else None for request in requests],
        "itls": [_gaps(request.token_times) for request in requests],
        "latencies": [request.ended for request in requests],
    }


# --- Forms ----------------------------------------------------------------------------------------


class Report:
    """Takes rows as they are measured; JSON lines go out at once, all else at the end."""

    def __init__(self, output: Output, form: str, facts: Row) -> None:
        """form: md, csv, json or jsonl. facts: what holds for all rows."""
        self._output = output
        self._form = form
        self._facts = facts
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        self._rows.append(row)
        if self._form == "jsonl":
            self._write(json.dumps({**self._facts, **row}))

    def end(self) -> None:
        if self._form == "json":
            self._write(json.dumps({**self._facts, "results": self._rows}))
        elif self._form == "csv" and self._rows:
            self._write(_csv([{**self._facts, **row} for row in self._rows]))
        elif self._form == "md" and self._rows:
            latency = self._facts["benchmark"] == "latency"
            table = _latency_table(self._rows) if latency else _throughput_table(self._rows)
            lines = _heading(self._facts)
            if latency:
                warmup = self._rows[0]["warmup"]
                lines.append(
                    f"Before the repeats of each point: {warmup} warm-up run{'s' * (warmup != 1)}. "
                    "End tokens are ignored."
                )
            if any(_reads_from_caches(row) for row in self._rows):
                lines.append(
                    "More than 100% of bandwidth: the weights stay in the caches, or memory was "
                    "slower while it was measured."
                )
            self._write("\n".join([*lines, "", _markdown(table)]))

    def _write(self, text: str) -> None:
        self._output.write(text + "\n")
        self._output.flush()


def _csv(rows: list[Row]) -> str:
    """The figures; lists of raw values are left to the JSON forms."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    file = io.StringIO()
    writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().removesuffix("\n")


def _heading(facts: Row) -> list[str]:
    lines = [
        f"{facts['model']}, {facts['num_parameters'] / 1e6:.0f} M parameters"
        f"{', random weights' * (facts['load_format'] == 'dummy')}; {facts['dtype']} on "
        f"{facts['cpu'] if facts['device'] == 'cpu' else facts['device']} ({facts['isa']}), "
        f"{facts['num_threads']} threads; temperature {facts['temperature']:g}, "
        f"prefix cache {'on' if facts['prefix_caching'] else 'off'}"
    ]
    if facts["read_bandwidth_bytes_per_second"] is not None:
        lines.append(
            f"This machine reads {facts['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s and "
            f"multiplies {facts['bf16_flops_per_second'] / 1e9:,.0f} GFLOP/s in bfloat16."
        )
    return lines


def _latency_table(rows: list[Row]) -> list[list[str]]:
    """Four lines a point: one a metric."""
    table = [["prompt", "output", "batch", "repeats", "ms", *_STATISTICS, "tokens/s", "of limit"]]
    for row in rows:
        speeds = {
            "ttft": ("prefill_throughput", "prefill_"),
            "tpot": ("decode_throughput", "decode_"),
        }
        point = [str(row[name]) for name in ("input_len", "output_len", "batch_size", "repeats")]
        for metric in METRICS:
            speed, phase = speeds.get(metric, (None, None))
            table.append(
                [
                    *point,
                    metric.upper(),
                    *(_short(row[f"{statistic}_{metric}_ms"]) for statistic in _STATISTICS),
                    _short(row[speed]) if speed is not None else "",
                    _nearer_limit(row, phase) if phase is not None else "",
                ]
            )
            point = [""] * len(point)
    return table


def _throughput_table(rows: list[Row]) -> list[list[str]]:
    columns = {
        "prompt tokens": "total_input_tokens",
        "output tokens": "total_output_tokens",
        "seconds": "duration",
        "requests/s": "request_throughput",
        "output tokens/s": "output_throughput",
        "total tokens/s": "total_token_throughput",
    }
    table = [["requests", *columns, "of arithmetic", "of bandwidth"]]
    for row in rows:
        requests = f"{row['completed']} of {row['num_prompts']}"
        table.append(
            [
                str(row["completed"]) if row["completed"] == row["num_prompts"] else requests,
                *(_short(row[name]) for name in columns.values()),
                _percent(row["arithmetic_share"]),
                _percent(row["bandwidth_share"]),
            ]
        )
    return table


def _nearer_limit(row: Row, phase: str) -> str:
    """The larger of the two shares: what holds this phase back."""
    shares = {name: row[f"{phase}{name}_share"] for name in ("arithmetic", "bandwidth")}
    if None in shares.values():
        return ""
    name = max(shares, key=lambda name: shares[name])
    return f"{_percent(shares[name])} {name}"


def _reads_from_caches(row: Row) -> bool:
    """More than memory gives, by more than its rate moves between two measurements."""
    shares = (row.get(f"{phase}bandwidth_share") for phase in ("", "prefill_", "decode_"))
    return any(share is not None and share > 1.1 for share in shares)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"


def _short(value: float | None) -> str:
    """Four digits that count; whole numbers in full."""
    if value is None:
        return "-"
    if isinstance(value, int) or value == 0:
        return str(value)
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def _markdown(table: list[list[str]]) -> str:
    """A table whose columns also stand under each other where nobody renders it."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)
