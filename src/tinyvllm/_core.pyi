"""The types of the C++ module, written after csrc/bindings/.

tests/test_build.py holds it against the module: the same names, parameters and defaults.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__version__: str

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

class CpuContext:
    def __init__(self, num_threads: int = 0, isa: str = "") -> None: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    def parallel_for(self, count: int, call: Callable[[int, int], object]) -> None: ...

class _Ops:
    """tinyvllm._core.ops: a module there, to be used through its attributes."""

    @staticmethod
    def gather_rows(ctx: CpuContext, rows: npt.ArrayLike, table: Tensor) -> Floats: ...
    @staticmethod
    def rms_norm(
        ctx: CpuContext, x: Floats, weight: Floats, eps: float, dtype: str = "float32"
    ) -> Tensor: ...
    @staticmethod
    def matmul(
        ctx: CpuContext,
        x: Tensor,
        blocks: Sequence[Tensor],
        biases: Sequence[Floats | None] = [],
    ) -> Floats: ...
    @staticmethod
    def matmul_add(
        ctx: CpuContext,
        x: Tensor,
        blocks: Sequence[Tensor],
        residual: Floats,
        biases: Sequence[Floats | None] = [],
    ) -> Floats: ...
    @staticmethod
    def norm_matmul(
        ctx: CpuContext,
        x: Floats,
        norm: Floats,
        eps: float,
        blocks: Sequence[Tensor],
        dtype: str = "float32",
        biases: Sequence[Floats | None] = [],
    ) -> Floats: ...
    @staticmethod
    def norm_swiglu(
        ctx: CpuContext,
        x: Floats,
        norm: Floats,
        eps: float,
        blocks: Sequence[Tensor],
        dtype: str = "float32",
        biases: Sequence[Floats | None] = [],
    ) -> Tensor: ...
    @staticmethod
    def silu_mul(ctx: CpuContext, gate_up: Floats, dtype: str = "float32") -> Tensor: ...
    @staticmethod
    def rope_angles(
        ctx: CpuContext, positions: npt.ArrayLike, inverse_frequencies: Floats, scale: float = 1.0
    ) -> Floats: ...
    @staticmethod
    def qk_norm_rope_and_cache(
        ctx: CpuContext,
        qkv: Floats,
        num_heads: int,
        q_norm: Floats | None,
        k_norm: Floats | None,
        eps: float,
        cos_sin: Floats,
        slots: npt.ArrayLike,
        keys: Tensor,
        values: Tensor,
    ) -> Floats: ...
    @staticmethod
    def paged_attention(
        ctx: CpuContext,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        sequences: Sequence[tuple[int, int, Sequence[int]]],
        num_heads: int,
        window: int = 0,
        scale: float = 1.0,
        dtype: str = "float32",
    ) -> Tensor: ...

ops: _Ops
