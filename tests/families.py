"""Small configs, each in the style of a published one, that together cover what the engine reads.

The shapes are tiny; the keys, and the forms that they take, are those of real config.json files.
Windows and original context lengths are scaled down so that a prompt of 300 tokens passes them.
`FAMILIES[name].write(directory)` makes the checkpoint; nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinyvllm import dummy

TokenIds = npt.NDArray[np.int32]

SHORT_PROMPTS = (1, 17, 300)
LONG_PROMPTS = (*SHORT_PROMPTS, 2000)


@dataclasses.dataclass(frozen=True)
class Family:
    """One test model: its config.json, how its files are written, and the prompts it is shown."""

    name: str
    config: dict[str, object]
    dtype: str = "bfloat16"
    norm_dtype: str | None = None
    num_shards: int = 1
    seed: int = 1
    prompt_lengths: tuple[int, ...] = SHORT_PROMPTS

    def write(self, directory: Path) -> Path:
        return dummy.write_checkpoint(
            directory,
            self.config,
            seed=self.seed,
            dtype=self.dtype,
            norm_dtype=self.norm_dtype,
            num_shards=self.num_shards,
        )

    def prompt(self, length: int, number: int = 0) -> TokenIds:
        """Random ids of the vocabulary, the same ones in every run."""
        vocab_size = self.config["vocab_size"]
        assert isinstance(vocab_size, int)
        words = np.random.Philox(key=length * 1000 + number).random_raw(length)
        token_ids: TokenIds = (words % np.uint64(vocab_size)).astype(np.int32)
        return token_ids


def _llama(**changes: object) -> dict[str, object]:
    """A Llama config.json as Transformers 4 wrote it; a change to `...` leaves the key out."""
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 384,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    return _changed(config, changes)


def _qwen(family: str, **changes: object) -> dict[str, object]:
    config: dict[str, object] = {
        "architectures": [{"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]],
        "model_type": family,
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 2,
        "bos_token_id": 509,
        "eos_token_id": [510, 509],
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    if family == "qwen3":
        config |= {"head_dim": 128, "attention_bias": False, "rope_scaling": None}
    return _changed(config, changes)


def _mistral(**changes: object) -> dict[str, object]:
    config: dict[str, object] = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    return _changed(config, changes)


def _changed(config: dict[str, object], changes: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in {**config, **changes}.items() if value is not ...}


# Llama 3.x scales the rotations whose wavelength exceeds the original context of 8,192 tokens,
# so a faithful value would change nothing within a short prompt. Here the original context is 64.
_LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}

_ALL = (
    # --- Llama ---
    Family(
        "llama-2-f16",  # 7B: full multi-head attention, F16 files; here with an odd head count
        _llama(
            hidden_size=144, num_attention_heads=3, num_key_value_heads=3, torch_dtype="float16"
        ),
        dtype="float16",
    ),
    Family(
        "llama-first-keys",  # the oldest files: no kv heads, no rope keys, no biases, no tie flag
        _llama(
            num_key_value_heads=...,
            rope_theta=...,
            rope_scaling=...,
            attention_bias=...,
            attention_dropout=...,
            mlp_bias=...,
            tie_word_embeddings=...,
            rms_norm_eps=1e-06,
        ),
    ),
    Family(
        "tinyllama-f32",  # eight query heads on each kv head; its early checkpoints are F32
        _llama(
            hidden_size=256,
            num_attention_heads=8,
            num_key_value_heads=1,
            max_position_embeddings=2048,
            torch_dtype="float32",
        ),
        dtype="float32",
    ),
    Family(
        "smollm2",  # the real width: 9 heads of 64 on 3 kv heads
        _llama(
            hidden_size=576,
            intermediate_size=384,
            num_attention_heads=9,
            num_key_value_heads=3,
            rope_theta=100000,
            rope_interleaved=False,
            is_llama_config=True,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    Family(
        "llama-3.1-sharded",  # untied, head_dim 128, three shards
        _llama(
            vocab_size=640,
            hidden_size=256,
            rope_theta=500000.0,
            rope_scaling=_LLAMA3_ROPE,
            bos_token_id=500,
            eos_token_id=[501, 508, 509],
        ),
        num_shards=3,
    ),
    Family(
        "llama-3.2-tied",  # tied, head_dim written out, the files of Transformers 4
        _llama(
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            rope_theta=500000.0,
            rope_scaling={**_LLAMA3_ROPE, "factor": 32.0},
            tie_word_embeddings=True,
        ),
        prompt_lengths=LONG_PROMPTS,
    ),
    Family(
        "llama-3.2-v5",  # the same model as Transformers 5 writes it: rope_parameters, dtype
        _llama(
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            rope_theta=...,
            rope_scaling=...,
            rope_parameters={**_LLAMA3_ROPE, "factor": 32.0, "rope_theta": 500000.0},
            tie_word_embeddings=True,
            torch_dtype=...,
            dtype="bfloat16",
        ),
    ),
    Family(
        "llama-biases",  # attention_bias (o_proj too) and mlp_bias; head_dim 80, five heads
        _llama(
            hidden_size=160,
            num_attention_heads=5,
            num_key_value_heads=5,
            head_dim=80,
            attention_bias=True,
            mlp_bias=True,
        ),
    ),
    Family(
        "llama-f32-norms",  # BF16 matrices with F32 norm weights in one file; odd sizes
        _llama(vocab_size=333, hidden_size=192, intermediate_size=250, num_attention_heads=3),
        norm_dtype="float32",
    ),
    Family(
        "llama-linear",  # the first form of rope_scaling, with `type`
        _llama(rope_scaling={"type": "linear", "factor": 4.0}),
    ),
    Family(
        "llama-yarn-explicit",  # every yarn option said: attention_factor, betas, truncate
        _llama(
            max_position_embeddings=1024,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 128,
                "attention_factor": 0.85,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "truncate": False,
            },
        ),
    ),
    # --- Qwen ---
    Family(
        "qwen2",  # biases on q, k, v; the window is off, so its 64 must be ignored
        _qwen(
            "qwen2",
            hidden_size=192,
            num_attention_heads=3,
            sliding_window=64,
            max_window_layers=0,
        ),
        norm_dtype="float32",
    ),
    Family(
        "qwen2-window",  # layers from max_window_layers on slide: 0 full, 1 and 2 do not
        _qwen(
            "qwen2",
            num_hidden_layers=3,
            use_sliding_window=True,
            sliding_window=64,
            max_window_layers=1,
            tie_word_embeddings=False,
        ),
        prompt_lengths=LONG_PROMPTS,
    ),
    Family(
        "qwen2-layer-types",  # Transformers 5 lists the layers; the list wins over the counts
        _qwen(
            "qwen2",
            num_hidden_layers=3,
            use_sliding_window=True,
            sliding_window=40,
            max_window_layers=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_theta=...,
            rope_parameters={"rope_theta": 1000000, "rope_type": "default"},
            torch_dtype=...,
            dtype="bfloat16",
        ),
    ),
    Family(
        "qwen3",  # q and k norms a head, head_dim not hidden / heads, sliding_window null
        _qwen("qwen3", num_attention_heads=4, num_key_value_heads=2, sliding_window=None),
    ),
    Family(
        "qwen3-bias",  # attention_bias on all four projections, under the norms
        _qwen(
            "qwen3",
            hidden_size=160,
            num_attention_heads=5,
            num_key_value_heads=1,
            head_dim=64,
            rms_norm_eps=1e-03,  # large enough that a wrong eps shows
            attention_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    Family(
        "qwen3-yarn",  # as its model card tells users to extend the context
        _qwen(
            "qwen3",
            max_position_embeddings=2560,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 640,
            },
        ),
        prompt_lengths=LONG_PROMPTS,
    ),
    # --- Mistral ---
    Family(
        "mistral-window",  # v0.1, with a window shorter than the prompt
        _mistral(num_attention_heads=4, num_key_value_heads=2, head_dim=64, sliding_window=64),
        prompt_lengths=LONG_PROMPTS,
    ),
    Family(
        "mistral-window-absent",  # no key: 4096, so one prompt goes past that
        _mistral(
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=1,
            sliding_window=...,
        ),
        prompt_lengths=(17, 4160),
    ),
    Family(
        "mistral-nemo",  # no window (null), head_dim larger than hidden / heads
        _mistral(
            hidden_size=160,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            rope_theta=1000000.0,
            sliding_window=None,
        ),
    ),
    Family(
        "mistral-yarn-mscale",  # the attention factor as a ratio of two mscales
        _mistral(
            max_position_embeddings=2048,
            rope_theta=...,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.4,
            },
            sliding_window=None,
            torch_dtype=...,
            dtype="bfloat16",
        ),
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
