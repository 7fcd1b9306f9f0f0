"""Hugging Face Transformers on PyTorch, eager, all prompts as one batch."""

from __future__ import annotations

import time
from typing import Any

from peers.peer import Outcome, Peer, Settings, TokenIds, Work, main


class Transformers(Peer):
    def __init__(self, settings: Settings) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch: Any = torch
        self._settings = settings
        torch.set_num_threads(settings.num_threads)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=torch.bfloat16
        )
        self._model.eval().to(settings.device)

    def run(self, work: Work) -> Outcome:
        max_tokens = work.even()
        arrived: list[float] = []

        def note_time(input_ids: Any, scores: Any, **_: Any) -> Any:
            if self._settings.device != "cpu":
                self._torch.cuda.synchronize()
            arrived.append(time.perf_counter())
            return self._torch.zeros(len(input_ids), dtype=bool, device=input_ids.device)

        batch = self._torch.tensor(work.prompts, device=self._settings.device)
        began = time.perf_counter()
        with self._torch.inference_mode():
            output = self._model.generate(
                batch,
                attention_mask=self._torch.ones_like(batch),
                do_sample=False,
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,  # never eos: the run does not end early
                pad_token_id=0,
                stopping_criteria=[note_time],
            )
        tokens = output[:, batch.shape[1] :].tolist()
        return Outcome(tokens, time.perf_counter() - began, arrived[0] - began)

    def encode(self, text: str) -> TokenIds:
        from transformers import AutoTokenizer

        token_ids: TokenIds = AutoTokenizer.from_pretrained(self._settings.model)(text).input_ids
        return token_ids

    @staticmethod
    def version() -> str:
        import torch
        import transformers

        return f"Transformers {transformers.__version__}, PyTorch {torch.__version__}"


if __name__ == "__main__":
    main(Transformers)
