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

from families import FAMILIES
from oracle import LOGIT_BOUND, NUM_GREEDY, kl_divergences, logit_error, max_abs, record

GOLDEN = Path(__file__).parent / "golden"


@dataclasses.dataclass(frozen=True)
class Golden:
    name: str
    directory: Path
    outputs: dict[str, Any]

    def engine_logits(self, dtype: str, chunk_size: int) -> Any:
        from tinyvllm import _core  # not at the top: a broken build fails these tests, no others

        model = _core.Model(str(self.directory), dtype=dtype, num_threads=2, block_size=16)
        return model.logits(self.outputs["token_ids"], chunk_size=chunk_size)


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


@pytest.mark.parametrize("chunk_size", [0, 7])
def test_float32_logits_equal_the_golden_ones(golden: Golden, chunk_size: int) -> None:
    outputs = golden.outputs
    ours = golden.engine_logits("float32", chunk_size)[outputs["positions"]]
    error = logit_error(ours, outputs["logits"]) * max_abs(outputs["logits"]) / outputs["max_abs"]
    assert record(
        "golden float32 max |logit - oracle| / max |oracle|", golden.name, error, LOGIT_BOUND
    )


@pytest.mark.parametrize("chunk_size", [0, 7])
def test_float32_greedy_tokens_equal_the_golden_ones(golden: Golden, chunk_size: int) -> None:
    outputs = golden.outputs
    clear = outputs["clear"]
    assert clear[-NUM_GREEDY:].sum() > NUM_GREEDY // 2  # else the continuation goes unchecked
    picked = golden.engine_logits("float32", chunk_size).argmax(axis=-1)
    np.testing.assert_array_equal(picked[clear], outputs["greedy"][clear])


def test_bfloat16_is_about_as_near_as_transformers_own(golden: Golden) -> None:
    # 24 positions are too few to compare two means closely: this catches what is grossly wrong,
    # test_oracle.py holds the promise over 2,000.
    outputs = golden.outputs
    ours = golden.engine_logits("bfloat16", 0)[outputs["positions"]]
    kl = kl_divergences(outputs["logits"], ours).mean()
    assert record(
        "golden bfloat16 mean KL, as a share of Transformers'",
        golden.name,
        kl / outputs["bfloat16_kl"],
        2.0,
    )
