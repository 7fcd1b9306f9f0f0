"""`tinyvllm run-batch`: a file of requests in, a file of answers out, line for line.

Lines are read as the engine has room for them, so that a file of any length needs the memory of
one window: the lines whose answers are not yet in the output. An answer is written as soon as all
before it are.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinyvllm.cli.line_io import LineReader, LineWriter
from tinyvllm.cli.model_options import (
    DEFAULT_MAX_TOKENS,
    engine_options,
    generation_config_option,
    model_options,
    open_llm,
    quiet_option,
)
from tinyvllm.cli.options import Command, Count, option
from tinyvllm.cli.terminal import Stopped
from tinyvllm.errors import InvalidRequestError

if TYPE_CHECKING:
    from tinyvllm.cli.batch_run import Tally

_EPILOG = """\b
Examples:
  tinyvllm run-batch --model DIR -i requests.jsonl -o answers.jsonl
  tinyvllm run-batch --model DIR -i requests.jsonl -o answers.jsonl --resume
  echo '{"prompt": "Once upon a time"}' | tinyvllm run-batch -i - -o -

\b
A line, and the keys of its answer:
  {"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": [...]}}
    id, custom_id, response: {status_code, request_id, body}, error
  {"prompt": "Once", "max_tokens": 9, "logprobs": 1}
    line, custom_id, text, finish_reason, stop_reason, prompt_tokens,
    completion_tokens, error, and logprobs where they were asked for
  error is null, or {line, code, param, message}
"""


@click.command(cls=Command, epilog=_EPILOG)
@option(
    "-i",
    "--input",
    "input_file",
    section="Files",
    required=True,
    metavar="FILE",
    help="Requests; '-' is stdin.",
)
@option(
    "-o",
    "--output",
    "output_file",
    section="Files",
    required=True,
    metavar="FILE",
    help="Answers; '-' is stdout. A file that exists is replaced.",
)
@option(
    "--resume",
    section="Files",
    is_flag=True,
    help="Keep the answers that the output has, and go on after them.",
)
@quiet_option("Files")
@model_options()
@option(
    "-n",
    "--max-tokens",
    section="Sampling, where a line does not say",
    type=Count(),
    metavar="N",
    help=f"At most N tokens of output.  [default: 16 for OpenAI's completions, the rest of the "
    f"context for OpenAI's chats; for plain lines the model's, else {DEFAULT_MAX_TOKENS}]",
)
@option(
    "-t",
    "--temperature",
    section="Sampling, where a line does not say",
    type=float,
    help="0 is greedy.  [default: the model's]",
)
@option(
    "--seed",
    section="Sampling, where a line does not say",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    show_default=True,
    help="A line's own seed comes from this and its line number.",
)
@generation_config_option("Sampling, where a line does not say")
@option(
    "--window",
    section="Engine",
    type=click.IntRange(1),
    metavar="N",
    help="Lines that are read and whose answers are not yet written: what a kill loses, and what "
    "memory holds.  [default: twice --max-num-seqs]",
)
@engine_options(batch=True)
def command(**options: Any) -> int:
    """Answer a file of requests, one a line.

    A line is a request of OpenAI's batch API (/v1/completions or /v1/chat/completions), or a plain
    {"prompt": TEXT or token ids} or {"messages": [...]} with sampling fields beside it. A prompt is
    continued as it is; messages go through the model's chat template. Answers come in the order of
    the lines, in the form of each line; empty lines are passed over. A line that cannot be served
    is answered with an error that names it, the run goes on, and ends with exit code 1.

    What a run has written when it is stopped or killed are whole lines, and --resume goes on after
    them. On the CPU the same file, model and options give the same answers, whether a run was
    stopped and resumed or not, and also where lines have no seed.
    """
    names_file = options["output_file"] != "-"
    if options["resume"] and not names_file:
        raise click.UsageError("--resume needs an output that is a file.")

    # Before the model is loaded: what is wrong here is wrong at once.
    source = _open_input(options["input_file"])
    target = _open_output(options["output_file"])
    _require_two_files(source, target, options)

    from tinyvllm.cli.batch_lines import MAX_LINE_BYTES, Settings
    from tinyvllm.cli.batch_run import Batch, Progress, Tally

    reader = LineReader(source, MAX_LINE_BYTES)
    writer = LineWriter(target, _name(options["output_file"], "standard output"))
    tally = Tally()
    if options["resume"]:
        _skip_answered(reader, target, options, tally)

    from tinyvllm.cli.report import note

    quiet = options["quiet"]
    with open_llm(
        options,
        max_num_seqs=options["max_num_seqs"],
        max_num_batched_tokens=options["max_num_batched_tokens"],
        generation_config=options["generation_config"],
        seed=options["seed"],
    ) as llm:
        flags = {name: options[name] for name in ("max_tokens", "temperature")}
        settings = Settings(
            model=options["model"] or "bundled",
            seed=options["seed"],
            defaults=llm.sampling_defaults(),
            flags={name: value for name, value in flags.items() if value is not None},
            max_tokens=DEFAULT_MAX_TOKENS,
        )
        if writer.is_file and names_file and not options["resume"]:
            os.ftruncate(target, 0)
        progress = Progress(llm, tally, reader.position, _size(source), hide=quiet)
        window = options["window"] or 2 * options["max_num_seqs"]
        num_before = tally.answered
        try:
            Batch(llm, settings, reader, writer, window, tally, progress).run()
        except Stopped:
            progress.close()
            if writer.is_file and names_file and not quiet:
                num_answers = num_before + writer.num_lines
                note(f"stopped after {num_answers} answers; --resume goes on after them")
            raise
        finally:
            progress.close()
        if not quiet:
            for line in progress.summary():
                note(line)
    return 1 if tally.failed else 0


def _open_input(path: str) -> int:
    if path == "-":
        if sys.stdin is None:
            raise InvalidRequestError("standard input is closed. Give --input FILE.")
        return 0
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise InvalidRequestError(f"{path}: cannot be read: {error.strerror}.") from None
    return descriptor


def _open_output(path: str) -> int:
    """A file keeps what it holds until there is something to write."""
    if path == "-":
        if sys.stdout is None:
            raise OSError("standard output is closed")
        return 1
    place = Path(path)
    try:
        is_other = place.exists() and not place.is_file()  # a pipe or a device
        flags = os.O_WRONLY if is_other else os.O_RDWR | os.O_CREAT
        return os.open(path, flags | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise InvalidRequestError(f"{path}: cannot be written: {error.strerror}.") from None


def _require_two_files(source: int, target: int, options: dict[str, Any]) -> None:
    found, written = os.fstat(source), os.fstat(target)
    if stat.S_ISREG(found.st_mode) and os.path.samestat(found, written):
        raise InvalidRequestError(
            f"{_name(options['input_file'], 'standard input')} is both input and output. "
            "Write to another file."
        )
    if options["resume"] and not stat.S_ISREG(written.st_mode):
        raise InvalidRequestError("--resume needs an output that is a file.")


def _skip_answered(reader: LineReader, target: int, options: dict[str, Any], tally: Tally) -> None:
    """Reads past the lines that the output answers, and cuts a torn last answer off.

    Changes nothing where an answer is not that of its line.
    """
    from tinyvllm.cli.batch_run import next_line

    path = options["output_file"]
    end = 0
    with open(os.dup(target), "rb") as file:  # noqa: PTH123
        for number, data in enumerate(file, start=1):
            if not data.endswith(b"\n"):
                break
            try:
                answer = json.loads(data)
                if not isinstance(answer, dict):
                    raise ValueError
            except (ValueError, RecursionError):
                raise InvalidRequestError(
                    f"{path}, line {number}: no answer of run-batch. Name the output of the run "
                    "that is to go on, or leave out --resume."
                ) from None
            line = next_line(reader, wait=True)
            if line is None or not line.is_answered_by(answer):
                asked = "no such line" if line is None else f"custom_id {line.custom_id!r:.60}"
                where = "" if line is None else f", line {line.number}"
                raise InvalidRequestError(
                    f"{path}, line {number}, answers custom_id {answer.get('custom_id')!r:.60}; "
                    f"the input{where} has {asked}. --resume needs the input of the first run."
                )
            tally.see(line)
            tally.add(answer)
            end += len(data)
    os.ftruncate(target, end)
    os.lseek(target, end, os.SEEK_SET)


def _size(descriptor: int) -> int | None:
    found = os.fstat(descriptor)
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _name(path: str, standard: str) -> str:
    return standard if path == "-" else path
