"""What is built and installed: the files of the wheel, what it needs, and the stub of _core."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest

import tinyvllm
from tinyvllm import _core

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PACKAGE = ROOT / "src" / "tinyvllm"


def python(*arguments: str, cwd: Path = Path("/")) -> str:
    """What a fresh interpreter prints."""
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- The wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The wheel without its C++ part, which takes a minute to build."""
    directory = tmp_path_factory.mktemp("wheel")
    settings = {"wheel.cmake": "false", "build-dir": str(directory / "build")}
    code = f"from scikit_build_core.build import *; build_wheel({str(directory)!r}, {settings})"
    python("-c", code, cwd=ROOT)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_the_package_and_nothing_else(wheel_files: set[str]) -> None:
    sources = {
        f"tinyvllm/{path.relative_to(PACKAGE)}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    assert {name for name in wheel_files if ".dist-info/" not in name} == sources


def test_the_wheel_holds_the_bundled_model(wheel_files: set[str]) -> None:
    names = ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json")
    assert {f"tinyvllm/story_model/{name}" for name in names} <= wheel_files


def test_the_wheel_tells_type_checkers_that_it_is_typed(wheel_files: set[str]) -> None:
    assert {"tinyvllm/py.typed", "tinyvllm/_core.pyi"} <= wheel_files


def test_the_wheel_holds_both_licences(wheel_files: set[str]) -> None:
    names = {name.split(".dist-info/licenses/")[-1] for name in wheel_files}
    assert {"LICENSE", "third_party/nlohmann/LICENSE.MIT"} <= names


# --- What is installed ----------------------------------------------------------------------------


def test_the_versions_agree() -> None:
    version = re.search(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)
    assert version
    assert importlib.metadata.version("tinyvllm") == version[1]
    assert _core.__version__ == version[1]
    assert tinyvllm.__version__ == version[1]


def test_it_needs_nothing_heavy() -> None:
    needed = importlib.metadata.requires("tinyvllm") or []
    always = {re.split(r"[^\w-]", need)[0] for need in needed if "extra ==" not in need}
    libraries = {"click", "huggingface-hub", "jinja2", "numpy", "prompt_toolkit", "tokenizers"}
    assert always == {*libraries, "tqdm"}


def test_it_imports_nothing_heavy() -> None:
    # Everything public. Where the oracle is installed, a dependency of ours could bring it in.
    code = "import sys, tinyvllm; [getattr(tinyvllm, name) for name in tinyvllm.__all__]"
    loaded = python("-c", f"{code}; print(*sys.modules)").split()
    assert "tinyvllm._core" in loaded
    assert {"torch", "transformers", "pandas", "scipy"}.isdisjoint(loaded)


def test_the_peers_and_the_oracle_share_an_environment() -> None:
    """What both files pin is one version: `make compare` after `make test` changes nothing."""
    pins = [
        dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE))
        for name in ("requirements-bench.txt", "requirements-oracle.txt")
    ]
    shared = pins[0].keys() & pins[1].keys()
    assert shared == {"torch", "transformers"}
    assert all(pins[0][name] == pins[1][name] for name in shared)


# --- The stub -------------------------------------------------------------------------------------
# pybind11 writes each function's signature into the first line of its docstring.


def runtime_signature(function: Any) -> list[str]:
    """The parameters by name, with " = default" where there is one; "*" and "**kwargs" as such."""
    first_line = function.__doc__.splitlines()[0]
    parsed = ast.parse(f"def {first_line}: ...").body[0]
    assert isinstance(parsed, ast.FunctionDef)
    return signature(parsed)


def signature(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)

    def word(argument: ast.arg, default: ast.expr | None) -> str:
        return argument.arg if default is None else f"{argument.arg} = {ast.unparse(default)}"

    words = [word(*pair) for pair in zip(plain, defaults, strict=True) if pair[0].arg != "self"]
    if arguments.kwonlyargs:
        words.append("*")
        words += map(word, arguments.kwonlyargs, arguments.kw_defaults)
    if arguments.kwarg:
        words.append(f"**{arguments.kwarg.arg}")
    return words


def stub_members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    named = {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    variables = (node for node in body if isinstance(node, ast.AnnAssign))
    public = {ast.unparse(node.target): node for node in variables}
    return {**named, **{name: node for name, node in public.items() if name[0] != "_"}}


def is_property(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        isinstance(decorator, ast.Name) and decorator.id == "property"
        for decorator in node.decorator_list
    )


STUB = stub_members(ast.parse((PACKAGE / "_core.pyi").read_text()).body)
OWNERS: dict[str, Any] = {"_core": _core, "ops": _core.ops}
OWNERS |= {name: member for name, member in vars(_core).items() if isinstance(member, type)}


# What the stub has and the module only in some builds.
WITH_CUDA = {
    *("CudaContext", "MatmulPlan", "MatmulTimer", "streaming_shapes", "num_normalising_shapes"),
    *("cuda_sample", "cuda_logprobs", "cuda_feed_tokens", "upload_and_read_back"),
    *("matmul_by_plan", "time_attention", "time_sampling", "cuda_memory"),
}
EMULATED = {"trap_names", "run_trap"}
ABSENT = {
    "none": WITH_CUDA | EMULATED,
    "gpu": EMULATED,
    "emulated": set(),
}[_core.cuda_build()]


def stub_of(owner: str) -> dict[str, ast.stmt]:
    if owner == "_core":
        members = {name: node for name, node in STUB.items() if name not in ("_Ops", "ops")}
    else:
        node = STUB["_Ops" if owner == "ops" else owner]
        assert isinstance(node, ast.ClassDef)
        members = stub_members(node.body)
    return {name: node for name, node in members.items() if name not in ABSENT}


@pytest.mark.parametrize("owner", OWNERS)
def test_the_stub_has_the_names_of_the_module(owner: str) -> None:
    runtime = {
        name
        for name, member in vars(OWNERS[owner]).items()
        if not name.startswith("_") and not isinstance(member, types.ModuleType)
    }
    assert {name for name in stub_of(owner) if name != "__init__"} == runtime


@pytest.mark.parametrize("owner", OWNERS)
def test_the_stub_has_the_parameters_of_the_module(owner: str) -> None:
    for name, node in stub_of(owner).items():
        member = vars(OWNERS[owner])[name]
        if isinstance(node, ast.FunctionDef):
            assert is_property(node) == isinstance(member, property), name
            if not is_property(node):
                assert signature(node) == runtime_signature(member), name
