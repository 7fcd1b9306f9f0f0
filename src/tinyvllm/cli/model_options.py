"""The options that commands with a model share, and the LLM and SamplingParams they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tinyvllm.cli.options import Count, ModelName, TokenBias, option

if TYPE_CHECKING:
    from tinyvllm.llm import LLM
    from tinyvllm.sampling_params import SamplingParams

_Function = TypeVar("_Function", bound=Callable[..., Any])

DEFAULT_MAX_TOKENS = 256  # of output, where neither the model nor the user says
# The largest step where somebody waits: a signal is seen when it ends.
INTERACTIVE_STEP_TOKENS = 512


def together(*decorators: Callable[[Any], Any]) -> Callable[[_Function], _Function]:
    """One decorator for many options, which --help lists in this order."""

    def decorate(function: _Function) -> _Function:
        decorated: Any = function
        for decorator in reversed(decorators):
            decorated = decorator(decorated)
        return decorated  # type: ignore[no-any-return]  # the same function

    return decorate


hub_options = together(
    option(
        "--revision", section="Model", metavar="REV", help="Branch, tag or commit of a hub model."
    ),
    option("--offline", section="Model", is_flag=True, help="Never use the network."),
)


def model_options(
    metavar: str = "DIR|ORG/NAME", kinds: str = "Checkpoint directory or hub model."
) -> Callable[[_Function], _Function]:
    """kinds: what --model may be, in words."""
    return together(
        option(
            "-m",
            "--model",
            section="Model",
            type=ModelName(),
            metavar=metavar,
            help=f"{kinds}  [default: the bundled story model]",
        ),
        hub_options,
    )


def generation_config_option(section: str) -> Callable[[_Function], _Function]:
    return option(
        "--generation-config",
        section=section,
        metavar="auto|none|FILE",
        default="auto",
        show_default=True,
        help="Where sampling defaults come from.",
    )


def quiet_option(
    section: str = "Output", kept: str = "Nothing on stderr but errors."
) -> Callable[[_Function], _Function]:
    """kept: what --quiet leaves, in words."""
    return option("-q", "--quiet", section=section, is_flag=True, help=kept)


def sampling_options(default_max_tokens: str) -> Callable[[_Function], _Function]:
    """default_max_tokens: what holds where neither the model nor the user says, in words."""
    section = "Sampling"
    return together(
        option(
            "-n",
            "--max-tokens",
            section=section,
            type=Count(),
            metavar="N",
            help=f"At most N tokens of output a prompt.  [default: the model's, else "
            f"{default_max_tokens}]",
        ),
        option(
            "--min-tokens",
            section=section,
            type=Count(),
            metavar="N",
            help="No end before N tokens.",
        ),
        option(
            "-t",
            "--temperature",
            section=section,
            type=float,
            help="0 is greedy.  [default: the model's]",
        ),
        option(
            "--top-p",
            section=section,
            type=float,
            help="Keep the most likely tokens of this total probability.",
        ),
        option(
            "--top-k",
            section=section,
            type=int,
            help="Keep the k most likely tokens; 0 is off.",
        ),
        option(
            "--min-p",
            section=section,
            type=float,
            help="Keep tokens of at least this share of the best one's probability.",
        ),
        option(
            "--repetition-penalty",
            section=section,
            type=float,
            help="Above 1: prompt and output tokens become less likely.",
        ),
        option(
            "--presence-penalty",
            section=section,
            type=float,
            help="Subtracted from the logit of each token in the output.",
        ),
        option(
            "--frequency-penalty",
            section=section,
            type=float,
            help="The same, times how often it is there.",
        ),
        option(
            "--logit-bias",
            section=section,
            multiple=True,
            type=TokenBias(),
            metavar="ID=BIAS",
            help="Added to a token's logit. May be repeated.",
        ),
        option(
            "--seed",
            section=section,
            type=click.IntRange(0, 2**64 - 1),
            help="Repeats a run.  [default: drawn, and shown with the statistics]",
        ),
        option(
            "--stop",
            section=section,
            multiple=True,
            metavar="TEXT",
            help="End before this text. May be repeated.",
        ),
        option(
            "--include-stop",
            section=section,
            is_flag=True,
            help="Keep the stop text in the output.",
        ),
        option(
            "--stop-token-id",
            "stop_token_ids",
            section=section,
            multiple=True,
            type=int,
            metavar="ID",
            help="End at this token. May be repeated.",
        ),
        option(
            "--ignore-eos",
            section=section,
            is_flag=True,
            help="Go on after the model's end tokens.",
        ),
        option(
            "--show-special",
            section=section,
            is_flag=True,
            help="Keep special tokens in the text.",
        ),
        generation_config_option(section),
    )


def engine_options(
    *,
    section: str = "Engine",
    batch: bool = False,
    kv_cache: bool = True,
    max_model_len: str = "Tokens of prompt and output together.  [default: the model's, as far as "
    "memory holds]",
) -> Callable[[_Function], _Function]:
    """batch: for who runs many sequences, how many and in what steps.

    kv_cache: for who allocates it, how much.
    max_model_len: what that is, in words.
    """
    options = [
        option(
            "--threads",
            section=section,
            type=click.IntRange(1, 1024),
            help="[default: one a physical core]",
        ),
        option(
            "--dtype",
            section=section,
            type=click.Choice(["auto", "bfloat16", "float32"]),
            default="auto",
            show_default=True,
        ),
        option(
            "--device",
            section=section,
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
        ),
        option("--max-model-len", section=section, type=Count(), metavar="N", help=max_model_len),
        option(
            "--repack-weights",
            section=section,
            is_flag=True,
            help="On a CPU: copy the weights into the order that is read fastest, for long prompts "
            "and many sequences.",
        ),
    ]
    if kv_cache:
        options += [
            option(
                "--kv-cache-memory-bytes",
                section=section,
                type=Count(),
                metavar="SIZE",
                help="Memory of the KV cache, such as 8G.  [default: what sequences of full "
                "length need, as far as there is room]",
            ),
            option(
                "--gpu-memory-utilization",
                section=section,
                type=float,
                metavar="X",
                default=0.9,
                show_default=True,
                help="Share of a GPU's memory for weights, KV cache and all else.",
            ),
        ]
    if batch:
        options += [
            option(
                "--max-num-seqs",
                section=section,
                type=click.IntRange(1, 65536),
                metavar="N",
                default=256,
                show_default=True,
                help="Sequences that run together.",
            ),
            max_num_batched_tokens_option(section),
        ]
    return together(*options)


def max_num_batched_tokens_option(section: str = "Engine") -> Callable[[_Function], _Function]:
    return option(
        "--max-num-batched-tokens",
        section=section,
        type=Count(),
        metavar="N",
        help="Tokens of the largest step, which a signal waits for.  [default: 2048, and at least "
        "--max-num-seqs]",
    )


@contextmanager
def open_llm(options: dict[str, Any], **arguments: Any) -> Iterator[LLM]:
    """The LLM of model_options, engine_options and quiet_option; `arguments` are further ones of
    LLM. What the user should know of it is said on stderr."""
    from tinyvllm.cli.report import note, notes
    from tinyvllm.llm import BUNDLED_MODEL, LLM

    with LLM(
        options["model"] or BUNDLED_MODEL,
        revision=options["revision"],
        offline=options["offline"],
        device=options["device"],
        dtype=options["dtype"],
        num_threads=options["threads"],
        max_model_len=options["max_model_len"],
        repack_weights=options["repack_weights"],
        kv_cache_memory_bytes=options["kv_cache_memory_bytes"],
        gpu_memory_utilization=options["gpu_memory_utilization"],
        quiet=options["quiet"],
        **arguments,
    ) as llm:
        if not options["quiet"]:
            for line in notes(llm, options["max_model_len"]):
                note(line)
        yield llm


def named_shape(model: str | None) -> dict[str, Any] | None:
    """The config.json of a named shape. A directory of that name goes before it."""
    if model is None or Path(model).is_dir():
        return None
    from tinyvllm.dummy import NAMED_CONFIGS

    return NAMED_CONFIGS.get(model)


def sampling_params(
    llm: LLM, options: dict[str, Any], max_tokens: int | None
) -> tuple[SamplingParams, dict[str, str]]:
    """What sampling_options ask for, and where each value that is no built-in default comes from.

    max_tokens: where neither the model nor the user says.
    """
    from tinyvllm.sampling_params import SamplingParams

    defaults = llm.sampling_defaults()
    origins = dict.fromkeys(defaults.fields, "generation_config")
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
        if options.get(name) is not None
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
    return SamplingParams(**defaults.merge(flags, max_tokens=max_tokens)), origins
