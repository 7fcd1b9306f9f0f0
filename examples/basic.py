"""Continues four prompts in one batch.

python examples/basic.py [MODEL]
"""

import sys

from tinyvllm import LLM, SamplingParams

PROMPTS = [
    "Once upon a time",
    "A long time ago, a shy rabbit",
    "The old bear lived in",
    "One day, a brave fox",
]


def main() -> None:
    llm = LLM(*sys.argv[1:])  # a directory or a hub model; without one, the bundled story model
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=40, seed=1)
    for output in llm.generate(PROMPTS, params):
        print(f"{output.prompt} |{output.outputs[0].text}\n")


if __name__ == "__main__":
    main()
