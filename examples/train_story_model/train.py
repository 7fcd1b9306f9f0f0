"""Trains the story model from nothing and writes a Hugging Face checkpoint directory.

    python train.py --out DIR                 55 minutes on two CPU cores
    python train.py --out DIR --steps 200     a quick try

Text is made while training runs, so no story is seen twice. The directory is rewritten every few
minutes: a run that is stopped early leaves a usable model.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import Config, Llama, causal_mask
from safetensors.torch import save
from story_grammar import make_conversation, make_story
from tokenizers import Tokenizer
from torch import Tensor
from train_tokenizer import (
    BOS,
    CHAT_TEMPLATE,
    END,
    EOS,
    chat_text,
    token_id,
    train_tokenizer,
)

TOKENS_PER_STEP = 4096
SHORT, LONG = 512, 2048  # row lengths; every tenth step has long rows, so all positions are trained
PEAK_LEARNING_RATE = 1.5e-3
WARMUP = 0.02  # share of the run


def make_texts(seed: int) -> Iterator[str]:
    """Bare stories and conversations, about half and half, without end."""
    rng = random.Random(seed)
    while True:
        yield make_story(rng) if rng.random() < 0.45 else chat_text(make_conversation(rng))


def make_documents(tokenizer: Tokenizer, seed: int) -> Iterator[list[int]]:
    """Token ids of one text after the other: BOS, text, EOS."""
    texts, eos = make_texts(seed), token_id(tokenizer, EOS)
    while True:
        for encoding in tokenizer.encode_batch(list(islice(texts, 500))):
            yield [*encoding.ids, eos]


def make_batches(tokenizer: Tokenizer, seed: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Packs documents into rows: (inputs, targets), both [rows, length].

    A row starts with a document and the last one is cut off, because a prompt starts at position 0.
    """
    documents = make_documents(tokenizer, seed)
    step = 0
    while True:
        step += 1
        length = LONG if step % 10 == 0 else SHORT
        rows = np.empty((TOKENS_PER_STEP // length, length + 1), dtype=np.int64)
        for row in rows:
            ids: list[int] = []
            while len(ids) < len(row):
                ids += next(documents)
            row[:] = ids[: len(row)]
        packed = torch.from_numpy(rows).to(device)
        yield packed[:, :-1], packed[:, 1:]


def loss_of(model: Llama, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy a token; matrix products in bfloat16."""
    mask = causal_mask(inputs)
    if inputs.shape[1] == SHORT:
        # A document sees itself alone: other stories' heroes only make copying harder to learn.
        # Long rows see everything, because a model that goes on after a story will, too.
        document = (inputs == inputs[0, 0]).cumsum(dim=1)  # every row starts with BOS
        mask = mask & (document[:, None, :, None] == document[:, None, None, :])
    with torch.autocast(inputs.device.type, torch.bfloat16):
        logits = model(inputs, mask)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def write_file(path: Path, content: bytes) -> None:
    """Replaces a file in one move, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    temporary.replace(path)


def write_checkpoint(out: Path, model: Llama, config: Config, tokenizer: Tokenizer) -> None:
    """Writes what Transformers and tinyvllm read: config, weights in bfloat16, tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    bos, eos, end = (token_id(tokenizer, token) for token in (BOS, EOS, END))
    # A bare story ends with EOS, an answer with END: either one stops generation.
    ids = {"bos_token_id": bos, "eos_token_id": [eos, end], "pad_token_id": eos}
    files: dict[str, dict[str, object]] = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(config),
            **ids,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        },
        "generation_config.json": {
            **ids,
            "do_sample": True,
            "temperature": 0.8,
            "top_k": 50,
            "top_p": 0.95,
            "max_new_tokens": 400,  # a story has about 250
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in files.items():
        write_file(out / name, (json.dumps(content, indent=2) + "\n").encode())
    write_file(out / "chat_template.jinja", CHAT_TEMPLATE.encode())
    write_file(out / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    weights = {name: weight.bfloat16().cpu() for name, weight in model.state_dict().items()}
    write_file(out / "model.safetensors", save(weights, metadata={"format": "pt"}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the story model.")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=55.0, help="length of the run")
    parser.add_argument("--steps", type=int, help="length of the run; the same steps every time")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    config = Config()
    tokenizer = train_tokenizer(islice(make_texts(arguments.seed), 10_000), config.vocab_size)
    device = arguments.device
    model = Llama(config).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    started = last_saved = time.monotonic()
    running = 0.0
    for step, (inputs, targets) in enumerate(make_batches(tokenizer, arguments.seed + 1, device)):
        now = time.monotonic()
        minutes = (now - started) / 60
        done = step / arguments.steps if arguments.steps else minutes / arguments.minutes
        if done >= 1:
            break
        # Linear warm-up, then half a cosine down to zero.
        factor = min((done + 1e-3) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * factor
        loss = loss_of(model, inputs, targets)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        if step % 50 == 0:
            print(f"step {step:5d}  minute {minutes:5.1f}  loss {running:.4f}", flush=True)
        if now - last_saved > 240:
            write_checkpoint(arguments.out, model, config, tokenizer)
            last_saved = now

    write_checkpoint(arguments.out, model, config, tokenizer)
    unseen = islice(make_batches(tokenizer, arguments.seed + 2, device), 20)
    with torch.no_grad():
        final = sum(loss_of(model, *batch).item() for batch in unseen) / 20
    print(f"loss on unseen text {final:.4f}; the checkpoint is in {arguments.out}")


if __name__ == "__main__":
    main()
