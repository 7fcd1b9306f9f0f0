"""`tinyvllm generate`: prompts in; text, or JSON, on standard output. Never interactive."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from tinyvllm.cli.options import Count, TokenBias, TokenIds
from tinyvllm.cli.terminal import Output, Stopped, read_file, read_stdin
from tinyvllm.errors import InvalidRequestError

if TYPE_CHECKING:
    from tinyvllm.cli.report import Prompt
    from tinyvllm.llm import LLM
    from tinyvllm.sampling_params import SamplingParams

_DEFAULT_MAX_TOKENS = 256
# A chunk of prompt is one call into the engine, and a signal waits for its end.
_MAX_TOKENS_A_STEP = 512

_EPILOG = """\b
Examples:
  tinyvllm generate --raw --prompt "Once upon a time"
  tinyvllm generate --prompt "Tell me a story about a brave fox"
  tinyvllm generate --model DIR --prompt "Hello" --temperature 0 --max-tokens 50
  git diff | tinyvllm generate --model DIR --system "Summarise this change." --prompt-file -
  tinyvllm generate --model DIR --prompt-file a.txt --prompt-file b.txt --jsonl | jq .text
"""


@click.command(
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "-m",
    "--model",
    metavar="DIR|ORG/NAME",
    help="Checkpoint directory or hub model.  [default: the bundled story model]",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="A prompt; '-' reads stdin. May be repeated.",
)
@click.option(
    "-f",
    "--prompt-file",
    "prompt_files",
    multiple=True,
    metavar="FILE",
    help="A file with a prompt; '-' is stdin. May be repeated.",
)
@click.option(
    "--prompt-ids",
    "prompt_ids",
    multiple=True,
    type=TokenIds(),
    metavar="1,2,3",
    help="A prompt as token ids. May be repeated.",
)
@click.option("-s", "--system", metavar="TEXT", help="System prompt, for the chat template.")
@click.option(
    "--chat/--raw",
    "chat",
    default=None,
    help="Use the model's chat template, or not.  [default: chat if the model has one]",
)
@click.option(
    "-n",
    "--max-tokens",
    type=Count(),
    metavar="N",
    help="At most N tokens of output a prompt.  [default: the model's, else 256]",
)
@click.option("--min-tokens", type=Count(), metavar="N", help="No end before N tokens.")
@click.option("-t", "--temperature", type=float, help="0 is greedy.  [default: the model's]")
@click.option("--top-p", type=float, help="Keep the most likely tokens of this total probability.")
@click.option("--top-k", type=int, help="Keep the k most likely tokens; 0 is off.")
@click.option(
    "--min-p", type=float, help="Keep tokens of at least this share of the best one's probability."
)
@click.option(
    "--repetition-penalty", type=float, help="Above 1: prompt and output tokens become less likely."
)
@click.option(
    "--presence-penalty", type=float, help="Subtracted from the logit of each token in the output."
)
@click.option("--frequency-penalty", type=float, help="The same, times how often it is there.")
@click.option(
    "--logit-bias",
    "logit_bias",
    multiple=True,
    type=TokenBias(),
    metavar="ID=BIAS",
    help="Added to a token's logit. May be repeated.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    help="Repeats a run.  [default: drawn, and shown by --stats]",
)
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="End before this text. May be repeated."
)
@click.option("--include-stop", is_flag=True, help="Keep the stop text in the output.")
@click.option(
    "--stop-token-id",
    "stop_token_ids",
    multiple=True,
    type=int,
    metavar="ID",
    help="End at this token. May be repeated.",
)
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end tokens.")
@click.option("--show-special", is_flag=True, help="Keep special tokens in the text.")
@click.option(
    "--generation-config",
    metavar="auto|none|FILE",
    default="auto",
    show_default=True,
    help="Where sampling defaults come from.",
)
@click.option(
    "--logprobs",
    type=click.IntRange(0, 20),
    metavar="K",
    help="With --json or --jsonl: each token's logprob and the best K.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end.")
@click.option(
    "--jsonl", "as_jsonl", is_flag=True, help="A JSON object a line for each prompt, as it ends."
)
@click.option(
    "--stream/--no-stream",
    default=True,
    help="Print text as it comes, or at the end.  [default: stream]",
)
@click.option(
    "--stats",
    is_flag=True,
    help="Speed, seed and settings on stderr.  [default: if stderr is a terminal]",
)
@click.option(
    "--trace",
    metavar="FILE",
    help="Write what happens to each step, request and block, for ui.perfetto.dev.",
)
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
@click.option("--threads", type=click.IntRange(1, 1024), help="[default: one a physical core]")
@click.option(
    "--dtype", type=click.Choice(["auto", "bfloat16", "float32"]), default="auto", show_default=True
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option(
    "--max-model-len",
    type=Count(),
    metavar="N",
    help="Tokens of prompt and output together.  [default: the model's, as far as memory holds]",
)
def command(**options: Any) -> None:
    """Continue prompts, or answer them through the model's chat template.

    The text goes to stdout, everything else to stderr. Without --prompt, --prompt-file or
    --prompt-ids the prompt is read from stdin; one line end at the end of a file or of stdin is no
    part of it. Numbers of tokens may be written 2k (2,000) or 2K (2,048).
    """
    if options["as_json"] and options["as_jsonl"]:
        raise click.UsageError("--json and --jsonl exclude each other.")
    if options["logprobs"] is not None and not (options["as_json"] or options["as_jsonl"]):
        raise click.UsageError("--logprobs needs --json or --jsonl: text has no place for them.")
    texts = _read_texts(options)  # before the model is loaded: what is wrong here is wrong at once
    output = Output()

    from tinyvllm.cli.report import Report, note, notes
    from tinyvllm.llm import BUNDLED_MODEL, LLM

    quiet = options["quiet"]
    with LLM(
        options["model"] or BUNDLED_MODEL,
        revision=options["revision"],
        offline=options["offline"],
        quiet=quiet,
        device=options["device"],
        dtype=options["dtype"],
        num_threads=options["threads"],
        max_model_len=options["max_model_len"],
        max_num_batched_tokens=_MAX_TOKENS_A_STEP,
        generation_config=options["generation_config"],
        seed=options["seed"],
        trace=options["trace"],
    ) as llm:
        num_warnings = len(llm.stats()["warnings"])
        sampling, origins = _sampling(llm, options)
        prompts = _prompts(llm, texts, options)
        report = Report(llm, output, sampling, origins, prompts, options)
        if not quiet:
            for line in notes(llm, options["max_model_len"]):
                note(line)
        try:
            for delta in llm.stream([prompt.token_ids for prompt in prompts], sampling):
                report.add(delta)
            report.end()
        except Stopped as stopped:
            if stopped.exit_code != 141:  # a reader is there: give it what there is
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
            prompts.append(Prompt(text, tokenizer.encode_chat(messages), chat=True))
        else:
            prompts.append(Prompt(text, tokenizer.encode(text), chat=False))
    return prompts + [Prompt(None, ids, chat=False) for ids in options["prompt_ids"]]


def _sampling(llm: LLM, options: dict[str, Any]) -> tuple[SamplingParams, dict[str, str]]:
    """The sampling parameters, and where each that is no built-in default comes from."""
    from tinyvllm.sampling_params import SamplingParams

    values: dict[str, Any] = {"max_tokens": _DEFAULT_MAX_TOKENS}
    values |= llm.sampling_defaults().fields
    origins = dict.fromkeys(llm.sampling_defaults().fields, "generation_config")
    flags = {
        name: options[name]
        for name in (
            "max_tokens",
            "min_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "logprobs",
        )
        if options[name] is not None
    }
    flags |= {
        name: options[name] for name in ("stop", "stop_token_ids", "ignore_eos") if options[name]
    }
    if options["include_stop"]:
        flags["include_stop_str_in_output"] = True
    if options["show_special"]:
        flags["skip_special_tokens"] = False
    if options["logit_bias"]:
        flags["logit_bias"] = dict(options["logit_bias"])
    origins |= dict.fromkeys(flags, "flag")
    return SamplingParams(**{**values, **flags}), origins
