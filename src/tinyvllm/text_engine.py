"""TextEngine: the C++ engine with a model's tokenizer in front. LLM and AsyncEngine stand on it.

The C++ engine knows only token ids. Here the model is found and loaded, prompts become token ids,
and what comes out of each step becomes text, while it comes.
"""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tinyvllm import _core, generation_config
from tinyvllm.chat_template import Message
from tinyvllm.checks import integer, number, seed_number
from tinyvllm.errors import InvalidRequestError
from tinyvllm.model_files import read_json
from tinyvllm.model_lookup import find_model
from tinyvllm.request import ActiveRequest, ParsedPrompt
from tinyvllm.sampling_params import SamplingParams
from tinyvllm.tokenizer import Tokenizer, TokenizerLoader

if TYPE_CHECKING:
    import tempfile

BUNDLED_MODEL = Path(__file__).parent / "story_model"

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]

# Arguments that vLLM has and that can only be neutral here.
_NEUTRAL = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "distributed_executor_backend": None,
    "enable_expert_parallel": False,
    "trust_remote_code": False,
    "quantization": None,
    "kv_cache_dtype": "auto",
    "cpu_offload_gb": 0,
    "enable_lora": False,
    "speculative_config": None,
    "enable_chunked_prefill": True,
    "disable_custom_all_reduce": False,
    "disable_log_stats": True,
    "skip_tokenizer_init": False,
    "tokenizer_mode": "auto",
    "tokenizer_revision": None,
    "hf_overrides": None,
    "runner": "auto",
}


class TextEngine:
    """A loaded model. `close()` gives its memory back. For one thread at a time, but for `parse`,
    `parse_chat`, `get_tokenizer` and the sampling defaults: these any thread may call at any time.

    model: a checkpoint directory, or the name of a hub model, `org/name[@revision]`.
    device: cpu, cuda, or auto: a GPU if this build and this machine have one, else the CPU.
    dtype: auto, bfloat16 or float32. auto: float32 for float32 files, else bfloat16.
    max_model_len: tokens of prompt and output together; None: the smaller of the model's own and
        what the KV cache holds.
    kv_cache_memory_bytes, num_gpu_blocks_override: the size of the KV cache, in bytes or in blocks
        of block_size tokens (on any device).
    num_threads: None: one for each physical core that this process may use.
    repack_weights: on a CPU, a copy of the weights in the order that products read fastest: for
        long prompts and many sequences. No other process shares its memory, and it takes a moment
        at the start.
    gpu_memory_utilization: the share of a GPU's memory for weights, KV cache and all else together.
    enforce_eager: no CUDA graphs; the results are the same bits.
    batch_invariant: on a GPU, too, a request's bits are the same in every batch. Decodes then go
        the way of prompts, without CUDA graphs and with no context split among blocks (split-KV),
        and a product has one algorithm whatever the number of its rows: slower.
    seed: what requests without a seed get theirs from. None: drawn at random; see `seed`.
    generation_config: auto (the model's), none, or the path of a generation_config.json.
    load_format: auto, or dummy: seeded random weights in the shape of the model's config.json.
    defer_tokenizer: load it when a text is first needed, not now. An output's first token is then
        reported before its text.
    batching: continuous, or static: requests are admitted only when none runs, for comparison.
    """

    def __init__(
        self,
        model: str | Path = BUNDLED_MODEL,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        block_size: int = 16,
        enable_prefix_caching: bool = True,
        gpu_memory_utilization: float = 0.9,
        kv_cache_memory_bytes: int | None = None,
        num_gpu_blocks_override: int | None = None,
        num_threads: int | None = None,
        enforce_eager: bool = False,
        seed: int | None = 0,
        tokenizer: str | Path | None = None,
        revision: str | None = None,
        generation_config: str | Path = "auto",
        load_format: str = "auto",
        batching: str = "continuous",
        batch_invariant: bool = False,
        repack_weights: bool = False,
        trace: str | Path | None = None,
        offline: bool = False,
        quiet: bool = False,
        defer_tokenizer: bool = False,
        **other: Any,
    ) -> None:
        _refuse_unknown(other)
        if load_format not in ("auto", "dummy"):
            raise InvalidRequestError(f'load_format is "{load_format}"; it must be auto or dummy.')
        if batching not in ("continuous", "static"):
            raise InvalidRequestError(f'batching is "{batching}"; it must be continuous or static.')
        for name, text in {"device": device, "dtype": dtype}.items():
            if not isinstance(text, str):
                raise InvalidRequestError(f"{name} is {text!r}; give a text.")
        whole_numbers = {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "block_size": block_size,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "num_gpu_blocks_override": num_gpu_blocks_override,
            "num_threads": num_threads,
        }
        for name, value in whole_numbers.items():
            if value is not None:
                integer(name, value, 32 if name == "num_threads" else 64)
        number("gpu_memory_utilization", gpu_memory_utilization)
        if max_num_batched_tokens is None:
            max_num_batched_tokens = max(2048, max_num_seqs)
        self.seed = _random_seed() if seed is None else seed_number(seed)
        self.timings: dict[str, float] = {}  # seconds of each part of loading
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._requests: dict[int, ActiveRequest] = {}
        self._next_id = 0

        began = time.perf_counter()
        self.directory = find_model(str(model), revision=revision, offline=offline, quiet=quiet)
        if load_format == "dummy":
            self.directory = self._write_dummy(self.directory, self.seed)
        began = self._lap("find", began)
        tokenizer_directory = (
            self.directory
            if tokenizer is None
            else find_model(str(tokenizer), offline=offline, quiet=quiet)
        )
        self._loader = TokenizerLoader(tokenizer_directory)
        if not defer_tokenizer:
            self._loader.result()
        self._defaults = _sampling_defaults(self.directory, str(generation_config))
        began = time.perf_counter()
        self._engine = _core.Engine(
            self.directory,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            num_blocks=num_gpu_blocks_override,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            num_threads=num_threads or 0,
            seed=self.seed,
            prefix_caching=enable_prefix_caching,
            static_batching=batching == "static",
            eos_token_ids=self._eos_token_ids(),
            trace=trace,
            device=device,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            batch_invariant=batch_invariant,
            repack_weights=repack_weights,
        )
        self._lap("weights", began)

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._loader.result()

    # --- Prompts ----------------------------------------------------------------------------------

    def parse(self, prompt: Prompt) -> ParsedPrompt:
        """A prompt in any of its forms, as token ids. From any thread."""
        text: Any = prompt
        if isinstance(prompt, Mapping):
            if not set(prompt) <= {"prompt", "prompt_token_ids"}:
                raise InvalidRequestError(
                    f"a prompt has the keys {sorted(map(str, prompt))}; "
                    "give prompt (a text), prompt_token_ids, or both."
                )
            text = prompt.get("prompt")
            if text is not None and not isinstance(text, str):
                raise InvalidRequestError(f"a prompt's text is {text!r:.60}; give a string.")
            if prompt.get("prompt_token_ids") is not None:
                return ParsedPrompt(text, _token_ids(prompt["prompt_token_ids"]))
        if isinstance(text, str):
            return ParsedPrompt(text, self._tokenizer.encode(text))
        return ParsedPrompt(None, _token_ids(text))

    def parse_chat(
        self,
        messages: Sequence[Message],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> ParsedPrompt:
        """A conversation, as the prompt that the model's chat template makes of it. From any
        thread."""
        text, ids = self._tokenizer.encode_chat(
            messages,
            template=chat_template,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **(chat_template_kwargs or {}),
        )
        return ParsedPrompt(text, ids)

    # --- Requests and steps -----------------------------------------------------------------------

    def add(
        self,
        prompt: ParsedPrompt,
        params: SamplingParams,
        *,
        prompt_index: int = 0,
        incremental: bool,
    ) -> ActiveRequest:
        """Queues a request, or refuses it with nothing done.

        incremental: whether text is wanted as it comes, or once, at the end.
        """
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"sampling_params is {params!r:.60}; give a SamplingParams.")
        params = params.clone()  # the caller may change theirs while this request runs
        request = ActiveRequest(
            self._next_id, prompt_index, prompt, params, self._loader, incremental
        )
        self._engine.add_request(request.id, prompt.token_ids, params.core)
        self._next_id += 1
        self._requests[request.id] = request
        return request

    def step(self) -> list[ActiveRequest]:
        """One step of the engine. Returns the requests that have got something from it."""
        output = self._engine.step()
        changed: dict[int, ActiveRequest] = {}
        for id, sample, token, finish, logprobs in zip(
            output.request, output.sample, output.token, output.finish, output.logprobs, strict=True
        ):
            request = changed[id] = self._requests[id]
            if request.accept(sample, token, finish, logprobs):
                self._engine.finish(id, sample, "stop")
        for id, entries in output.prompt_logprobs.items():
            self._requests[id].accept_prompt_logprobs(entries)
        for id, num_cached_tokens, error in output.ended:
            request = changed[id] = self._requests.pop(id)
            request.end(num_cached_tokens, error)
        return list(changed.values())

    def abort(self, request: ActiveRequest) -> None:
        """Frees what the request holds; its end comes with the next step. Twice is fine."""
        if request.id in self._requests:
            self._engine.abort(request.id)

    def has_unfinished(self) -> bool:
        """Whether a step has something to do or to report."""
        return self._engine.has_unfinished()

    # --- What surrounds it ------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `sampling_params=None` means: the model's own defaults, then SamplingParams'."""
        values = self.sampling_defaults().merge({}, max_tokens=SamplingParams.max_tokens)
        return SamplingParams(**values)

    def sampling_defaults(self) -> generation_config.SamplingDefaults:
        """The SamplingParams fields that the model's generation_config.json sets."""
        return self._defaults

    def stats(self) -> dict[str, Any]:
        """Counters of the engine, and what it was built with. Plain values."""
        return {**self._engine.info(), **self._engine.stats(), "load_seconds": self.load_seconds()}

    def load_seconds(self) -> dict[str, float]:
        """What each part of loading took; without the tokenizer as long as it is deferred."""
        if self._loader.seconds is not None:
            self.timings["tokenizer"] = self._loader.seconds
        return dict(self.timings)

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes. False, with nothing done, while requests are unfinished."""
        return self._engine.reset_prefix_cache()

    def close(self) -> None:
        """Gives the memory back. Twice is fine; use after it is an error."""
        self._requests.clear()
        self._engine.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _write_dummy(self, source: Path, seed: int) -> Path:
        import tempfile

        from tinyvllm import dummy  # brings numpy, which nothing else here needs

        self._temporary = tempfile.TemporaryDirectory(prefix="tinyvllm-dummy-")
        config = read_json(source / "config.json")
        return dummy.write_checkpoint(Path(self._temporary.name), config, seed=seed & 0xFFFFFFFF)

    def _eos_token_ids(self) -> list[int]:
        return generation_config.eos_token_ids(
            read_json(self.directory / generation_config.FILE),
            read_json(self.directory / "config.json"),
            self._loader.eos_token_id(),
        )

    def _lap(self, name: str, began: float) -> float:
        now = time.perf_counter()
        self.timings[name] = now - began
        return now


def _random_seed() -> int:
    """63 random bits; the module `secrets` would take longer to import than a small model."""
    return int.from_bytes(os.urandom(8), "little") >> 1


def _refuse_unknown(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if name in _NEUTRAL:
            if value != _NEUTRAL[name]:
                raise InvalidRequestError(
                    f"{name} is {value!r}; only {_NEUTRAL[name]!r} is supported. Leave it out."
                )
            continue
        import difflib
        import inspect

        known = [*inspect.signature(TextEngine).parameters, *_NEUTRAL]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise TypeError(f"There is no argument '{name}'; the nearest is '{nearest}'.")


def _sampling_defaults(directory: Path, choice: str) -> generation_config.SamplingDefaults:
    """choice: auto (the model's file), none (vLLM's name: vllm), or the path of another."""
    if choice in ("none", "vllm"):
        return generation_config.SamplingDefaults()
    path = directory / generation_config.FILE
    if choice != "auto":
        path = Path(choice)
        if not path.is_file():
            raise InvalidRequestError(
                f"generation_config is {choice!r}: no such file. Give auto, none or a path."
            )
    return generation_config.sampling_defaults(read_json(path), str(path))


def _token_ids(values: Any) -> list[int]:
    # No loop of Python: over 1,024 tokens it takes 0.1 ms, and their prefill on a GPU 4.5.
    try:
        ids = list(map(operator.index, values))
        if bool not in set(map(type, values)) and (
            not ids or (min(ids) >= -(1 << 31) and max(ids) < 1 << 31)
        ):
            return ids
    except TypeError:
        pass
    raise InvalidRequestError(
        f"a prompt is {values!r:.60}; give a text, or a list of token ids: whole numbers from 0 to "
        "2^31 - 1."
    )
