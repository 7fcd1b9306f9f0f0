"""This engine, through its public LLM class."""

from __future__ import annotations

import time
from typing import Any

from peers.peer import Outcome, Peer, Settings, TokenIds, Work, main

_LOGPROBS = 20  # a token that is not among so many is no near miss
_BLOCK_SIZE = 16


class Tinyvllm(Peer):
    def __init__(self, settings: Settings) -> None:
        from tinyvllm import LLM

        blocks_a_sequence = -(-settings.max_model_len // _BLOCK_SIZE)
        self._llm = LLM(
            settings.model,
            device=settings.device,
            num_threads=settings.num_threads,
            max_num_seqs=settings.max_num_seqs,
            max_model_len=settings.max_model_len,
            max_num_batched_tokens=settings.max_step_tokens,
            block_size=_BLOCK_SIZE,
            # Not most of a GPU's memory: the peers beside it need some, too.
            num_gpu_blocks_override=settings.max_num_seqs * blocks_a_sequence,
            enable_prefix_caching=False,  # a prompt that comes again is computed again
            quiet=True,
            defer_tokenizer=not settings.tokenizer,
            **settings.options,
        )

    def run(self, work: Work) -> Outcome:
        params = [_greedy(count) for count in work.max_tokens]
        tokens: list[TokenIds] = [[] for _ in work.prompts]
        waiting, first_token_seconds, early = len(work.prompts), 0.0, 0
        missing = sum(work.max_tokens)
        began = time.perf_counter()
        for delta in self._llm.stream(work.prompts, params):
            if delta.token_ids and not tokens[delta.prompt_index]:
                waiting -= 1
                if not waiting:
                    first_token_seconds = time.perf_counter() - began
                    early = sum(max(0, len(of_one) - 1) for of_one in tokens)
            tokens[delta.prompt_index] += delta.token_ids
            missing -= len(delta.token_ids)
            if not missing:
                break  # what is left is text, and only ids were asked for
        return Outcome(tokens, time.perf_counter() - began, first_token_seconds, early)

    def encode(self, text: str) -> TokenIds:
        token_ids: TokenIds = self._llm.get_tokenizer().encode(text)
        return token_ids

    def near_misses(self, prompts: list[TokenIds], tokens: TokenIds) -> list[float]:
        outputs = self._llm.generate(prompts, _greedy(1, logprobs=_LOGPROBS), use_tqdm=False)
        misses = []
        for output, token in zip(outputs, tokens, strict=True):
            logprobs = output.outputs[0].logprobs
            assert logprobs is not None
            entries = logprobs[0]
            best = max(entry.logprob for entry in entries.values())
            misses.append(best - entries[token].logprob if token in entries else float("inf"))
        return misses

    @staticmethod
    def version() -> str:
        import tinyvllm

        return f"tinyvllm {tinyvllm.__version__}"


def _greedy(max_tokens: int, **options: Any) -> Any:
    from tinyvllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **options)


if __name__ == "__main__":
    main(Tinyvllm)
