"""Model lookup: directories, the cache, and real downloads from a hub on this machine.

Downloads run huggingface_hub itself in a process of its own, because it reads its environment at
import. That process may only speak to 127.0.0.1: HF_ENDPOINT points there.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hub_server import REPO, HubServer, commit_of
from tinyvllm.errors import CheckpointError, InvalidRequestError
from tinyvllm.model_lookup import find_model

SHARDS = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
WANTED = {
    "config.json": b"{}",
    "generation_config.json": b'{"do_sample": false}',
    "tokenizer.json": b'{"model": 1}',
    "tokenizer_config.json": b'{"bos_token": null}',
    "special_tokens_map.json": b'{"eos_token": "x"}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
    "model.safetensors.index.json": json.dumps({"weight_map": SHARDS}).encode(),
    "model-1-of-2.safetensors": b"1" * 70_000,
    "model-2-of-2.safetensors": b"2" * 90_000,
}
UNWANTED = {
    "README.md": b"# read me",
    ".gitattributes": b"*",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same weights again",
    "original/consolidated.00.pth": b"and again",
    "original/config.json": b"{}",
    "onnx/model.safetensors": b"and again",
    "tokenizer.model": b"sentencepiece",
}
SINGLE = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"3" * 5_000}

CALL = """
import json, resource, sys, time

wait = time.sleep
time.sleep = lambda seconds: wait(min(seconds, 0.01))  # huggingface_hub's pauses between retries

from tinyvllm.errors import TinyvllmError
from tinyvllm.model_lookup import find_model

model, options, result, limit = json.loads(sys.argv[1])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
report = {"found": "", "error": ""}
try:
    report["found"] = str(find_model(model, **options))
except TinyvllmError as error:
    report["error"], report["exit_code"] = str(error), error.exit_code
report["imported"] = "huggingface_hub" in sys.modules
with open(result, "w") as file:
    json.dump(report, file)
"""


@dataclass
class Lookup:
    """What find_model did in its process: found a directory, or raised."""

    found: str
    error: str
    imported: bool  # huggingface_hub
    stderr: str

    @property
    def path(self) -> Path:
        assert self.found, self.error
        return Path(self.found)


class Machine:
    """A home directory, a cache in it, and processes that see nothing else of the environment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache = root / "hf" / "hub"
        self.env = {
            "HOME": str(root),
            "HF_HOME": str(root / "hf"),
            "HF_ENDPOINT": "http://127.0.0.1:9",  # nothing listens there
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": ":".join(str(Path(path).absolute()) for path in sys.path),
        }

    def find(
        self,
        model: str = REPO,
        *,
        stderr: int | None = subprocess.PIPE,
        largest_file: int | None = None,
        env: dict[str, str] | None = None,
        **options: Any,
    ) -> Lookup:
        """stderr: None closes it."""
        result = self.root / "result.json"
        done = subprocess.run(
            [sys.executable, "-c", CALL, json.dumps([model, options, str(result), largest_file])],
            env={**self.env, **(env or {})},
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=60,
            preexec_fn=partial(os.close, 2) if stderr is None else None,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "", "stdout belongs to the answer"
        report = json.loads(result.read_text())
        assert report.pop("exit_code", 3) == 3
        assert "\n" not in report["error"]
        return Lookup(**report, stderr=done.stderr or "")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def hub(machine: Machine) -> Iterator[HubServer]:
    with HubServer({**WANTED, **UNWANTED}, revisions={"v1": SINGLE}) as server:
        machine.env["HF_ENDPOINT"] = server.endpoint
        yield server


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for lookups in this process, which never may reach a network."""
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def fill(cache: Path, files: dict[str, bytes], revision: str = "main") -> Path:
    """Writes `files` into the cache as huggingface_hub does: blobs, links to them, a ref."""
    folder = cache / ("models--" + REPO.replace("/", "--"))
    snapshot = folder / "snapshots" / commit_of(revision)
    for directory in (folder / "blobs", folder / "refs", snapshot):
        directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        blob = folder / "blobs" / f"{commit_of(revision)}-{name.replace('/', '-')}"
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    ref = folder / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit_of(revision))
    return snapshot


def contents(directory: Path) -> dict[str, bytes]:
    found = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


# Paths.


def test_a_directory_is_itself(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("some dir").mkdir()
    assert find_model("some dir") == Path("some dir")
    assert capfd.readouterr() == ("", "")


def test_a_tilde_is_the_home_directory(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert find_model("~/m") == tmp_path / "m"


def test_a_directory_wins_over_a_hub_name_and_says_so(
    cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fill(cache, SINGLE)
    Path(REPO).mkdir(parents=True)
    assert find_model(REPO) == Path(REPO)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert REPO in err
    find_model(REPO, quiet=True)
    assert capfd.readouterr() == ("", "")


@pytest.fixture(params=["closed", "/dev/full"])
def deaf(request: pytest.FixtureRequest) -> Iterator[int | None]:
    """A stderr on which nothing can be said, for Machine.find."""
    if request.param == "closed":
        yield None
    else:
        with Path(request.param).open("wb") as full:
            yield full.fileno()


def test_a_note_that_cannot_be_said_changes_nothing(machine: Machine, deaf: int | None) -> None:
    (machine.root / REPO).mkdir(parents=True)
    assert machine.find(stderr=deaf).path == Path(REPO)


@pytest.mark.parametrize(
    "model",
    ["./gone", "../gone", "/gone/away", "~/gone", "gone", "", "a/b/c", "a--b/c", "a/..", "a/b.git"],
)
def test_a_path_that_does_not_exist_is_named(cache: Path, model: str) -> None:
    with pytest.raises(CheckpointError, match="org/name") as caught:
        find_model(model)
    assert str(caught.value).startswith(f'"{model.replace("~", str(Path.home()))}"')


def test_a_file_is_refused_with_its_directory(cache: Path) -> None:
    Path("m").mkdir()
    Path("m/model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"is a file\. Pass the directory .*: m$"):
        find_model("m/model.safetensors")


def test_a_gguf_file_is_refused_by_its_format(cache: Path) -> None:
    Path("m.gguf").touch()
    with pytest.raises(CheckpointError, match=r"m\.gguf is a GGUF file.*\*\.safetensors"):
        find_model("m.gguf")


def test_a_dangling_link_is_named_with_its_target(cache: Path) -> None:
    Path("m").symlink_to("moved/away")
    with pytest.raises(CheckpointError, match="m is a link to moved/away"):
        find_model("m")


# The cache, without huggingface_hub.


@pytest.mark.parametrize(
    ("variables", "root"),
    [
        ({"HF_HUB_CACHE": "~/a", "HF_HOME": "/wrong"}, "a"),
        ({"HUGGINGFACE_HUB_CACHE": "$HOME/b", "HF_HOME": "/wrong"}, "b"),
        ({"HF_HOME": "~/c", "XDG_CACHE_HOME": "/wrong"}, "c/hub"),
        ({"XDG_CACHE_HOME": "~/d"}, "d/huggingface/hub"),
        ({}, ".cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_environment_says(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    root: str,
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    snapshot = fill(tmp_path / root, SINGLE)
    assert find_model(REPO) == snapshot


def test_a_revision_selects_its_snapshot(cache: Path) -> None:
    main, v1 = fill(cache, SINGLE), fill(cache, SINGLE, "refs/pr/1")
    assert find_model(REPO) == find_model(f"{REPO}@main") == main
    assert find_model(REPO, revision="refs/pr/1") == find_model(f"{REPO}@refs/pr/1") == v1
    assert find_model(REPO, revision=commit_of("refs/pr/1")) == v1


def test_two_revisions_are_refused(cache: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r'"v1".*"v2"'):
        find_model(f"{REPO}@v1", revision="v2")


@pytest.mark.parametrize("revision", ["../../../outside", "/outside", "-x"])
def test_a_revision_never_leaves_the_cache(cache: Path, tmp_path: Path, revision: str) -> None:
    fill(cache, SINGLE)
    (tmp_path / "outside").write_text(commit_of("main"))
    with pytest.raises(CheckpointError, match="is not a branch, a tag or a commit"):
        find_model(REPO, revision=revision)


@pytest.mark.parametrize("ref", [b"../../../../elsewhere", b"", b"\xff\xfe", b"main"])
def test_a_ref_that_holds_no_commit_is_no_snapshot(cache: Path, tmp_path: Path, ref: bytes) -> None:
    fill(cache, SINGLE)
    shutil.copytree(fill(cache, SINGLE, "v1"), tmp_path / "elsewhere")
    (cache / ("models--" + REPO.replace("/", "--")) / "refs" / "main").write_bytes(ref)
    with pytest.raises(CheckpointError, match="has no snapshot"):
        find_model(REPO)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-2-of-2.safetensors"])
@pytest.mark.parametrize("how", ["link removed", "blob removed"])
def test_an_incomplete_snapshot_names_what_it_lacks(cache: Path, name: str, how: str) -> None:
    snapshot = fill(cache, WANTED)
    assert find_model(REPO) == snapshot
    (snapshot / name if how == "link removed" else (snapshot / name).resolve()).unlink()
    with pytest.raises(CheckpointError, match=f"{re.escape(str(snapshot))} lacks {name}\\."):
        find_model(REPO)


@pytest.mark.parametrize("index", [b"{", b"[]", b'{"weight_map": [1]}', b"\xff", b"[" * 100_000])
def test_a_damaged_index_is_left_to_the_checkpoint_reader(cache: Path, index: bytes) -> None:
    snapshot = fill(cache, {**SINGLE, "model.safetensors.index.json": index})
    assert find_model(REPO) == snapshot


def test_neither_a_directory_nor_a_cached_model_imports_huggingface_hub(machine: Machine) -> None:
    snapshot = fill(machine.cache, WANTED)
    (machine.root / "m").mkdir()
    for model, path in ((REPO, snapshot), ("m", Path("m"))):
        found = machine.find(model)
        assert (found.path, found.imported, found.stderr) == (path, False, "")


# Downloads.


def test_a_download_needs_no_stderr(machine: Machine, hub: HubServer, deaf: int | None) -> None:
    assert contents(machine.find(stderr=deaf).path) == WANTED


def test_a_download_fetches_what_the_engine_reads_and_no_more(
    machine: Machine, hub: HubServer
) -> None:
    found = machine.find()
    assert found.path.parent.parent.parent == machine.cache
    assert contents(found.path) == WANTED
    assert hub.downloaded() == set(WANTED)
    assert found.stderr == ""  # not a terminal: no progress


def test_a_downloaded_model_is_found_without_a_request(machine: Machine, hub: HubServer) -> None:
    first = machine.find()
    hub.requests.clear()
    second, third = machine.find(), machine.find(offline=True)
    assert first.path == second.path == third.path
    assert hub.requests == []
    assert not second.imported


def test_a_model_in_one_file_is_downloaded(machine: Machine) -> None:
    with HubServer(SINGLE) as hub:
        found = machine.find(env={"HF_ENDPOINT": hub.endpoint})
    assert contents(found.path) == SINGLE


def test_an_empty_variable_counts_as_not_set(machine: Machine, hub: HubServer) -> None:
    first = machine.find(revision="v1", env={"HF_HUB_CACHE": ""}).path
    assert first == machine.find(revision="v1", offline=True).path
    assert machine.cache in first.parents


def test_a_revision_is_downloaded_as_asked(machine: Machine, hub: HubServer) -> None:
    tag, commit = machine.find(f"{REPO}@v1"), machine.find(revision=commit_of("v1"))
    assert tag.path == commit.path
    assert tag.path.name == commit_of("v1")
    assert contents(tag.path) == SINGLE
    assert "main" not in str(hub.requests)


@pytest.mark.parametrize("how", ["link removed", "blob removed"])
def test_a_hole_in_the_cache_is_repaired(machine: Machine, hub: HubServer, how: str) -> None:
    path = machine.find().path
    shard = path / "model-2-of-2.safetensors"
    (shard if how == "link removed" else shard.resolve()).unlink()
    assert not shard.exists()
    hub.requests.clear()
    assert machine.find().path == path
    assert contents(path) == WANTED
    assert hub.downloaded() <= {"model-2-of-2.safetensors"}  # a blob that is there is linked


def test_progress_goes_to_a_terminal_unless_quiet(machine: Machine, hub: HubServer) -> None:
    def shown(revision: str, quiet: bool) -> bytes:
        ours, theirs = pty.openpty()
        try:
            os.set_blocking(ours, False)
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
            assert machine.find(revision=revision, quiet=quiet, stderr=theirs).found
            try:
                return os.read(ours, 1 << 16)
            except BlockingIOError:
                return b""
        finally:
            os.close(ours)
            os.close(theirs)

    assert shown("v1", quiet=True) == b""
    assert b"%" in shown("main", quiet=False)


# No network.


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", None])
def test_offline_lists_the_places_and_asks_nobody(
    machine: Machine, hub: HubServer, variable: str | None
) -> None:
    env = {variable: "1"} if variable else {}
    found = machine.find(offline=variable is None, env=env)
    assert str(machine.root / REPO) in found.error
    assert str(machine.cache) in found.error
    assert hub.requests == []
    assert not found.imported


@pytest.mark.parametrize("revision", ["main", "v1"])
@pytest.mark.parametrize("variables", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_the_command_that_offline_prints_works(
    machine: Machine, hub: HubServer, revision: str, variables: dict[str, str]
) -> None:
    machine.env.update(variables)
    error = machine.find(revision=revision, offline=True).error
    command = error.partition("run: ")[2]
    assert f"hf download {REPO} " in command
    subprocess.run(
        command, shell=True, check=True, env=machine.env, stdout=subprocess.DEVNULL, timeout=60
    )
    assert machine.find(revision=revision, offline=True).path.name == commit_of(revision)
    assert not hub.downloaded() & {"pytorch_model.bin", "consolidated.safetensors"}


def test_the_printed_command_names_shards_that_its_patterns_miss(cache: Path) -> None:
    index = b'{"weight_map": {"a": "w.safetensors"}}'
    fill(cache, {**SINGLE, "model.safetensors.index.json": index})
    with pytest.raises(CheckpointError, match=r"run: .*hf download .* w\.safetensors$"):
        find_model(REPO)


# What a hub and a network can do to a download.


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ({"refuse": (404, "RepoNotFound")}, "Check the name; .*`hf auth login`"),
        ({"refuse": (401, "RepoNotFound")}, "Check the name; .*`hf auth login`"),
        ({"refuse": (401, "")}, "Check the name; .*`hf auth login`"),
        ({"refuse": (403, "")}, f"HTTP 403.*licence at .*/{REPO}, run `hf auth login`"),
        ({"refuse_files": (403, "GatedRepo")}, f"gated.*licence at .*/{REPO}, run `hf auth login`"),
        ({"refuse_files": (401, "GatedRepo")}, f"gated.*licence at .*/{REPO}, run `hf auth login`"),
        ({"refuse": (503, "")}, "answered HTTP 503.*Try again later"),
        ({"refuse_files": (500, "")}, "answered HTTP 500.*Try again later"),
    ],
)
def test_a_refusal_is_one_line_with_what_to_try(
    machine: Machine, server: dict[str, tuple[int, str]], expected: str
) -> None:
    with HubServer({**WANTED, **UNWANTED}, **server) as hub:  # type: ignore[arg-type]
        found = machine.find(env={"HF_ENDPOINT": hub.endpoint})
    assert re.search(expected, found.error), found.error
    assert REPO in found.error


def test_an_unknown_revision_is_named(machine: Machine, hub: HubServer) -> None:
    error = machine.find(revision="v9").error
    assert f'{REPO} has no branch, tag or commit "v9"' in error


def test_a_refused_connection_names_the_hub(machine: Machine) -> None:
    error = machine.find().error
    assert "could not be downloaded from http://127.0.0.1:9: " in error
    assert "HF_ENDPOINT" in error


def test_a_partly_cached_model_is_not_passed_off_as_whole(machine: Machine) -> None:
    fill(machine.cache, {"config.json": b"{}"})
    assert "could not be downloaded from" in machine.find().error


def test_a_dropped_connection_is_reported_and_the_next_call_goes_on(
    machine: Machine, hub: HubServer
) -> None:
    hub.cut = {"model-2-of-2.safetensors": 30_000}
    error = machine.find(quiet=True).error
    assert "could not be downloaded from" in error
    assert "run the same command again" in error
    hub.cut = {}
    hub.requests.clear()
    found = machine.find()
    assert contents(found.path) == WANTED
    assert "config.json" not in hub.downloaded()


def test_ctrl_c_ends_a_download_at_once(machine: Machine, hub: HubServer) -> None:
    hub.stall = ["model-1-of-2.safetensors"]
    arguments = json.dumps([REPO, {}, str(machine.root / "result"), None])
    process = subprocess.Popen(
        [sys.executable, "-c", CALL, arguments],
        env=machine.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 30
        while not hub.downloaded() & set(hub.stall) and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == -signal.SIGINT
    finally:
        process.kill()
        process.wait()


def test_a_quiet_failure_prints_nothing_of_its_own(machine: Machine, hub: HubServer) -> None:
    hub.cut = {"model-1-of-2.safetensors": 10}
    found = machine.find(quiet=True)
    assert found.error
    assert found.stderr == ""


def test_a_write_that_fails_names_the_cache_and_the_room(machine: Machine, hub: HubServer) -> None:
    error = machine.find(largest_file=50_000).error  # the kernel refuses larger files
    assert re.search(r"Cannot write .*File too large \(\d+\.\d GB free\).*HF_HUB_CACHE", error)


def test_a_cache_that_is_a_file_is_named(machine: Machine, hub: HubServer) -> None:
    (machine.root / "hf").touch()
    error = machine.find().error
    assert error.startswith("Cannot write ")
    assert str(machine.cache) in error


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "config.json"])
def test_a_repository_without_a_needed_file_costs_no_weights(machine: Machine, name: str) -> None:
    files = {n: data for n, data in SINGLE.items() if n != name} | {"pytorch_model.bin": b"p"}
    with HubServer(files) as hub:
        error = machine.find(env={"HF_ENDPOINT": hub.endpoint}).error
    assert f"has no {name} on the hub" in error
    assert "model.safetensors" not in hub.downloaded()
