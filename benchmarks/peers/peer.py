"""What a peer is to the benchmarks, and the process that it runs in.

An adapter is a module of this package with a subclass of Peer and, at its end, `main(ItsClass)`:

    python -m peers.NAME prepare --checkpoint DIR --model PATH [--tokenizer]
    python -m peers.NAME serve --model PATH --num-threads N ...
    python -m peers.NAME first-token --model PATH --num-threads N --ids 1,2,3 | --text TEXT

Each runs in a process of its own: a clean address space, threads and libraries that disturb nobody
else, a start that can be timed as a whole, and an environment of its own where it needs one. An
adapter imports its engine inside its methods, so that a missing one is an answer and not a crash,
and nothing here needs tinyvllm. Answers are JSON, one a line, on standard output:

    {"ok": ...} | {"missing": "why"} | {"failed": "why"}
"""

from __future__ import annotations

import abc
import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TokenIds = list[int]


@dataclasses.dataclass(frozen=True)
class Work:
    """Greedy continuations of all prompts at once, each of exactly as many tokens as are asked for:
    eos is an ordinary token."""

    prompts: list[TokenIds]
    max_tokens: list[int]  # of each

    def even(self) -> int:
        """The number of tokens, where all sequences are of one shape."""
        if len(set(self.max_tokens)) > 1 or len({len(prompt) for prompt in self.prompts}) > 1:
            raise ValueError("sequences of several lengths would have to be padded: other work")
        return self.max_tokens[0]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a peer made of a Work. It clears its caches before, outside these times."""

    tokens: list[TokenIds]
    seconds: float
    first_token_seconds: float  # until every prompt has its first token
    early_tokens: int = 0  # behind the first of their sequence, when not all had one yet
    own_prompts: bool = (
        False  # it takes prompts of its own, of the same lengths: no tokens to check
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a peer is loaded: room for what will be asked of it, and no more."""

    model: Path  # what prepare() wrote
    num_threads: int
    max_num_seqs: int = 1
    max_model_len: int = 1024
    max_step_tokens: int = 2048  # at a time, where an engine has such a limit
    device: str = "cpu"
    tokenizer: bool = False  # whether encode() will be called
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of this engine's LLM


class Peer(abc.ABC):
    """A loaded engine, in bfloat16."""

    @staticmethod
    def prepare(checkpoint: Path, model: Path, tokenizer: bool) -> None:
        """Writes a checkpoint in the engine's own format to `model`, unless it is there.

        Engines that read Hugging Face checkpoints are given the checkpoint itself.
        """
        if model != checkpoint:
            raise NotImplementedError(f"nothing writes {model.name}")

    @abc.abstractmethod
    def __init__(self, settings: Settings) -> None: ...

    @abc.abstractmethod
    def run(self, work: Work) -> Outcome: ...

    @abc.abstractmethod
    def encode(self, text: str) -> TokenIds: ...

    @staticmethod
    @abc.abstractmethod
    def version() -> str:
        """Name and version of the engine, and what of its settings is not the default."""

    def near_misses(self, prompts: list[TokenIds], tokens: TokenIds) -> list[float]:
        """How much less likely each token is after its prompt than the likeliest one, in nats.

        Only the peer that the others are checked against must know this.
        """
        raise NotImplementedError(f"{type(self).__name__} does not tell logprobs")


def main(peer: type[Peer]) -> None:
    """The process of one adapter."""
    # What lies beside this package is not for the engines: Transformers would import kernels.py.
    here = Path(__file__).resolve().parent.parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    # Engines print to standard output, too; what they say goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(kind: str, value: object) -> None:
        answers.write(json.dumps({kind: value}) + "\n")
        answers.flush()

    def try_to(act: Callable[[], object]) -> None:
        try:
            answer("ok", act())
        except ImportError as error:
            answer("missing", f"not installed ({error})")
            sys.exit(1)
        except Exception as error:
            answer("failed", f"{type(error).__name__}: {error}".splitlines()[0])
            sys.exit(1)

    arguments = _parse()
    if arguments.command == "prepare":
        try_to(lambda: _prepare(peer, arguments))
        return
    settings = Settings(
        model=arguments.model,
        num_threads=arguments.num_threads,
        max_num_seqs=arguments.max_num_seqs,
        max_model_len=arguments.max_model_len,
        max_step_tokens=arguments.max_step_tokens,
        device=arguments.device,
        tokenizer=arguments.text is not None,
        options=arguments.options,
    )
    loaded: list[Peer] = []
    if arguments.command == "first-token":
        try_to(lambda: _first_token(peer, settings, arguments, loaded))
        answers.close()
        os._exit(0)  # the time until here is what counts; freeing is nobody's wait

    def load() -> float:
        began = time.perf_counter()
        loaded.append(peer(settings))
        return time.perf_counter() - began

    try_to(load)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if "near_misses" in request:
            try_to(lambda r=request["near_misses"]: loaded[0].near_misses(*r))  # type: ignore[misc]
        else:
            try_to(lambda r=request: dataclasses.asdict(loaded[0].run(Work(**r))))  # type: ignore[misc]


def _prepare(peer: type[Peer], arguments: argparse.Namespace) -> str:
    version = peer.version()  # first: a peer that is not installed writes nothing
    peer.prepare(arguments.checkpoint, arguments.model, arguments.tokenizer)
    return version


def _first_token(
    peer_class: type[Peer],
    settings: Settings,
    arguments: argparse.Namespace,
    loaded: list[Peer],
) -> tuple[float, TokenIds]:
    """The seconds to load, and the prompt's ids with the first token behind them. The peer is put
    into `loaded`: it outlives the answer, or its unmapping would be timed."""
    began = time.perf_counter()
    peer = peer_class(settings)
    loaded.append(peer)
    load_seconds = time.perf_counter() - began
    if arguments.text is not None:
        prompt = peer.encode(arguments.text)
    else:
        prompt = [int(token) for token in arguments.ids.split(",")]
    outcome = peer.run(Work([prompt], [1]))
    if outcome.own_prompts:
        raise ValueError("it makes up its own prompts, so that its first token is no answer")
    return load_seconds, [*prompt, *outcome.tokens[0]]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["prepare", "serve", "first-token"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--tokenizer", action="store_true")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--max-step-tokens", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--ids")
    parser.add_argument("--text")
    return parser.parse_args()
