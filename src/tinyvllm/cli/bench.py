"""`tinyvllm bench latency` and `tinyvllm bench throughput`."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tinyvllm.cli.model_options import (
    engine_options,
    max_num_batched_tokens_option,
    model_options,
    named_shape,
    open_llm,
    quiet_option,
    together,
)
from tinyvllm.cli.options import Command, Count, LengthRange, Lengths, option
from tinyvllm.cli.terminal import Output, Stopped
from tinyvllm.errors import CapacityError, InvalidRequestError, TinyvllmError

if TYPE_CHECKING:
    from tinyvllm.cli.bench_report import Report
    from tinyvllm.cli.bench_work import Work
    from tinyvllm.limits import MachineLimits
    from tinyvllm.llm import LLM
    from tinyvllm.model_cost import ModelCost

_Function = TypeVar("_Function", bound=Callable[..., Any])

_EPILOG = """\b
Examples:
  tinyvllm bench latency --model llama-3.2-1b
  tinyvllm bench throughput --model DIR --num-prompts 32
"""

_LATENCY_EPILOG = """\b
Examples:
  tinyvllm bench latency --model llama-3.2-1b
  tinyvllm bench latency --model smollm2-135m --input-len 1-4096*2 --output-len 32
  tinyvllm bench latency --model DIR --input-len 512,128 --batch-size 1-16*2 --output csv
  tinyvllm bench latency --model DIR --output json > latency.json
"""

_THROUGHPUT_EPILOG = """\b
Examples:
  tinyvllm bench throughput --model qwen3-0.6b --num-prompts 32
  tinyvllm bench throughput --model DIR --input-len 100:1024 --output-len 128
  tinyvllm bench throughput --model DIR --shared-prefix 1000 --input-len 20 --output-len 8
  tinyvllm bench throughput --model DIR --prompts prompts.jsonl --output json
"""

_PREFILL_WEIGHT = 1 / 16  # of a prompt's token against one of the output, for the progress bar
_SECONDS_A_REFRESH = 0.1


def _common_options(
    temperature: float, engine: Callable[[_Function], _Function]
) -> Callable[[_Function], _Function]:
    """What both benchmarks take after their own options. temperature: its default."""
    return together(
        option(
            "--temperature",
            "-t",
            section="Work",
            type=click.FloatRange(0),
            default=temperature,
            show_default=True,
            help="0 is greedy. Outputs always have their full length.",
        ),
        option(
            "--seed",
            section="Work",
            type=click.IntRange(0, 2**32 - 1),
            default=0,
            show_default=True,
            help="Of prompts, lengths, sampling and random weights.",
        ),
        model_options(
            "DIR|ORG/NAME|SHAPE",
            "Checkpoint directory or hub model; or llama-3.2-1b, llama-3.1-8b, qwen3-0.6b or "
            "smollm2-135m: that shape with random weights, which needs no file.",
        ),
        option(
            "--load-format",
            section="Model",
            type=click.Choice(["auto", "dummy"]),
            default="auto",
            show_default=True,
            help="dummy: random weights in the shape of the model's config.json, which is then all "
            "that DIR needs.",
        ),
        option(
            "-o",
            "--output",
            "form",
            section="Output",
            type=click.Choice(["md", "csv", "json", "jsonl"]),
            default="md",
            show_default=True,
            help="The two JSON forms have the time of every token.",
        ),
        option(
            "--limits/--no-limits",
            section="Output",
            default=True,
            help="Measure what the machine reads and multiplies a second, and show how much of it "
            "was reached.  [default: limits]",
        ),
        quiet_option(),
        engine,
    )


@click.group(epilog=_EPILOG)
def command() -> None:
    """Measure latency and throughput.

    Times cover scheduling, the forward pass, sampling and the making of text; not loading and not
    tokenization. End tokens are ignored, so that every output has its length. Ctrl-C prints what
    was measured so far and ends with exit code 130.
    """


@command.command(
    cls=Command,
    epilog=_LATENCY_EPILOG,
    short_help="How long one answer, or a batch of them, takes.",
)
@option(
    "-p",
    "--input-len",
    "input_lens",
    section="Work",
    type=Lengths(),
    metavar="LIST",
    default="512",
    show_default=True,
    help="Tokens of a prompt: 512,128 or a range: 128-512+128, 1-4096*2.",
)
@option(
    "-n",
    "--output-len",
    "output_lens",
    section="Work",
    type=Lengths(),
    metavar="LIST",
    default="128",
    show_default=True,
    help="Tokens of an output.",
)
@option(
    "-b",
    "--batch-size",
    "batch_sizes",
    section="Work",
    type=Lengths(),
    metavar="LIST",
    default="1",
    show_default=True,
    help="Requests that are handed over together.",
)
@option(
    "--warmup",
    section="Work",
    type=click.IntRange(0),
    metavar="N",
    default=1,
    show_default=True,
    help="Runs of each point that do not count.",
)
@option(
    "-r",
    "--repeats",
    section="Work",
    type=click.IntRange(1),
    metavar="N",
    default=5,
    show_default=True,
    help="Runs of each point that count, each with other prompts.",
)
@_common_options(0.0, together(engine_options(), max_num_batched_tokens_option()))
def latency(**options: Any) -> None:
    """How long one answer, or a batch of them, takes.

    Every combination of the lengths and batch sizes is measured: the time to the first token
    (TTFT), from token to token (TPOT a request, ITL a token) and to the end (E2EL), with mean,
    median, standard deviation and percentiles over all repeats.
    """
    points = list(
        itertools.product(options["input_lens"], options["output_lens"], options["batch_sizes"])
    )
    output = Output()
    with _opened(
        options,
        longest=max(num_input + num_output for num_input, num_output, _ in points),
        max_num_seqs=max(options["batch_sizes"]),
        prefix_caching=False,
    ) as (llm, cost, model):
        limits = _limits(llm, options)
        report = _report(output, "latency", llm, cost, model, limits, options)
        num_runs = options["warmup"] + options["repeats"]
        total = num_runs * sum(
            batch * (num_input * _PREFILL_WEIGHT + num_output)
            for num_input, num_output, batch in points
        )
        try:
            with _Progress(total, options["quiet"]) as progress:
                for point in points:
                    _measure(llm, point, cost, limits, report, progress, options)
        except Stopped as stopped:
            if stopped.exit_code != 141:  # a reader is there: give it what there is
                report.end()
            raise
        report.end()


def _measure(
    llm: LLM,
    point: tuple[int, int, int],
    cost: ModelCost,
    limits: MachineLimits | None,
    report: Report,
    progress: _Progress,
    options: dict[str, Any],
) -> None:
    """Adds the row of one point of `bench latency`: of the runs that came to their end."""
    from tinyvllm.cli.bench_report import latency_row
    from tinyvllm.cli.bench_run import Run, run_work
    from tinyvllm.cli.bench_work import random_work

    num_input, num_output, batch = point
    warmup, repeats = options["warmup"], options["repeats"]
    runs: list[Run] = []

    def on_token(first: bool) -> None:
        progress.add(1 + num_input * _PREFILL_WEIGHT if first else 1)

    try:
        for number in range(warmup + repeats):
            progress.say(f"{num_input} + {num_output} tokens, batch {batch}")
            work = random_work(
                batch,
                (num_input, num_input),
                (num_output, num_output),
                options["seed"] + number,
                llm.stats()["vocab_size"],
            )
            run = Run(work)
            run_work(llm, work, run, options["temperature"], stream=True, on_token=on_token)
            for request in run.requests:
                if request.error is not None:
                    raise request.error
            if number >= warmup:
                runs.append(run)
    finally:
        if runs:
            asked = {"input_len": num_input, "output_len": num_output, "batch_size": batch}
            report.add(latency_row({**asked, "warmup": warmup}, runs, cost, limits))


@command.command(
    cls=Command,
    epilog=_THROUGHPUT_EPILOG,
    short_help="How much is done when there is much to do.",
)
@option(
    "--num-prompts",
    section="Work",
    type=click.IntRange(1),
    metavar="N",
    help="[default: 256; all of a --prompts file]",
)
@option(
    "-p",
    "--input-len",
    "input_range",
    section="Work",
    type=LengthRange(),
    metavar="N|MIN:MAX",
    default="100:1024",
    show_default=True,
    help="Tokens of a prompt, drawn for each.",
)
@option(
    "-n",
    "--output-len",
    "output_range",
    section="Work",
    type=LengthRange(),
    metavar="N|MIN:MAX",
    default="100:1024",
    show_default=True,
    help="Tokens of an output, drawn for each.",
)
@option(
    "--prompts",
    "prompt_file",
    section="Work",
    metavar="FILE",
    help='Prompts of a JSONL file: {"prompt": TEXT}, {"messages": [...]} or {"prompt_token_ids": '
    '[...]}, and "max_tokens" for the length of the output.',
)
@option(
    "--shared-prefix",
    section="Work",
    type=Count(),
    metavar="N",
    default=0,
    help="N tokens more before every prompt, the same ones for all.",
)
@_common_options(0.6, engine_options(batch=True))
@option(
    "--prefix-caching/--no-prefix-caching",
    "prefix_caching",
    section="Engine",
    default=None,
    help="[default: on with --shared-prefix, else off]",
)
def throughput(**options: Any) -> int:
    """How much is done when there is much to do: all requests are handed over at once.

    Without options these are nano-vllm's 256 requests (142,827 prompt and 133,966 output tokens):
    on a laptop give fewer, such as --num-prompts 16.
    """
    from tinyvllm.cli.bench_report import throughput_row
    from tinyvllm.cli.bench_run import Run, run_work
    from tinyvllm.cli.bench_work import Work
    from tinyvllm.cli.report import note

    output = Output()
    with _opened(
        options,
        longest=None if options["prompt_file"] else _longest_drawn(options),
        max_num_seqs=options["max_num_seqs"],
        prefix_caching=bool(options["shared_prefix"])
        if options["prefix_caching"] is None
        else options["prefix_caching"],
    ) as (llm, cost, model):
        work = _throughput_work(llm, options)
        limits = _limits(llm, options)
        report = _report(output, "throughput", llm, cost, model, limits, options)
        warmup = Work([work.prompts[0][:3]], [min(16, work.output_lens[0])])
        run_work(llm, warmup, Run(warmup), options["temperature"], stream=False)
        run = Run(work)
        point = {
            "num_prompts": len(work.prompts),
            "shared_prefix": options["shared_prefix"],
        }
        try:
            with _Progress(sum(work.output_lens), options["quiet"]) as progress:
                progress.say(f"{len(work.prompts)} requests")
                run_work(
                    llm,
                    work,
                    run,
                    options["temperature"],
                    stream=False,
                    on_token=lambda _: progress.add(1),
                )
        except Stopped as stopped:
            if stopped.exit_code != 141:
                report.add(throughput_row(point, run, cost, limits))
                report.end()
            raise
        report.add(throughput_row(point, run, cost, limits))
        report.end()
        errors = [request.error for request in run.requests if request.error is not None]
        if errors:
            note(f"{len(errors)} requests failed; the first: {errors[0]}")
    return 1 if errors else 0


def _longest_drawn(options: dict[str, Any]) -> int:
    ends = options["shared_prefix"], options["input_range"][1], options["output_range"][1]
    return sum(ends)


def _throughput_work(llm: LLM, options: dict[str, Any]) -> Work:
    from tinyvllm.cli.bench_work import random_work, work_of_file

    if options["prompt_file"] is None:
        return random_work(
            options["num_prompts"] or 256,
            options["input_range"],
            options["output_range"],
            options["seed"],
            llm.stats()["vocab_size"],
            options["shared_prefix"],
        )
    if options["shared_prefix"]:
        raise click.UsageError("--shared-prefix goes with drawn prompts, not with --prompts.")
    work = work_of_file(
        Path(options["prompt_file"]).expanduser(),
        llm.get_tokenizer(),
        options["num_prompts"],
        options["output_range"],
        options["seed"],
    )
    _require_room(work.longest, llm.stats()["max_model_len"])
    return work


# --- What both share ------------------------------------------------------------------------------


@contextmanager
def _opened(
    options: dict[str, Any], longest: int | None, max_num_seqs: int, prefix_caching: bool
) -> Iterator[tuple[LLM, ModelCost, dict[str, Any]]]:
    """The engine, what its work costs, and what the model is.

    longest: tokens of the longest request, if that is known before the model is.
    """
    from tinyvllm import _core
    from tinyvllm.llm import BUNDLED_MODEL
    from tinyvllm.model_cost import ModelCost
    from tinyvllm.model_lookup import find_model

    quiet = options["quiet"]
    with ExitStack() as stack:
        load_format = options["load_format"]
        shape = named_shape(options["model"])
        if shape is not None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tinyvllm-")))
            (directory / "config.json").write_text(json.dumps(shape), encoding="utf-8")
            load_format = "dummy"
        else:
            directory = find_model(
                options["model"] or str(BUNDLED_MODEL),
                revision=options["revision"],
                offline=options["offline"],
                quiet=quiet,
            )
        if load_format == "dummy":
            _announce_dummy(directory, quiet)
        max_model_len = options["max_model_len"]
        if longest is not None:
            config = _core.parse_model_config(directory / "config.json")
            own = config["max_position_embeddings"]
            _require_room(longest, own if max_model_len is None else min(own, max_model_len))
        arguments = {
            **options,
            "model": str(directory),
            "revision": None,
            # A pool for what is asked, not for the longest context that the model knows.
            "max_model_len": longest if max_model_len is None else max_model_len,
        }
        llm = stack.enter_context(
            open_llm(
                arguments,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=options["max_num_batched_tokens"],
                enable_prefix_caching=prefix_caching,
                load_format=load_format,
                seed=options["seed"],
            )
        )
        model = {
            "model": options["model"] or "bundled",
            "load_format": load_format,
            "prefix_caching": prefix_caching,
            "max_num_seqs": max_num_seqs,
        }
        info = llm.stats()
        yield llm, ModelCost(llm.directory, info["dtype"], info["checkpoint_dtype"]), model


def _announce_dummy(directory: Path, quiet: bool) -> None:
    """Says how much is written, and where; or that it does not fit there."""
    import shutil

    from tinyvllm.cli.report import note
    from tinyvllm.dummy import checkpoint_bytes
    from tinyvllm.model_files import read_json

    size = checkpoint_bytes(read_json(directory / "config.json"))
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if size > free:
        raise CapacityError(
            f"{place}: the random weights need {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. "
            "Set TMPDIR to a directory with more room."
        )
    if not quiet:
        note(f"writing {size / 1e9:.2f} GB of random weights to {place}, until the end of this run")


def _require_room(longest: int, limit: int) -> None:
    if longest > limit:
        raise InvalidRequestError(
            f"the longest request has {longest} tokens of prompt and output, and there is room for "
            f"{limit} (the model's own limit, or --max-model-len). Ask for shorter ones."
        )


def _limits(llm: LLM, options: dict[str, Any]) -> MachineLimits | None:
    if not options["limits"]:
        return None
    from tinyvllm.cli.report import note
    from tinyvllm.limits import measure_limits

    info = llm.stats()
    try:
        return measure_limits(info["device"], info["num_threads"])
    except TinyvllmError as error:  # too little memory, a device that it cannot measure
        note(f"without the machine's limits: {error}")
        return None


def _report(
    output: Output,
    benchmark: str,
    llm: LLM,
    cost: ModelCost,
    model: dict[str, Any],
    limits: MachineLimits | None,
    options: dict[str, Any],
) -> Report:
    import platform
    from importlib.metadata import version

    from tinyvllm.cli.bench_report import SCHEMA, Report
    from tinyvllm.cli.env import cpu_model

    info = llm.stats()
    names = ("dtype", "checkpoint_dtype", "device", "isa", "num_threads", "max_model_len")
    facts = {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "tinyvllm": version("tinyvllm"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **model,
        "num_parameters": cost.num_parameters,
        "step_bytes": cost.step_bytes,
        **{name: info[name] for name in names},
        "cpu": cpu_model(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "seed": options["seed"],
        "temperature": options["temperature"],
        "timed": "scheduling, forward pass, sampling, detokenization",
        "read_bandwidth_bytes_per_second": limits and limits.read_bandwidth_bytes_per_second,
        "bf16_flops_per_second": limits and limits.bf16_flops_per_second,
    }
    return Report(output, options["form"], facts)


class _Progress:
    """A bar with the time that is left, if stderr is a terminal."""

    def __init__(self, total: float, hide: bool) -> None:
        self._bar: Any = None
        self._done = 0.0  # not yet shown
        self._shown = time.perf_counter()
        if not hide and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
                dynamic_ncols=True,
                leave=False,
            )

    def say(self, what: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(what, refresh=False)

    def add(self, done: float) -> None:
        if self._bar is None:
            return
        self._done += done
        now = time.perf_counter()
        if now - self._shown >= _SECONDS_A_REFRESH:
            self._bar.update(self._done)
            self._done, self._shown = 0.0, now

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
