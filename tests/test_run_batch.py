"""`tinyvllm run-batch` as other programs see it: answers, order, errors, kills, pipes, memory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import random
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from families import FAMILIES
from tinyvllm import LLM, SamplingParams
from tinyvllm.cli.batch_lines import MAX_LINE_BYTES, Settings, encode, read_line
from tinyvllm.cli.batch_run import Batch, Progress, Tally
from tinyvllm.cli.line_io import LineReader, LineWriter
from tinyvllm.errors import InvalidRequestError
from tinyvllm.generation_config import SamplingDefaults
from tinyvllm.openai_api import SAMPLING_FIELDS

COMMAND = [sys.executable, "-m", "tinyvllm.cli", "run-batch"]
Result = subprocess.CompletedProcess[bytes]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a tokenizer and no chat template; greedy by default."""
    return str(FAMILIES["llama-3.2-v5"].write(tmp_path_factory.mktemp("model")))


def run_batch(*arguments: str, stdin: bytes = b"", **options: Any) -> Result:
    return subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, timeout=120, **options
    )


def jsonl(values: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def parse(data: bytes) -> list[dict[str, Any]]:
    """The lines of an output; it ends with a whole one."""
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def answers(lines: Iterable[Any], *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    """What the bundled model answers, through pipes."""
    result = run_batch("-i", "-", "-o", "-", *arguments, stdin=jsonl(lines))
    assert result.returncode == code, result.stderr
    return parse(result.stdout)


def completion(custom_id: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def chat(custom_id: str, text: str, **body: Any) -> dict[str, Any]:
    body = {"model": "any", "messages": [{"role": "user", "content": text}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def some_lines(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Requests of all kinds and lengths, sampled without seeds of their own."""
    rng = random.Random(seed)
    lines: list[dict[str, Any]] = []
    for i in range(count):
        text = "Once upon a time " * rng.randint(1, 9)
        limit = rng.choice([1, 2, 5, 30])
        if i % 3 == 0:
            lines.append({"custom_id": f"id-{i}", "prompt": text, "max_tokens": limit})
        elif i % 3 == 1:
            lines.append(completion(f"id-{i}", prompt=text, max_tokens=limit, temperature=1.3))
        else:
            lines.append(chat(f"id-{i}", text, max_tokens=limit))
    return lines


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for line in lines:
        if line.get("response"):
            line["response"]["body"].pop("created", None)
    return lines


# --- Answers --------------------------------------------------------------------------------------


def test_answers_are_those_of_the_library() -> None:
    lines = [
        completion("a", prompt="Once upon a time", max_tokens=12, temperature=0),
        chat("b", "Tell me a story about a brave fox", max_completion_tokens=12, temperature=0),
        {"prompt": "The owl", "max_tokens": 12, "temperature": 0},
        {"messages": [{"role": "user", "content": "Tell me a story"}], "seed": 5, "max_tokens": 9},
    ]
    with LLM() as llm:
        greedy = SamplingParams(temperature=0, max_tokens=12)
        once, owl = llm.generate(["Once upon a time", "The owl"], greedy, use_tqdm=False)
        (fox,) = llm.chat(lines[1]["body"]["messages"], greedy, use_tqdm=False)
        defaults: Any = llm.sampling_defaults().fields
        drawn = SamplingParams(**{**defaults, "seed": 5, "max_tokens": 9})
        (story,) = llm.chat(lines[3]["messages"], drawn, use_tqdm=False)

    first, second, third, fourth = answers(lines)
    body = first["response"]["body"]
    assert first["error"] is None
    assert first["custom_id"] == "a"
    assert first["response"]["status_code"] == 200
    assert body["object"] == "text_completion"
    assert body["model"] == "bundled"
    assert body["choices"] == [
        {
            "index": 0,
            "text": once.outputs[0].text,
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": len(once.prompt_token_ids),
        "completion_tokens": 12,
        "total_tokens": len(once.prompt_token_ids) + 12,
    }
    body = second["response"]["body"]
    assert body["object"] == "chat.completion"
    message = {"role": "assistant", "content": fox.outputs[0].text}
    assert body["choices"][0]["message"] == message
    assert body["choices"][0]["finish_reason"] == "length"
    assert third == {
        "line": 3,
        "custom_id": None,
        "text": owl.outputs[0].text,
        "finish_reason": "length",
        "stop_reason": None,
        "prompt_tokens": len(owl.prompt_token_ids),
        "completion_tokens": 12,
        "error": None,
    }
    assert fourth["text"] == story.outputs[0].text


def test_n_and_several_prompts_are_choices_in_their_order() -> None:
    prompts = ["Once upon", [5, 6, 7]]
    asked = completion("a", prompt=prompts, n=2, max_tokens=4, seed=3)
    one_by_one = [completion(f"{p}", prompt=p, n=2, max_tokens=4, seed=3) for p in prompts]
    together, *alone = answers([asked, *one_by_one])
    choices = together["response"]["body"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    texts = [c["text"] for answer in alone for c in answer["response"]["body"]["choices"]]
    assert [choice["text"] for choice in choices] == texts
    assert together["response"]["body"]["usage"]["completion_tokens"] == 16


def test_logprobs_have_the_shape_of_each_endpoint() -> None:
    first, second, third = answers(
        [
            completion("a", prompt="Once", max_tokens=3, logprobs=2, temperature=0),
            chat("b", "Hi", max_tokens=3, logprobs=True, top_logprobs=2, temperature=0),
            {"prompt": "Once", "max_tokens": 3, "logprobs": 2, "temperature": 0},
        ]
    )
    choice = first["response"]["body"]["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert [len(best) for best in logprobs["top_logprobs"]] == [2, 2, 2]
    for token, value, best in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert best[token] == value == max(best.values())  # greedy
    assert logprobs["text_offset"][1] == len(logprobs["tokens"][0])
    content = second["response"]["body"]["choices"][0]["logprobs"]["content"]
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]
        assert len(entry["top_logprobs"]) == 2
    assert [entry["token"] for entry in third["logprobs"]] == logprobs["tokens"]


def test_openai_defaults_hold_for_openai_lines_and_the_models_for_plain_ones() -> None:
    lines = [completion("a", prompt="Once", ignore_eos=True), {"prompt": "Once"}]
    first, second = answers(lines)
    assert first["response"]["body"]["usage"]["completion_tokens"] == 16
    assert second["completion_tokens"] > 16
    first, second = answers(lines, "--max-tokens", "7")
    assert first["response"]["body"]["usage"]["completion_tokens"] == 7
    assert second["completion_tokens"] == 7


def test_a_models_min_tokens_forbids_no_short_output(bundled: LLM) -> None:
    defaults = SamplingDefaults({"min_tokens": 30, "max_tokens": 40})
    settings_ = Settings("m", 0, defaults, {}, 20)
    for line, want in (
        ({"prompt": "x"}, (30, 40)),
        ({"prompt": "x", "max_tokens": 5}, (5, 5)),
        (completion("a", prompt="x"), (16, 16)),
        (chat("a", "x"), (30, None)),
        (chat("a", "x", max_completion_tokens=5), (5, 5)),
    ):
        [(_, params)] = read_line(json.dumps(line).encode(), 1).requests(bundled, settings_)
        assert (params.min_tokens, params.max_tokens) == want
    asked = read_line(b'{"prompt": "x", "max_tokens": 5, "min_tokens": 6}', 1)
    with pytest.raises(InvalidRequestError, match="min_tokens is 6"):
        asked.requests(bundled, settings_)


def test_nulls_are_fields_left_out_and_notes_are_passed_over() -> None:
    asked = completion("a", prompt="Once", max_tokens=4, temperature=0)
    noted = completion(
        "a", prompt="Once", max_tokens=4, temperature=0, model="gpt-4o-mini", user="me",
        stop=None, logprobs=None, stream=False, n=None, suffix=None, stream_options=None,
    )  # fmt: skip
    first, second = without_times(answers([asked, noted]))
    assert first["response"]["body"]["choices"] == second["response"]["body"]["choices"]


def test_content_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "Tell me"}, {"type": "text", "text": "a story"}]
    whole = {"messages": [{"role": "user", "content": "Tell me\na story"}], "max_tokens": 6}
    split = {"messages": [{"role": "user", "content": parts}], "max_tokens": 6}
    first, second = answers([whole | {"seed": 1}, split | {"seed": 1}])
    assert first["text"] == second["text"]


def test_answers_do_not_depend_on_the_window_or_the_batch(tmp_path: Path) -> None:
    lines = some_lines(24)
    wide, narrow, single = (
        without_times(answers(lines, *arguments))
        for arguments in ([], ["--window", "3"], ["--max-num-seqs", "1", "--window", "1"])
    )
    assert wide == narrow == single
    assert [line["custom_id"] for line in wide] == [f"id-{i}" for i in range(24)]


def test_a_seed_changes_the_lines_that_have_none() -> None:
    lines = [{"prompt": "Once", "max_tokens": 20}, {"prompt": "Once", "max_tokens": 20, "seed": 1}]
    first, second = answers(lines), answers(lines, "--seed", "9")
    assert first[0]["text"] != second[0]["text"]
    assert first[1]["text"] == second[1]["text"]


# --- Bad lines ------------------------------------------------------------------------------------

BAD_LINES: list[tuple[bytes, str, str]] = [
    (b"{", "invalid_json", "not JSON"),
    (b"[1, 2]", "invalid_json", "list"),
    (b'{"prompt": "x", "top_p": NaN}', "invalid_json", "NaN"),
    (b'{"prompt": "\xff"}', "invalid_utf8", "byte 12 (0xff)"),
    (b"[" * 100_000, "invalid_json", "JSON"),
    (b"{}", "invalid_request", "custom_id, method, url and body"),
    (b'{"prompt": "x", "temprature": 1}', "invalid_request", "temprature"),
    (b'{"prompt": "x", "temperature": -1}', "invalid_request", "temperature is -1"),
    (b'{"prompt": "x", "temperature": "hot"}', "invalid_request", "'hot'"),
    (b'{"prompt": "x", "n": 2}', "invalid_request", "/v1/completions"),
    (b'{"prompt": "x", "messages": []}', "invalid_request", "one of the two"),
    (b'{"prompt": [99999]}', "invalid_request", "99999"),
    (b'{"prompt": "x", "seed": 1e999}', "invalid_request", "seed"),
    (b'{"prompt": "x", "logit_bias": [1]}', "invalid_request", "logit_bias"),
    (b'{"prompt": "x", "stop": 5}', "invalid_request", "stop"),
    (b'{"prompt": "\\ud800"}', "invalid_request", "U+D800"),
    (b'{"prompt": []}', "invalid_request", "no tokens"),
    (b'{"messages": [{"role": "user", "content": 5}]}', "invalid_request", "text only"),
    (jsonl([{"prompt": "x" * 9000}]).strip(), "invalid_request", "max_model_len is 2048"),
    (jsonl([completion("a") | {"url": "/v1/embeddings"}]).strip(), "unknown_url", "embeddings"),
    (jsonl([completion("a") | {"url": ["/v1"]}]).strip(), "unknown_url", "url is ['/v1']"),
    (jsonl([completion("a") | {"url": {"x": 1}}]).strip(), "unknown_url", "url is {'x': 1}"),
    (jsonl([completion("a") | {"method": "GET"}]).strip(), "invalid_request", "GET"),
    (jsonl([completion("a") | {"body": 5}]).strip(), "invalid_request", "body is 5"),
    (jsonl([completion("a") | {"custom_id": 5}]).strip(), "invalid_request", "custom_id is 5"),
    (jsonl([completion("a")]).strip(), "invalid_request", "prompt is None"),
    (jsonl([completion("a", prompt="x", stream=True)]).strip(), "invalid_request", "stream"),
    (jsonl([completion("a", prompt="x", n=65)]).strip(), "invalid_request", "n is 65"),
    (jsonl([completion("a", prompt="x", echo=True)]).strip(), "invalid_request", "echo"),
    (jsonl([completion("a", prompt=[[5], []])]).strip(), "invalid_request", "no tokens"),
    (jsonl([completion("a", prompt="x", messages=[])]).strip(), "invalid_request", "messages"),
    (jsonl([chat("a", "x", tools=[{}])]).strip(), "invalid_request", "tools"),
    (jsonl([chat("a", "x", logprobs=5)]).strip(), "invalid_request", "logprobs"),
    (jsonl([chat("a", "x", top_logprobs=5)]).strip(), "invalid_request", "logprobs: true"),
    (jsonl([chat("a", "x", chat_template_kwargs={"self": 1})]).strip(), "invalid_request", "self"),
    (b'{"prompt": "x", "temperature": 1' + b"0" * 400 + b"}", "invalid_request", "temperature"),
    (b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}", "invalid_json", "deep"),
    (b'{"prompt": "' + b"x" * MAX_LINE_BYTES + b'"}', "line_too_long", "one request a line"),
]


def test_bad_lines_are_answered_with_errors_and_the_run_goes_on() -> None:
    good = b'{"prompt": "Once", "max_tokens": 2, "temperature": 0}\n'
    stdin = good + b"".join(data + b"\n" + good for data, _, _ in BAD_LINES)
    result = run_batch("-i", "-", "-o", "-", stdin=stdin)
    assert result.returncode == 1
    assert f"({len(BAD_LINES)} failed)".encode() in result.stderr
    assert b"the first that failed: line 2:" in result.stderr
    lines = parse(result.stdout)
    assert len(lines) == 2 * len(BAD_LINES) + 1
    assert len({line["text"] for line in lines[::2]}) == 1
    for i, (line, (data, code, part)) in enumerate(zip(lines[1::2], BAD_LINES, strict=True)):
        error = line["error"]
        assert error["code"] == code, (data[:60], error)
        assert part in error["message"], data[:60]
        assert error["line"] == 2 * i + 2
        assert error["message"].startswith(f"line {2 * i + 2}: ")
        if "response" in line:
            assert line["response"]["status_code"] == (404 if code == "unknown_url" else 400)
            assert line["response"]["body"]["error"]["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def bundled() -> Iterable[LLM]:
    with LLM(max_model_len=64) as llm:
        yield llm


OTHER_FIELDS = (
    "custom_id", "method", "url", "body", "prompt", "messages", "logprobs", "top_logprobs",
    "stream", "echo", "model", "chat_template_kwargs",
)  # fmt: skip
FIELDS = st.sampled_from([*sorted(SAMPLING_FIELDS), *OTHER_FIELDS])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["/v1/completions", "/v1/chat/completions", "user", "role", "content"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS | st.text(), inner),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(FIELDS, VALUES))
def test_no_line_ends_the_run(bundled: LLM, value: dict[str, Any]) -> None:
    """Whatever a line holds, it becomes requests or an InvalidRequestError."""
    settings_ = Settings("m", 0, SamplingDefaults(), {"max_tokens": 1}, 1)
    line = read_line(json.dumps(value).encode(), 1)
    try:
        for prompt, params in line.requests(bundled, settings_):
            bundled.abort(bundled.add(prompt, params, incremental=False))
    except InvalidRequestError as error:
        encode(line.refusal(error))
    while bundled.has_unfinished():
        bundled.step()


@pytest.mark.parametrize("stdin", [b"", b"\n \r\n\n", b"\xef\xbb\xbf"])
def test_an_input_without_requests_has_no_answers(stdin: bytes) -> None:
    result = run_batch("-i", "-", "-o", "-", stdin=stdin)
    assert (result.returncode, result.stdout) == (0, b"")
    assert result.stderr.startswith(b"tinyvllm: 0 lines")


def test_line_ends_of_all_kinds(tmp_path: Path) -> None:
    line = b'{"prompt": "Once", "max_tokens": 2, "temperature": 0}'
    result = run_batch("-i", "-", "-o", "-", "-q", stdin=b"\xef\xbb\xbf" + line + b"\r\n\n" + line)
    assert result.stderr == b""
    assert [answer["line"] for answer in parse(result.stdout)] == [1, 3]


def test_custom_ids_that_come_twice_are_answered_and_named() -> None:
    lines = [completion(name, prompt="x", max_tokens=1) for name in ("a", "b", "a")]
    result = run_batch("-i", "-", "-o", "-", stdin=jsonl(lines))
    assert result.returncode == 0
    assert [line["custom_id"] for line in parse(result.stdout)] == ["a", "b", "a"]
    assert b"line 3 has the custom_id of line 1, 'a'" in result.stderr


def test_half_a_character_in_a_custom_id_comes_back() -> None:
    (answer,) = answers([completion("\ud800", prompt="x", max_tokens=1)])
    assert answer["custom_id"] == "\ud800"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["-i", "/no/such/file", "-o", "-"], b"/no/such/file: cannot be read"),
        (["-i", "/tmp", "-o", "-"], b"/tmp: cannot be read: Is a directory"),
        (["-i", "-", "-o", "/no/such/file"], b"/no/such/file: cannot be written"),
        (["-i", "-", "-o", "/tmp"], b"/tmp: cannot be written"),
        (["-i", "-", "-o", "-", "--resume"], b"--resume needs an output that is a file"),
        (["-i", "-", "-o", "/dev/null", "--resume"], b"--resume needs an output that is a file"),
        (["-i", "-", "-o", "-", "--window", "0"], b"--window"),
        (["-i", "-", "-o", "-", "--max-num-seqs", "0"], b"--max-num-seqs"),
        (["-i", "-"], b"--output"),
    ],
)
def test_unusable_files_are_exit_2(arguments: list[str], part: bytes) -> None:
    result = run_batch(*arguments)
    assert result.returncode == 2
    assert part in result.stderr
    assert result.stdout == b""


def test_the_input_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(jsonl([{"prompt": "x"}]))
    result = run_batch("-i", str(file), "-o", str(file))
    assert result.returncode == 2
    assert b"both input and output" in result.stderr
    assert file.read_bytes() == jsonl([{"prompt": "x"}])


def test_a_model_that_cannot_be_loaded_leaves_the_output_alone(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_bytes(b"precious\n")
    result = run_batch("-m", "/no/such/model", "-i", "-", "-o", str(file))
    assert result.returncode == 3
    assert file.read_bytes() == b"precious\n"


# --- Kills and --resume ---------------------------------------------------------------------------


def whole_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def start(model: str, source: Path, target: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, "-m", model, "-i", str(source), "-o", str(target), *arguments],
        stderr=subprocess.PIPE,
    )


def wait_for_lines(process: subprocess.Popen[bytes], file: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while whole_lines(file) < count:
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it was stopped"
        time.sleep(0.002)


def test_kill_9_then_resume_answers_every_line_once_and_in_order(tmp_path: Path) -> None:
    lines = some_lines(400)
    lines[7]["surprise"] = 1  # two bad lines: their errors are kept, too
    lines[350]["surprise"] = 1
    source, whole, target = (tmp_path / name for name in ("in", "whole", "out"))
    source.write_bytes(jsonl(lines))
    model = ["-m", str(Path(sys.modules["tinyvllm"].__file__ or "").parent / "story_model")]
    uninterrupted = run_batch(*model, "-i", str(source), "-o", str(whole))
    assert uninterrupted.returncode == 1  # the bad lines

    for count, resume in ((1, False), (60, True), (170, True)):
        process = start(model[1], source, target, *(["--resume"] if resume else []))
        wait_for_lines(process, target, count)
        process.kill()
        process.communicate()
        kept = target.read_bytes()
        if count == 60:
            target.write_bytes(kept + b'{"id": "batch_req_9999", "custom')  # torn
    assert whole_lines(target) < 400
    last = run_batch(*model, "-i", str(source), "-o", str(target), "--resume")
    assert last.returncode == 1, last.stderr
    assert f"; {kept.count(10)} were there".encode() in last.stderr
    assert target.read_bytes().startswith(kept)
    assert without_times(parse(target.read_bytes())) == without_times(parse(whole.read_bytes()))


def test_resume_of_a_finished_run_does_nothing_and_of_none_does_all(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(jsonl(some_lines(5)))
    arguments = ["-i", str(source), "-o", str(target), "--resume"]
    assert run_batch(*arguments).returncode == 0
    first = target.read_bytes()
    assert len(parse(first)) == 5
    again = run_batch(*arguments)
    assert (again.returncode, target.read_bytes()) == (0, first)


def test_without_resume_the_output_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"x" * 10_000)
    line = {"prompt": "Once", "max_tokens": 1}
    assert run_batch("-i", "-", "-o", str(target), stdin=jsonl([line])).returncode == 0
    assert len(parse(target.read_bytes())) == 1


@pytest.mark.parametrize(
    ("output", "part"),
    [
        (b'{"custom_id": "other", "error": null}\n', b"answers custom_id 'other'"),
        (b'{"custom_id": "id-0", "line": 2, "error": null}\n', b"line 1"),
        (jsonl([{"custom_id": f"id-{i}"} for i in range(4)]), b"no such line"),
        (b"something else\n", b"no answer of run-batch"),
        (b"[]\n", b"no answer of run-batch"),
    ],
)
def test_resume_refuses_the_output_of_another_input(
    tmp_path: Path, output: bytes, part: bytes
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(jsonl(some_lines(3)))
    target.write_bytes(output + b'{"torn')
    result = run_batch("-i", str(source), "-o", str(target), "--resume")
    assert result.returncode == 2
    assert part in result.stderr
    assert target.read_bytes() == output + b'{"torn'


def endless(path: Path, count: int = 3000) -> Path:
    path.write_bytes(jsonl({"prompt": "x", "max_tokens": 400} for _ in range(count)))
    return path


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_keep_whole_lines(model: str, tmp_path: Path, number: int, code: int) -> None:
    target = tmp_path / "out"
    process = start(model, endless(tmp_path / "in"), target, "--max-num-seqs", "8")
    wait_for_lines(process, target, 3)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    lines = parse(target.read_bytes())
    assert [line["line"] for line in lines] == list(range(1, len(lines) + 1))
    assert f"stopped after {len(lines)} answers; --resume".encode() in stderr


SIGNAL_IN_A_WRITE = """
import os, signal, sys
from tinyvllm.cli import line_io, main

def write(descriptor, data, write=os.write):
    number = write(descriptor, data)
    if b'"line":3' in data.replace(b" ", b""):
        os.kill(os.getpid(), signal.SIGINT)
    return number

line_io.os.write = write
sys.argv = ["tinyvllm", "run-batch", *sys.argv[1:]]
main()
"""


def test_a_signal_during_a_write_counts_the_line(model: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    arguments = ["-m", model, "-i", str(endless(tmp_path / "in", 20)), "-o", str(target)]
    done = subprocess.run(
        [sys.executable, "-c", SIGNAL_IN_A_WRITE, *arguments], capture_output=True, check=False
    )
    assert done.returncode == 130
    assert [line["line"] for line in parse(target.read_bytes())] == [1, 2, 3]
    assert b"stopped after 3 answers; --resume" in done.stderr


def test_a_signal_ends_the_wait_for_a_reader_that_does_not_read(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(jsonl({"prompt": "x", "max_tokens": 1} for _ in range(300)))
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen([*COMMAND, "-i", str(source), "-o", "-"], stdout=write_end)
    os.close(write_end)
    select.select([read_end], [], [])
    time.sleep(0.5)  # a pipe of one page takes no second line before the first one is read
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    with os.fdopen(read_end, "rb") as file:
        lines = parse(file.read())
    assert [line["line"] for line in lines] == list(range(1, len(lines) + 1))


def test_a_signal_ends_the_wait_for_a_writer_that_does_not_write() -> None:
    process = subprocess.Popen(
        [*COMMAND, "-i", "-", "-o", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b'{"prompt": "x", "max_tokens": 1}\n')
    process.stdin.flush()
    assert process.stdout.readline().endswith(b"}\n")  # answered while the writer waits
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    process.communicate()


def test_a_reader_that_goes_away_is_exit_141(model: str, tmp_path: Path) -> None:
    source = endless(tmp_path / "in")
    process = subprocess.Popen(
        [*COMMAND, "-m", model, "-i", str(source), "-o", "-", "--max-num-seqs", "8"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (141, b"")


def test_a_full_disk_is_exit_1_and_keeps_whole_lines(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(jsonl(some_lines(50)))
    script = f'ulimit -f 2; trap "" XFSZ; exec "$@" -i {source} -o {target}'  # 2 x 1024 bytes
    result = subprocess.run(
        ["bash", "-c", script, "bash", *COMMAND], capture_output=True, timeout=60
    )
    assert result.returncode == 1
    assert f"{target}: File too large".encode() in result.stderr
    assert b"--resume goes on" in result.stderr
    kept = parse(target.read_bytes())
    assert 0 < len(kept) < 50
    assert run_batch("-i", str(source), "-o", str(target), "--resume").returncode == 0
    assert len(parse(target.read_bytes())) == 50


def test_dev_full_is_exit_1() -> None:
    result = run_batch("-i", "-", "-o", "/dev/full", stdin=jsonl([{"prompt": "x"}]))
    assert result.returncode == 1
    assert b"/dev/full: No space left on device" in result.stderr


def test_a_model_file_that_changes_ends_the_run(model: str, tmp_path: Path) -> None:
    """No line is answered any more, so none may be written off as failed."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in Path(model).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    target = tmp_path / "out"
    process = start(str(copy), endless(tmp_path / "in"), target, "--max-num-seqs", "8")
    wait_for_lines(process, target, 3)
    os.truncate(copy / "model.safetensors", 4096)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3
    assert b"model.safetensors" in stderr
    assert all(line["error"] is None for line in parse(target.read_bytes()))


# --- Progress -------------------------------------------------------------------------------------


def on_a_terminal(*arguments: str, stdin: bytes | None = None) -> str:
    """What a run shows on stderr when that is a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=theirs
    )
    os.close(theirs)
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(stdin or b"")
    shown = b""
    with contextlib.suppress(OSError):  # Linux: the other end has been closed
        while data := os.read(ours, 65536):
            shown += data
    os.close(ours)
    assert process.wait(timeout=60) == 0
    return shown.decode()


def test_a_terminal_sees_how_far_it_is(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    lines = [{"prompt": "Once", "max_tokens": 500, "ignore_eos": True} for _ in range(24)]
    source.write_bytes(jsonl(lines))
    arguments = ["-o", str(target), "--max-num-seqs", "4"]
    file = on_a_terminal("-i", str(source), *arguments)
    assert re.search(r"\d+%\|.*\| 00:\d\d<00:\d\d, \d+ lines, \d+ prompt and \d+ output", file)
    pipe = on_a_terminal("-i", "-", *arguments, stdin=jsonl(lines))
    assert re.search(r"00:\d\d, \d+ lines, ", pipe)
    assert "%" not in pipe
    assert on_a_terminal("-i", str(source), *arguments, "-q") == ""


# --- The window -----------------------------------------------------------------------------------


def run_in_process(llm: LLM, lines: list[dict[str, Any]], window: int, target: Path) -> list[int]:
    """Answers lines; returns, for each step, how many had been read and not been written."""
    source = target.with_suffix(".in")
    source.write_bytes(jsonl(lines))
    open_lines = []
    reader_end = os.open(source, os.O_RDONLY)
    writer_end = os.open(target, os.O_RDWR | os.O_CREAT)
    reader, writer = LineReader(reader_end, MAX_LINE_BYTES), LineWriter(writer_end, str(target))
    tally = Tally()
    step = llm.step

    def counted_step() -> Any:
        open_lines.append(reader.number - tally.answered)
        return step()

    llm.step = counted_step  # type: ignore[method-assign]
    try:
        progress = Progress(llm, tally, 0, None, hide=True)
        batch_settings = Settings("m", 0, SamplingDefaults({"temperature": 0}), {}, 16)
        Batch(llm, batch_settings, reader, writer, window, tally, progress).run()
    finally:
        llm.step = step  # type: ignore[method-assign]
        os.close(reader_end)
        os.close(writer_end)
    return open_lines


def test_the_window_bounds_what_is_open_and_keeps_the_engine_full(tmp_path: Path) -> None:
    """A long first line holds the others up: the window fills with answers, and no further."""
    lines = [{"prompt": "x", "max_tokens": 120 if i == 0 else 4} for i in range(300)]
    with LLM(max_num_seqs=8, max_model_len=128) as llm:
        open_lines = run_in_process(llm, lines, 20, tmp_path / "out")
    assert max(open_lines) == 20
    texts = parse((tmp_path / "out").read_bytes())
    assert [line["line"] for line in texts] == list(range(1, 301))
    assert [line["completion_tokens"] for line in texts[1:]] == [4] * 299


def test_the_engine_stays_full(tmp_path: Path) -> None:
    """Of equal lines, all sequences that may run do run, from the first step to the last ones."""
    lines = [{"prompt": "x", "max_tokens": 10, "ignore_eos": True} for i in range(160)]
    with LLM(max_num_seqs=8, max_model_len=64) as llm:
        steps = len(run_in_process(llm, lines, 16, tmp_path / "out"))
    # Each line takes 10 steps, of which the first reads its prompt; 8 run at a time.
    assert steps <= 160 / 8 * 10 + 10


def test_memory_does_not_grow_with_the_file() -> None:
    """6,000 lines through pipes: the process ends no larger than it was after 1,500."""
    script = """
import resource, sys
from tinyvllm.cli import batch_run, main
sizes = []
add = batch_run.Tally.add
def watched(self, answer):
    add(self, answer)
    if self.answered in (1500, 6000):
        with open("/proc/self/statm") as file:
            sizes.append(int(file.read().split()[1]) * 4096)
batch_run.Tally.add = watched
batch_run._NUM_REMEMBERED_IDS = 1000  # a bound as well, of more lines than this test has
sys.argv = ["tinyvllm", "run-batch", "-i", "-", "-o", "-", "--max-num-seqs", "16"]
try:
    main()
finally:
    print(*sizes, file=sys.stderr)
"""
    lines = ({"custom_id": f"c{i}", "prompt": "x " * 50, "max_tokens": 1} for i in range(6_000))
    result = subprocess.run(
        [sys.executable, "-c", script], input=jsonl(lines), capture_output=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    early, late = map(int, result.stderr.splitlines()[-1].split())
    assert late - early < 2 << 20
