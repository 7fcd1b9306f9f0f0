"""OpenVINO GenAI's continuous batching, which is also what its LLMPipeline runs on by default."""

from __future__ import annotations

import time
from pathlib import Path

from peers.peer import Outcome, Peer, Settings, TokenIds, Work, main


class OpenvinoGenai(Peer):
    @staticmethod
    def prepare(checkpoint: Path, model: Path, tokenizer: bool) -> None:
        from peers.openvino_model import write_openvino, write_tokenizer

        if not model.exists():
            write_openvino(checkpoint, model)
        if tokenizer and not _tokenizer_of(model).exists():
            write_tokenizer(checkpoint, _tokenizer_of(model))

    def __init__(self, settings: Settings) -> None:
        import openvino_genai as genai

        self._genai = genai
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = settings.max_num_seqs
        scheduler.max_num_batched_tokens = max(settings.max_step_tokens, settings.max_model_len)
        scheduler.cache_size = 1  # GiB
        properties = {
            "INFERENCE_NUM_THREADS": settings.num_threads,
            "PERFORMANCE_HINT": "LATENCY",
            # Its default is 8 bits, which gives other tokens and is not the same work.
            "KV_CACHE_PRECISION": "bf16",
        }
        if settings.tokenizer:
            self._tokenizer = genai.Tokenizer(str(_tokenizer_of(settings.model)))
        self._next_id = 0
        self._pipeline = genai.ContinuousBatchingPipeline(
            str(settings.model), scheduler, "CPU", properties, {}
        )

    def run(self, work: Work) -> Outcome:
        import numpy as np
        import openvino as ov

        configs = []
        for count in work.max_tokens:
            config = self._genai.GenerationConfig()
            config.max_new_tokens = count
            config.ignore_eos = True
            config.do_sample = False
            configs.append(config)
        prompts = [ov.Tensor(np.asarray([prompt], np.int64)) for prompt in work.prompts]
        began = time.perf_counter()
        handles = []
        for prompt, config in zip(prompts, configs, strict=True):
            handles.append(self._pipeline.add_request(self._next_id, prompt, config))
            self._next_id += 1
        while not all(handle.can_read() for handle in handles):
            self._pipeline.step()
        first_token_seconds = time.perf_counter() - began
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()  # tokens are read at the end: asking in between costs a third
        seconds = time.perf_counter() - began
        tokens = [list(handle.read_all()[0].generated_ids) for handle in handles]
        return Outcome(tokens, seconds, first_token_seconds)

    def encode(self, text: str) -> TokenIds:
        ids = self._tokenizer.encode(text).input_ids
        return [int(token) for token in ids.data[0]]

    @staticmethod
    def version() -> str:
        import openvino_genai

        number = openvino_genai.get_version().split("-")[0]
        return f"OpenVINO GenAI {number}, KV cache in bfloat16"


def _tokenizer_of(model: Path) -> Path:
    """Beside the model, not in it: a pipeline loads what lies in it, needed or not."""
    return model.with_suffix(".openvino_tokenizer")


if __name__ == "__main__":
    main(OpenvinoGenai)
