"""Three stories at once, each printed as it comes: AsyncEngine, one task a request.

python examples/streaming.py [MODEL]
"""

import asyncio
import sys

from tinyvllm import AsyncEngine, SamplingParams

PROMPTS = ["Once upon a time", "The old bear lived in", "One day, a brave fox"]


async def tell(engine: AsyncEngine, number: int, prompt: str) -> None:
    params = SamplingParams(temperature=0.8, max_tokens=20, seed=number)
    printed = 0
    async for output in engine.generate(prompt, params):
        text = output.outputs[0].text  # all of it, from the beginning
        print(f"{number}: {text[printed:]!r}")
        printed = len(text)


async def main() -> None:
    async with AsyncEngine(*sys.argv[1:]) as engine:
        await asyncio.gather(*(tell(engine, i, prompt) for i, prompt in enumerate(PROMPTS)))


if __name__ == "__main__":
    asyncio.run(main())
