"""Runs rows: the same work on every peer, in turns, checked to be the same, beside the limits.

A benchmark is a list of rows for the command line of command.py. One row of one run:

1. Each peer gets the checkpoint in its own format and is loaded in a process of its own. One that
   is not installed stays in the row, with the reason.
2. A short warm-up, then rounds. Each measures the machine's limits, on a CPU by reading the
   checkpoint itself, and then every peer once, in another order each time.
3. In every round it is checked that there are as many tokens as were asked for, and in the first
   one that they are this engine's up to a near tie. A peer that did other work is refused: no ratio
   is computed, and the command ends with exit code 1.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

import results
from peer_process import (
    PEERS,
    ROOT,
    DifferentWorkError,
    PeerError,
    PeerProcess,
    PeerSpec,
    check_agreement,
    check_counts,
    check_decode,
    read_answer,
    start,
)
from peers.peer import Outcome, TokenIds, Work
from results import Json
from tinyvllm import dummy
from tinyvllm.limits import MachineLimits, measure_limits
from tinyvllm.model_cost import ModelCost

MODELS = ROOT.parent / "build" / "models"

# The products that measure_limits() times take all the power that a card may take, and its clock
# stays down for some tenths of a second: at 1,440 in place of 1,980 MHz on an H200, where a prefill
# that takes 4.5 ms takes 6 then. No user's request comes right behind them.
SETTLING_SECONDS = 0.5

_TEXT = "The quick brown fox said that it had seen all of the old town at least once before."

Length = int | tuple[int, int]  # as it is, or drawn from first to last for each sequence


def _most(length: Length) -> int:
    return length if isinstance(length, int) else length[1]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    measures  decode: output tokens after the first, a second; all prompts are in one step, so that
              from there on every sequence decodes
              prefill: prompt tokens a second until every sequence has its first token
              throughput: output tokens a second, of all sequences, from start to end
              first_token: seconds until every sequence has its first token
              load: seconds to load the engine, its libraries included
              start: seconds from the start of the process to the first token, of a prompt of ids
              start_text: the same of a text, with the tokenizer loaded
              memory: resident bytes of the process after a decode
    must      the ratio to the best peer that is asked for
    variants  this engine once more with other arguments of LLM: {"static": {"batching": "static"}}
              stands in the row as a peer called "tinyvllm static"
    """

    name: str
    what: str
    model: str
    measures: str
    num_prompts: int = 1
    prompt_len: Length = 16
    max_tokens: Length = 64
    must: float | None = None
    variants: Mapping[str, Json] = dataclasses.field(default_factory=dict)

    @property
    def unit(self) -> str:
        if self.measures == "memory":
            return "bytes"
        return "tok/s" if self.measures in ("decode", "prefill", "throughput") else "s"

    def scaled_by(self, divisor: int) -> Row:
        """The row with shorter and fewer sequences, and the name and words of what it is then."""
        if divisor == 1:
            return self

        def scale(length: Length) -> Length:
            if isinstance(length, int):
                return max(1, length // divisor)
            return (max(1, length[0] // divisor), max(1, length[1] // divisor))

        tokens = scale(self.max_tokens)
        if self.max_tokens != 1 and isinstance(tokens, int):
            tokens = max(2, tokens)  # a decode has a second token
        return dataclasses.replace(
            self,
            what=f"{self.what}, all divided by {divisor}",
            num_prompts=max(1, self.num_prompts // divisor),
            prompt_len=scale(self.prompt_len),
            max_tokens=tokens,
            must=None,
        )

    def longest(self) -> int:
        """Tokens of prompt and output that a sequence may have."""
        return _most(self.prompt_len) + _most(self.max_tokens)

    def step_tokens(self) -> int:
        """How many tokens an engine takes at a time: all prompts of a decode."""
        decode = self.num_prompts * _most(self.prompt_len) if self.measures == "decode" else 0
        return max(2048, self.num_prompts, decode)

    def work(self, vocab_size: int) -> Work:
        """Random prompts without special tokens, the same for every peer and in every run."""
        generator = random.Random(0)
        highest = min(vocab_size, 128_000) - 1

        def draw(length: Length) -> int:
            return length if isinstance(length, int) else generator.randint(*length)

        prompts = [
            [
                generator.randint(min(256, highest // 2), highest)
                for _ in range(draw(self.prompt_len))
            ]
            for _ in range(self.num_prompts)
        ]
        return Work(prompts, [draw(self.max_tokens) for _ in prompts])

    def value(self, work: Work, outcome: Outcome) -> float:
        return self._rate(
            work, outcome.first_token_seconds, outcome.seconds - outcome.first_token_seconds
        )

    def limit(self, work: Work, cost: ModelCost, limits: MachineLimits) -> float | None:
        if self.measures == "memory":
            return float(cost.step_bytes)
        if self.measures in ("load", "start", "start_text"):
            return None
        lengths = [len(prompt) for prompt in work.prompts]
        steps = [count - 1 for count in work.max_tokens]
        decode = cost.decode_seconds(limits, lengths, steps) if max(steps) else 0.0
        return self._rate(work, cost.prefill_seconds(limits, lengths), decode)

    def _rate(self, work: Work, prefill: float, decode: float) -> float:
        """The value, given the seconds to the first tokens and from there to the end."""
        if self.measures == "decode":
            return (sum(work.max_tokens) - len(work.prompts)) / decode
        if self.measures == "prefill":
            return sum(map(len, work.prompts)) / prefill
        if self.measures == "first_token":
            return prefill
        return sum(work.max_tokens) / (prefill + decode)


# --- Rows -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Column:
    """What is known of one peer in one row."""

    spec: PeerSpec
    version: str = ""
    missing: str = ""
    refused: str = ""
    values: list[float] = dataclasses.field(default_factory=list)
    agreement: Json | None = None
    output_tokens: int = 0


@functools.cache
def _read_from_disk(checkpoint: Path) -> None:
    """Puts the files of all peers into the page cache as if each had been written long ago.

    Linux keeps what it reads in large pages, where the file system can, and what a program has just
    written in small ones, with which products take up to 5% longer.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for path in checkpoint.parent.glob(f"{checkpoint.name}*"):
        for file in path.iterdir() if path.is_dir() else [path]:
            with file.open("rb", buffering=0) as pages:
                os.fsync(pages.fileno())
                os.posix_fadvise(pages.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while pages.read(1 << 24):
                    pass


@dataclasses.dataclass(frozen=True)
class Bench:
    """How rows are run. The first of the peers is the one that the others are checked against."""

    models: Path = MODELS
    peers: Sequence[PeerSpec] = tuple(PEERS.values())
    num_threads: int = 1
    rounds: int = 3
    device: str = "cpu"
    command: str = ""
    limits: Callable[[], MachineLimits] | None = None  # measure_limits, unless a test says other

    def checkpoint(self, model: str) -> Path:
        directory = self.models / model
        if not (directory / "model.safetensors").exists():
            print(f"writing seeded random weights: {model}", file=sys.stderr)
            dummy.write_checkpoint(directory, dummy.NAMED_CONFIGS[model], seed=0)
        return directory

    def run(self, row: Row) -> Json:
        checkpoint = self.checkpoint(row.model)
        ours, *others = self.peers
        variants = [
            dataclasses.replace(ours, name=f"{ours.name} {name}", options=options)
            for name, options in row.variants.items()
        ]
        columns = [self._prepared(spec, checkpoint, row) for spec in (ours, *variants, *others)]
        config = json.loads((checkpoint / "config.json").read_text())
        work = row.work(config["vocab_size"])
        _read_from_disk(checkpoint)
        timed_whole = row.measures in ("load", "start", "start_text")
        limits = (self._time_starts if timed_whole else self._time_work)(
            row, work, checkpoint, columns
        )
        return self._result(row, work, checkpoint, columns, limits)

    def _prepared(self, spec: PeerSpec, checkpoint: Path, row: Row) -> _Column:
        column = _Column(spec)
        arguments = [
            "--checkpoint",
            str(checkpoint.resolve()),
            *self._model_argument(spec, checkpoint),
        ]
        if row.measures == "start_text":
            arguments.append("--tokenizer")
        process = start(spec, ["prepare", *arguments])
        try:
            column.version = str(read_answer(spec, process.stdout))
        except PeerError as error:
            column.missing = str(error)
        process.communicate()
        return column

    def _model_argument(self, spec: PeerSpec, checkpoint: Path) -> list[str]:
        return ["--model", str(checkpoint.with_name(checkpoint.name + spec.suffix).resolve())]

    def _arguments(self, spec: PeerSpec, checkpoint: Path, row: Row) -> list[str]:
        return [
            *self._model_argument(spec, checkpoint),
            *("--num-threads", str(self.num_threads)),
            *("--max-num-seqs", str(row.num_prompts)),
            *("--max-model-len", str(-(-row.longest() // 256) * 256)),
            *("--max-step-tokens", str(row.step_tokens())),
            *("--device", self.device),
            *("--options", json.dumps(spec.options)),
        ]

    def _time_work(
        self, row: Row, work: Work, checkpoint: Path, columns: list[_Column]
    ) -> list[MachineLimits]:
        processes: dict[str, PeerProcess] = {}
        try:
            for column in columns:
                if column.missing:
                    continue
                try:
                    processes[column.spec.name] = PeerProcess(
                        column.spec, self._arguments(column.spec, checkpoint, row)
                    )
                except PeerError as error:
                    column.missing = str(error)
            self._warm_up(work, columns, processes)
            limits = []
            reference: Outcome | None = None
            for number in range(self.rounds):
                limits.append(self._limits(checkpoint))
                # In the first round the reference goes first.
                for column in _in_turns(columns, number):
                    if column.missing or column.refused:
                        continue
                    process = processes[column.spec.name]
                    try:
                        outcome = process.run(work)
                    except PeerError as error:
                        if column is columns[0]:
                            raise
                        column.missing = str(error)
                        continue
                    try:
                        check_counts(work, outcome)
                        if row.measures == "decode":
                            check_decode(outcome)
                        if reference is None:
                            reference = outcome
                        elif (
                            not outcome.own_prompts
                            and column.agreement is None
                            and column is not columns[0]
                        ):
                            reference_process = processes[columns[0].spec.name]
                            column.agreement = check_agreement(
                                work, reference, outcome, reference_process.near_misses
                            )
                    except DifferentWorkError as error:
                        if column is columns[0]:
                            raise
                        column.refused = str(error)
                        continue
                    column.output_tokens = sum(map(len, outcome.tokens))
                    if row.measures == "memory":
                        column.values.append(process.resident_bytes())
                    else:
                        column.values.append(row.value(work, outcome))
            return limits
        finally:
            for process in processes.values():
                process.close()

    def _warm_up(
        self, work: Work, columns: list[_Column], processes: dict[str, PeerProcess]
    ) -> None:
        """All prompts, and one step more: what is made at first use is made."""
        first = columns[0]
        for column in columns:
            if not column.missing:
                try:
                    processes[column.spec.name].run(
                        Work(work.prompts, [min(2, count) for count in work.max_tokens])
                    )
                except PeerError as error:
                    column.missing = str(error)
        if first.missing:
            raise PeerError(
                f"{first.spec.name}, which the others are checked against: {first.missing}"
            )

    def _time_starts(
        self, row: Row, work: Work, checkpoint: Path, columns: list[_Column]
    ) -> list[MachineLimits]:
        limits = []
        arrived: dict[str, TokenIds] = {}  # of each peer: the prompt's ids, and the first token
        given = (
            ["--text", _TEXT]
            if row.measures == "start_text"
            else ["--ids", ",".join(map(str, work.prompts[0]))]
        )
        for number in range(-1, self.rounds):  # the first only warms the page cache
            if number >= 0:
                limits.append(self._limits(checkpoint))
            for column in columns if number < 0 else _in_turns(columns, number):
                if column.missing:
                    continue
                arguments = [*self._arguments(column.spec, checkpoint, row), *given]
                began = time.perf_counter()
                process = start(column.spec, ["first-token", *arguments])
                try:
                    load_seconds, token_ids = read_answer(column.spec, process.stdout)
                    seconds = time.perf_counter() - began
                except PeerError as error:
                    if column is columns[0]:
                        raise
                    column.missing = str(error)
                    continue
                finally:
                    process.communicate()
                arrived[column.spec.name] = token_ids
                column.output_tokens = 1
                if number >= 0:
                    column.values.append(load_seconds if row.measures == "load" else seconds)
        self._check_starts(row, checkpoint, columns, arrived)
        return limits

    def _check_starts(
        self, row: Row, checkpoint: Path, columns: list[_Column], arrived: dict[str, TokenIds]
    ) -> None:
        """The same prompt and, up to a near tie, the same first token."""
        *prompt, token = arrived[columns[0].spec.name]
        work, ours = Work([prompt], [1]), Outcome([[token]], 0.0, 0.0)

        def near_misses(prompts: list[TokenIds], tokens: TokenIds) -> list[float]:
            reference = PeerProcess(
                columns[0].spec, self._arguments(columns[0].spec, checkpoint, row)
            )
            try:
                return reference.near_misses(prompts, tokens)
            finally:
                reference.close()

        for column in columns[1:]:
            if column.missing:
                continue
            *own_prompt, own_token = arrived[column.spec.name]
            if own_prompt != prompt:
                column.refused = (
                    f"its prompt has {len(own_prompt)} tokens, not the same {len(prompt)}"
                )
                continue
            theirs = Outcome([[own_token]], 0.0, 0.0)
            try:
                column.agreement = check_agreement(work, ours, theirs, near_misses)
            except DifferentWorkError as error:
                column.refused = str(error)

    def _limits(self, checkpoint: Path) -> MachineLimits:
        if self.limits:
            return self.limits()
        limits = measure_limits(self.device, self.num_threads, mapped_weights(checkpoint))
        if self.device == "cuda":
            time.sleep(SETTLING_SECONDS)
        return limits

    def _result(
        self,
        row: Row,
        work: Work,
        checkpoint: Path,
        columns: list[_Column],
        limits: list[MachineLimits],
    ) -> Json:
        cost = ModelCost(checkpoint)
        allowed = [row.limit(work, cost, each) for each in limits]
        first = columns[0]
        smaller_is_better = row.unit != "tok/s"
        peers: list[Json] = []
        for column in columns:
            peer: Json = {"peer": column.spec.name}
            if column.spec.options:
                peer["options"] = column.spec.options
            peers.append(peer)
            if column.missing:
                peer["missing"] = column.missing
                continue
            peer["version"] = column.version
            if column.refused:
                peer["refused"] = column.refused
                continue
            ratio = None
            if column is not first:
                pairs = zip(first.values, column.values, strict=True)
                ratio = statistics.median(
                    theirs / ours if smaller_is_better else ours / theirs for ours, theirs in pairs
                )
            share = None
            if row.unit == "tok/s":
                share = statistics.median(
                    value / limit
                    for value, limit in zip(column.values, allowed, strict=True)
                    if limit is not None
                )
            peer.update(
                values=column.values,
                median=statistics.median(column.values),
                min=min(column.values),
                max=max(column.values),
                ratio=ratio,
                share_of_limit=share,
                tokens={
                    "prompt": sum(map(len, work.prompts)),
                    "output": column.output_tokens,
                },
                agreement=column.agreement,
                refused=None,
            )
        known = [limit for limit in allowed if limit is not None]
        return {
            "row": row.name,
            "what": row.what,
            "model": row.model,
            "measures": row.measures,
            "unit": row.unit,
            **results.provenance(),
            "machine": results.machine(self.device, self.num_threads),
            "command": self.command,
            "must": row.must,
            "limits": {
                name: [getattr(each, name) for each in limits]
                for name in ("read_bandwidth_bytes_per_second", "bf16_flops_per_second")
            },
            "limit": statistics.median(known) if known else None,
            "peers": peers,
        }


def mapped_weights(checkpoint: Path) -> np.ndarray:
    return np.memmap(checkpoint / "model.safetensors", np.uint8, "r")


def _in_turns(columns: list[_Column], number: int) -> list[_Column]:
    """Each is first as often as the others, and not always behind the same one, which may leave a
    hot machine and full caches: forwards and backwards, from another one on every two rounds."""
    shift = number // 2 % len(columns)
    order = columns[shift:] + columns[:shift]
    return order[::-1] if number % 2 else order
