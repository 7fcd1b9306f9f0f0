"""The other side of peers/: who there is, a process for each, and whether it did the same work."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from peers.peer import Outcome, TokenIds, Work
from results import Json

ROOT = Path(__file__).parent

# The largest gap between the likeliest token and another engine's choice, in nats, that is still a
# matter of rounding. bfloat16 moves the logits of these models, whose standard deviation is 3, by
# 0.1 (standard deviation) and 0.6 at the most; a token that comes of other work is off by 10.
NEAR_TIE = 1.0


class DifferentWorkError(Exception):
    """A peer did not do what the others did."""


class PeerError(Exception):
    """A peer is not installed or does not run."""


@dataclasses.dataclass(frozen=True)
class PeerSpec:
    """Who is compared: an adapter module, and how the file is called that it reads."""

    name: str
    module: str
    suffix: str = ""  # appended to the checkpoint's path; "" where it is read as it is
    python: str = sys.executable
    options: Json = dataclasses.field(default_factory=dict)  # as Settings has them


PEERS = {
    "tinyvllm": PeerSpec("tinyvllm", "peers.tinyvllm"),
    "llama.cpp": PeerSpec("llama.cpp", "peers.llama_cpp", ".gguf"),
    "openvino": PeerSpec("openvino", "peers.openvino_genai", ".openvino"),
    "transformers": PeerSpec("transformers", "peers.transformers"),
    "llama-batched-bench": PeerSpec("llama-batched-bench", "peers.llama_batched_bench", ".gguf"),
    "ctranslate2": PeerSpec("ctranslate2", "peers.ctranslate2", ".ct2"),
}


class PeerProcess:
    """One peer, loaded for one row."""

    def __init__(self, spec: PeerSpec, arguments: Sequence[str]) -> None:
        self.spec = spec
        self._process = start(spec, ["serve", *arguments])
        self.load_seconds: float
        self.load_seconds = read_answer(spec, self._process.stdout)

    def run(self, work: Work) -> Outcome:
        return Outcome(**self._ask(dataclasses.asdict(work)))

    def near_misses(self, prompts: list[TokenIds], tokens: TokenIds) -> list[float]:
        gaps: list[float] = self._ask({"near_misses": [prompts, tokens]})
        return gaps

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024

    def _ask(self, request: Json) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"{self.spec.name}: its process has ended") from None
        return read_answer(self.spec, self._process.stdout)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def start(spec: PeerSpec, arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [spec.python, "-m", spec.module, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if os.environ.get("TINYVLLM_BENCH_STDERR") else subprocess.DEVNULL,
        text=True,
    )


def read_answer(spec: PeerSpec, pipe: IO[str] | None) -> Any:
    assert pipe is not None
    line = pipe.readline()
    if not line:
        raise PeerError(
            f"{spec.name} ended without an answer; TINYVLLM_BENCH_STDERR=1 shows what it says"
        )
    answer = json.loads(line)
    if "ok" in answer:
        return answer["ok"]
    raise PeerError(answer.get("missing") or f"failed ({answer['failed']})")


# --- Whether it was the same work -----------------------------------------------------------------


def check_counts(work: Work, outcome: Outcome) -> None:
    """Throws DifferentWorkError unless there are exactly the tokens that were asked for."""
    lengths = [len(tokens) for tokens in outcome.tokens]
    if lengths != work.max_tokens:
        raise DifferentWorkError(
            f"{len(work.prompts)} sequences of {min(work.max_tokens)} to {max(work.max_tokens)} "
            f"tokens were asked for, {sum(work.max_tokens)} together; {len(lengths)} came, of "
            f"{min(lengths, default=0)} to {max(lengths, default=0)}, {sum(lengths)} together"
        )


def check_decode(outcome: Outcome) -> None:
    """Throws DifferentWorkError unless all sequences decode together from the first tokens on."""
    if outcome.early_tokens:
        raise DifferentWorkError(
            f"{outcome.early_tokens} tokens came while another sequence had none yet: they would "
            "be counted and their time would not. Let one step take all prompts"
        )


def check_agreement(
    work: Work,
    reference: Outcome,
    outcome: Outcome,
    near_misses: Callable[[list[TokenIds], TokenIds], list[float]],
) -> Json:
    """Compares greedy tokens with the reference's, up to the first difference in each sequence.

    There the reference says how much less likely the other token is; throws DifferentWorkError
    where that is more than a near tie. What comes after it continues another text.
    """
    prefixes = [
        next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
        for ours, theirs in zip(reference.tokens, outcome.tokens, strict=True)
    ]
    differing = [s for s, prefix in enumerate(prefixes) if prefix < work.max_tokens[s]]
    gaps = []
    if differing:
        gaps = near_misses(
            [work.prompts[s] + reference.tokens[s][: prefixes[s]] for s in differing],
            [outcome.tokens[s][prefixes[s]] for s in differing],
        )
    for s, gap in zip(differing, gaps, strict=True):
        if gap > NEAR_TIE:
            raise DifferentWorkError(
                f"token {prefixes[s]} of sequence {s} is {outcome.tokens[s][prefixes[s]]}, which "
                f"is {gap:.1f} nats less likely than {reference.tokens[s][prefixes[s]]}; "
                f"a near tie is {NEAR_TIE:.1f} at the most"
            )
    return {
        "sequences": len(work.prompts),
        "identical": len(work.prompts) - len(differing),
        "shortest_common_prefix": min(prefixes),
        "largest_gap": max(gaps, default=0.0),
    }
