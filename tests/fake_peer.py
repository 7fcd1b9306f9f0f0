"""An adapter for tests/test_benchmarks.py: this engine, but for what FAKE_PEER says it does."""

from __future__ import annotations

import dataclasses
import os

from peers.peer import Outcome, Peer, Settings, TokenIds, Work, main
from peers.tinyvllm import Tinyvllm


class FakePeer(Tinyvllm):
    """honest | missing | breaks_down | own_prompts | stops_early | drops_a_prompt | guesses |
    decodes_early"""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._behaviour = os.environ["FAKE_PEER"]
        self._runs = 0

    def run(self, work: Work) -> Outcome:
        if self._behaviour == "drops_a_prompt":
            return super().run(Work(work.prompts[1:], work.max_tokens[1:]))
        self._runs += 1
        if self._behaviour == "breaks_down" and self._runs > 2:  # a warm-up and a round
            raise MemoryError("none left")
        outcome = super().run(work)
        if self._behaviour == "own_prompts":
            return dataclasses.replace(outcome, own_prompts=True)
        if self._behaviour == "decodes_early":
            return dataclasses.replace(outcome, early_tokens=3)
        change = {"stops_early": _without_the_last, "guesses": _with_another_last}
        tokens = [change.get(self._behaviour, list)(tokens) for tokens in outcome.tokens]
        return dataclasses.replace(outcome, tokens=tokens)

    @staticmethod
    def version() -> str:
        if os.environ["FAKE_PEER"] == "missing":
            import an_engine_that_nobody_has  # noqa: F401
        return "fake 1.0"


def _without_the_last(tokens: TokenIds) -> TokenIds:
    return tokens[:-1]


def _with_another_last(tokens: TokenIds) -> TokenIds:
    return [*tokens[:-1], (tokens[-1] + 1) % 100]


if __name__ == "__main__":
    peer: type[Peer] = FakePeer
    main(peer)
