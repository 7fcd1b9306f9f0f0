"""The types of the C++ module, written after csrc/bindings/.

tests/test_build.py holds it against the module: the same names, parameters and defaults.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

__version__: str
compiler: str

Floats = npt.NDArray[np.float32]
# float32, or the bits of bfloat16.
Tensor = npt.NDArray[np.float32] | npt.NDArray[np.uint16]
Path = str | PathLike[str]
# The logprob of the token, its rank, the best ids, their logprobs.
Logprobs = tuple[float, int, list[int], list[float]]
FinishReason = Literal["stop", "length", "abort", "error"]

class Checkpoint:
    def __init__(self, directory: Path) -> None: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def failed(self) -> bool: ...
    def names(self) -> list[str]: ...
    def tensor_info(self, name: str) -> dict[str, Any]: ...
    def read(self, name: str) -> Floats: ...
    def warnings(self) -> list[str]: ...
    def check_files(self) -> None: ...

def parse_model_config(config_json: Path) -> dict[str, Any]: ...

class SamplingParams:
    def __init__(self, **kwargs: Any) -> None: ...

class StepOutput:
    @property
    def request(self) -> list[int]: ...
    @property
    def sample(self) -> list[int]: ...
    @property
    def token(self) -> list[int]: ...
    @property
    def finish(self) -> list[FinishReason | None]: ...
    @property
    def logprobs(self) -> list[Logprobs | None]: ...
    @property
    def ended(self) -> list[tuple[int, int, Exception | None]]: ...
    @property
    def prompt_logprobs(self) -> dict[int, list[Logprobs]]: ...

class Engine:
    def __init__(
        self,
        model: Path,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        num_threads: int = 0,
        seed: int = 0,
        prefix_caching: bool = True,
        static_batching: bool = False,
        prefix_hash_mask: int = 18446744073709551615,
        fail_at_step: int = 0,
        eos_token_ids: Sequence[int] = [],
        trace: Path | None = None,
        device: str = "auto",
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        batch_invariant: bool = False,
        repack_weights: bool = False,
    ) -> None: ...
    def add_request(self, id: int, prompt: Sequence[int], params: SamplingParams) -> None: ...
    def step(self) -> StepOutput: ...
    def finish(self, id: int, sample: int, reason: str) -> None: ...
    def abort(self, id: int) -> None: ...
    def reset_prefix_cache(self) -> bool: ...
    def snapshot(self) -> dict[str, Any]: ...
    def has_unfinished(self) -> bool: ...
    def stats(self) -> dict[str, Any]: ...
    def info(self) -> dict[str, Any]: ...
    def close(self) -> None: ...

class Model:
    def __init__(
        self,
        directory: Path,
        dtype: str = "auto",
        num_threads: int = 0,
        block_size: int = 16,
        device: str = "auto",
        enforce_eager: bool = False,
        batch_invariant: bool = False,
        repack_weights: bool = False,
    ) -> None: ...
    def logits(self, token_ids: npt.ArrayLike, chunk_size: int = 0) -> Floats: ...

class ContentKey:
    def __init__(self) -> None: ...
    @property
    def serial(self) -> int: ...

class BlockPool:
    def __init__(self, num_blocks: int, prefix_hash_mask: int = 18446744073709551615) -> None: ...
    def allocate(self) -> int: ...
    def share(self, block: int) -> None: ...
    def release(self, block: int) -> None: ...
    def forget(self, block: int) -> None: ...
    def count(self, block: int) -> int: ...
    def publish(self, block: int, before: ContentKey, tokens: Sequence[int]) -> ContentKey: ...
    def find(self, before: ContentKey, tokens: Sequence[int]) -> int | None: ...
    def key_of(self, block: int) -> ContentKey: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    @property
    def num_used(self) -> int: ...
    @property
    def num_cached(self) -> int: ...

def sample(
    params: SamplingParams,
    logits: Sequence[float] | npt.NDArray[np.floating[Any]],
    prompt: Sequence[int],
    output: Sequence[int],
    seed: int = 0,
    eos_token_ids: Sequence[int] = [],
    sample_index: int = 0,
) -> tuple[int, Logprobs | None]: ...
def gumbel_noise(seed: int, sample_index: int, position: int, token: int) -> float: ...
def philox(key: Sequence[int], counter: Sequence[int]) -> list[int]: ...
def supported_isas() -> list[str]: ...
def default_num_threads() -> int: ...
def available_memory() -> int: ...
def require_cuda_build() -> None: ...
def refuse_repacked_weights() -> NoReturn: ...
def padded_batch_size(num_sequences: int) -> int: ...
def most_decode_items(max_num_seqs: int, num_kv_heads: int, max_model_len: int) -> int: ...
def num_decode_sizes(max_num_seqs: int, num_kv_heads: int, max_model_len: int) -> int: ...
def check_batch_limits(max_num_seqs: int, max_num_batched_tokens: int) -> None: ...
def step_memory_bytes(
    config: Mapping[str, Any],
    device: str,
    dtype: str,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    block_size: int,
    num_threads: int,
) -> int: ...
def kv_block_bytes(config: Mapping[str, Any], dtype: str, block_size: int) -> int: ...
def host_kv_cache_budget(available: int) -> int: ...
def gpu_kv_cache_budget(total: int, used: int, utilization: float) -> int: ...
def gpu_reserve_bytes(config: Mapping[str, Any], max_num_seqs: int, max_model_len: int) -> int: ...
def repacked_bytes(rows: int, depth: int, dtype: str) -> int: ...

class CpuContext:
    def __init__(self, num_threads: int = 0, isa: str = "") -> None: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    def parallel_for(self, count: int, call: Callable[[int, int], object]) -> None: ...

def measure_read_bandwidth(
    ctx: CpuContext, seconds: float = 0.5, memory: np.ndarray | None = None
) -> float: ...
def measure_arithmetic(ctx: CpuContext, seconds: float = 0.2) -> float: ...
def time_matmul(
    ctx: CpuContext,
    rows: int,
    outputs: int,
    depth: int,
    copies: int = 1,
    rounds: int = 5,
    layout: str = "rows",
) -> list[float]: ...
def cuda_build() -> str: ...

# Only in a module that was built with CUDA, real or emulated: up to run_trap.

class CudaContext:
    def __init__(self, device: int = 0, batch_invariant: bool = False) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def compute_capability(self) -> int: ...
    @property
    def num_multiprocessors(self) -> int: ...
    @property
    def cublaslt(self) -> str: ...

def cuda_memory() -> tuple[int, int]: ...

Context = CpuContext | CudaContext

class MatmulPlan:
    def __init__(
        self,
        kernel: str,
        *,
        shape: int = 0,
        blocks_per_multiprocessor: int = 0,
        fuses_norm: bool = False,
        rank: int = 0,
    ) -> None: ...
    @property
    def kernel(self) -> str: ...
    @property
    def shape(self) -> int: ...
    @property
    def blocks_per_multiprocessor(self) -> int: ...
    @property
    def fuses_norm(self) -> bool: ...
    @property
    def rank(self) -> int: ...

def streaming_shapes() -> list[list[int]]: ...
def num_normalising_shapes() -> int: ...

class MatmulTimer:
    def __init__(
        self, ctx: CudaContext, matrices: Sequence[tuple[str, int, int]], max_rows: int
    ) -> None: ...
    def plans(self, rows: int) -> list[MatmulPlan]: ...
    def milliseconds(
        self, rows: int, plans: Sequence[MatmulPlan], passes: int, repetitions: int
    ) -> list[float]: ...
    def read_milliseconds(self, passes: int, repetitions: int) -> list[float]: ...
    @property
    def weight_bytes(self) -> int: ...

# Row of the logits, parameters, prompt, output so far, seed, number of the sample; None: padding.
SampledRow = tuple[int, SamplingParams, Sequence[int], Sequence[int], int, int] | None

def cuda_sample(
    ctx: CudaContext,
    logits: Floats,
    rows: Sequence[SampledRow],
    eos_token_ids: Sequence[int],
) -> list[tuple[int, int, Logprobs | None]]: ...
def cuda_logprobs(
    ctx: CudaContext, logits: Floats, tokens: npt.ArrayLike, k: int
) -> list[Logprobs]: ...
def time_attention(
    ctx: CudaContext,
    num_sequences: int,
    num_tokens: int,
    context: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_layers: int,
    block_size: int,
    split: int,
    passes: int,
    repetitions: int,
) -> list[float]: ...
def time_sampling(
    ctx: CudaContext,
    num_rows: int,
    vocab: int,
    temperature: float,
    top_k: int,
    top_p: float,
    num_logprobs: int,
    passes: int,
    repetitions: int,
) -> list[float]: ...
def cuda_feed_tokens(
    ctx: CudaContext, sampled: npt.ArrayLike, sources: npt.ArrayLike, tokens: npt.ArrayLike
) -> list[int]: ...
def upload_and_read_back(
    ctx: CudaContext, arrays: Sequence[npt.NDArray[np.uint8]], num_threads: int
) -> list[npt.NDArray[np.uint8]]: ...

# Only emulated.
def trap_names() -> list[str]: ...
def run_trap(ctx: CudaContext, name: str, with_mistake: bool) -> bool: ...

class _Ops:
    """tinyvllm._core.ops: a module there, to be used through its attributes."""

    @staticmethod
    def gather_rows(
        ctx: Context, rows: npt.ArrayLike, table: Tensor, dtype: str = "float32"
    ) -> Tensor: ...
    @staticmethod
    def rms_norm(
        ctx: Context, x: Floats, weight: Floats, eps: float, dtype: str = "float32"
    ) -> Tensor: ...
    @staticmethod
    def matmul(
        ctx: Context,
        x: Tensor,
        blocks: Sequence[Tensor],
        biases: Sequence[Floats | None] = [],
        out_dtype: str = "float32",
        layout: str = "rows",
    ) -> Tensor: ...
    @staticmethod
    def matmul_logits(
        ctx: CpuContext, x: Tensor, block: Tensor, layout: str = "rows"
    ) -> tuple[Tensor, Tensor]: ...
    @staticmethod
    def matmul_largest(
        ctx: CpuContext, x: Tensor, block: Tensor, layout: str = "rows"
    ) -> tuple[Floats, npt.NDArray[np.int32]]: ...
    @staticmethod
    def repack(ctx: CpuContext, block: Tensor) -> Tensor: ...
    @staticmethod
    def matmul_add(
        ctx: Context,
        x: Tensor,
        blocks: Sequence[Tensor],
        residual: Floats,
        biases: Sequence[Floats | None] = [],
        layout: str = "rows",
    ) -> Floats: ...
    @staticmethod
    def norm_matmul(
        ctx: Context,
        x: Floats,
        norm: Floats,
        eps: float,
        blocks: Sequence[Tensor],
        dtype: str = "float32",
        biases: Sequence[Floats | None] = [],
        out_dtype: str = "float32",
    ) -> Tensor: ...
    @staticmethod
    def norm_swiglu(
        ctx: Context,
        x: Floats,
        norm: Floats,
        eps: float,
        blocks: Sequence[Tensor],
        dtype: str = "float32",
        biases: Sequence[Floats | None] = [],
        layout: str = "rows",
    ) -> Tensor: ...
    @staticmethod
    def matmul_by_plan(
        ctx: CudaContext,
        plan: MatmulPlan,
        use: str,
        x: Tensor,
        blocks: Sequence[Tensor],
        biases: Sequence[Floats | None] = [],
        norm: Floats | None = None,
        eps: float = 0.0,
        residual: Floats | None = None,
        out_dtype: str = "float32",
    ) -> Tensor: ...
    @staticmethod
    def silu_mul(ctx: Context, gate_up: Tensor, dtype: str = "float32") -> Tensor: ...
    @staticmethod
    def rope_angles(
        ctx: Context, positions: npt.ArrayLike, inverse_frequencies: Floats, scale: float = 1.0
    ) -> Floats: ...
    @staticmethod
    def qk_norm_rope_and_cache(
        ctx: Context,
        qkv: Tensor,
        num_heads: int,
        q_norm: Floats | None,
        k_norm: Floats | None,
        eps: float,
        cos_sin: Floats,
        slots: npt.ArrayLike,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor: ...
    @staticmethod
    def copy_blocks(ctx: Context, pool: Tensor, copies: Sequence[tuple[int, int]]) -> Tensor: ...
    @staticmethod
    def rope_and_attend(
        ctx: Context,
        qkv: Tensor,
        num_heads: int,
        q_norm: npt.ArrayLike | None,
        k_norm: npt.ArrayLike | None,
        eps: float,
        cos_sin: npt.ArrayLike,
        slots: npt.ArrayLike,
        keys: Tensor,
        values: Tensor,
        sequences: Sequence[tuple[int, int, Sequence[int]]],
        window: int,
        scale: float,
        dtype: str,
    ) -> Tensor: ...
    @staticmethod
    def paged_attention(
        ctx: Context,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        sequences: Sequence[tuple[int, int, Sequence[int]]],
        num_heads: int,
        window: int = 0,
        scale: float = 1.0,
        dtype: str = "float32",
        as_chunks: bool = False,
    ) -> Tensor: ...

ops: _Ops
