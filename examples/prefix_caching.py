"""Prompts that begin alike: with the prefix cache their common part is computed once.

python examples/prefix_caching.py [MODEL]
"""

import sys

from tinyvllm import LLM, SamplingParams

PREFIX = "Once upon a time there was a small village by the sea. " * 20
PROMPTS = [PREFIX + f"There lived a {animal}" for animal in ("fox", "bear", "dog", "cat", "owl")]


def main() -> None:
    params = SamplingParams(temperature=0, max_tokens=20)
    texts = []
    for enabled in (False, True):
        with LLM(*sys.argv[1:], enable_prefix_caching=enabled) as llm:
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
            texts.append([output.outputs[0].text for output in outputs])
            given = sum(len(output.prompt_token_ids) for output in outputs)
            computed = llm.stats()["prompt_tokens"]
        print(f"enable_prefix_caching={enabled}: {given} prompt tokens, {computed} computed")
    print("The texts are the same:", texts[0] == texts[1])


if __name__ == "__main__":
    main()
