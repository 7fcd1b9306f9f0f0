"""The command line of every benchmark that is a list of rows (runner.py): main() runs those that it
names and writes the files."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import results
from peer_process import PEERS, ROOT, DifferentWorkError, PeerError
from results import Json
from runner import MODELS, Bench, Row
from tinyvllm._core import default_num_threads, supported_isas
from tinyvllm.errors import TinyvllmError

TRIALS = ROOT.parent / "build" / "benchmarks"  # what --scaled-by writes: no results

# What oneDNN calls our instruction sets, each with all that the one before it has.
_ONEDNN_ISAS = {
    "portable": "SSE41",
    "avx2": "AVX2",
    "avx512": "AVX512_CORE",
    "avx512bf16": "AVX512_CORE_BF16",
    "amx": "AVX512_CORE_AMX",
}


def parse(
    description: str, rows: Sequence[Row], peers: Sequence[str], device: str = "cpu"
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("rows", nargs="*", help="names of rows; none: all of them")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"])
    parser.add_argument(
        "--scaled-by",
        type=int,
        default=1,
        metavar="N",
        help="divide lengths and sequences by N, to try a script where its rows take too long; its "
        "files then go to build/benchmarks",
    )
    parser.add_argument("--model", help="a directory of --models instead of each row's own")
    parser.add_argument("--models", type=Path, default=MODELS, help="where weights are written")
    parser.add_argument("--num-threads", type=int, default=default_num_threads())
    parser.add_argument(
        "--isa",
        choices=supported_isas(),
        help="this engine and oneDNN, on which OpenVINO and PyTorch build, use no better set of "
        "instructions than this one; needs --output",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=list(peers), choices=list(PEERS))
    parser.add_argument("--peers-python", help="the Python that has the other engines")
    parser.add_argument("--output", type=Path, help="the JSON; its Markdown is put beside it")
    arguments = parser.parse_args()
    unknown = set(arguments.rows) - {row.name for row in rows}
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}. --list prints them.")
    if arguments.isa and not arguments.output:
        parser.error("--isa makes rows of another kind; name a file for them with --output.")
    return arguments


def main(
    description: str,
    rows: Sequence[Row],
    peers: Sequence[str],
    output: Path,
    device: str = "cpu",
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Runs the rows that the command line names, prints each when done, and writes the files.

    finish: is called with the path of the JSON when all is written.
    """
    arguments = parse(description, rows, peers, device)
    if arguments.list:
        for row in rows:
            print(f"{row.name:16s} {row.what}")
        sys.exit(0)
    if arguments.isa:  # of this process, which measures the limits, and of all peers
        os.environ["TINYVLLM_CPU_ISA"] = _best_isa(arguments.isa)
        os.environ["ONEDNN_MAX_CPU_ISA"] = _ONEDNN_ISAS[arguments.isa]
    path = arguments.output or (output if arguments.scaled_by == 1 else TRIALS / output.name)
    specs = [
        dataclasses.replace(PEERS[name], python=arguments.peers_python)
        if arguments.peers_python and name != "tinyvllm"
        else PEERS[name]
        for name in ["tinyvllm", *(peer for peer in arguments.peers if peer != "tinyvllm")]
    ]
    bench = Bench(
        models=arguments.models,
        peers=specs,
        num_threads=arguments.num_threads,
        rounds=arguments.rounds,
        device=arguments.device,
        command=_command(arguments),
    )
    measured = failed = refused = False
    for row in rows:
        if arguments.rows and row.name not in arguments.rows:
            continue
        if arguments.model:
            what = f"{row.what}, with {arguments.model}"
            row = dataclasses.replace(row, model=arguments.model, what=what, must=None)
        try:
            result = bench.run(row.scaled_by(arguments.scaled_by))
        except (PeerError, DifferentWorkError, TinyvllmError) as error:
            print(f"error: {row.name}: {error}", file=sys.stderr)
            failed = True
            continue
        print_row(result)
        results.put_row(path, result, [row.name for row in rows])
        measured = True
        refused = refused or any(peer.get("refused") for peer in result["peers"])
    if measured:
        path.with_suffix(".md").write_text(results.to_markdown(results.read_rows(path)))
        if finish is not None:
            finish(path)
    if refused:
        print("error: a peer did other work and was not compared; see above", file=sys.stderr)
    if failed or refused:
        sys.exit(1)


def _best_isa(most: str) -> str:
    """What this engine would take of a CPU that has no better instructions than `most`."""
    known = list(_ONEDNN_ISAS)
    return next(isa for isa in supported_isas() if known.index(isa) <= known.index(most))


def _command(arguments: argparse.Namespace) -> str:
    command = [f"benchmarks/{Path(sys.argv[0]).name}", "--rounds", str(arguments.rounds)]
    return shlex.join(command + (["--isa", arguments.isa] if arguments.isa else []))


def print_row(row: Json) -> None:
    limit = results.shown(row["limit"], row["unit"])
    print(f"{row['row']}: {row['what']}" + (f"; limit {limit}" if limit else ""))
    for peer in row["peers"]:
        if "missing" in peer:
            print(f"  {peer['peer']:13s} did not run: {peer['missing']}")
            continue
        if peer["refused"]:
            print(f"  {peer['peer']:13s} REFUSED: {peer['refused']}")
            continue
        low, high = (results.shown(peer[key], row["unit"]) for key in ("min", "max"))
        line = f"  {peer['peer']:13s} {results.shown(peer['median'], row['unit']):>8s}"
        line += f"  [{low}, {high}]  {peer['tokens']['output']} tokens"
        if peer["share_of_limit"] is not None:
            line += f"  {peer['share_of_limit']:.0%} of the limit"
        if peer["ratio"] is not None:
            line += f"  ratio {peer['ratio']:.2f}"
        if peer["agreement"]:
            agreement = peer["agreement"]
            line += f"  same tokens {agreement['identical']}/{agreement['sequences']}"
            if agreement.get("largest_gap"):
                line += (
                    f" (common prefix >= {agreement['shortest_common_prefix']},"
                    f" gap <= {agreement['largest_gap']:.2f} nats)"
                )
        print(line)
    sys.stdout.flush()
