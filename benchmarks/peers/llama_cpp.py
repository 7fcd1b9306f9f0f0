"""llama.cpp through the C functions that llama-cpp-python binds.

Not through its class Llama, which decodes one sequence at a time and copies every row of logits.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

from peers.peer import Outcome, Peer, Settings, TokenIds, Work, main

_MICRO_BATCH = 512  # rows of one matrix product; llama.cpp's default


class LlamaCpp(Peer):
    @staticmethod
    def prepare(checkpoint: Path, model: Path, tokenizer: bool) -> None:
        from peers.gguf_file import write_gguf

        if not model.exists():
            write_gguf(checkpoint, model)

    def __init__(self, settings: Settings) -> None:
        import llama_cpp.llama_cpp as api

        self._api: Any = api
        self._log = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self._log, None)
        api.llama_backend_init()
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = 0 if settings.device == "cpu" else 999
        if not settings.tokenizer:  # ids in, ids out: the vocabulary stays in the file
            overrides = (api.llama_model_kv_override * 2)()
            overrides[0].tag = 3  # a string
            overrides[0].key = b"tokenizer.ggml.model"
            overrides[0].value.val_str = b"none"
            model_params.kv_overrides = overrides
        self._model = api.llama_model_load_from_file(str(settings.model).encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {settings.model.name}")
        params = api.llama_context_default_params()
        params.n_ctx = settings.max_num_seqs * settings.max_model_len
        params.n_batch = max(2048, settings.max_model_len)
        params.n_ubatch = _MICRO_BATCH
        params.n_seq_max = settings.max_num_seqs
        params.n_threads = params.n_threads_batch = settings.num_threads
        self._context = api.llama_init_from_model(self._model, params)
        self._vocab = api.llama_model_get_vocab(self._model)
        self._vocab_size = api.llama_vocab_n_tokens(self._vocab)
        self._batch_size = params.n_batch
        self._batch = api.llama_batch_init(params.n_batch, 0, 1)

    def run(self, work: Work) -> Outcome:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)
        tokens: list[TokenIds] = [[] for _ in work.prompts]
        began = time.perf_counter()
        # Whole prompts, as many at a time as a batch holds.
        group: list[int] = []
        for sequence, prompt in enumerate(work.prompts):
            if sum(len(work.prompts[s]) for s in group) + len(prompt) > self._batch_size:
                self._prefill(group, work, tokens)
                group = []
            group.append(sequence)
        self._prefill(group, work, tokens)
        first_token_seconds = time.perf_counter() - began
        for step in range(max(work.max_tokens) - 1):
            running = [s for s, count in enumerate(work.max_tokens) if len(tokens[s]) < count]
            rows = [(tokens[s][-1], len(work.prompts[s]) + step, s, True) for s in running]
            for sequence, token in zip(running, self._decode(rows), strict=True):
                tokens[sequence].append(token)
        return Outcome(tokens, time.perf_counter() - began, first_token_seconds)

    def _prefill(self, group: list[int], work: Work, tokens: list[TokenIds]) -> None:
        rows = [
            (token, position, sequence, position == len(work.prompts[sequence]) - 1)
            for sequence in group
            for position, token in enumerate(work.prompts[sequence])
        ]
        for sequence, token in zip(group, self._decode(rows), strict=True):
            tokens[sequence].append(token)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> TokenIds:
        """One batch of (token, position, sequence, wanted): the greedy token of each wanted row."""
        import numpy as np

        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        status = self._api.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {len(rows)} tokens returns {status}")
        wanted_rows = sum(row[3] for row in rows)
        logits = np.ctypeslib.as_array(
            self._api.llama_get_logits(self._context), shape=(wanted_rows, self._vocab_size)
        )
        return [int(token) for token in logits.argmax(axis=1)]

    def encode(self, text: str) -> TokenIds:
        data = text.encode()
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        count = self._api.llama_tokenize(self._vocab, data, len(data), tokens, room, True, False)
        return list(tokens[:count])

    @staticmethod
    def version() -> str:
        import llama_cpp

        info = llama_cpp.llama_print_system_info().decode()
        native = "AVX512_BF16 = 1" in info or "AMX" in info
        return (
            f"llama-cpp-python {llama_cpp.__version__}, bfloat16 {'' if native else 'not '}native"
        )


if __name__ == "__main__":
    main(LlamaCpp)
