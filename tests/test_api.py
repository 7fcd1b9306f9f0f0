"""Code written for vLLM and nano-vllm runs with an import and a model changed.

Each script touches what the offline examples of those projects touch, in the same way: the same
calls, arguments, attributes. It runs in a process of its own, as a user's would.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from families import FAMILIES
from tinyvllm import LLM, AsyncEngine, SamplingParams, dummy
from tinyvllm.text_engine import BUNDLED_MODEL

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> str:
    """What the process prints on stdout."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dummy as nano-vllm's benchmark needs it: ids to 10,000 and 4,096 positions."""
    config = {
        **FAMILIES["qwen3"].config,
        "vocab_size": 10240,
        "max_position_embeddings": 4096,
    }
    return dummy.write_checkpoint(tmp_path_factory.mktemp("qwen"), config)


# --- nano-vllm ------------------------------------------------------------------------------------

NANO_BENCH = """
import sys
import time
from random import randint, seed
from tinyvllm import LLM, SamplingParams

seed(0)
llm = LLM(sys.argv[1], enforce_eager=False, max_model_len=4096)
prompts = [[randint(0, 10000) for _ in range(randint(10, 100))] for _ in range(32)]
params = [
    SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=randint(5, 20)) for _ in prompts
]
llm.generate(["Benchmark: "], SamplingParams())
began = time.time()
outputs = llm.generate(prompts, params, use_tqdm=False)
seconds = time.time() - began
total = sum(one.max_tokens for one in params)
assert total == sum(len(output["token_ids"]) for output in outputs)
print(f"Total: {total}tok, Time: {seconds:.2f}s, Throughput: {total / seconds:.2f}tok/s")
"""

# Nearly all of the time was that of importing PyTorch, which the tokenizer can do without.
WITHOUT_PYTORCH = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
"""

NANO_EXAMPLE = """
import os
import sys
from tinyvllm import LLM, SamplingParams
from transformers import AutoTokenizer

path = os.path.expanduser(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(path)
llm = LLM(path, enforce_eager=True, tensor_parallel_size=1)
params = SamplingParams(temperature=0.6, max_tokens=64)
prompts = ["Tell me a story about a brave fox.", "Tell me a story about a sleepy owl."]
prompts = [
    tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    for prompt in prompts
]
for prompt, output in zip(prompts, llm.generate(prompts, params)):
    print(f"Prompt: {prompt!r}")
    print(f"Completion: {output['text']!r}")
"""


def test_nano_vllms_benchmark(qwen: Path) -> None:
    assert re.fullmatch(
        r"Total: \d+tok, Time: [\d.]+s, Throughput: [\d.]+tok/s\n", run("-c", NANO_BENCH, str(qwen))
    )


def test_nano_vllms_example(transformers: ModuleType) -> None:
    printed = run("-c", WITHOUT_PYTORCH + NANO_EXAMPLE, str(BUNDLED_MODEL))
    assert "fox" in printed.split("Completion: ")[1]
    assert "owl" in printed.split("Completion: ")[2]


# --- vLLM -----------------------------------------------------------------------------------------

VLLM_BASIC = """
from tinyvllm import LLM, SamplingParams

prompts = ["Hello, my name is", "The president of", "The capital of France is", "The future is"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95)

def main():
    llm = LLM(model=MODEL)
    outputs = llm.generate(prompts, sampling_params)
    for output in outputs:
        prompt = output.prompt
        generated_text = output.outputs[0].text
        print(f"Prompt:    {prompt!r}")
        print(f"Output:    {generated_text!r}")

if __name__ == "__main__":
    main()
"""

VLLM_DEFAULTS = """
from tinyvllm import LLM

llm = LLM(model=MODEL, trust_remote_code=False, tensor_parallel_size=1, dtype="auto", seed=0)
sampling_params = llm.get_default_sampling_params()
sampling_params.max_tokens = 7
sampling_params.temperature = 0.9
sampling_params.top_p = 0.5
sampling_params.top_k = 9
sampling_params.ignore_eos = True
for output in llm.generate(["Hello, my name is", "The future of AI is"], sampling_params):
    print(len(output.outputs[0].token_ids))
"""

VLLM_CHAT = """
from tinyvllm import LLM, SamplingParams

sampling_params = SamplingParams(max_tokens=12, temperature=0.0, top_p=1.0, top_k=-1)
llm = LLM(model=MODEL)

def print_outputs(outputs):
    for output in outputs:
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
    print("-" * 80)

conversation = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello! How can I assist you today?"},
    {"role": "user", "content": "Tell me a story about a brave fox."},
]
print_outputs(llm.chat(conversation, sampling_params, use_tqdm=False))
print_outputs(llm.chat([conversation for _ in range(10)], sampling_params, use_tqdm=True))
template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\\n{% endfor %}"
print_outputs(llm.chat(
    [conversation for _ in range(3)], sampling_params, use_tqdm=False, chat_template=template
))
"""

VLLM_PREFIX_CACHING = """
from tinyvllm import LLM, SamplingParams

prefix = "Once upon a time there was a small village by the sea, and in it lived a fox. " * 4
prompts = ["Hello, my name is", "The president of", "The capital of France is", "The future is"]
generating_prompts = [prefix + prompt for prompt in prompts]
sampling_params = SamplingParams(temperature=0.0)

def texts(outputs):
    for output, prompt in zip(outputs, generating_prompts):
        assert output.prompt == prompt
    return [output.outputs[0].text for output in outputs]

regular_llm = LLM(model=MODEL, gpu_memory_utilization=0.4, enable_prefix_caching=False)
regular = texts(regular_llm.generate(generating_prompts, sampling_params))
del regular_llm

cached_llm = LLM(model=MODEL, enable_prefix_caching=True, gpu_memory_utilization=0.4)
cached_llm.generate(generating_prompts[0], sampling_params)  # computes the common part
outputs = cached_llm.generate(generating_prompts, sampling_params)
print([output.num_cached_tokens > 50 for output in outputs])
print(f"Generated answers are the same: {texts(outputs) == regular}")
assert cached_llm.reset_prefix_cache()
(output,) = cached_llm.generate(generating_prompts[0], sampling_params)
print(output.num_cached_tokens)
"""


def vllm_script(script: str) -> str:
    return run("-c", script.replace("MODEL", repr(str(BUNDLED_MODEL))))


def test_vllms_basic_example() -> None:
    lines = vllm_script(VLLM_BASIC).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["Prompt", "Output"] * 4
    assert lines[0] == "Prompt:    'Hello, my name is'"
    assert all(len(line) > 15 for line in lines[1::2])


def test_vllms_example_that_assigns_to_the_default_sampling_params() -> None:
    assert vllm_script(VLLM_DEFAULTS) == "7\n7\n"


def test_vllms_chat_example() -> None:
    one, ten, three, rest = vllm_script(VLLM_CHAT).split("-" * 80 + "\n")
    assert ten == one * 10
    assert "<|user|>Hello<|end|>" in one
    assert "fox" in one.split(" -> ")[1]
    assert three.count("user: Hello\\nassistant: Hello!") == 3
    assert rest == ""


def test_vllms_prefix_caching_example() -> None:
    assert vllm_script(VLLM_PREFIX_CACHING).splitlines() == [
        "[True, True, True, True]",
        "Generated answers are the same: True",
        "0",
    ]


# --- Names ----------------------------------------------------------------------------------------


def test_the_names_and_defaults_of_the_design() -> None:
    """Stable from the first release; the defaults that scripts rely on are vLLM's."""
    options = inspect.signature(LLM).parameters
    assert list(options)[:2] == ["model", "device"]
    for name, default in {
        "max_num_seqs": 256,
        "block_size": 16,
        "enable_prefix_caching": True,
        "gpu_memory_utilization": 0.9,
        "seed": 0,
    }.items():
        assert options[name].default == default
    assert list(inspect.signature(LLM.generate).parameters)[1:] == [
        "prompts",
        "sampling_params",
        "use_tqdm",
    ]
    assert list(inspect.signature(LLM.chat).parameters)[1:4] == [
        "messages",
        "sampling_params",
        "use_tqdm",
    ]
    assert list(inspect.signature(AsyncEngine.generate).parameters)[1:] == [
        "prompt",
        "sampling_params",
        "request_id",
    ]
    defaults = json.loads(json.dumps(vars(SamplingParams())))
    assert (defaults["temperature"], defaults["max_tokens"], defaults["n"]) == (1.0, 16, 1)


# --- Our own examples -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("basic", r"(?s)Once upon a time \|.+brave fox \|.+"),
        ("chat", r"(?s)> Tell me a story about a brave fox.+\n> .+owl.+[1-9]\d* of them cached.+"),
        (
            "prefix_caching",
            r"(?s).*: (\d+) prompt tokens, \1 computed\n.*texts are the same: True\n",
        ),
        ("streaming", r"(?s).*\n0: .*\n1: .*\n2: .*"),
        ("throughput", r"(?s) *one at a time: .*\n *static: .*\n *continuous: .*"),
    ],
    ids=["basic", "chat", "prefix_caching", "streaming", "throughput"],
)
def test_our_examples_run_on_the_bundled_model(name: str, expected: str) -> None:
    printed = run(str(ROOT / "examples" / f"{name}.py"))
    assert re.fullmatch(expected, printed), printed
