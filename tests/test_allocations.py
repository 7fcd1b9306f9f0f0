"""A decode step on the CPU takes no memory from the system for its rows, layers and threads.

Counted by a library that is loaded before all others and stands in front of malloc; it is compiled
here. What is left are the few arrays that the engine hands over, each once a step.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine_driver import MODEL
from tinyvllm import dummy

COUNTER = r"""
#include <stddef.h>
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
long num_allocations;
static void count(void) { __atomic_add_fetch(&num_allocations, 1, __ATOMIC_RELAXED); }
void* malloc(size_t n) { count(); return __libc_malloc(n); }
void* calloc(size_t n, size_t size) { count(); return __libc_calloc(n, size); }
void* realloc(void* p, size_t n) { count(); return __libc_realloc(p, n); }
void* aligned_alloc(size_t a, size_t n) { count(); return __libc_memalign(a, n); }
"""

# Prints how many allocations each of the decode steps makes.
PROGRAM = """
import ctypes, json, sys
from tinyvllm import _core

model, counter, sequences, options = sys.argv[1:]
num_allocations = ctypes.c_long.in_dll(ctypes.CDLL(counter), "num_allocations")
engine = _core.Engine(model, num_threads=2)
for request in range(int(sequences)):
    params = _core.SamplingParams(max_tokens=40, ignore_eos=True, **json.loads(options))
    engine.add_request(request, [1 + request % 50] * 10, params)
counts = []
for _ in range(30):
    before = num_allocations.value
    output = engine.step()
    counts.append(num_allocations.value - before)
    assert len(output.token) == int(sequences)
print(json.dumps(counts))
"""


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    directory = tmp_path_factory.mktemp("counter")
    source, library = directory / "counter.c", directory / "counter.so"
    source.write_text(COUNTER)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def fewest_allocations(counter: Path, model: Path, sequences: int, **options: object) -> int:
    """Of a step: a table that grows takes memory in some steps and not in all."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, model, counter, str(sequences), json.dumps(options)],
        env={**os.environ, "LD_PRELOAD": str(counter)},
        capture_output=True,
        text=True,
        check=True,
    )
    return min(json.loads(result.stdout))


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "random"])
def test_a_decode_step_allocates_nothing_for_its_rows_and_layers(
    counter: Path, tmp_path: Path, temperature: float
) -> None:
    counts = set()
    for layers in (1, 6):
        config = {**MODEL, "num_hidden_layers": layers}
        model = dummy.write_checkpoint(tmp_path / str(layers), config, seed=1, tokenizer=False)
        for sequences in (1, 33):
            counts.add(fewest_allocations(counter, model, sequences, temperature=temperature))
    assert len(counts) == 1, "the count depends on the number of layers or of sequences"
    assert 0 < counts.pop() <= 8
