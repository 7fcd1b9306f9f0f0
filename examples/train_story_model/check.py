"""Asks Transformers whether a trained checkpoint is sound, and how well it tells stories.

    pip install transformers && python check.py DIR

Three questions: are the logits those of model.py, does a story keep to what was asked for, also for
pairs of adjective and animal that training never showed, and does it end by itself.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

import torch
from model import Config, Llama
from safetensors.torch import load_file
from story_grammar import ADJECTIVES, ANIMALS, NAMES, is_held_out, make_story, mend_articles, words
from transformers import AutoTokenizer, LlamaForCausalLM

MAX_NEW_TOKENS = 500


def max_logit_difference(directory: Path, text: str) -> float:
    """Largest difference to model.py in float32, relative to the largest logit."""
    ours = Llama(Config())
    ours.load_state_dict(load_file(directory / "model.safetensors"))
    theirs = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : Config.max_position_embeddings]
    with torch.no_grad():
        want, got = theirs(ids).logits, ours(ids)
    return float((want - got).abs().max() / want.abs().max())


def tell(directory: Path, prompts: list[str], chat: bool, seed: int) -> list[tuple[str, bool]]:
    """Continues each prompt with the sampling of generation_config.json: (text, ended itself)."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    if chat:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompts = list(rendered)
    # The chat template starts with BOS; for a raw prompt the tokenizer adds it.
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not chat)
    ids = batch.input_ids
    out = model.generate(ids, attention_mask=batch.attention_mask, max_new_tokens=MAX_NEW_TOKENS)
    ends = torch.tensor(model.generation_config.eos_token_id)
    ended = torch.isin(out[:, ids.shape[1] :], ends).any(dim=1).tolist()
    first = ids.shape[1] if chat else 0
    texts = tokenizer.batch_decode(out[:, first:], skip_special_tokens=True)
    return list(zip(texts, ended, strict=True))


def contradictions(story: str) -> list[str]:
    """What a story mentions but never brought in, and what it has two of but may have one.

    Stories from the grammar have no contradictions.
    """
    found = []
    names = {*NAMES["she"], *NAMES["he"]}
    for match in re.finditer(rf"\bthe (\w+ )?({'|'.join(ANIMALS)})\b(?! pond| from)", story):
        before = story[: match.start()]
        brought_in = before.split()[-1] in names  # "Ruby the lizard"
        if not brought_in and not re.search(rf"\b{match[2]}\b", before):
            found.append(match[0])
    for section in ("treasure", "food"):
        mentioned = [w for w in words(section) if re.search(rf"\b{w}\b(?! lamp)", story)]
        if len(mentioned) > 1:
            found.append(" and ".join(mentioned))
    return found


def obedience(directory: Path, held_out: bool, count: int, seed: int) -> None:
    """Prints how many of the stories have the adjective and the animal that were asked for."""
    pairs = [(j, a) for j in ADJECTIVES for a in ANIMALS if is_held_out(j, a) == held_out]
    pairs = random.Random(seed).sample(pairs, count)
    prompts = [mend_articles(f"Tell me a story about a {j} {a}") for j, a in pairs]
    stories = tell(directory, prompts, chat=True, seed=seed)
    both = sum(f"{j} {a}" in story for (j, a), (story, _) in zip(pairs, stories, strict=True))
    ended = sum(end for _, end in stories)
    sound = sum(not contradictions(story) for story, _ in stories)
    kind = "pairs never seen in training" if held_out else "pairs seen in training"
    print(
        f"{kind}: {both}/{count} tell of the adjective and the animal, {ended}/{count} end, "
        f"{sound}/{count} are free of contradictions"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Check a story model with Transformers.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--count", type=int, default=50, help="stories for each kind of pair")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    rng = random.Random(arguments.seed)
    text = "\n\n".join(make_story(rng) for _ in range(12))
    difference = max_logit_difference(arguments.directory, text)
    print(f"largest logit difference to model.py: {difference:.1e} of the largest logit")
    if not difference < 1e-4:
        raise SystemExit("the checkpoint and model.py disagree; 1e-4 is the limit")
    for held_out in (False, True):
        obedience(arguments.directory, held_out, arguments.count, arguments.seed)
    prompts = ["Once upon a time"] * 3
    for text, _ in tell(arguments.directory, prompts, chat=False, seed=arguments.seed):
        print(f"\n--- raw\n{text}")
    prompts = ["Tell me a story about a brave fox", "Write a story about a shy owl"]
    for text, _ in tell(arguments.directory, prompts, chat=True, seed=arguments.seed):
        print(f"\n--- chat\n{text}")


if __name__ == "__main__":
    main()
