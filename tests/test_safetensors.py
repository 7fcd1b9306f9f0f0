"""One safetensors file: what is accepted, what is refused with which words, and files that change.

The reference is a second reader, written here in plain Python from the format's description, and
the `safetensors` package itself where it is installed.
"""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from checkpoint_files import LLAMA, blob, header_of, safetensors, some_tensors, write_model
from tinyvllm import _core
from tinyvllm.errors import CheckpointError, UnsupportedModelError

BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "U8": 8, "F8_E4M3": 8, "I16": 16, "F16": 16, "BF16": 16}
BITS |= {"F32": 32, "I32": 32, "I64": 64, "F64": 64, "C64": 64}


def reference_read(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The format, read strictly: ValueError for anything that is not exactly right."""
    if len(content) < 8:
        raise ValueError("too short")
    (length,) = struct.unpack("<Q", content[:8])
    if length > 100_000_000 or length > len(content) - 8:
        raise ValueError("header length")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("duplicate key")
        return dict(pairs)

    text = content[8 : 8 + length].decode("utf-8")
    header = json.loads(text, object_pairs_hook=unique)
    if not isinstance(header, dict):
        raise ValueError("not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values()):
        raise ValueError("metadata")
    data = content[8 + length :]
    found = []
    for name, entry in header.items():
        if not isinstance(entry, dict):
            raise ValueError("entry")
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
            raise ValueError("fields")
        if any(type(n) is not int or not 0 <= n < 2**63 for n in shape + offsets):
            raise ValueError("numbers")
        if type(dtype) is not str or dtype not in BITS:
            raise ValueError("dtype")
        begin, end = offsets
        if math.prod(n for n in shape if n) * BITS[dtype] >= 2**64:
            raise ValueError("overflow")
        if math.prod(shape) * BITS[dtype] != (end - begin) * 8:
            raise ValueError("size")
        found.append((begin, end, name, dtype, tuple(shape)))
    at = 0
    for begin, end, *_ in sorted(found):
        if begin != at:
            raise ValueError("hole or overlap")
        at = end
    if at != len(data):
        raise ValueError("length")
    return {name: (dtype, shape, data[begin:end]) for begin, end, name, dtype, shape in found}


def float32_of(dtype: str, shape: tuple[int, ...], data: bytes) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[dtype]).astype("<f4").reshape(shape)


def assert_reads_as(checkpoint: _core.Checkpoint, content: bytes) -> None:
    """Every tensor of the checkpoint is what the reference reads out of the same bytes."""
    want = reference_read(content)
    assert checkpoint.names() == sorted(want)
    for name, (dtype, shape, data) in want.items():
        info = checkpoint.tensor_info(name)
        assert (info["dtype"], info["shape"], info["num_bytes"]) == (dtype, shape, len(data))
        if dtype in ("F32", "F16", "BF16"):
            got = checkpoint.read(name)
            assert got.shape == shape
            with np.errstate(invalid="ignore"):
                np.testing.assert_array_equal(got, float32_of(dtype, shape, data))


def refused(directory: Path, content: bytes) -> str:
    """The message with which this file is refused: one line that begins with the file's path."""
    write_model(directory, content)
    with pytest.raises(CheckpointError) as caught:
        _core.Checkpoint(directory)
    message = str(caught.value)
    assert message.startswith(f"{directory / 'model.safetensors'}: ")
    assert "\n" not in message
    return message


# What is accepted


def test_every_value_is_read_exactly(tmp_path: Path) -> None:
    content = safetensors(some_tensors())
    assert_reads_as(_core.Checkpoint(write_model(tmp_path, content)), content)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_all_65536_halves_widen_exactly(tmp_path: Path, dtype: str) -> None:
    data = np.arange(65536, dtype="<u2").tobytes()
    checkpoint = _core.Checkpoint(
        write_model(tmp_path, safetensors({"x": (dtype, (65536,), data)}))
    )
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(checkpoint.read("x"), float32_of(dtype, (65536,), data))


@pytest.mark.parametrize(("before", "after"), [("", "   \n\t "), (" \r\n", ""), (" ", " ")])
def test_white_space_around_the_header_is_accepted(tmp_path: Path, before: str, after: str) -> None:
    tensors = some_tensors()
    data = b"".join(data for _, _, data in tensors.values())
    content = blob((before + json.dumps(header_of(tensors)) + after).encode(), data)
    assert_reads_as(_core.Checkpoint(write_model(tmp_path, content)), content)


def test_a_scalar_and_a_tensor_without_elements_are_accepted(tmp_path: Path) -> None:
    tensors = {
        "none": ("BF16", (4, 0), b""),
        "scalar": ("F32", (), struct.pack("<f", 1.5)),
        "none at the end": ("F32", (0,), b""),
    }
    checkpoint = _core.Checkpoint(write_model(tmp_path, safetensors(tensors)))
    assert checkpoint.read("scalar").shape == ()
    assert checkpoint.read("scalar") == np.float32(1.5)
    assert checkpoint.read("none").shape == (4, 0)


@pytest.mark.parametrize("offset", range(1, 8))
def test_a_tensor_may_begin_at_any_byte(tmp_path: Path, offset: int) -> None:
    values = np.arange(33, dtype="<f4")
    tensors = {"pad": ("U8", (offset,), bytes(offset)), "x": ("F32", (33,), values.tobytes())}
    checkpoint = _core.Checkpoint(write_model(tmp_path, safetensors(tensors)))
    np.testing.assert_array_equal(checkpoint.read("x"), values)


def test_metadata_and_unknown_fields_of_a_tensor_are_ignored(tmp_path: Path) -> None:
    header = header_of(some_tensors())
    header["a"]["note"] = ["anything"]
    header["__metadata__"] = {"format": "pt"}
    content = blob(header, b"".join(data for _, _, data in some_tensors().values()))
    assert_reads_as(_core.Checkpoint(write_model(tmp_path, content)), content)


def test_nan_and_infinity_are_weights_like_others(tmp_path: Path) -> None:
    values = np.array([np.nan, np.inf, -np.inf, -0.0], "<f4")
    content = safetensors({"x": ("F32", (4,), values.tobytes())})
    got = _core.Checkpoint(write_model(tmp_path, content)).read("x")
    assert got.tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", sorted(set(BITS) - {"F32", "F16", "BF16"}))
def test_a_dtype_that_the_engine_cannot_use_is_named_when_it_is_needed(
    tmp_path: Path, dtype: str
) -> None:
    tensors = some_tensors() | {"odd": (dtype, (8,), bytes(BITS[dtype]))}
    checkpoint = _core.Checkpoint(write_model(tmp_path, safetensors(tensors)))
    assert checkpoint.tensor_info("odd")["dtype"] == dtype
    with pytest.raises(UnsupportedModelError, match=rf'model.safetensors: tensor "odd" .*{dtype}'):
        checkpoint.read("odd")


# What is refused: the rows of the reference loader's errors, then the traps that it leaves open


def changed(**fields: Any) -> bytes:
    """The good file, with tensor a's entry changed; None removes a field."""
    header = header_of(some_tensors())
    header["a"] = {k: v for k, v in (header["a"] | fields).items() if v is not None}
    return blob(header, b"".join(data for _, _, data in some_tensors().values()))


def raw(header: bytes, data: bytes = b"") -> bytes:
    return blob(header, data)


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = safetensors(some_tensors())
ONE = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'

BAD_FILES: dict[str, tuple[bytes, list[str]]] = {
    "HeaderTooSmall": (b"\0" * 7, ["7 bytes", "8"]),
    "HeaderTooSmall, one byte": (b"{", ["1 bytes"]),
    "HeaderTooLarge": (blob({}, b"", length=100_000_001), ["100000001", "100000000"]),
    "HeaderTooLarge, 2^64 - 1": (b"\xff" * 8, ["18446744073709551615"]),
    "InvalidHeaderLength": (blob({}, b"", length=3), ["3 bytes", "only 2 follow"]),
    "InvalidHeader": (raw(b'{"\xff": 1}'), ["not UTF-8 at byte 2"]),
    "InvalidHeader, overlong": (raw(b'{"\xc0\xaf": 1}'), ["not UTF-8 at byte 2"]),
    "InvalidHeader, surrogate": (raw(b'{"\xed\xa0\x80": 1}'), ["not UTF-8 at byte 2"]),
    "not JSON": (raw(b"{nope}"), ["not valid JSON at byte 2"]),
    "empty header": (raw(b""), ["not valid JSON"]),
    "cut-off JSON": (raw(b'{"a": {"dtype"'), ["not valid JSON"]),
    "text after JSON": (raw(b"{} {}"), ["not valid JSON at byte 3"]),
    "NUL after JSON": (raw(b"{}\0\0garbage"), ["not valid JSON at byte 2", "NUL"]),
    "not an object": (raw(b"[1, 2]"), ["[1,2]", "not a JSON object"]),
    "entry is no object": (raw(b'{"a": 7}'), ['tensor "a"', "7"]),
    "no dtype": (changed(dtype=None), ['tensor "a" has no dtype']),
    "no shape": (changed(shape=None), ['tensor "a" has no shape']),
    "no data_offsets": (changed(data_offsets=None), ['tensor "a" has no data_offsets']),
    "dtype is no string": (changed(dtype=32), ['tensor "a"', "32"]),
    "unknown dtype": (changed(dtype="F33"), ['tensor "a"', '"F33"']),
    "shape is no list": (changed(shape=15), ['tensor "a"', "15"]),
    "float in shape": (changed(shape=[3.0, 5]), ['tensor "a"', "3.0"]),
    "negative in shape": (changed(shape=[-3, -5]), ['tensor "a"', "-3"]),
    "string in shape": (changed(shape=["3", 5]), ['tensor "a"', '"3"']),
    "2^64 in shape": (changed(shape=[2**64, 0]), ['tensor "a"', "9223372036854775807"]),
    "2^63 in shape": (
        blob({"a": entry("U8", [0, 2**63], 0, 0)}, b""),
        ['tensor "a"', "9223372036854775808"],
    ),
    "one offset": (changed(data_offsets=[0]), ['tensor "a"', "[0]"]),
    "three offsets": (changed(data_offsets=[0, 60, 60]), ['tensor "a"', "[0,60,60]"]),
    "float offset": (changed(data_offsets=[0.0, 60]), ['tensor "a"', "[0.0,60]"]),
    "negative offset": (changed(data_offsets=[-60, 0]), ['tensor "a"', "[-60,0]"]),
    "NaN as a number": (raw(b'{"a": {"shape": [NaN]}}'), ["not valid JSON"]),
    "1e999 as a number": (raw(b'{"a": {"shape": [1e999]}}'), ["not valid JSON"]),
    "metadata is no object": (raw(b'{"__metadata__": 3}'), ["__metadata__ is 3"]),
    "metadata holds no string": (raw(b'{"__metadata__": {"k": 3}}'), ['__metadata__ "k" is 3']),
    "InvalidOffset, end before start": (
        changed(data_offsets=[60, 0]),
        ['tensor "a"', "byte 0", "byte 60"],
    ),
    "InvalidOffset, gap": (
        blob({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 5, 9)}, bytes(9)),
        ['tensor "b" begins at byte 5', 'tensor "a" ends at byte 4', "gap"],
    ),
    "InvalidOffset, gap at the start": (
        blob({"a": entry("U8", [4], 1, 5)}, bytes(5)),
        ['tensor "a" begins at byte 1', "ends at byte 0", "gap"],
    ),
    "InvalidOffset, overlap": (
        blob({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 3, 7)}, bytes(7)),
        ['tensor "b" begins at byte 3', 'tensor "a" ends at byte 4', "overlap"],
    ),
    "InvalidOffset, ten tensors on the same bytes": (
        blob({f"t{i}": entry("F32", [4], 0, 16) for i in range(10)}, bytes(16)),
        ["begins at byte 0", "ends at byte 16", "overlap"],
    ),
    "InvalidOffset, empty tensor inside another": (
        blob({"a": entry("U8", [4], 0, 4), "b": entry("U8", [0], 2, 2)}, bytes(4)),
        ['tensor "b" begins at byte 2', "overlap"],
    ),
    "TensorInvalidInfo": (
        changed(shape=[3, 6]),
        ['tensor "a" says [3, 6] F32 = 72 bytes, its data_offsets span 60'],
    ),
    "ValidationOverflow in the shape": (
        changed(shape=[2**32, 2**32, 4]),
        ['tensor "a" says [4294967296, 4294967296, 4] F32', "64 bits"],
    ),
    "ValidationOverflow in the bytes": (
        changed(shape=[2**59]),
        ['tensor "a" says [576460752303423488] F32', "64 bits"],
    ),
    "ValidationOverflow behind a zero": (
        blob({"a": entry("U8", [0, 2**62, 2**62], 0, 0)}, b""),
        ['tensor "a"', "64 bits"],
    ),
    "overflow to exactly the right size": (
        blob({"a": entry("U8", [2**61 + 1], 0, 8)}, bytes(8)),
        ['tensor "a"', "64 bits"],
    ),
    "offsets near 2^64": (
        blob({"a": entry("U8", [4], 2**64 - 4, 2**64 - 1)}, bytes(4)),
        ['tensor "a"', "4 bytes", "span 3"],
    ),
    "MisalignedSlice": (
        blob({"a": entry("F4", [3], 0, 1)}, bytes(1)),
        ['tensor "a" says [3] F4 = 12 bits'],
    ),
    "MetadataIncompleteBuffer, two bytes short": (GOOD[:-2], ["byte 86", '"c"', "84 bytes"]),
    "MetadataIncompleteBuffer, a tail": (GOOD + b"PK\3\4", ["byte 86", "90 bytes"]),
    "MetadataIncompleteBuffer, no tensors but data": (blob({}, b"data"), ["0 tensors", "4 bytes"]),
    "duplicate tensor": (
        raw(b'{"a":' + ONE + b',"a":' + ONE + b"}", bytes(4)),
        ['the key "a" twice'],
    ),
    "duplicate tensor, spelt differently": (
        raw(b'{"a":' + ONE + b',"\\u0061":' + ONE + b"}", bytes(4)),
        ['the key "a" twice'],
    ),
    "duplicate field": (
        raw(b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        ['the key "shape" twice'],
    ),
    "duplicate metadata": (raw(b'{"__metadata__":{},"__metadata__":{}}'), ['"__metadata__" twice']),
    "deep nesting": (raw(b'{"a":' + b"[" * 1_000_000), ["nests more than 32 levels deep"]),
    "deep nesting of objects": (raw(b'{"a":' * 1_000_000), ["nests more than 32 levels deep"]),
    "33 dimensions": (
        blob({"a": entry("U8", [1] * 33, 0, 1)}, bytes(1)),
        ['tensor "a" has 33 dimensions', "32"],
    ),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        ["Git LFS", "git lfs pull"],
    ),
    "empty file": (b"", ["0 bytes"]),
    "no tensors": (blob({}, b""), ["0 tensors"]),
}


@pytest.mark.parametrize("row", BAD_FILES)
def test_a_bad_file_is_refused_with_the_numbers(tmp_path: Path, row: str) -> None:
    content, fragments = BAD_FILES[row]
    message = refused(tmp_path, content)
    for fragment in fragments:
        assert fragment in message


def test_a_hostile_name_cannot_write_to_the_terminal_or_fill_it(tmp_path: Path) -> None:
    name = "\x1b[2J\n\r\x00\x9b31m\u00e9" + "x" * 100_000
    message = refused(tmp_path, blob({name: entry("F32", [2], 0, 4)}, bytes(4)))
    assert "\\x1b[2J\\x0a\\x0d\\x00\\x9b31m\u00e9xxx" in message
    assert message.isprintable()
    assert len(message) < 600


def many_tensors(count: int) -> bytes:
    empty = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    items = [f'"tensor.{i}":{empty}' for i in range(count - 1)]
    return blob(f'{{{",".join(items)},"w":{ONE.decode()}}}'.encode(), bytes(4))


def test_the_time_to_open_grows_with_the_number_of_tensors_and_not_faster(tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        write_model(tmp_path, many_tensors(count))
        start = time.perf_counter()
        assert len(_core.Checkpoint(tmp_path).names()) == count
        return time.perf_counter() - start

    assert seconds(100_000) < 3 * 5 * seconds(20_000) + 0.5  # squared would be 25 times


@pytest.mark.parametrize(
    ("count", "why"),
    [(100_001, "100001 tensors, more than the 100000"), (1_000_000, "4000000 values")],
)
def test_too_many_tensors_are_refused(tmp_path: Path, count: int, why: str) -> None:
    assert why in refused(tmp_path, many_tensors(count))


def test_a_header_of_one_hundred_megabytes_of_values_is_refused_early(tmp_path: Path) -> None:
    text = b'{"a":[' + b"0," * 49_000_000 + b"0]}"
    start = time.perf_counter()
    assert "more than 4000000 values" in refused(tmp_path, blob(text, b""))
    assert time.perf_counter() - start < 20


# Files of another kind


def test_a_directory_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, b"x")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a directory"):
        _core.Checkpoint(tmp_path)


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    write_model(tmp_path, b"x")
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a pipe"):
        _core.Checkpoint(tmp_path)


def test_a_file_that_may_not_be_read_is_refused() -> None:
    with tempfile.TemporaryDirectory() as directory:  # pytest's own is closed to other users
        Path(directory).chmod(0o755)
        write_model(Path(directory), GOOD)
        (Path(directory) / "model.safetensors").chmod(0)
        result = run(f"""
            if os.geteuid() == 0:
                os.setuid(65534)  # root may read everything
            try:
                _core.Checkpoint({directory!r})
            except CheckpointError as error:
                print(error)
        """)
    assert "model.safetensors: cannot be opened: Permission denied" in result.stdout


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(GOOD)
    directory = write_model(tmp_path / "model", b"x")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to("../blob")
    assert_reads_as(_core.Checkpoint(directory), GOOD)


def test_a_symbolic_link_to_nothing_names_its_target(tmp_path: Path) -> None:
    write_model(tmp_path, b"x")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("../blobs/0123abcd")
    with pytest.raises(CheckpointError, match=r"link to \.\./blobs/0123abcd, which does not exist"):
        _core.Checkpoint(tmp_path)


# Files that change while they are open


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, which a signal may kill."""
    prelude = """
        import faulthandler, mmap, os, signal, sys
        from pathlib import Path
        from tinyvllm import _core
        from tinyvllm.errors import CheckpointError
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | environment,
    )


def killed_by_sigbus(result: subprocess.CompletedProcess[str]) -> bool:
    """Also under AddressSanitizer, whose own handler is then the previous one."""
    return result.returncode == -signal.SIGBUS or "AddressSanitizer: BUS" in result.stderr


def write_large(directory: Path, num_bytes: int = 1 << 20) -> Path:
    tensors = {"x": ("U8", (num_bytes,), b""), "y": ("F32", (3,), b"")}
    header = header_of(tensors)
    header["x"]["data_offsets"] = [0, num_bytes]
    header["y"]["data_offsets"] = [num_bytes, num_bytes + 12]
    write_model(directory, blob(header, b""))
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) + num_bytes + 12)  # a hole: takes no disk
    return directory


def test_a_file_cut_off_while_mapped_is_an_error_and_not_the_end_of_the_process(
    tmp_path: Path,
) -> None:
    write_large(tmp_path)
    result = run(f"""
        checkpoint = _core.Checkpoint({str(tmp_path)!r})
        assert not checkpoint.failed
        os.truncate({str(tmp_path / "model.safetensors")!r}, 4096)
        for attempt in range(2):
            try:
                checkpoint.read("y")
            except CheckpointError as error:
                print(error)
            assert checkpoint.failed
    """)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"{tmp_path / 'model.safetensors'}: its size in bytes changed from ")
        assert " to 4096 since it was opened" in line


def test_the_failure_stays_known_after_the_file_is_whole_again(tmp_path: Path) -> None:
    write_large(tmp_path)
    path = tmp_path / "model.safetensors"
    before = path.stat()
    checkpoint = _core.Checkpoint(tmp_path)
    os.truncate(path, 4096)
    with pytest.raises(CheckpointError, match="size in bytes changed"):
        checkpoint.read("y")
    os.truncate(path, before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: part of its \d+ bytes could not"
    ):
        checkpoint.check_files()
    assert not _core.Checkpoint(tmp_path).failed


def test_one_damaged_file_does_not_spoil_another(tmp_path: Path) -> None:
    damaged, whole = write_large(tmp_path / "damaged"), write_large(tmp_path / "whole")
    first, second = _core.Checkpoint(damaged), _core.Checkpoint(whole)
    os.truncate(damaged / "model.safetensors", 4096)
    with pytest.raises(CheckpointError, match=r"damaged/model\.safetensors"):
        first.read("y")
    np.testing.assert_array_equal(second.read("y"), np.zeros(3, "f4"))
    assert (first.failed, second.failed) == (True, False)


def test_files_opened_closed_and_cut_off_by_many_threads(tmp_path: Path) -> None:
    for number in range(4):
        write_large(tmp_path / str(number))
    problems: list[str] = []

    def work(thread: int) -> None:
        directory = tmp_path / str(thread)
        path = directory / "model.safetensors"
        size = path.stat().st_size
        for _ in range(50):
            checkpoint = _core.Checkpoint(directory)
            if checkpoint.failed:
                problems.append("failed too early")
            if thread % 2 == 0:  # the others stay whole
                os.truncate(path, 4096)
            try:
                checkpoint.read("y")
                expected = thread % 2 == 1
            except CheckpointError:
                expected = thread % 2 == 0
            if not expected or checkpoint.failed != (thread % 2 == 0):
                problems.append(f"thread {thread}")
            del checkpoint
            os.truncate(path, size)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


FOREIGN_FAULT = """
    with open({path!r}, "r+b") as file:
        foreign = mmap.mmap(file.fileno(), 0)
    os.truncate({path!r}, 0)
    print("before", flush=True)
    foreign[0]
    print("after", flush=True)
"""


def foreign_file(directory: Path) -> str:
    path = directory / "foreign"
    path.write_bytes(bytes(8192))
    return str(path)


def test_a_fault_in_a_mapping_of_somebody_else_still_kills(tmp_path: Path) -> None:
    write_model(tmp_path, GOOD)
    result = run(
        f"checkpoint = _core.Checkpoint({str(tmp_path)!r})\n"
        + textwrap.dedent(FOREIGN_FAULT).format(path=foreign_file(tmp_path))
    )
    assert result.stdout == "before\n"
    assert killed_by_sigbus(result)


def test_a_fault_in_a_mapping_of_somebody_else_reaches_the_previous_handler(
    tmp_path: Path,
) -> None:
    write_model(tmp_path, GOOD)
    result = run(
        f"faulthandler.enable()\ncheckpoint = _core.Checkpoint({str(tmp_path)!r})\n"
        + textwrap.dedent(FOREIGN_FAULT).format(path=foreign_file(tmp_path))
    )
    assert result.stdout == "before\n"
    assert "Fatal Python error: Bus error" in result.stderr
    assert killed_by_sigbus(result)


@pytest.mark.parametrize(
    ("previous", "survives"),
    [("lambda *_: print('handled')", True), ("signal.SIG_IGN", True), ("signal.SIG_DFL", False)],
)
def test_a_sigbus_that_was_sent_goes_where_it_went_before(
    tmp_path: Path, previous: str, survives: bool
) -> None:
    write_model(tmp_path, GOOD)
    result = run(f"""
        signal.signal(signal.SIGBUS, {previous})
        checkpoint = _core.Checkpoint({str(tmp_path)!r})
        os.kill(os.getpid(), signal.SIGBUS)
        print("alive")
    """)
    handled = ["handled"] if "handled" in previous else []
    assert result.stdout.splitlines() == ([*handled, "alive"] if survives else [])
    assert result.returncode == (0 if survives else -signal.SIGBUS)


def test_an_ignored_sigbus_does_not_make_a_foreign_fault_run_for_ever(tmp_path: Path) -> None:
    write_model(tmp_path, GOOD)
    result = run(
        "signal.signal(signal.SIGBUS, signal.SIG_IGN)\n"
        f"checkpoint = _core.Checkpoint({str(tmp_path)!r})\n"
        + textwrap.dedent(FOREIGN_FAULT).format(path=foreign_file(tmp_path))
    )
    assert result.stdout == "before\n"
    assert result.returncode == -signal.SIGBUS


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda path: path.write_bytes(GOOD + b"x"), "its size in bytes changed from"),
        (lambda path: os.utime(path, ns=(1, 1)), "its modification time (ns) changed from"),
        (lambda path: replace(path), "its inode changed from"),
        (lambda path: path.unlink(), "is gone (No such file or directory)"),
    ],
    ids=["size", "mtime", "inode", "gone"],
)
def test_a_changed_file_is_noticed(tmp_path: Path, change: Any, what: str) -> None:
    path = write_model(tmp_path, GOOD) / "model.safetensors"
    checkpoint = _core.Checkpoint(tmp_path)
    checkpoint.check_files()
    change(path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_files()
    assert str(caught.value).startswith(f"{path}: {what}")


def replace(path: Path) -> None:
    before = path.stat()
    (path.parent / "new").write_bytes(GOOD)
    os.utime(path.parent / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (path.parent / "new").rename(path)


def test_a_relative_path_is_still_known_after_chdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model", GOOD)
    monkeypatch.chdir(tmp_path)
    checkpoint = _core.Checkpoint("model")
    monkeypatch.chdir("/")
    checkpoint.check_files()


def test_a_gigabyte_is_opened_without_being_read(tmp_path: Path) -> None:
    write_large(tmp_path, 1 << 30)
    result = run(f"""
        import numpy
        def resident() -> int:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE")
        before = resident()
        checkpoint = _core.Checkpoint({str(tmp_path)!r})
        print(resident() - before)
        checkpoint.read("y")
        print(resident() - before)
    """)
    assert result.returncode == 0, result.stderr
    after_open, after_read = (int(line) for line in result.stdout.splitlines())
    assert after_open < 8_000_000
    assert after_read < 8_000_000


# Random files


@settings(max_examples=400, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=3),
    end=st.none() | st.integers(0, len(GOOD)),
    tail=st.binary(max_size=2),
)
@example(edits=[], end=None, tail=b"")
def test_a_file_with_random_bytes_changed_is_read_right_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    edits: list[tuple[int, int]],
    end: int | None,
    tail: bytes,
) -> None:
    mutable = bytearray(GOOD)
    for at, value in edits:
        mutable[at] = value
    check_against_reference(tmp_path_factory.getbasetemp() / "fuzz", bytes(mutable[:end]) + tail)


numbers = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, 2**31, 2**32, 2**61, 2**62, 2**63 - 1, -1, 1.0])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F33", 4]),
        "shape": st.lists(numbers, max_size=4),
        "data_offsets": st.lists(numbers, min_size=2, max_size=2),
    }
)


@settings(max_examples=400, deadline=None)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "c"]), entries, min_size=1),
    size=st.sampled_from([0, 4, 8, 12, 16]),
)
@example(header={"a": entry("F16", [2, 3], 0, 12)}, size=12)
@example(header={"a": entry("F32", [2**62, 4], 0, 0)}, size=0)
@example(header={"a": entry("F32", [2**58, 0], 0, 0)}, size=0)
@example(header={"a": entry("U8", [4], 0, 4), "b": entry("F32", [], 4, 8)}, size=8)
def test_a_random_header_is_read_right_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size: int
) -> None:
    content = blob(header, bytes(range(size)))
    check_against_reference(tmp_path_factory.getbasetemp() / "fuzz", content)


def check_against_reference(directory: Path, content: bytes) -> None:
    """The engine accepts exactly what the reference accepts, and reads the same."""
    write_model(directory, content)
    try:
        want = reference_read(content)
    except (ValueError, RecursionError):
        with pytest.raises(CheckpointError):
            _core.Checkpoint(directory)
        return
    if not any(dtype in ("F32", "F16", "BF16") for dtype, _, _ in want.values()):
        with pytest.raises((CheckpointError, UnsupportedModelError)):
            _core.Checkpoint(directory)
        return
    assert_reads_as(_core.Checkpoint(directory), content)


# The package that defines the format


@pytest.fixture(name="package")
def safetensors_package() -> Any:
    try:
        import safetensors
    except ImportError:
        if os.environ.get("TINYVLLM_REQUIRE_ORACLE") == "1":
            pytest.fail("the safetensors package is not installed")
        pytest.skip("the safetensors package is not installed")
    return safetensors


STRICTER = {  # what the package lets pass and we refuse
    "duplicate tensor",
    "duplicate tensor, spelt differently",
    "33 dimensions",
    "ValidationOverflow behind a zero",
    "no tensors",
    "2^63 in shape",
}


@pytest.mark.parametrize("row", BAD_FILES)
def test_whatever_the_package_refuses_is_in_the_table_and_the_rest_is_known(
    package: Any, row: str
) -> None:
    content, _ = BAD_FILES[row]
    accepted = True
    try:
        package.deserialize(content)
    except package.SafetensorError:
        accepted = False
    assert accepted == (row in STRICTER)


def test_a_file_that_the_package_wrote_reads_the_same(package: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    arrays = {f"layer.{i}": rng.standard_normal((i, 5)).astype("f4") for i in range(4)}
    arrays["half"] = rng.standard_normal((3, 9)).astype("f2")
    from safetensors.numpy import save

    checkpoint = _core.Checkpoint(write_model(tmp_path, save(arrays, {"format": "pt"}), LLAMA))
    assert checkpoint.names() == sorted(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(checkpoint.read(name), array.astype("f4"))
