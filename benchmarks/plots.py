"""Draws the figures of a results file, as PNG and SVG."""

from __future__ import annotations

import sys
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
    "tinyvllm repacked": "#56b4e9",
    "llama.cpp": "#0072b2",
    "openvino": "#009e73",
    "transformers": "#e69f00",
    "ctranslate2": "#cc79a7",
    "torch": "#e69f00",
}
_INK, _GREY = "#24292f", "#57606a"
_OTHERS, _STRIP = "#8c96a3", "#e7eaee"


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: matplotlib is missing: pip install -r requirements-bench.txt")
    matplotlib.use("agg")
    # The same input gives the same bytes, so that a redrawn figure shows no change of its own.
    matplotlib.rcParams.update({"svg.hashsalt": "tinyvllm", "font.size": 9})
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        figure.savefig(
            path.with_suffix(suffix),
            dpi=150,
            metadata=metadata,
            bbox_inches="tight",
            pad_inches=0.15,
        )


def draw_comparison(rows: list[Json], path: Path) -> None:
    """A panel a row, a bar an engine, on a strip that is as long as the machine allows."""
    plt = pyplot()
    names = list(dict.fromkeys(peer["peer"] for row in rows for peer in row["peers"]))
    # As wide as a README is, so that nothing is scaled; one line of letters an engine.
    figure, axes = plt.subplots(
        1,
        len(rows),
        figsize=(0.4 + 2.05 * len(rows), 1.45 + 0.27 * len(names)),
        sharey=True,
        squeeze=False,
    )
    headings = [_heading(row) for row in rows]
    num_lines = max(text.count("\n") + 1 for _, text in headings)
    for axis, row, (title, text) in zip(axes[0], rows, headings, strict=True):
        _draw_bars(axis, row, names)
        above = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top"}
        axis.annotate(
            text, (0, 1), xytext=(0, 13 + 11 * num_lines), color=_GREY, fontsize=8, **above
        )
        axis.annotate(
            title, (0, 1), xytext=(0, 28 + 11 * num_lines), color=_INK, fontweight="bold", **above
        )
    first = axes[0][0]
    first.set_yticks(range(len(names)), names)
    first.invert_yaxis()
    first.get_yticklabels()[0].set(color=_COLOURS[names[0]], fontweight="bold")
    figure.tight_layout(w_pad=1.2)
    caption = textwrap.fill(results.measured_where(rows), 37 * len(rows))
    figure.text(0.01, 0, caption, color=_GREY, fontsize=8, va="top", linespacing=1.4)
    _save(figure, path)
    plt.close(figure)


def _heading(row: Json) -> tuple[str, str]:
    """A title, and the work with its unit in short lines."""
    title, _, work = row["what"].partition(": ")
    unit = "tokens/s" if row["unit"] == "tok/s" else "less is better"
    return title, textwrap.fill(f"{work}; {unit}", 28)


def _draw_bars(axis: Any, row: Json, names: Sequence[str]) -> None:
    peers = {peer["peer"]: peer for peer in row["peers"]}
    limit = row["limit"] or 0.0
    longest = max([limit, *(peer.get("max") or 0.0 for peer in peers.values())])
    for y, name in enumerate(names):
        peer = peers.get(name)
        if peer is None:
            continue
        if peer.get("median") is None:
            why = "refused" if peer.get("refused") else "did not run"
            axis.text(0, y, why, color=_GREY, va="center", fontstyle="italic")
            continue
        axis.barh(y, limit, height=0.62, color=_STRIP)
        axis.barh(y, peer["median"], height=0.62, color=_COLOURS[name] if y == 0 else _OTHERS)
        axis.plot([peer["min"], peer["max"]], [y, y], color=_INK, linewidth=0.8)
        axis.annotate(
            results.shown(peer["median"], row["unit"]),
            (max(peer["max"], limit), y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=_COLOURS[name] if y == 0 else _INK,
            fontweight="bold" if y == 0 else "normal",
        )
    if limit:
        axis.annotate(
            f"limit {results.shown(limit, row['unit'])}",
            (limit, -0.5),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=_GREY,
            fontsize=8,
        )
    axis.set_xlim(0, longest * 1.3)  # room for the figures
    axis.set_xticks([])
    axis.tick_params(axis="y", length=0, labelcolor=_INK)
    axis.spines[:].set_visible(False)


def draw_gemm(points: Sequence[Json], path: Path) -> None:
    """A panel a matrix: GFLOP/s over the rows of x, with the roofline."""
    plt = pyplot()
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
    plt = pyplot()
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
