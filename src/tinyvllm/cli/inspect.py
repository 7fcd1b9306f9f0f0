"""`tinyvllm inspect`: what a model is, and whether it will fit. Reads headers, and no weight."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from tinyvllm.cli.model_options import (
    DEFAULT_MAX_TOKENS,
    engine_options,
    hub_options,
    named_shape,
)
from tinyvllm.cli.options import Command, Count, ModelName, option
from tinyvllm.cli.terminal import Output
from tinyvllm.errors import CapacityError, DeviceError, InvalidRequestError
from tinyvllm.memory_plan import (
    BLOCK_SIZE,
    GPU_PROGRAM,
    GPU_UTILIZATION,
    Limits,
    MemoryPlan,
    TensorHeader,
    compute_dtype,
    make_plan,
    used_tensors,
)
from tinyvllm.model_files import read_json
from tinyvllm.stderr import printable

if TYPE_CHECKING:
    from tinyvllm.tokenizer import Tokenizer

SCHEMA = 1  # of --json; it changes when a key changes its meaning

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "min_tokens",
)

_EPILOG = """\b
Examples:
  tinyvllm inspect
  tinyvllm inspect DIR --tensors
  tinyvllm inspect llama-3.1-8b --memory 24G --max-model-len 32K
  tinyvllm inspect llama-3.1-8b --device cuda --memory 80G
  tinyvllm inspect DIR --json | jq .memory
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("model", required=False, type=ModelName(), metavar="[MODEL]")
@hub_options
@option(
    "--memory",
    section="Memory plan",
    type=Count(),
    metavar="BYTES",
    help="Plan for a machine with this much to spare, or for a GPU that has this much, such as "
    "24G.  [default: what is here]",
)
@engine_options(
    section="Memory plan",
    batch=True,
    kv_cache=False,
    max_model_len="A sequence of so many tokens must fit.  [default: as many as memory holds]",
)
@option("--tensors", "show_tensors", section="Output", is_flag=True, help="List every tensor.")
@option(
    "--json", "as_json", section="Output", is_flag=True, help="One JSON object; sizes in bytes."
)
def command(model: str | None, **options: Any) -> int:
    """What a model is, and whether it will fit: config, tensors, tokenizer, sampling, memory.

    MODEL is a checkpoint directory, a hub model (downloaded if it is not there), or one of the
    shapes that need no files: llama-3.2-1b, llama-3.1-8b, smollm2-135m, qwen3-0.6b. Without it, the
    bundled story model. Only headers are read. The memory plan is what is resident when the KV
    cache is full; with --device cuda, what is taken of the GPU, for which --memory needs no GPU.
    The exit code is 4 where that is more than there is. Sizes may be written 24G (2^30) or 24g
    (10^9).
    """
    output = Output()
    report = _inspect(model, options)
    if options["as_json"]:
        output.write(json.dumps(report, ensure_ascii=False) + "\n")
    else:
        output.write("".join(f"{line}\n" for line in _text(report)))
    output.flush()
    if not report["memory"]["fits"]:
        raise CapacityError(_shortage(report["memory"]))
    return 0


def _inspect(model: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The whole report, as --json prints it."""
    from tinyvllm import _core
    from tinyvllm.llm import BUNDLED_MODEL  # what generate imports, as the program is measured
    from tinyvllm.model_lookup import find_model
    from tinyvllm.tokenizer import Tokenizer

    directory: Path | None = None
    tokenizer: Tokenizer | None = None
    warnings: list[str] = []
    program = _resident_bytes()
    shape = named_shape(model)
    if shape is not None:
        config, dtype, tensors = _headers_of_shape(shape)
    else:
        directory = find_model(
            model or str(BUNDLED_MODEL), revision=options["revision"], offline=options["offline"]
        )
        tokenizer = Tokenizer.from_dir(directory)
        program = _resident_bytes()
        checkpoint = _core.Checkpoint(directory)
        config, dtype = checkpoint.config, checkpoint.dtype
        tensors = _headers(checkpoint)
        warnings += checkpoint.warnings()

    own, asked = config["max_position_embeddings"], options["max_model_len"]
    if asked is not None and not 2 <= asked <= own:
        raise InvalidRequestError(
            f"max_model_len is {asked}; it must be from 2 to {own}, the model's "
            "max_position_embeddings."
        )
    num_seqs, step_tokens = options["max_num_seqs"], options["max_num_batched_tokens"]
    if step_tokens is None:
        step_tokens = max(2048, num_seqs)
    _core.check_batch_limits(num_seqs, step_tokens)
    room = _room(options, program)
    if options["repack_weights"] and room.device == "cuda":
        _core.refuse_repacked_weights()
    limits = Limits(
        dtype=compute_dtype(options["dtype"], dtype),
        device=room.device,
        max_model_len=asked,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=step_tokens,
        repack_weights=options["repack_weights"],
        num_threads=options["threads"] or 0,
    )
    plan = make_plan(config, tensors, limits, memory=room.memory, program=room.program)
    sampling, sampling_warnings = _sampling(directory)
    files: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.file is not None:
            files[tensor.file] += tensor.num_bytes
    used = used_tensors(config, tensors)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "model": model or "bundled",
        "directory": None if directory is None else str(directory),
        "config": config,
        "dtype": dtype,
        "parameters": {
            "total": sum(tensor.num_elements for tensor in used),
            "embedding": sum(t.num_elements for t in used if "embed_tokens" in t.name),
            "layers": sum(t.num_elements for t in used if ".layers." in t.name),
            "output_matrix": sum(t.num_elements for t in used if t.name == "lm_head.weight"),
        },
        "files": [{"file": name, "num_bytes": size} for name, size in files.items()],
        "num_tensors": len(tensors),
        "tokenizer": None if tokenizer is None else _tokenizer(tokenizer, config),
        "eos_token_ids": _eos_token_ids(directory, tokenizer),
        "sampling": sampling,
        "memory": _memory(plan, limits, room),
        "warnings": warnings + sampling_warnings,
    }
    if options["show_tensors"]:
        report["tensors"] = [tensor._asdict() for tensor in tensors]
    return report


def _headers_of_shape(
    published: dict[str, Any],
) -> tuple[dict[str, Any], str, list[TensorHeader]]:
    """The config, dtype and tensors of a published shape, of which there are no files."""
    from tinyvllm import _core, dummy

    with tempfile.TemporaryDirectory(prefix="tinyvllm-inspect-") as directory:
        path = Path(directory) / "config.json"
        path.write_text(json.dumps(published))
        config = _core.parse_model_config(path)
    tensors = [
        TensorHeader(tensor, "BF16", shape, 2 * math.prod(shape), None)
        for tensor, shape in dummy.tensor_shapes(published).items()
    ]
    return config, "bfloat16", tensors


def _headers(checkpoint: Any) -> list[TensorHeader]:
    headers = []
    for name in checkpoint.names():
        info = checkpoint.tensor_info(name)
        headers.append(
            TensorHeader(
                name, info["dtype"], info["shape"], info["num_bytes"], Path(info["file"]).name
            )
        )
    return headers


def _resident_bytes() -> int:
    """What this process holds now: the program and the tokenizer, and no model yet."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Room(NamedTuple):
    """Where the plan is for, and what is there: bytes, and in words where they come from."""

    device: str  # cpu or cuda
    memory: int
    memory_from: str
    program: int
    program_from: str


def _room(options: dict[str, Any], program: int) -> _Room:
    """program: what this process holds."""
    from tinyvllm import _core

    device, memory = options["device"], options["memory"]
    if device == "auto" and _core.cuda_build() == "gpu":  # as the engine chooses
        try:
            _core.cuda_memory()
            device = "cuda"
        except DeviceError:
            device = "cpu"
    if device != "cuda":
        return _Room(
            "cpu",
            _core.available_memory() if memory is None else memory,
            "this machine" if memory is None else "--memory",
            program,
            "Python, the libraries and the tokenizer, as measured here",
        )
    if memory is not None:
        return _Room(
            "cuda", memory, "--memory", GPU_PROGRAM, "the driver and its context, as assumed here"
        )
    try:
        _core.require_cuda_build()
        free, total = _core.cuda_memory()
    except DeviceError as error:
        raise DeviceError(
            f"{error} For a GPU that is elsewhere, say how much memory it has: --memory 80G."
        ) from None
    return _Room(
        "cuda", total, "this GPU", total - free, "the driver, its context and other programs"
    )


def _tokenizer(tokenizer: Tokenizer, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": tokenizer.vocab_size,
        "unused_rows": max(0, config["vocab_size"] - tokenizer.vocab_size),
        "special_tokens": {
            name: {"token": token, "id": getattr(tokenizer, f"{name}_id", None)}
            for name, token in tokenizer.special_tokens.items()
        },
        "chat_templates": {
            name: {"file": template.origin, "characters": len(template.source)}
            for name, template in tokenizer.chat_templates.items()
        },
    }


def _eos_token_ids(directory: Path | None, tokenizer: Tokenizer | None) -> list[int]:
    from tinyvllm import generation_config

    if directory is None:
        return []
    return generation_config.eos_token_ids(
        read_json(directory / generation_config.FILE),
        read_json(directory / "config.json"),
        None if tokenizer is None else tokenizer.eos_token_id,
    )


def _sampling(directory: Path | None) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What `generate` uses where no flag is given, and where each value comes from."""
    from tinyvllm import generation_config
    from tinyvllm.sampling_params import SamplingParams

    built_in = SamplingParams(max_tokens=DEFAULT_MAX_TOKENS)
    sampling = {name: {"value": getattr(built_in, name), "from": "default"} for name in _SAMPLING}
    if directory is None:
        return sampling, []
    path = directory / generation_config.FILE
    values = read_json(path)
    defaults = generation_config.sampling_defaults(values, str(path))
    written = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
    for name, value in defaults.fields.items():
        if values.get(written.get(name, name)) is not None and not (
            name == "temperature" and value == 0
        ):
            origin = generation_config.FILE
        elif name == "temperature" and value == 0:
            origin = f"{generation_config.FILE} has no do_sample: true, which means greedy"
        else:
            origin = "Transformers' default"
        sampling[name] = {"value": value, "from": origin}
    return sampling, defaults.warnings


def _memory(plan: MemoryPlan, limits: Limits, room: _Room) -> dict[str, Any]:
    return {
        "device": room.device,
        "available": plan.memory,
        "available_from": room.memory_from,
        "dtype": limits.dtype,
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "program": plan.program,
        "program_from": room.program_from,
        "weights": plan.weights,
        "mapped_weights": plan.mapped_weights,
        "copied_weights": plan.copied_weights,
        "passed_weights": plan.passed_weights,
        "activations": plan.activations,
        "kv_cache": plan.kv_cache,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "kv_tokens": plan.kv_tokens,
        "kv_limit": plan.kv_limit,
        "default_kv_tokens": plan.default_kv_tokens,
        "max_model_len": plan.max_model_len,
        "asked_model_len": plan.asked_model_len,
        "full_length_sequences": plan.full_length_sequences,
        "needed": plan.needed,
        "fits": plan.fits,
    }


# --- Text -----------------------------------------------------------------------------------------


def _text(report: dict[str, Any]) -> list[str]:
    """The report for people: a name and a line or a few for each thing."""
    config, parameters, memory = report["config"], report["parameters"], report["memory"]
    kv_heads = config["num_kv_heads"]
    rope = config["rope"]
    windows = sorted({window for window in config["sliding_window"] if window})
    rows: list[tuple[str, str]] = [
        ("model", f"{report['directory'] or report['model']} ({config['family']})"),
        (
            "parameters",
            f"{parameters['total']:,}: {parameters['embedding']:,} in the embedding"
            + (
                ", which is the output matrix, too"
                if config["tie_word_embeddings"]
                else f", {parameters['output_matrix']:,} in the output matrix"
            )
            + f", {parameters['layers']:,} in the layers",
        ),
        (
            "config",
            f"{config['num_layers']} layers; hidden {config['hidden_size']}, intermediate "
            f"{config['intermediate_size']}; {config['num_heads']} heads over {kv_heads} of K and "
            f"V, {config['head_dim']} wide; vocabulary {config['vocab_size']:,}",
        ),
        (
            "",
            f"up to {config['max_position_embeddings']:,} tokens; rope {rope['type']}, theta "
            f"{rope['theta']:,.0f}"
            + (f"; sliding window of {windows[0]:,} tokens" if windows else ""),
        ),
        *(("files", f"{file['file']}  {_size(file['num_bytes'])}") for file in report["files"]),
        ("tensors", f"{report['num_tensors']}, most of them {report['dtype']}"),
        *_tokenizer_rows(report),
        *_sampling_rows(report),
        *_memory_rows(memory),
        *(("warning", warning) for warning in report["warnings"]),
    ]
    lines, last = [], ""
    for name, text in rows:
        lines.append(printable(f"{'' if name == last else name:<12}{text}"))
        last = name
    return lines + _tensor_table(report.get("tensors", []))


def _tokenizer_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    tokenizer = report["tokenizer"]
    if tokenizer is None:
        return [("tokenizer", "none: a shape without files")]
    special = ", ".join(
        f"{name.removesuffix('_token')} {entry['token']} ({entry['id']})"
        for name, entry in tokenizer["special_tokens"].items()
        if entry["id"] is not None
    )
    rows = [("tokenizer", f"{tokenizer['vocab_size']:,} tokens; {special or 'no special tokens'}")]
    eos = ", ".join(map(str, report["eos_token_ids"])) or "none"
    rows.append(("", f"tokens that end an output: {eos}"))
    for name, template in tokenizer["chat_templates"].items():
        rows.append(("chat", f"template {name} from {template['file']}"))
    return rows if tokenizer["chat_templates"] else [*rows, ("chat", "no template")]


def _sampling_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    by_origin: dict[str, list[str]] = {}
    for name, entry in report["sampling"].items():
        by_origin.setdefault(entry["from"], []).append(f"{name} {entry['value']}")
    return [("sampling", f"{', '.join(names)} ({origin})") for origin, names in by_origin.items()]


def _memory_rows(memory: dict[str, Any]) -> list[tuple[str, str]]:
    limit = {
        "sequences": f"all that {memory['max_num_seqs']} sequences can use",
        "share": "40% of memory, as LLM() takes it",
        "utilization": f"what is left of {GPU_UTILIZATION:.0%} of the GPU",
        "left": "all that is left",
    }[memory["kv_limit"]]
    weights = "copied to the GPU"
    if memory["device"] == "cpu":
        weights = f"{_size(memory['mapped_weights'])} as they lie in the files"
        if memory["copied_weights"]:
            weights += f", {_size(memory['copied_weights'])} copied"
    plan = [
        ("program", "program", memory["program_from"]),
        ("weights", "weights", weights),
        (
            "activations",
            "activations",
            f"steps of {memory['max_num_batched_tokens']:,} tokens, {memory['max_num_seqs']} "
            "sequences",
        ),
        (
            "kv_cache",
            "KV cache",
            f"{memory['kv_tokens']:,} tokens of {memory['kv_bytes_per_token']:,} bytes: {limit}",
        ),
        ("needed", "together", f"of {_size(memory['available'])} ({memory['available_from']})"),
    ]
    rows = [("memory", f"{label:<12}{_size(memory[key]):>10}  {text}") for key, label, text in plan]
    if memory["passed_weights"] > memory["weights"] // 100:  # not only norms and biases
        rows.append(
            (
                "memory",
                f"{'':<12}{_size(memory['passed_weights']):>10}  more are read once, to be copied",
            )
        )
    if memory["default_kv_tokens"] > memory["kv_tokens"] > 0:
        rows.append(
            (
                "memory",
                f"by itself LLM() would reserve {memory['default_kv_tokens']:,} tokens; "
                f"kv_cache_memory_bytes={memory['kv_cache']} keeps it to what is left",
            )
        )
    sequences = memory["full_length_sequences"]
    verdict = (
        f"fits: {memory['kv_tokens']:,} tokens at a time, such as {sequences} "
        f"sequence{'' if sequences == 1 else 's'} of {memory['max_model_len']:,}"
        if memory["fits"]
        else "does not fit"
    )
    return [*rows, ("memory", f"{memory['dtype']} on {memory['device']}: {verdict}")]


def _tensor_table(tensors: list[dict[str, Any]]) -> list[str]:
    if not tensors:
        return []
    rows = [
        (
            tensor["name"],
            tensor["dtype"],
            str(list(tensor["shape"])),
            f"{tensor['num_bytes']:,}",
            tensor["file"] or "",
        )
        for tensor in tensors
    ]
    head = ("tensor", "dtype", "shape", "bytes", "file")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(4)]
    return [
        "",
        *(
            printable(
                f"{name:<{widths[0]}}  {dtype:<{widths[1]}}  {shape:<{widths[2]}}  "
                f"{size:>{widths[3]}}  {file}".rstrip()
            )
            for name, dtype, shape, size, file in [head, *rows]
        ),
    ]


def _shortage(memory: dict[str, Any]) -> str:
    wanted = max(memory["asked_model_len"] or 0, BLOCK_SIZE)
    text = (
        f"it will not fit: {_size(memory['needed'] - memory['kv_cache'])} without KV cache and "
        f"{_size(wanted * memory['kv_bytes_per_token'])} for {wanted:,} tokens of it, and there "
        f"are {_size(memory['available'])}"
        + (f", of which {GPU_UTILIZATION:.0%} may be used" if memory["device"] == "cuda" else "")
    )
    if memory["kv_tokens"]:
        return f"{text}; the cache gets {memory['kv_tokens']:,} tokens. Lower --max-model-len."
    return f"{text}. Take a smaller model, or lower --max-num-seqs and --max-num-batched-tokens."


def _size(num_bytes: int) -> str:
    """A size as people read it."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1000:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
