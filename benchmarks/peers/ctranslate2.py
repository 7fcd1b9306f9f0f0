"""CTranslate2, in bfloat16 where it can and in float32 where its CPU kernels know no bfloat16."""

from __future__ import annotations

import json
import time
from pathlib import Path

from peers.peer import Outcome, Peer, Settings, TokenIds, Work, main


class Ctranslate2(Peer):
    @staticmethod
    def prepare(checkpoint: Path, model: Path, tokenizer: bool) -> None:
        from ctranslate2.converters import TransformersConverter

        if not model.exists():
            partial = model.with_suffix(".partial")
            converter = TransformersConverter(str(checkpoint), low_cpu_mem_usage=True)
            converter.convert(str(partial), quantization="bfloat16", force=True)
            partial.rename(model)

    def __init__(self, settings: Settings) -> None:
        import ctranslate2

        self._settings = settings
        self._generator = ctranslate2.Generator(
            str(settings.model),
            device=settings.device,
            compute_type=_compute_type(settings.device),
            inter_threads=1,
            intra_threads=settings.num_threads,
        )
        self._words: list[str] = json.loads((settings.model / "vocabulary.json").read_text())

    def run(self, work: Work) -> Outcome:
        max_tokens = work.even()
        waiting, first_token_seconds = len(work.prompts), 0.0

        def note_time(result: object) -> bool:
            nonlocal waiting, first_token_seconds
            if waiting:
                waiting -= 1
                if not waiting:
                    first_token_seconds = time.perf_counter() - began
            return False

        prompts = [[self._words[token] for token in prompt] for prompt in work.prompts]
        began = time.perf_counter()
        results = self._generator.generate_batch(
            prompts,
            max_length=max_tokens,
            min_length=max_tokens,
            sampling_topk=1,
            end_token=[],
            include_prompt_in_result=False,
            callback=note_time,
        )
        seconds = time.perf_counter() - began
        return Outcome([r.sequences_ids[0] for r in results], seconds, first_token_seconds)

    def encode(self, text: str) -> TokenIds:
        from tokenizers import Tokenizer

        path = self._settings.model.with_suffix("") / "tokenizer.json"
        token_ids: TokenIds = Tokenizer.from_file(str(path)).encode(text).ids
        return token_ids

    @staticmethod
    def version() -> str:
        import ctranslate2

        return f"CTranslate2 {ctranslate2.__version__}, computes in {_compute_type('cpu')}"


def _compute_type(device: str) -> str:
    import ctranslate2

    known = ctranslate2.get_supported_compute_types(device)
    return "bfloat16" if "bfloat16" in known else "float32"


if __name__ == "__main__":
    main(Ctranslate2)
