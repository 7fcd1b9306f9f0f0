"""tinyvllm: an LLM inference engine that one person can read in a weekend and still use for work.

    from tinyvllm import LLM, SamplingParams

Names are loaded when they are first used, so that `tinyvllm --help` imports no engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyvllm.async_engine import AsyncEngine
    from tinyvllm.llm import LLM
    from tinyvllm.outputs import CompletionOutput, Logprob, RequestDelta, RequestOutput
    from tinyvllm.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "Logprob",
    "RequestDelta",
    "RequestOutput",
    "SamplingParams",
]

_HOMES = {
    "LLM": "tinyvllm.llm",
    "AsyncEngine": "tinyvllm.async_engine",
    "CompletionOutput": "tinyvllm.outputs",
    "Logprob": "tinyvllm.outputs",
    "RequestDelta": "tinyvllm.outputs",
    "RequestOutput": "tinyvllm.outputs",
    "SamplingParams": "tinyvllm.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tinyvllm")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tinyvllm' has no attribute {name!r}")
