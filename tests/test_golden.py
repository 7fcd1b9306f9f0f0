"""The engine against outputs of Transformers that are kept in the repository: no torch needed.

golden/make_golden.py writes them and says what they hold. Every family and option is compared,
with Transformers itself at hand, in test_oracle.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from devices import has_cuda
from families import FAMILIES
from oracle import LOGIT_BOUND, NUM_GREEDY, kl_divergences, logit_error, max_abs, record
from tinyvllm import _core

GOLDEN = Path(__file__).parent / "golden"

# Tokens a chunk; 0: all at once; 1: decodes. One of a kind on CUDA, where an emulator is slow, and
# there so many tokens: past each window, and each context that RoPE was scaled from.
FLOAT32 = [("cpu", 0), ("cpu", 7), *([("cuda", 33)] if has_cuda() else [])]
BFLOAT16 = [("cpu", 0), *([("cuda", 0), ("cuda", 1)] if has_cuda() else [])]
NUM_EMULATED = 132


@dataclasses.dataclass(frozen=True)
class Golden:
    name: str
    directory: Path
    outputs: dict[str, Any]
    computed: dict[tuple[str, str, int], Any] = dataclasses.field(default_factory=dict)

    def engine_logits(self, device: str, dtype: str, chunk_size: int) -> Any:
        """Of all tokens; on the emulator of the first ones."""
        key = (device, dtype, chunk_size)
        if key not in self.computed:
            emulated = device == "cuda" and _core.cuda_build() == "emulated"
            count = NUM_EMULATED if emulated else None
            model = _core.Model(
                str(self.directory), device=device, dtype=dtype, num_threads=2, block_size=16
            )
            token_ids = self.outputs["token_ids"][:count]
            self.computed[key] = model.logits(token_ids, chunk_size=chunk_size)
        return self.computed[key]


def shown(ours: Any, outputs: dict[str, Any]) -> tuple[Any, Any]:
    """The engine's logits and the oracle's at the positions that a golden keeps."""
    there = outputs["positions"] < len(ours)
    return ours[outputs["positions"][there]], outputs["logits"][there]


@pytest.fixture(scope="module", params=sorted(path.stem for path in GOLDEN.glob("*.npz")))
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        outputs = dict(file)
    directory = FAMILIES[request.param].write(tmp_path_factory.mktemp("golden"))
    return Golden(request.param, directory, outputs)


def test_there_are_goldens_of_each_architecture() -> None:
    architectures = {str(FAMILIES[path.stem].config["model_type"]) for path in GOLDEN.glob("*.npz")}
    assert architectures == {"llama", "mistral", "qwen2", "qwen3"}


def test_the_checkpoint_is_still_the_one_that_was_shown_to_transformers(golden: Golden) -> None:
    digest = hashlib.sha256()
    for path in sorted(golden.directory.glob("*.safetensors")):
        digest.update(path.read_bytes())
    assert digest.hexdigest() == golden.outputs["weights_sha256"], (
        f"golden/{golden.name}.npz: the generator or the config of this family has changed. "
        "Run golden/make_golden.py and read what it changes."
    )


@pytest.mark.parametrize(("device", "chunk_size"), FLOAT32)
def test_float32_logits_equal_the_golden_ones(golden: Golden, device: str, chunk_size: int) -> None:
    outputs = golden.outputs
    ours, truth = shown(golden.engine_logits(device, "float32", chunk_size), outputs)
    error = logit_error(ours, truth) * max_abs(truth) / outputs["max_abs"]
    what = f"golden float32 max |logit - oracle| / max |oracle|, {device}"
    assert record(what, golden.name, error, LOGIT_BOUND)


@pytest.mark.parametrize(("device", "chunk_size"), FLOAT32)
def test_float32_greedy_tokens_equal_the_golden_ones(
    golden: Golden, device: str, chunk_size: int
) -> None:
    outputs = golden.outputs
    clear = outputs["clear"]
    assert clear[-NUM_GREEDY:].sum() > NUM_GREEDY // 2  # else the continuation goes unchecked
    picked = golden.engine_logits(device, "float32", chunk_size).argmax(axis=-1)
    clear = clear[: len(picked)]
    np.testing.assert_array_equal(picked[clear], outputs["greedy"][: len(picked)][clear])


@pytest.mark.parametrize(("device", "chunk_size"), BFLOAT16)
def test_bfloat16_is_about_as_near_as_transformers_own(
    golden: Golden, device: str, chunk_size: int
) -> None:
    # 24 positions are too few to compare two means closely: this catches what is grossly wrong,
    # test_oracle.py holds the promise over 2,000.
    outputs = golden.outputs
    ours, truth = shown(golden.engine_logits(device, "bfloat16", chunk_size), outputs)
    kl = kl_divergences(truth, ours).mean()
    what = f"golden bfloat16 mean KL, as a share of Transformers', {device}"
    assert record(what, golden.name, kl / outputs["bfloat16_kl"], 2.0)
