"""llama.cpp's own llama-batched-bench, where the program is on the PATH.

For machines that have llama.cpp's binaries and not its Python bindings. It makes up prompts of the
lengths that it is told, so that only the number of tokens can be checked.
"""

from __future__ import annotations

import json
import shutil
import subprocess

from peers.llama_cpp import LlamaCpp
from peers.peer import Outcome, Peer, Settings, TokenIds, Work, main

_PROGRAM = "llama-batched-bench"


class LlamaBatchedBench(Peer):
    prepare = LlamaCpp.prepare

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def run(self, work: Work) -> Outcome:
        steps = max(1, work.even() - 1)  # the first token comes of the prompt
        sequences, prompt = len(work.prompts), len(work.prompts[0])
        command = [_PROGRAM, "--output-format", "jsonl", "-m", str(self._settings.model)]
        command += ["-npp", str(prompt), "-ntg", str(steps), "-npl", f"{sequences},{sequences}"]
        command += ["-c", str(sequences * self._settings.max_model_len), "-b", "2048"]
        command += ["-t", str(self._settings.num_threads), "-fa", "on"]
        command += ["-ngl", "0" if self._settings.device == "cpu" else "999"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        # Twice: the first one also pays for what a process makes at first use, such as 50 ms of a
        # prefill of 1,024 tokens on a GPU.
        _, line = (line for line in done.stdout.splitlines() if line.startswith("{"))
        measured = json.loads(line)
        if (measured["pp"], measured["tg"], measured["pl"]) != (prompt, steps, sequences):
            raise ValueError(f"{_PROGRAM} was asked for {prompt}, {steps}, {sequences}: {line}")
        count = work.max_tokens[0]
        seconds = measured["t_pp"] + (measured["t_tg"] if count > 1 else 0.0)
        tokens = [[-1] * count for _ in work.prompts]
        return Outcome(tokens, seconds, measured["t_pp"], own_prompts=True)

    def encode(self, text: str) -> TokenIds:
        raise NotImplementedError(f"{_PROGRAM} takes no text")

    @staticmethod
    def version() -> str:
        if shutil.which(_PROGRAM) is None:
            raise ImportError(f"{_PROGRAM} is not on the PATH")
        return _PROGRAM


if __name__ == "__main__":
    main(LlamaBatchedBench)
