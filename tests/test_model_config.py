"""config.json: both generations of fields, the families' defaults, and what is refused by name.

The reference is Transformers' own reading of the same file where it is installed; the other tests
state the rules in numbers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from checkpoint_files import LLAMA, write_config
from tinyvllm import _core
from tinyvllm.errors import CheckpointError, UnsupportedModelError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
FAMILIES = sorted(ARCHITECTURES)
REMOVED = object()  # as the value of a key: leave it out


def config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    fields = LLAMA | {"model_type": family, "architectures": [ARCHITECTURES.get(family)]} | changes
    return {key: value for key, value in fields.items() if value is not REMOVED}


def parse(directory: Path, fields: Any) -> dict[str, Any]:
    parsed: dict[str, Any] = _core.parse_model_config(write_config(directory, fields))
    return parsed


def refused(directory: Path, fields: Any, kind: type[Exception] = CheckpointError) -> str:
    """The message with which this config is refused: one line that begins with the file's path."""
    with pytest.raises(kind) as caught:
        parse(directory, fields)
    message = str(caught.value)
    assert message.startswith(f"{directory / 'config.json'}: ")
    assert message.isprintable()
    return message


# The shape


def test_every_field_arrives(tmp_path: Path) -> None:
    assert parse(tmp_path, config(rope_theta=5e5, torch_dtype="bfloat16")) == {
        "family": "llama",
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_layers": 3,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 128,
        "rms_norm_eps": np.float32(1e-5),
        "tie_word_embeddings": False,
        "qkv_bias": False,
        "attention_output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "sliding_window": [0, 0, 0],
        "rope": {
            "type": "default",
            "theta": 500000.0,
            "factor": 1.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 0.0,
            "attention_factor": 1.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": True,
        },
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize(
    ("family", "qkv", "output", "mlp", "norm"),
    [
        ("llama", True, True, True, False),
        ("mistral", False, False, False, False),
        ("qwen2", True, False, False, False),
        ("qwen3", True, True, False, True),
    ],
)
def test_biases_and_norms_of_a_family_that_is_asked_for_biases(
    tmp_path: Path, family: str, qkv: bool, output: bool, mlp: bool, norm: bool
) -> None:
    got = parse(tmp_path, config(family, attention_bias=True, mlp_bias=True))
    assert (got["qkv_bias"], got["attention_output_bias"]) == (qkv, output)
    assert (got["mlp_bias"], got["qk_norm"]) == (mlp, norm)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_keys_only_qwen2_has_biases_and_no_family_is_tied(
    tmp_path: Path, family: str
) -> None:
    got = parse(tmp_path, config(family))
    assert got["qkv_bias"] == (family == "qwen2")
    assert not got["attention_output_bias"]
    assert not got["mlp_bias"]
    assert not got["tie_word_embeddings"]


def test_head_dim_is_derived_or_given(tmp_path: Path) -> None:
    assert parse(tmp_path, config())["head_dim"] == 4
    assert parse(tmp_path, config(head_dim=None))["head_dim"] == 4
    assert parse(tmp_path, config(head_dim=10))["head_dim"] == 10
    assert parse(tmp_path, config("qwen3"))["head_dim"] == 128


@pytest.mark.parametrize(
    ("family", "absent"), [("llama", 64), ("mistral", 8), ("qwen2", 32), ("qwen3", 32)]
)
def test_kv_heads_null_means_all_and_absent_means_the_default_of_the_family(
    tmp_path: Path, family: str, absent: int
) -> None:
    fields = config(family, num_attention_heads=64, hidden_size=128)
    assert parse(tmp_path, fields | {"num_key_value_heads": None})["num_kv_heads"] == 64
    del fields["num_key_value_heads"]
    assert parse(tmp_path, fields)["num_kv_heads"] == absent


def test_a_default_that_does_not_fit_says_where_it_comes_from(tmp_path: Path) -> None:
    message = refused(tmp_path, config("qwen2", num_key_value_heads=REMOVED))
    assert "num_attention_heads 6 is not a multiple of num_key_value_heads 32" in message
    assert "the default of qwen2; the key is missing" in message


def test_whole_numbers_may_be_written_as_floats(tmp_path: Path) -> None:
    text = json.dumps(config(rope_theta=0)).replace('"hidden_size": 24', '"hidden_size": 2.4e1')
    text = text.replace('"vocab_size": 64', '"vocab_size": 64.0')
    text = text.replace('"rope_theta": 0', '"rope_theta": 1e5')
    got = parse(tmp_path, text.encode())
    assert (got["hidden_size"], got["vocab_size"], got["rope"]["theta"]) == (24, 64, 100000.0)


def test_dtype_wins_over_torch_dtype(tmp_path: Path) -> None:
    assert parse(tmp_path, config())["dtype"] == ""
    assert parse(tmp_path, config(torch_dtype="float16"))["dtype"] == "float16"
    assert parse(tmp_path, config(torch_dtype="float16", dtype="float32"))["dtype"] == "float32"


def test_keys_that_change_nothing_are_ignored(tmp_path: Path) -> None:
    extra: dict[str, Any] = {
        "pretraining_tp": 2,
        "rope_interleaved": False,
        "is_llama_config": True,
        "x": [None],
    }
    assert parse(tmp_path, config(**extra)) == parse(tmp_path, config())


@pytest.mark.parametrize("missing", ["architectures", "model_type"])
def test_one_of_architectures_and_model_type_is_enough(tmp_path: Path, missing: str) -> None:
    assert parse(tmp_path, config("qwen3", **{missing: REMOVED}))["family"] == "qwen3"
    assert parse(tmp_path, config("qwen3", **{missing: None}))["family"] == "qwen3"


# Sliding windows


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("mistral", {}, [4096, 4096, 4096]),
        ("mistral", {"sliding_window": None}, [0, 0, 0]),
        ("mistral", {"sliding_window": 7}, [7, 7, 7]),
        ("llama", {"sliding_window": 7}, [0, 0, 0]),
        ("qwen2", {"sliding_window": 7}, [0, 0, 0]),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": False}, [0, 0, 0]),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True}, [0, 0, 0]),  # from layer 28 on
        (
            "qwen2",
            {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2},
            [0, 0, 7],
        ),
        (
            "qwen3",
            {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0},
            [7, 7, 7],
        ),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, [0, 4096, 4096]),
        (
            "qwen3",
            {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0},
            [0, 0, 0],
        ),
        (
            "qwen3",
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "max_window_layers": 0,
                "layer_types": ["full_attention", "sliding_attention", "attention"],
            },
            [0, 7, 0],
        ),
        ("qwen2", {"layer_types": ["full_attention"] * 3}, [0, 0, 0]),
    ],
)
def test_each_layer_has_the_window_of_its_family(
    tmp_path: Path, family: str, changes: dict[str, Any], windows: list[int]
) -> None:
    assert parse(tmp_path, config(family, **changes))["sliding_window"] == windows


def test_layer_types_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    full, sliding = "full_attention", "sliding_attention"
    message = refused(tmp_path, config("qwen2", layer_types=[full] * 4))
    assert "layer_types has 4 entries for 3 layers" in message
    message = refused(tmp_path, config("qwen2", layer_types=[full, sliding, full]))
    assert 'layer_types[1] is "sliding_attention", but there is no window' in message
    message = refused(
        tmp_path,
        config("qwen3", layer_types=[full, "linear_attention", full]),
        UnsupportedModelError,
    )
    assert 'layer_types[1] is "linear_attention"' in message
    message = refused(
        tmp_path,
        config("mistral", sliding_window=7, layer_types=[sliding, full, full]),
        UnsupportedModelError,
    )
    assert 'layer_types[1] is "full_attention" beside a sliding_window of 7' in message
    assert "layer_types is 3, not a list" in refused(tmp_path, config("qwen2", layer_types=3))


# RoPE

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def rope(directory: Path, **changes: Any) -> dict[str, Any]:
    parsed: dict[str, Any] = parse(directory, config(**changes))["rope"]
    return parsed


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 2.5}, LLAMA3, YARN])
def test_old_and_new_fields_mean_the_same(tmp_path: Path, scaling: dict[str, Any]) -> None:
    new = rope(tmp_path, rope_parameters=scaling | {"rope_theta": 7e4})
    assert new["type"] == scaling["rope_type"]
    assert (new["theta"], new["factor"]) == (7e4, scaling["factor"])
    assert rope(tmp_path, rope_scaling=scaling, rope_theta=7e4) == new
    older = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    assert rope(tmp_path, rope_scaling=older, rope_theta=7e4) == new
    both = {"rope_parameters": scaling | {"rope_theta": 7e4}, "rope_scaling": scaling}
    assert rope(tmp_path, **both, rope_theta=7e4) == new
    for layers in (["full_attention"], ["full_attention", "sliding_attention"]):
        nested = {layer: scaling | {"rope_theta": 7e4} for layer in layers}
        assert rope(tmp_path, rope_parameters=nested) == new


def test_theta_is_looked_up_in_the_new_place_then_the_old_then_is_10000(tmp_path: Path) -> None:
    inner = {"rope_type": "default", "rope_theta": 300}
    assert rope(tmp_path)["theta"] == 10000
    assert rope(tmp_path, rope_theta=None, rope_scaling=None)["theta"] == 10000
    assert rope(tmp_path, rope_theta=200)["theta"] == 200
    assert rope(tmp_path, rope_theta=200, rope_parameters=inner)["theta"] == 300
    assert rope(tmp_path, rope_theta=200, rope_parameters={"rope_type": "default"})["theta"] == 200
    assert rope(tmp_path, rope_theta=200, rope_scaling={}, rope_parameters={})["theta"] == 200


def test_the_values_of_llama3_arrive(tmp_path: Path) -> None:
    got = rope(tmp_path, rope_scaling=LLAMA3)
    assert (got["low_freq_factor"], got["high_freq_factor"]) == (1.5, 5.0)
    assert got["original_max_position_embeddings"] == 64
    assert got["attention_factor"] == 1.0


def test_the_original_length_is_the_top_levels_then_the_objects_then_the_models(
    tmp_path: Path,
) -> None:
    key = "original_max_position_embeddings"
    without = {name: value for name, value in LLAMA3.items() if name != key}
    assert rope(tmp_path, rope_scaling=LLAMA3, **{key: 16})[key] == 16
    assert rope(tmp_path, rope_scaling=LLAMA3)[key] == 64
    assert rope(tmp_path, rope_scaling=without)[key] == 128


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"factor": 0.5}, 1.0),
        ({"attention_factor": 1.75}, 1.75),
        ({"attention_factor": None}, 0.1 * math.log(4) + 1),
        ({"mscale": 2.0}, 0.1 * math.log(4) + 1),
        ({"mscale": 2.0, "mscale_all_dim": 0}, 0.1 * math.log(4) + 1),
        (
            {"mscale": 2.0, "mscale_all_dim": 0.5},
            (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
        ),
        ({"mscale": 1, "mscale_all_dim": 1}, 1.0),
    ],
)
def test_the_attention_factor_of_yarn_is_resolved(
    tmp_path: Path, changes: dict[str, Any], want: float
) -> None:
    got = rope(tmp_path, rope_scaling=YARN | changes)
    assert got["attention_factor"] == pytest.approx(want, rel=1e-15)


def test_yarn_without_a_factor_takes_the_ratio_of_the_lengths(tmp_path: Path) -> None:
    assert rope(tmp_path, rope_scaling=YARN | {"factor": None})["factor"] == 128 / 32
    message = refused(tmp_path, config(rope_scaling={"rope_type": "yarn"}))
    assert "rope_scaling.factor is missing" in message


def test_the_optional_fields_of_yarn_arrive(tmp_path: Path) -> None:
    got = rope(tmp_path, rope_scaling=YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False})
    assert (got["beta_fast"], got["beta_slow"], got["truncate"]) == (16, 2, False)
    got = rope(tmp_path, rope_scaling=YARN | {"beta_fast": 0, "beta_slow": None})
    assert (got["beta_fast"], got["beta_slow"], got["truncate"]) == (32, 1, True)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope", "proportional", "Yarn"])
def test_an_unknown_rope_type_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    for key in ("type", "rope_type"):
        fields = config(rope_scaling={key: kind, "factor": 2.0})
        message = refused(tmp_path, fields, UnsupportedModelError)
        assert (
            f'rope_scaling.rope_type is "{kind}"; only default, linear, llama3 and yarn' in message
        )


def test_different_rope_for_different_layers_is_refused(tmp_path: Path) -> None:
    nested = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    message = refused(tmp_path, config("qwen3", rope_parameters=nested), UnsupportedModelError)
    assert "full and sliding layers have different rope parameters" in message


def test_two_rope_objects_that_disagree_are_refused(tmp_path: Path) -> None:
    fields = config(rope_scaling=LLAMA3, rope_parameters=LLAMA3 | {"factor": 32.0})
    assert "rope_parameters and rope_scaling contradict each other" in refused(tmp_path, fields)


@pytest.mark.parametrize(
    "changes",
    [{"partial_rotary_factor": 0.75}, {"rope_parameters": {"partial_rotary_factor": 0.75}}],
)
def test_partial_rotation_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    message = refused(tmp_path, config(**changes), UnsupportedModelError)
    assert "partial_rotary_factor is 0.75; only 1" in message
    assert rope(tmp_path, partial_rotary_factor=1.0) == rope(tmp_path)


@pytest.mark.parametrize(
    ("scaling", "why"),
    [
        ({"rope_type": "linear"}, "rope_scaling.factor is missing"),
        ({"rope_type": "linear", "factor": 0}, "rope_scaling.factor is 0, not a number from"),
        ({"rope_type": "linear", "factor": "2"}, 'rope_scaling.factor is "2", not a number'),
        ({"rope_type": 3}, "rope_scaling.rope_type is 3, not a string"),
        ({"rope_type": "default", "rope_theta": 1.0}, "rope_scaling.rope_theta is 1.0, not a"),
        ({"rope_type": "default", "rope_theta": -5}, "rope_scaling.rope_theta is -5, not a"),
        (LLAMA3 | {"low_freq_factor": None}, "rope_scaling.low_freq_factor is missing"),
        (LLAMA3 | {"high_freq_factor": None}, "rope_scaling.high_freq_factor is missing"),
        (
            LLAMA3 | {"high_freq_factor": 1.5},
            "high_freq_factor is 1.5, not above low_freq_factor 1.5",
        ),
        (
            LLAMA3 | {"original_max_position_embeddings": 0},
            "rope_scaling.original_max_position_embeddings is 0, not a number",
        ),
        (YARN | {"beta_fast": 0.5}, "rope_scaling.beta_fast is 0.5, below beta_slow 1.0"),
        (YARN | {"truncate": 1}, "rope_scaling.truncate is 1, not true or false"),
        (YARN | {"attention_factor": -1}, "rope_scaling.attention_factor is -1, not a number"),
        ([1], "rope_scaling is [1], not an object"),
        ("linear", 'rope_scaling is "linear", not an object'),
    ],
)
def test_bad_rope_values_are_named(tmp_path: Path, scaling: Any, why: str) -> None:
    assert why in refused(tmp_path, config(rope_scaling=scaling))


# What is refused


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]},
            'model_type "gemma2" with architecture "Gemma2ForCausalLM"',
        ),
        ({"model_type": "mixtral", "architectures": None}, 'of model_type "mixtral"'),
        ({"model_type": REMOVED, "architectures": ["OPT"]}, 'of architecture "OPT"'),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            'model_type "llama" with architecture "LlamaForSequenceClassification"',
        ),
        (
            {"architectures": ["MistralForCausalLM"]},
            'model_type "llama" with architecture "MistralForCausalLM"',
        ),
    ],
)
def test_other_architectures_are_refused_with_the_list_of_supported_ones(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    message = refused(tmp_path, config(**changes), UnsupportedModelError)
    assert why in message
    assert all(name in message for name in ARCHITECTURES.values())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, 'quantised by "awq"'),
        ({"quantization_config": {}}, "quantization_config is present"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; only "silu"'),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    assert why in refused(tmp_path, config(**changes), UnsupportedModelError)


def test_null_means_that_nothing_is_asked_for(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {
        "quantization_config": None,
        "per_layer_config": None,
        "hidden_act": None,
    }
    assert parse(tmp_path, config(**nothing)) == parse(tmp_path, config())


SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
]


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [0, -1, 2.5, 2**40, 1e300, "8", True, [8], {}])
def test_a_size_that_is_no_positive_bounded_number_is_named(
    tmp_path: Path, key: str, value: Any
) -> None:
    message = refused(tmp_path, config(**{key: value}))
    assert f"{key} is " in message
    assert "not a whole number from 1 to " in message


@pytest.mark.parametrize("key", SIZES[:5])
@pytest.mark.parametrize("value", [None, REMOVED])
def test_a_size_that_no_family_can_know_must_be_there(tmp_path: Path, key: str, value: Any) -> None:
    assert f"{key} is missing" in refused(tmp_path, config(**{key: value}))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"num_key_value_heads": 4},
            "num_attention_heads 6 is not a multiple of num_key_value_heads 4",
        ),
        ({"hidden_size": 25}, "hidden_size 25 is not a multiple of num_attention_heads 6"),
        ({"head_dim": 5}, "head_dim is 5, not an even number"),
        ({"hidden_size": 30}, "head_dim is 5, not an even number"),
        ({"hidden_size": 6 * 8192}, "head_dim is 8192, not an even number up to 4096"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, not a number from"),
        ({"rms_norm_eps": "1e-5"}, 'rms_norm_eps is "1e-5", not a number'),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false", not true or false'),
        ({"attention_bias": 1}, "attention_bias is 1, not true or false"),
        ({"architectures": "LlamaForCausalLM"}, 'architectures is "LlamaForCausalLM", not a list'),
        ({"architectures": [3]}, "architectures is [3], not a list of names"),
        ({"model_type": 3}, "model_type is 3, not a string"),
        ({"model_type": None, "architectures": []}, "neither architectures nor model_type"),
        ({"quantization_config": "awq"}, 'quantization_config is "awq", not an object'),
    ],
)
def test_values_that_cannot_be_are_named(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    assert why in refused(tmp_path, config(**changes))


@pytest.mark.parametrize(("family", "window"), [("mistral", 0), ("mistral", -1), ("qwen2", 0)])
def test_an_impossible_window_is_named(tmp_path: Path, family: str, window: int) -> None:
    fields = config(family, sliding_window=window, use_sliding_window=True)
    assert f"sliding_window is {window}, not a whole number from 1" in refused(tmp_path, fields)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "is empty (0 bytes)"),
        (b"{,}", "is not valid JSON at byte 1"),
        (b'{"hidden_size": NaN}', "is not valid JSON at byte 16"),
        (b"{}\0", "is not valid JSON at byte 2 (a NUL)"),
        (b'{"\xff": 1}', "is not UTF-8 at byte 2"),
        (b"null", "is not a JSON object but null"),
        (b'{"hidden_size": 8, "hidden_size": 16}', 'has the key "hidden_size" twice'),
        (b'{"a": {"b": [{"c": 1, "c": 1}]}}', 'has the key "c" twice'),
        (b'{"a": ' + b"[" * 100_000, "nests more than 32 levels deep"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: bytes, why: str) -> None:
    assert why in refused(tmp_path, text)


# Transformers' own reading of the same files

ORACLE_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": config(),
    "llama, all defaults": config(
        num_key_value_heads=REMOVED, max_position_embeddings=REMOVED, rms_norm_eps=REMOVED
    ),
    "llama, biases and tied": config(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama, head_dim": config(head_dim=10),
    "llama, a window that it ignores": config(sliding_window=7),
    "llama, linear": config(rope_scaling={"type": "linear", "factor": 2.5}, rope_theta=5e4),
    "llama, llama3": config(rope_scaling=LLAMA3, rope_theta=500000.0, head_dim=64),
    "llama, llama3 new": config(rope_parameters=LLAMA3 | {"rope_theta": 500000}, head_dim=64),
    "llama, llama3 without original": config(
        rope_scaling={k: v for k, v in LLAMA3.items() if not k.startswith("original")}, head_dim=64
    ),
    "llama, llama3 with original on top": config(
        rope_scaling=LLAMA3, original_max_position_embeddings=16, head_dim=64
    ),
    "mistral": config("mistral"),
    "mistral, no window": config("mistral", sliding_window=None),
    "mistral, window": config("mistral", sliding_window=7, rope_theta=1e6),
    "mistral, defaults": config(
        "mistral",
        hidden_size=32,
        num_attention_heads=8,
        num_key_value_heads=REMOVED,
        max_position_embeddings=REMOVED,
    ),
    "qwen2": config("qwen2"),
    "qwen2, unused window": config("qwen2", sliding_window=7, max_window_layers=1),
    "qwen2, window": config(
        "qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen2, default window": config("qwen2", use_sliding_window=True, max_window_layers=2),
    "qwen2, yarn": config("qwen2", rope_scaling=YARN, rope_theta=1e6, head_dim=64),
    "qwen3": config("qwen3"),
    "qwen3, defaults": config(
        "qwen3",
        num_attention_heads=32,
        num_key_value_heads=REMOVED,
        max_position_embeddings=REMOVED,
    ),
    "qwen3, layer types": config(
        "qwen3",
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "qwen3, biases": config("qwen3", attention_bias=True, head_dim=16),
    "qwen3, yarn with everything": config(
        "qwen3",
        rope_parameters=YARN
        | {"rope_theta": 1e6, "beta_fast": 16, "beta_slow": 2, "truncate": False, "mscale": 2.0}
        | {"mscale_all_dim": 0.5},
    ),
    "qwen3, yarn with a factor of its own": config(
        "qwen3", rope_parameters=YARN | {"rope_theta": 1e6, "attention_factor": 1.75}
    ),
}


def frequencies(config: dict[str, Any]) -> Any:
    """The angles a position from what the engine parsed, in float64, from the formulas."""
    rope, dim = config["rope"], config["head_dim"]
    plain = rope["theta"] ** -(np.arange(0, dim, 2) / dim)
    original = rope["original_max_position_embeddings"]
    if rope["type"] == "default":
        return plain
    if rope["type"] == "linear":
        return plain / rope["factor"]
    if rope["type"] == "llama3":
        turns = original * plain / (2 * np.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = np.clip((turns - low) / (high - low), 0, 1)
    else:

        def index_of(turns: float) -> Any:
            return dim * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(rope["theta"]))

        first, last = index_of(rope["beta_fast"]), index_of(rope["beta_slow"])
        if rope["truncate"]:
            first, last = np.floor(first), np.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        last = last if first != last else last + 0.001
        share = 1 - np.clip((np.arange(dim // 2) - first) / (last - first), 0, 1)
    return share * plain + (1 - share) * plain / rope["factor"]


@pytest.mark.parametrize("name", ORACLE_CONFIGS)
def test_transformers_reads_the_same_file_the_same_way(
    transformers: ModuleType, tmp_path: Path, name: str
) -> None:
    got = parse(tmp_path, ORACLE_CONFIGS[name])
    want = transformers.AutoConfig.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(want)

    for ours, theirs in [
        ("family", "model_type"),
        ("vocab_size", "vocab_size"),
        ("num_layers", "num_hidden_layers"),
        ("max_position_embeddings", "max_position_embeddings"),
        ("tie_word_embeddings", "tie_word_embeddings"),
    ]:
        assert got[ours] == getattr(want, theirs), ours
    assert got["rms_norm_eps"] == np.float32(want.rms_norm_eps)

    # The model that it builds says what its fields come to.
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    layer = "model.layers.0."
    rows, kv_rows = (got[n] * got["head_dim"] for n in ("num_heads", "num_kv_heads"))
    assert shapes[layer + "self_attn.q_proj.weight"] == (rows, got["hidden_size"])
    assert shapes[layer + "self_attn.k_proj.weight"] == (kv_rows, got["hidden_size"])
    assert shapes[layer + "mlp.up_proj.weight"] == (got["intermediate_size"], got["hidden_size"])
    assert (layer + "self_attn.q_proj.bias" in shapes) == got["qkv_bias"]
    assert (layer + "self_attn.o_proj.bias" in shapes) == got["attention_output_bias"]
    assert (layer + "mlp.up_proj.bias" in shapes) == got["mlp_bias"]
    assert (layer + "self_attn.q_norm.weight" in shapes) == got["qk_norm"]

    if got["family"] in ("qwen2", "qwen3"):
        sliding = [kind == "sliding_attention" for kind in want.layer_types]
        windows = [want.sliding_window if s else 0 for s in sliding]
    else:
        window = getattr(want, "sliding_window", None) if got["family"] == "mistral" else None
        windows = [window or 0] * got["num_layers"]
    assert got["sliding_window"] == windows

    rotary = model.model.rotary_emb
    assert got["rope"]["attention_factor"] == pytest.approx(rotary.attention_scaling, rel=1e-12)
    np.testing.assert_allclose(frequencies(got), rotary.inv_freq.numpy(), rtol=2e-6)


def test_a_window_holds_the_token_itself_and_window_minus_one_before(
    transformers: ModuleType, tmp_path: Path
) -> None:
    import torch

    window = parse(tmp_path, config("mistral", sliding_window=7))["sliding_window"][0]
    seen = transformers.masking_utils.sliding_window_causal_mask_function(7)
    for i in range(20):
        theirs = [j for j in range(20) if seen(0, 0, torch.tensor(i), torch.tensor(j))]
        assert theirs == [j for j in range(20) if i - window < j <= i]
