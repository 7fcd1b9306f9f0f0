"""Draws the figures of a results file, as PNG and SVG."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import results
from results import Json

# One colour an engine, the same in every figure (Okabe and Ito's, which the colour-blind can tell
# apart); the limit is a black line.
_COLOURS = {
    "tinyvllm": "#d55e00",
    "llama.cpp": "#0072b2",
    "openvino": "#009e73",
    "transformers": "#e69f00",
    "ctranslate2": "#cc79a7",
    "torch": "#e69f00",
}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    # The same input gives the same bytes, so that a redrawn figure shows no change of its own.
    matplotlib.rcParams.update({"svg.hashsalt": "tinyvllm", "font.size": 9})
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        figure.savefig(path.with_suffix(suffix), dpi=150, metadata=metadata, bbox_inches="tight")


def draw_comparison(rows: Sequence[Json], path: Path) -> None:
    """A panel a row, a bar an engine, and the limit as a line."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(rows), figsize=(2.7 * len(rows), 3.0), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        shown = [peer for peer in row["peers"] if peer.get("median") is not None]
        for position, peer in enumerate(shown):
            axis.bar(
                position,
                peer["median"],
                yerr=[[peer["median"] - peer["min"]], [peer["max"] - peer["median"]]],
                color=_COLOURS[peer["peer"]],
                error_kw={"elinewidth": 0.8},
            )
            text = results.shown(peer["median"], row["unit"])
            axis.annotate(
                text,
                (position, peer["median"]),
                ha="center",
                va="bottom",
                xytext=(0, 2),
                textcoords="offset points",
            )
        if row["limit"] is not None:
            axis.axhline(row["limit"], color="black", linewidth=0.8, linestyle="--")
            axis.annotate(
                "what the machine allows",
                (len(shown) - 0.5, row["limit"]),
                ha="right",
                va="bottom",
                fontsize=7,
            )
        axis.set_xticks(
            range(len(shown)), [peer["peer"] for peer in shown], rotation=35, ha="right"
        )
        better = "higher is better" if row["unit"] == "tok/s" else "lower is better"
        axis.set_title(f"{textwrap.fill(row['what'], 32)}\n{row['unit']}, {better}", fontsize=9)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _save(figure, path)
    plt.close(figure)


def draw_gemm(points: Sequence[Json], path: Path) -> None:
    """A panel a matrix: GFLOP/s over the rows of x, with the roofline."""
    plt = _pyplot()
    matrices = list(dict.fromkeys(point["matrix"] for point in points))
    columns = min(len(matrices), 3)
    lines = -(-len(matrices) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 3 * lines), squeeze=False)
    for axis, matrix in zip(axes.flat, matrices, strict=False):
        own = [point for point in points if point["matrix"] == matrix]
        rows = [point["rows"] for point in own]
        limit = [point["limit_flops_per_second"] / 1e9 for point in own]
        axis.plot(rows, limit, color="black", linewidth=1, linestyle="--", label="limit")
        for name in own[0]["flops_per_second"]:
            values = [point["flops_per_second"][name] for point in own]
            if None not in values:
                rates = [value / 1e9 for value in values]
                axis.plot(rows, rates, marker=".", color=_COLOURS[name], label=name)
        _log_axes(axis, "rows of x (M)", "GFLOP/s")
        axis.set_title(f"{matrix}: [{own[0]['outputs']}, {own[0]['depth']}]", fontsize=9)
    for axis in axes.flat[len(matrices) :]:
        axis.set_visible(False)
    axes.flat[0].legend(frameon=False)
    figure.tight_layout()
    _save(figure, path)
    plt.close(figure)


def draw_scaling(series: Mapping[str, Sequence[Json]], path: Path) -> None:
    """Decode rate over context and over batch, measured and predicted."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(series), figsize=(4.5 * len(series), 3.2), squeeze=False)
    for axis, (label, points) in zip(axes[0], series.items(), strict=True):
        x = [point["x"] for point in points]
        predicted = [point["predicted"] for point in points]
        axis.plot(x, predicted, color="black", linewidth=1, linestyle="--", label="prediction")
        measured = [point["median"] for point in points]
        spread = [
            [point["median"] - point["min"] for point in points],
            [point["max"] - point["median"] for point in points],
        ]
        axis.errorbar(
            x, measured, yerr=spread, marker=".", color=_COLOURS["tinyvllm"], label="measured"
        )
        _log_axes(axis, label, "decode, tok/s")
        axis.legend(frameon=False)
    figure.tight_layout()
    _save(figure, path)
    plt.close(figure)


def _log_axes(axis: Any, x: str, y: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
