"""What a model will take of memory, computed from its config and its tensors' headers alone.

The sizes are the core's own (csrc/engine/memory_sizes.h); what is repeated here is which tensors it
uses in place. What an engine on the CPU keeps resident, in the terms of the files that decide it:

    program       Python, the libraries and the tokenizer
    weights       csrc/model/weights.h: matrices are used where they lie in the mapped files, and
                  are resident once a step has read them; norms, biases and other dtypes are copied
    activations   csrc/model/transformer.h, for the largest step, and what each thread works in
    KV cache      csrc/ops/kv_cache.h: reserved at the start, resident as tokens fill it

and on a GPU, where all of it is allocated at the start (csrc/engine/cuda_runner.cpp):

    program       the driver's context, its libraries, and what other programs hold
    weights       csrc/model/cuda_weights.h: all of them, one after the other
    activations   as above; with them the arrays of a step and the memory between kernels
    KV cache      what is left of gpu_memory_utilization, but for CUDA graphs and the driver

An embedding that is not the output matrix too is read row by row; it is counted in full, as the
text of a long run touches nearly all of its pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

BLOCK_SIZE = 16  # tokens, LLM's default
GPU_UTILIZATION = 0.9  # LLM's default
# What the driver and its context are taken to need of a GPU that is not here to be asked.
GPU_PROGRAM = 1 << 30

_SIZES = {"float32": 4, "bfloat16": 2}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class TensorHeader(NamedTuple):
    """A tensor as its file describes it."""

    name: str
    dtype: str  # as safetensors writes it: F32, F16, BF16
    shape: tuple[int, ...]
    num_bytes: int
    file: str | None  # None: of a shape without files

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Limits:
    """LLM's arguments that decide how much memory it takes."""

    dtype: str  # bfloat16 or float32
    device: str = "cpu"  # or cuda
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    repack_weights: bool = False
    num_threads: int = 0  # on the CPU; 0: as many as there are cores


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, and tokens of KV cache. `kv_limit` says what the number of tokens comes from."""

    memory: int
    program: int
    mapped_weights: int  # used where they lie
    copied_weights: int
    passed_weights: int  # read once, to be copied; their pages are given back
    activations: int
    kv_bytes_per_token: int
    kv_tokens: int  # that the cache can hold
    kv_limit: str  # sequences, share (of memory), utilization (of a GPU) or left
    default_kv_tokens: int  # that LLM() would reserve in this memory
    max_model_len: int  # of one sequence
    asked_model_len: int | None

    @property
    def weights(self) -> int:
        return self.mapped_weights + self.copied_weights

    @property
    def kv_cache(self) -> int:
        return self.kv_tokens * self.kv_bytes_per_token

    @property
    def without_kv_cache(self) -> int:
        return self.program + self.weights + self.activations

    @property
    def needed(self) -> int:
        """What is resident when the KV cache is full."""
        return self.without_kv_cache + self.kv_cache

    @property
    def full_length_sequences(self) -> int:
        return self.kv_tokens // self.max_model_len if self.max_model_len else 0

    @property
    def fits(self) -> bool:
        return self.kv_tokens >= max(self.asked_model_len or 0, BLOCK_SIZE)


def compute_dtype(asked: str, checkpoint_dtype: str) -> str:
    """What `auto` means: float32 for float32 files, else bfloat16."""
    if asked != "auto":
        return asked
    return "float32" if checkpoint_dtype == "float32" else "bfloat16"


def used_tensors(config: Mapping[str, Any], tensors: Iterable[TensorHeader]) -> list[TensorHeader]:
    """Those that the model reads: a file may hold the tied output matrix a second time."""
    tied = config["tie_word_embeddings"]
    return [tensor for tensor in tensors if not (tied and tensor.name == "lm_head.weight")]


def make_plan(
    config: Mapping[str, Any],
    tensors: Iterable[TensorHeader],
    limits: Limits,
    *,
    memory: int,
    program: int,
) -> MemoryPlan:
    """config: as _core.parse_model_config gives it. memory, program: in bytes; of a GPU, all that
    it has, and what is taken of it before the weights come."""
    from tinyvllm import _core

    on_gpu = limits.device == "cuda"
    mapped, copied, passed = _weight_bytes(used_tensors(config, tensors), limits)
    copied += 4 * (config["head_dim"] // 2)  # the frequencies of the rotation
    if on_gpu:
        mapped, copied, passed = 0, mapped + copied, 0
    own = config["max_position_embeddings"]
    longest = min(own, limits.max_model_len or own)
    activations = _core.step_memory_bytes(
        config,
        limits.device,
        limits.dtype,
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
        longest,
        BLOCK_SIZE,
        limits.num_threads,
    )

    # As Engine::choose_kv_shape does it.
    bytes_per_block = _core.kv_block_bytes(config, limits.dtype, BLOCK_SIZE)
    for_all_sequences = limits.max_num_seqs * -(-longest // BLOCK_SIZE)
    taken = program + mapped + copied + activations
    if on_gpu:
        taken += _core.gpu_reserve_bytes(config, limits.max_num_seqs, longest)
        left = _core.gpu_kv_cache_budget(memory, taken, GPU_UTILIZATION) // bytes_per_block
        by_default = min(for_all_sequences, left)
        limit = "sequences" if by_default < left else "utilization"
        num_blocks = by_default
    else:
        left = max(0, memory - taken) // bytes_per_block
        by_default = min(for_all_sequences, _core.host_kv_cache_budget(memory) // bytes_per_block)
        limit = "sequences" if by_default == for_all_sequences else "share"
        num_blocks, limit = min((by_default, limit), (left, "left"), key=lambda item: item[0])
    return MemoryPlan(
        memory=memory,
        program=program,
        mapped_weights=mapped,
        copied_weights=copied,
        passed_weights=passed,
        activations=activations,
        kv_bytes_per_token=bytes_per_block // BLOCK_SIZE,
        kv_tokens=num_blocks * BLOCK_SIZE,
        kv_limit=limit,
        default_kv_tokens=by_default * BLOCK_SIZE,
        max_model_len=min(longest, num_blocks * BLOCK_SIZE),
        asked_model_len=limits.max_model_len,
    )


def _weight_bytes(tensors: list[TensorHeader], limits: Limits) -> tuple[int, int, int]:
    """Bytes that are used in place, that are copies, and that are read once to be copied."""
    from tinyvllm import _core

    dtype = limits.dtype
    tied = all(tensor.name != "lm_head.weight" for tensor in tensors)
    mapped = copied = passed = 0
    for tensor in tensors:
        stored = _DTYPES.get(tensor.dtype)
        is_matrix = len(tensor.shape) > 1
        is_embedding = tensor.name == "model.embed_tokens.weight"  # whose rows are read, too
        in_place = is_matrix and (stored == dtype or (stored, dtype) == ("bfloat16", "float32"))
        kept = stored if in_place and stored else dtype
        size = _SIZES[kept] if is_matrix else 4
        repacked = limits.repack_weights and is_matrix
        if repacked and (tied or not is_embedding):
            rows, depth = tensor.shape[0], math.prod(tensor.shape[1:])
            copied += _core.repacked_bytes(rows, depth, kept)
        keeps_rows = is_embedding or not repacked
        if in_place and keeps_rows:
            mapped += tensor.num_bytes
            continue
        passed += tensor.num_bytes
        if keeps_rows:
            copied += tensor.num_elements * size
    return mapped, copied, passed
