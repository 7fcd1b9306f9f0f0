"""LLM: prompts in, text out. The front end of the C++ engine, with vLLM's names.

The engine knows only token ids. This file finds the model, tokenizes, feeds requests, decodes what
comes back while it comes, and looks for stop strings.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from tinyvllm import _core, generation_config
from tinyvllm.chat_template import Message
from tinyvllm.errors import DeviceError, InvalidRequestError
from tinyvllm.model_lookup import find_model
from tinyvllm.outputs import CompletionOutput, RequestDelta, RequestOutput
from tinyvllm.request import ActiveRequest
from tinyvllm.sampling_params import SamplingParams
from tinyvllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tempfile

BUNDLED_MODEL = Path(__file__).parent / "story_model"

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]

# Arguments that vLLM has and that can only be neutral here.
_NEUTRAL = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "trust_remote_code": False,
    "quantization": None,
    "enable_lora": False,
    "speculative_config": None,
    "disable_log_stats": True,
    "skip_tokenizer_init": False,
    "tokenizer_mode": "auto",
}


class LLM:
    """A loaded model. Also a context manager; `close()` gives its memory back.

    model: a checkpoint directory, or the name of a hub model, `org/name[@revision]`.
    dtype: auto, bfloat16 or float32. auto: float32 for float32 files, else bfloat16.
    max_model_len: tokens of prompt and output together; None: the smaller of the model's own and
        what the KV cache holds.
    kv_cache_memory_bytes, num_gpu_blocks_override: the size of the KV cache, in bytes or in blocks
        of block_size tokens (on any device).
    num_threads: None: one for each physical core that this process may use.
    seed: what requests without a seed get theirs from. None: drawn at random; see `seed`.
    generation_config: auto (the model's), none, or the path of a generation_config.json.
    load_format: auto, or dummy: seeded random weights in the shape of the model's config.json.
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
        trace: str | Path | None = None,
        offline: bool = False,
        quiet: bool = False,
        **other: Any,
    ) -> None:
        _refuse_unknown(other)
        _require_cpu(device)
        if load_format not in ("auto", "dummy"):
            raise InvalidRequestError(f'load_format is "{load_format}"; it must be auto or dummy.')
        if batching not in ("continuous", "static"):
            raise InvalidRequestError(f'batching is "{batching}"; it must be continuous or static.')
        self.seed = secrets.randbits(63) if seed is None else seed
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
        self._tokenizer = Tokenizer.from_dir(tokenizer_directory)
        self._defaults = _sampling_defaults(self.directory, str(generation_config))
        began = self._lap("tokenizer", began)
        self._engine = _core.Engine(
            self.directory,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens or max(2048, max_num_seqs),
            block_size=block_size,
            num_blocks=num_gpu_blocks_override,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            num_threads=num_threads or 0,
            seed=self.seed,
            prefix_caching=enable_prefix_caching,
            static_batching=batching == "static",
            eos_token_ids=self._eos_token_ids(),
        )
        self._lap("weights", began)

    # --- Generation -------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues every prompt. Outputs are in the order of the prompts.

        A prompt is a string, a list of token ids, {"prompt": ...} or {"prompt_token_ids": ...}.
        sampling_params: one for all or one a prompt; None: the model's own defaults.
        """
        parsed = [self._parse(prompt) for prompt in _as_list(prompts)]
        return self._complete(parsed, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of a list of them, through the model's chat template."""
        single = not messages or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        parsed: list[tuple[str | None, list[int]]] = []
        for conversation in conversations:
            text = self._tokenizer.apply_chat_template(
                conversation,
                template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                **(chat_template_kwargs or {}),
            )
            parsed.append((text, self._tokenizer.encode(text, add_special_tokens=False)))
        return self._complete(parsed, sampling_params, use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestDelta]:
        """Yields what each step adds. Closing the iterator aborts what is unfinished."""
        parsed = [self._parse(prompt) for prompt in _as_list(prompts)]
        requests = self._add(parsed, sampling_params, incremental=True)
        yield from self._run(requests)

    def _complete(
        self,
        parsed: list[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        requests = self._add(parsed, sampling_params, incremental=False)
        progress = None
        if use_tqdm:
            from tqdm import tqdm

            progress = tqdm(total=len(requests), desc="Processed prompts", dynamic_ncols=True)
        outputs = [
            [CompletionOutput(index=i, text="", token_ids=[]) for i in range(request.num_outputs)]
            for request in requests
        ]
        try:
            for delta in self._run(requests):
                outputs[delta.prompt_index][delta.index].add(delta)
                if progress:
                    progress.update(sum(request.finished for request in requests) - progress.n)
        finally:
            if progress:
                progress.close()
        return [
            RequestOutput(
                str(request.id),
                text,
                ids,
                completions,
                num_cached_tokens=request.num_cached_tokens,
                prompt_logprobs=request.prompt_logprobs,
            )
            for request, (text, ids), completions in zip(requests, parsed, outputs, strict=True)
        ]

    def _add(
        self,
        parsed: list[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        incremental: bool,
    ) -> list[ActiveRequest]:
        """Queues all prompts, or none if one of them is refused."""
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(parsed)
        if len(sampling_params) != len(parsed):
            raise InvalidRequestError(
                f"There are {len(parsed)} prompts and {len(sampling_params)} sampling_params. "
                "Give one for all, or one for each prompt."
            )
        requests: list[ActiveRequest] = []
        try:
            for index, ((_, ids), params) in enumerate(zip(parsed, sampling_params, strict=True)):
                request = ActiveRequest(
                    self._next_id, index, ids, params, self._tokenizer, incremental
                )
                self._engine.add_request(request.id, ids, params.core)
                self._next_id += 1
                self._requests[request.id] = request
                requests.append(request)
        except BaseException:
            self._abort(requests)
            raise
        return requests

    def _run(self, requests: list[ActiveRequest]) -> Iterator[RequestDelta]:
        """Steps the engine until these requests have ended; others that are queued advance, too."""
        try:
            while True:
                finished = all(request.finished for request in requests)
                for request in requests:  # while a delta is out, somebody else may step the engine
                    yield from request.take_deltas()
                if finished:
                    return
                self._step()
        finally:
            self._abort([request for request in requests if not request.finished])

    def _step(self) -> None:
        """One step of the engine. What comes of requests that nobody waits for is dropped."""
        output = self._engine.step()
        for id, sample, token, finish, logprobs in zip(
            output.request, output.sample, output.token, output.finish, output.logprobs, strict=True
        ):
            request = self._requests.get(id)
            if request is not None and request.accept(sample, token, finish, logprobs):
                self._engine.finish(id, sample, "stop")
        for id, entries in output.prompt_logprobs.items():
            if id in self._requests:
                self._requests[id].accept_prompt_logprobs(entries)
        for id, num_cached_tokens, error in output.ended:
            if id in self._requests:
                self._requests.pop(id).end(num_cached_tokens, error)

    def _abort(self, requests: list[ActiveRequest]) -> None:
        for request in requests:
            if self._requests.pop(request.id, None) is not None:
                self._engine.abort(request.id)

    # --- What surrounds it ------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `sampling_params=None` means: the model's own defaults, then SamplingParams'."""
        return SamplingParams(**self.sampling_defaults().fields)  # type: ignore[arg-type]

    def sampling_defaults(self) -> generation_config.SamplingDefaults:
        """The SamplingParams fields that the model's generation_config.json sets."""
        return self._defaults

    def stats(self) -> dict[str, Any]:
        """Counters of the engine, and what it was built with. Plain values."""
        return {**self._engine.info(), **self._engine.stats(), "load_seconds": dict(self.timings)}

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes. False, with nothing done, while requests are unfinished."""
        return self._engine.reset_prefix_cache()

    def close(self) -> None:
        """Gives the memory back. Twice is fine; use after it is an error."""
        self._requests.clear()
        self._engine.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def encode_chat(self, messages: Sequence[Message], **kwargs: Any) -> list[int]:
        """The prompt of a conversation, as token ids."""
        return self._tokenizer.encode_chat(messages, **kwargs)

    def _parse(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt in any of its forms -> (its text, if it has one; its token ids)."""
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                text = prompt.get("prompt")
                return text, _token_ids(prompt["prompt_token_ids"])
            if isinstance(prompt.get("prompt"), str):
                prompt = str(prompt["prompt"])
            else:
                raise InvalidRequestError(
                    f"a prompt has the keys {sorted(map(str, prompt))}; "
                    "give prompt (a text) or prompt_token_ids."
                )
        if isinstance(prompt, str):
            return prompt, self._tokenizer.encode(prompt)
        return None, _token_ids(prompt)

    def _write_dummy(self, source: Path, seed: int) -> Path:
        import tempfile

        from tinyvllm import dummy  # brings numpy, which nothing else here needs

        self._temporary = tempfile.TemporaryDirectory(prefix="tinyvllm-dummy-")
        config = generation_config.read_json(source / "config.json")
        return dummy.write_checkpoint(Path(self._temporary.name), config, seed=seed & 0xFFFFFFFF)

    def _eos_token_ids(self) -> list[int]:
        return generation_config.eos_token_ids(
            generation_config.read_json(self.directory / generation_config.FILE),
            generation_config.read_json(self.directory / "config.json"),
            self._tokenizer.eos_token_id,
        )

    def _lap(self, name: str, began: float) -> float:
        now = time.perf_counter()
        self.timings[name] = now - began
        return now


def _refuse_unknown(arguments: Mapping[str, Any]) -> None:
    import difflib
    import inspect

    for name, value in arguments.items():
        if name in _NEUTRAL:
            if value != _NEUTRAL[name]:
                raise InvalidRequestError(
                    f"{name} is {value!r}; only {_NEUTRAL[name]!r} is supported. Leave it out."
                )
            continue
        known = [*inspect.signature(LLM).parameters, *_NEUTRAL]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise TypeError(f"LLM() has no argument '{name}'; the nearest is '{nearest}'.")


def _require_cpu(device: str) -> None:
    if device in ("auto", "cpu"):
        return
    if device == "cuda":
        raise DeviceError("device cuda: this build has the CPU engine only. Use --device cpu.")
    raise InvalidRequestError(f'device is "{device}"; it must be auto, cpu or cuda.')


def _sampling_defaults(directory: Path, choice: str) -> generation_config.SamplingDefaults:
    """choice: auto (the model's file), none, or the path of a generation_config.json."""
    if choice == "none":
        return generation_config.SamplingDefaults()
    path = directory / generation_config.FILE
    if choice != "auto":
        path = Path(choice)
        if not path.is_file():
            raise InvalidRequestError(
                f"generation_config is {choice!r}: no such file. Give auto, none or a path."
            )
    return generation_config.sampling_defaults(generation_config.read_json(path), str(path))


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many -> many."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    items: list[Any] = list(prompts)
    if items and all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        return [items]  # the token ids of one prompt
    return items


def _token_ids(values: Any) -> list[int]:
    try:
        ids = [int(value) for value in values]
        if ids == list(values) and all(-(1 << 31) <= token < 1 << 31 for token in ids):
            return ids
    except (TypeError, ValueError):
        pass
    raise InvalidRequestError(
        f"a prompt is {values!r:.60}; give a text or a list of token ids (whole numbers)."
    )
