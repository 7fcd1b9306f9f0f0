"""`tinyvllm generate`: prompts in; text, or JSON, on standard output. Never interactive."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from tinyvllm.cli.model_options import (
    DEFAULT_MAX_TOKENS,
    INTERACTIVE_STEP_TOKENS,
    engine_options,
    model_options,
    open_llm,
    quiet_option,
    sampling_options,
    sampling_params,
)
from tinyvllm.cli.options import Command, TokenIds, option
from tinyvllm.cli.startup import importing
from tinyvllm.cli.terminal import Output, Stopped, read_file, read_stdin
from tinyvllm.errors import InvalidRequestError, TinyvllmError

if TYPE_CHECKING:
    from tinyvllm.cli.report import Prompt
    from tinyvllm.llm import LLM

_EPILOG = """\b
Examples:
  tinyvllm generate --raw --prompt "Once upon a time"
  tinyvllm generate --prompt "Tell me a story about a brave fox"
  tinyvllm generate --model DIR --prompt "Hello" --temperature 0 --max-tokens 50
  git diff | tinyvllm generate --model DIR --system "Summarise this change." --prompt-file -
  tinyvllm generate --model DIR --prompt-file a.txt --prompt-file b.txt --jsonl | jq .text
"""


@click.command(cls=Command, epilog=_EPILOG)
@model_options()
@option(
    "-p",
    "--prompt",
    "prompts",
    section="Prompt",
    multiple=True,
    metavar="TEXT",
    help="A prompt; '-' reads stdin. May be repeated.",
)
@option(
    "-f",
    "--prompt-file",
    "prompt_files",
    section="Prompt",
    multiple=True,
    metavar="FILE",
    help="A file with a prompt; '-' is stdin. May be repeated.",
)
@option(
    "--prompt-ids",
    "prompt_ids",
    section="Prompt",
    multiple=True,
    type=TokenIds(),
    metavar="1,2,3",
    help="A prompt as token ids. May be repeated.",
)
@option(
    "-s",
    "--system",
    section="Prompt",
    metavar="TEXT",
    help="System prompt, for the chat template.",
)
@option(
    "--chat/--raw",
    "chat",
    section="Prompt",
    default=None,
    help="Use the model's chat template, or not.  [default: chat if the model has one]",
)
@sampling_options(default_max_tokens=str(DEFAULT_MAX_TOKENS))
@option(
    "--logprobs",
    section="Output",
    type=click.IntRange(0, 20),
    metavar="K",
    help="With --json or --jsonl: each token's logprob and the best K.",
)
@option("--json", "as_json", section="Output", is_flag=True, help="One JSON object at the end.")
@option(
    "--jsonl",
    "as_jsonl",
    section="Output",
    is_flag=True,
    help="A JSON object a line for each prompt, as it ends.",
)
@option(
    "--stream/--no-stream",
    section="Output",
    default=True,
    help="Print text as it comes, or at the end.  [default: stream]",
)
@option(
    "--stats",
    section="Output",
    is_flag=True,
    help="Speed, seed and settings on stderr.  [default: if stderr is a terminal]",
)
@option(
    "--trace",
    section="Output",
    metavar="FILE",
    help="Write what happens to each step, request and block, for ui.perfetto.dev.",
)
@quiet_option()
@engine_options()
def command(**options: Any) -> None:
    """Continue prompts, or answer them through the model's chat template.

    The text goes to stdout, everything else to stderr; a terminal is shown control characters and
    does not obey them. Without --prompt, --prompt-file or
    --prompt-ids the prompt is read from stdin; one line end at the end of a file or of stdin is no
    part of it. Numbers of tokens may be written 2k (2,000) or 2K (2,048).
    """
    if options["as_json"] and options["as_jsonl"]:
        raise click.UsageError("--json and --jsonl exclude each other.")
    if options["logprobs"] is not None and not (options["as_json"] or options["as_jsonl"]):
        raise click.UsageError("--logprobs needs --json or --jsonl: text has no place for them.")
    texts = _read_texts(options)  # before the model is loaded: what is wrong here is wrong at once
    output = Output()

    with importing():
        from tinyvllm.cli.report import Report, note

    quiet = options["quiet"]
    with open_llm(
        options,
        defer_tokenizer=not texts,
        max_num_batched_tokens=INTERACTIVE_STEP_TOKENS,
        generation_config=options["generation_config"],
        seed=options["seed"],
        trace=options["trace"],
    ) as llm:
        num_warnings = len(llm.stats()["warnings"])
        sampling, origins = sampling_params(llm, options, DEFAULT_MAX_TOKENS)
        prompts = _prompts(llm, texts, options)
        report = Report(llm, output, sampling, origins, prompts, options)
        try:
            for delta in llm.stream([prompt.token_ids for prompt in prompts], sampling):
                report.add(delta)
            report.end()
        except Stopped as stopped:
            if stopped.exit_code != 141:  # a reader is there: give it what there is
                report.end()
            raise
        except TinyvllmError:
            if report.has_begun:  # else a prompt was refused, and none has an answer
                report.end()
            raise
        finally:
            if not quiet:  # a trace that could not be written to its end
                for line in llm.stats()["warnings"][num_warnings:]:
                    note(line)
            if options["stats"] or (sys.stderr is not None and sys.stderr.isatty() and not quiet):
                for line in report.stats():
                    note(line)


def _read_texts(options: dict[str, Any]) -> list[str]:
    """The prompts that are texts: of --prompt, then of --prompt-file, else of stdin."""
    sources = [*options["prompts"], *options["prompt_files"]]
    num_stdin = sources.count("-")
    if num_stdin > 1:
        raise click.UsageError("stdin ('-') can be read once only.")
    if options["system"] is not None and options["chat"] is False:
        raise click.UsageError("--system needs the chat template; leave out --raw.")
    if not sources and not options["prompt_ids"]:
        if sys.stdin is not None and sys.stdin.isatty():
            raise click.UsageError(
                "No prompt. Give --prompt TEXT, --prompt-file FILE, or text on stdin."
            )
        return [read_stdin()]
    return [
        *(read_stdin() if text == "-" else text for text in options["prompts"]),
        *(read_stdin() if path == "-" else read_file(path) for path in options["prompt_files"]),
    ]


def _prompts(llm: LLM, texts: list[str], options: dict[str, Any]) -> list[Prompt]:
    """Every prompt as token ids; texts go through the chat template unless --raw."""
    from tinyvllm.cli.report import Prompt

    ids = [Prompt(None, ids, chat=False) for ids in options["prompt_ids"]]
    if not texts and not options["chat"] and options["system"] is None:
        return ids  # the tokenizer is not needed yet
    tokenizer = llm.get_tokenizer()
    chat = tokenizer.has_chat_template if options["chat"] is None else options["chat"]
    if chat and not tokenizer.has_chat_template:
        raise InvalidRequestError(
            f"{llm.directory}: the model has no chat template. Leave out --chat and --system."
        )
    if options["system"] is not None and not chat:
        raise InvalidRequestError(
            f"{llm.directory}: --system needs a chat template, and the model has none."
        )
    prompts = []
    for text in texts:
        if chat:
            messages = [{"role": "user", "content": text}]
            if options["system"] is not None:
                messages.insert(0, {"role": "system", "content": options["system"]})
            prompts.append(Prompt(text, tokenizer.encode_chat(messages)[1], chat=True))
        else:
            prompts.append(Prompt(text, tokenizer.encode(text), chat=False))
    return prompts + ids
