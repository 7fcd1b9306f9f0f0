"""What the benchmarks run: prompts of random tokens or of a file, and how long each output is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

from tinyvllm.errors import InvalidRequestError
from tinyvllm.tokenizer import Tokenizer

_MAX_RANDOM_TOKEN = 10_000  # nano-vllm's


class Work(NamedTuple):
    """One request a prompt. An output has exactly its length: end tokens are ignored."""

    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(len(p) + n for p, n in zip(self.prompts, self.output_lens, strict=True))


def random_work(
    num_prompts: int,
    input_range: tuple[int, int],
    output_range: tuple[int, int],
    seed: int,
    vocab_size: int,
    shared_prefix: int = 0,
) -> Work:
    """nano-vllm's requests (its bench.py): lengths and token ids from Python's `random`.

    The defaults of `bench throughput` and a vocabulary of more than 10,000 tokens give its very
    requests; a smaller vocabulary changes the ids, not the lengths. shared_prefix: so many tokens
    more stand before every prompt, the same ones.
    """
    generator = random.Random(seed)
    prompts = [
        [generator.randint(0, _MAX_RANDOM_TOKEN) for _ in range(generator.randint(*input_range))]
        for _ in range(num_prompts)
    ]
    output_lens = [generator.randint(*output_range) for _ in range(num_prompts)]
    prefix = [generator.randint(0, _MAX_RANDOM_TOKEN) for _ in range(shared_prefix)]
    return Work(
        [[token % vocab_size for token in prefix + prompt] for prompt in prompts], output_lens
    )


def work_of_file(
    path: Path,
    tokenizer: Tokenizer,
    num_prompts: int | None,
    output_range: tuple[int, int],
    seed: int,
) -> Work:
    """A line a prompt: {"prompt": TEXT}, {"prompt_token_ids": [...]} or {"messages": [...]}.

    `max_tokens` in a line is the length of its output, else it is drawn from output_range.
    num_prompts: the first so many; None: all.
    """
    generator = random.Random(seed)
    work = Work([], [])
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if len(work.prompts) == num_prompts:
                    break
                if line.strip():
                    prompt, length = _parse(line, f"{path}, line {number}", tokenizer)
                    drawn = generator.randint(*output_range)
                    work.prompts.append(prompt)
                    work.output_lens.append(drawn if length is None else length)
    except OSError as error:
        raise InvalidRequestError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise InvalidRequestError(f"{path}: not a text in UTF-8. Convert it first.") from None
    if len(work.prompts) < (num_prompts or 1):
        raise InvalidRequestError(
            f"{path}: has {len(work.prompts)} prompts, {num_prompts or 'at least 1'} are asked for."
        )
    return work


def _parse(line: str, where: str, tokenizer: Tokenizer) -> tuple[list[int], int | None]:
    """The prompt, and the length of its output if the line says it."""
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{where}: not JSON: {error}.") from None
    value = value if isinstance(value, dict) else {}
    length = value.get("max_tokens")
    if length is not None and (type(length) is not int or length < 1):
        raise InvalidRequestError(f"{where}: max_tokens is {length!r:.60}; give a whole number.")
    if isinstance(value.get("prompt"), str):
        return tokenizer.encode(value["prompt"]), length
    if isinstance(value.get("messages"), list):
        return tokenizer.encode_chat(value["messages"])[1], length
    ids = value.get("prompt_token_ids")
    if isinstance(ids, list) and ids and all(type(token) is int for token in ids):
        return ids, length
    raise InvalidRequestError(
        f'{where}: no prompt. Write {{"prompt": TEXT}}, {{"prompt_token_ids": [1, 2]}} or '
        '{"messages": [...]}.'
    )
