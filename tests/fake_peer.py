"""An adapter for tests/test_benchmarks.py: this engine, but for what FAKE_PEER says it does."""

from __future__ import annotations

import dataclasses
import os

from peers.peer import Outcome, Peer, Settings, TokenIds, Work, main
from peers.tinyvllm import Tinyvllm


class FakePeer(Tinyvllm):
    """honest | missing | stops_early | drops_a_prompt | guesses"""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._behaviour = os.environ["FAKE_PEER"]

    def run(self, work: Work) -> Outcome:
        if self._behaviour == "drops_a_prompt":
            return super().run(Work(work.prompts[1:], work.max_tokens[1:]))
        outcome = super().run(work)
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
