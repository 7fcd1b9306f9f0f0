"""Output tokens a second of the same requests: one at a time, in static batches, and continuously.

python examples/throughput.py [MODEL]
"""

import random
import sys
import time

from tinyvllm import LLM, SamplingParams


def main() -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 1000) for _ in range(rng.randint(10, 50))] for _ in range(24)]
    params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=rng.randint(5, 50))
        for _ in prompts
    ]
    for name, batching, max_num_seqs in (
        ("one at a time", "continuous", 1),
        ("static", "static", 8),
        ("continuous", "continuous", 8),
    ):
        with LLM(*sys.argv[1:], batching=batching, max_num_seqs=max_num_seqs) as llm:
            began = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - began
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(f"{name:>13}: {num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.0f}/s")


if __name__ == "__main__":
    main()
