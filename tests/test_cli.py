"""`tinyvllm generate` as other programs see it: streams, exit codes, signals, formats."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cli_process import COMMAND, imported_by
from families import FAMILIES
from tinyvllm import LLM, SamplingParams
from tinyvllm.cli.terminal import read_file

Result = subprocess.CompletedProcess[bytes]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a tokenizer and no chat template; greedy by default."""
    return str(FAMILIES["llama-3.2-v5"].write(tmp_path_factory.mktemp("model")))


def tinyvllm(
    *arguments: str,
    stdin: bytes | int = subprocess.DEVNULL,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> Result:
    stream: dict[str, Any] = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        timeout=120,
        env={**os.environ, **(environment or {})},
        **stream,
        **options,
    )


def generate(model: str, *arguments: str, **options: Any) -> Result:
    return tinyvllm("generate", "--model", model, *arguments, **options)


def assert_error(result: Result, code: int, *parts: str, lines: int = 1) -> None:
    """The exit code, nothing on stdout, one line on stderr that has these parts in it; `lines`: and
    a table.
    """
    stderr = result.stderr.decode()
    assert result.returncode == code, stderr
    assert result.stdout == b""
    assert "Traceback" not in stderr
    for part in parts:
        assert part in stderr
    if code != 2 or stderr.startswith("tinyvllm: error"):
        assert stderr.count("\n") == lines, stderr


# --- What comes out ---------------------------------------------------------------------------


def test_stdout_has_the_text_and_one_line_end(model: str) -> None:
    with LLM(model) as llm:
        (expected,) = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=12), False)
    result = generate(model, "-p", "Hello", "-n", "12")
    assert result.returncode == 0
    assert result.stdout.decode() == expected.outputs[0].text.removesuffix("\n") + "\n"
    assert result.stderr == b""


def test_several_prompts_answer_in_their_order(model: str) -> None:
    alone = [generate(model, "-p", text, "-n", "9").stdout for text in ("one", "two", "three")]
    together = generate(model, "-p", "one", "-p", "two", "-p", "three", "-n", "9")
    assert together.stdout == b"".join(alone)


def test_no_stream_prints_the_same_text(model: str) -> None:
    streamed, whole = (
        generate(model, "-p", "Hello", "-n", "40", *flag).stdout for flag in ([], ["--no-stream"])
    )
    assert streamed == whole != b""


def test_text_appears_while_it_is_made(model: str) -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "-m", model, "-p", "x", "-n", "3000", "--ignore-eos"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    assert process.poll() is None
    process.kill()
    process.communicate()
    assert first != b""


def test_json_is_one_object_that_says_everything(model: str) -> None:
    result = generate(model, "-p", "Hello", "-n", "4", "--json", "--logprobs", "2", "--seed", "7")
    document = json.loads(result.stdout)
    assert document["schema"] == 1
    assert document["seed"] == 7
    assert document["sampling"]["max_tokens"] == {"value": 4, "from": "flag"}
    assert document["sampling"]["temperature"] == {"value": 0, "from": "generation_config"}
    assert document["sampling"]["top_p"]["from"] == "default"
    (answer,) = document["results"]
    assert len(answer["token_ids"]) == len(answer["logprobs"]) == 4
    assert [len(entry["top"]) for entry in answer["logprobs"]] == [2] * 4
    assert all(entry["rank"] == 1 for entry in answer["logprobs"])  # greedy
    assert answer["finish_reason"] == "length"
    assert document["usage"]["total_tokens"] == answer["prompt_tokens"] + 4


def test_a_models_min_tokens_forbids_no_short_output(model: str, tmp_path: Path) -> None:
    config = tmp_path / "generation_config.json"
    config.write_text('{"min_new_tokens": 30}')
    arguments = ["-p", "Hello", "-n", "4", "--json", "--generation-config", str(config)]
    sampling = json.loads(generate(model, *arguments).stdout)["sampling"]
    assert sampling["min_tokens"] == {"value": 4, "from": "generation_config"}
    assert_error(generate(model, *arguments, "--min-tokens", "30"), 2, "min_tokens is 30")


def test_the_size_of_the_kv_cache_is_what_was_asked_for(model: str) -> None:
    arguments = ["-p", "Hello", "-n", "4", "--json", "--kv-cache-memory-bytes"]
    stats = [json.loads(generate(model, *arguments, size).stdout)["stats"] for size in ("1M", "2M")]
    assert stats[1]["kv_cache_tokens"] == 2 * stats[0]["kv_cache_tokens"]


def test_jsonl_has_a_line_for_each_prompt(model: str) -> None:
    result = generate(model, "-p", "one", "--prompt-ids", "5,6,7", "-n", "3", "--jsonl")
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert (first["index"], first["prompt"]) == (0, "one")
    assert (second["index"], second["prompt"], second["prompt_tokens"]) == (1, None, 3)


def test_stats_go_to_stderr_and_name_the_seed(model: str) -> None:
    result = generate(model, "-p", "Hello", "-n", "4", "--stats", "--seed", "11")
    assert b"seed 11" in result.stderr
    assert b"max_tokens 4 (flag)" in result.stderr
    assert result.stdout == generate(model, "-p", "Hello", "-n", "4").stdout


def test_stats_show_the_tokens_of_the_prompts_and_how_many_were_computed(model: str) -> None:
    ids = ",".join(["5"] * 600)  # more than a step has: when the second begins, much of it is there
    arguments = ["--prompt-ids", ids, "-n", "2", "--stats"]
    once = generate(model, *arguments).stderr.decode()
    assert "prompt: 600 tokens; first token" in once
    twice = generate(model, *arguments, "--prompt-ids", ids).stderr.decode()
    computed = re.search(r"prompt: 1200 tokens, (\d+) computed; first token", twice)
    assert computed is not None
    assert 600 < int(computed[1]) < 1200


def test_stats_show_what_starting_up_took(model: str) -> None:
    stats = generate(model, "--prompt-ids", "5,6", "-n", "1", "--stats").stderr.decode()
    (line,) = (line for line in stats.splitlines() if line.startswith("tinyvllm: start: "))
    parts = dict(re.findall(r"(\w+) ([0-9.]+) s", line.split("start: ")[1]))
    assert list(parts) == ["interpreter", "imports", "find", "weights", "tokenizer"]
    age = re.search(r"([0-9.]+) s after process start", stats)
    assert age is not None
    before = sum(float(parts[name]) for name in ("interpreter", "imports", "find", "weights"))
    assert 0.02 < before < float(age[1]) + 0.05  # the system counts in hundredths of a second


def test_the_seed_that_stats_shows_repeats_the_run(model: str) -> None:
    sampled = ["-p", "Hello", "-n", "30", "-t", "1.5", "--ignore-eos"]
    first = json.loads(generate(model, *sampled, "--json").stdout)
    again = json.loads(generate(model, *sampled, "--json", "--seed", str(first["seed"])).stdout)
    other = json.loads(generate(model, *sampled, "--json", "--seed", "1").stdout)
    tokens = [run["results"][0]["token_ids"] for run in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_stop_ends_before_the_text(model: str) -> None:
    whole = generate(model, "-p", "Hello", "-n", "40").stdout.decode()
    stop = whole[20:23]
    cut = generate(model, "-p", "Hello", "-n", "40", "--stop", stop).stdout.decode()
    kept = generate(model, "-p", "Hello", "-n", "40", "--stop", stop, "--include-stop").stdout
    assert cut == whole[: whole.index(stop)].removesuffix("\n") + "\n"
    assert kept.decode() == (whole[: whole.index(stop)] + stop).removesuffix("\n") + "\n"


def test_a_terminal_is_shown_control_characters_and_a_pipe_gets_them(model: str) -> None:
    with LLM(model) as llm:
        [escape] = llm.get_tokenizer().encode("\x1b", add_special_tokens=False)
    arguments = ["-p", "x", "-n", "3", "--logit-bias", f"{escape}=100"]
    assert generate(model, *arguments).stdout == b"\x1b\x1b\x1b\n"
    ours, theirs = pty.openpty()
    subprocess.run([*COMMAND, "generate", "-m", model, *arguments], stdout=theirs, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 1000).decode()
    os.close(ours)
    assert shown == "\u241b\u241b\u241b\r\n"


# --- Where prompts come from ------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["-p", "-"], ["-f", "-"]])
def test_stdin_is_a_prompt_without_its_last_line_end(model: str, arguments: list[str]) -> None:
    piped = generate(model, *arguments, "-n", "8", stdin=b"Hello\n")
    assert piped.stdout == generate(model, "-p", "Hello", "-n", "8").stdout != b""


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\n", "a"),
        (b"a\n\n", "a\n"),
        (b"a\r\n\r\n", "a\r\n"),
        (b"a\r", "a\r"),
        (b"\xef\xbb\xbfa\r\n", "a"),
        (b"\xef\xbb\xbf\xef\xbb\xbf", "\ufeff"),
    ],
)
def test_a_file_is_read_without_its_byte_order_mark_and_its_last_line_end(
    tmp_path: Path, data: bytes, text: str
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(data)
    assert read_file(str(file)) == text


def test_stdin_is_left_alone_when_a_prompt_is_given(model: str) -> None:
    read_end, write_end = os.pipe()  # nobody ever writes: reading it would wait for ever
    result = generate(model, "-p", "Hello", "-n", "2", stdin=read_end)
    os.close(read_end)
    os.close(write_end)
    assert result.returncode == 0


def test_prompt_file(model: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Hello\n")
    from_file = generate(model, "-f", str(file), "-n", "8")
    assert from_file.stdout == generate(model, "-p", "Hello", "-n", "8").stdout


def test_closed_stdin_without_a_prompt(model: str) -> None:
    result = generate(model, stdin=None, preexec_fn=lambda: os.close(0))
    assert_error(result, 2, "standard input is closed")


def test_a_terminal_without_a_prompt_is_a_usage_error(model: str) -> None:
    ours, theirs = pty.openpty()
    result = generate(model, stdin=theirs)
    os.close(ours)
    os.close(theirs)
    assert_error(result, 2, "No prompt")


@pytest.mark.parametrize(
    ("arguments", "stdin", "parts"),
    [
        ([], b"ab\xffcd", ("standard input", "byte 2", "0xff")),
        ([], b"\xef\xbb\xbfab\xff", ("standard input", "byte 5", "0xff")),
        (["-f", "/no/such/file"], b"", ("/no/such/file",)),
        (["--prompt-ids", "1,x"], b"", ("1,x",)),
        (["--prompt-ids", "1,99999"], b"", ("99999", "0 to ")),
        (["-p", "-", "-f", "-"], b"", ("once",)),
        (["-p", "x", "--raw", "--system", "y"], b"", ("--system",)),
        (["-p", "x", "--system", "y"], b"", ("chat template",)),
        (["-p", "x", "--chat"], b"", ("chat template",)),
        (["-p", "x", "--logprobs", "2"], b"", ("--json",)),
        (["-p", "x", "--json", "--jsonl"], b"", ("--json",)),
        (["-p", "x", "--top-p", "1.5"], b"", ("top_p", "1.5")),
        (["-p", "x", "-n", "0"], b"", ("max_tokens", "0")),
        (["-p", "x", "-n", "1.5k!"], b"", ("1.5k!",)),
        (["-p", "x", "-n", "9" * 20], b"", ("9" * 20, "too large")),
        (["-p", "x", "-m", ""], b"", ("--model", "empty")),
        (["-p", "x", "--kv-cache-memory-bytes", "0"], b"", ("kv_cache_memory_bytes is 0",)),
        (["-p", "x", "--kv-cache-memory-bytes", "x"], b"", ("whole number",)),
        (["-p", "x", "--gpu-memory-utilization", "1.5"], b"", ("gpu_memory_utilization is 1.5",)),
        (["-p", "x", "--max-model-len", "1G"], b"", ("1073741824", "4096")),
        (["-p", "x", "--no-such-option"], b"", ("--no-such-option",)),
        (["-p", "x", "--generation-config", "/no/file"], b"", ("/no/file",)),
    ],
)
def test_unusable_input_is_exit_2(
    model: str, arguments: list[str], stdin: bytes, parts: tuple[str, ...]
) -> None:
    assert_error(generate(model, *arguments, stdin=stdin), 2, *parts)


def test_a_prompt_too_long_names_both_numbers(model: str) -> None:
    result = generate(model, stdin=b"y\n" * 50_000)
    assert_error(result, 2, "The prompt has 100000 tokens", "4096", "at most 4095")


def test_unknown_kernels_are_named(model: str) -> None:
    result = generate(model, "-p", "x", environment={"TINYVLLM_CPU_ISA": "mmx"})
    assert_error(result, 2, "mmx", "portable")


# --- Models that cannot be used ---------------------------------------------------------------


def test_missing_model_is_exit_3() -> None:
    assert_error(generate("/no/such/model", "-p", "x"), 3, "/no/such/model")


def test_damaged_model_is_exit_3(model: str, tmp_path: Path) -> None:
    for file in Path(model).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert_error(generate(str(tmp_path), "-p", "x"), 3, "model.safetensors", "bytes")


def test_what_will_not_fit_is_exit_4(model: str, tmp_path: Path) -> None:
    for file in Path(model).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["max_position_embeddings"] = 1_500_000_000
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = generate(str(tmp_path), "-p", "x", "--max-model-len", "1500000000")
    table = ("\n  weights ", "\n  KV cache ", "\n  workspace ", "\n  free ")
    assert_error(result, 4, "1500000000", "GiB", "Lower max_model_len", *table, lines=5)


def test_cuda_without_cuda_is_exit_5(model: str) -> None:
    assert_error(generate(model, "-p", "x", "--device", "cuda"), 5, "cuda")


# --- Pipes and signals ------------------------------------------------------------------------


def long_run(model: str) -> list[str]:
    return [*COMMAND, "generate", "-m", model, "-p", "x", "-n", "4000", "--ignore-eos"]


def test_a_reader_that_goes_away_is_exit_141_and_no_message(model: str) -> None:
    process = subprocess.Popen(
        long_run(model), stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_full_disk_is_exit_1(model: str) -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        process = subprocess.run(long_run(model), stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert process.returncode == 1
    assert b"No space left on device" in process.stderr
    assert process.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["-p", "x", "-n", "3", "--stats"], 0),
        (["-p", "x", "-n", "0"], 2),
        (["-p", "x", "--no-such-option"], 2),
        (["-m", "/no/such/model", "-p", "x"], 3),
    ],
)
def test_what_cannot_be_said_on_stderr_changes_no_exit_code(
    model: str, arguments: list[str], code: int
) -> None:
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [*COMMAND, "generate", "-m", model, *arguments],
            stdout=subprocess.PIPE,
            stderr=full,
            timeout=60,
        )
    assert result.returncode == code
    assert bool(result.stdout) == (code == 0)


def test_closed_stdout_is_exit_1(model: str) -> None:
    result = subprocess.run(
        long_run(model), stderr=subprocess.PIPE, timeout=60, preexec_fn=lambda: os.close(1)
    )
    assert result.returncode == 1
    assert b"standard output is closed" in result.stderr


def test_an_interrupt_while_the_program_is_imported_leaves_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(COMMAND, capture_output=True, timeout=60, env=environment)
    assert result.returncode == -signal.SIGINT  # 130, as a shell says it
    assert result.stderr == b""


def test_an_interrupt_while_a_module_in_c_is_imported_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tinyvllm.cli import program
    from tinyvllm.cli.terminal import Stopped

    def main(**_: Any) -> None:  # as pybind11 passes on what is raised meanwhile
        raise ImportError("initialization failed") from Stopped(130)

    monkeypatch.setattr(program.cli, "main", main)
    with pytest.raises(Stopped) as caught:
        program._exit_code()
    assert caught.value.exit_code == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_keep_what_was_written(model: str, number: int, code: int) -> None:
    whole = subprocess.run(long_run(model), capture_output=True, timeout=120).stdout
    process = subprocess.Popen(
        long_run(model), stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(number)
    rest, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stderr == b""
    text = first + rest
    assert text.endswith(b"\n")
    assert whole.startswith(text.removesuffix(b"\n"))
    assert len(text) < len(whole)


def test_an_interrupted_json_run_still_says_what_there_is(model: str) -> None:
    # Prompt and output share 4,000 tokens, so the long prompt's answer ends long before the other.
    arguments = ["generate", "-m", model, "-p", "x" * 3900, "-p", "y", "--jsonl"]
    arguments += ["-n", "4000", "--ignore-eos", "--max-model-len", "4000"]
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    reasons = [json.loads(line)["finish_reason"] for line in (first + rest).splitlines()]
    assert reasons == ["length", "abort"]


@pytest.fixture(scope="module")
def model_with_a_bad_token(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that computes NaN where token 7 is in the prompt."""
    directory = FAMILIES["llama-linear"].write(tmp_path_factory.mktemp("bad"))
    weights = directory / "model.safetensors"
    data = bytearray(weights.read_bytes())
    (header_size,) = struct.unpack_from("<Q", data)
    embedding = json.loads(data[8 : 8 + header_size])["model.embed_tokens.weight"]
    assert embedding["dtype"] == "BF16"
    row_size = 2 * embedding["shape"][1]
    begin = 8 + header_size + embedding["data_offsets"][0] + 7 * row_size
    data[begin : begin + row_size] = b"\xff" * row_size
    weights.write_bytes(data)
    return str(directory)


def test_an_error_in_the_middle_loses_no_answer(model_with_a_bad_token: str) -> None:
    # The second prompt takes several steps, in which the first one's answer comes to its end, while
    # the third one waits.
    prompts = ["5,6", "5," * 2000 + "7", "6," * 2000 + "5"]
    arguments = [part for ids in prompts for part in ("--prompt-ids", ids)] + ["-n", "3"]
    whole = generate(model_with_a_bad_token, "--prompt-ids", "5,6", "-n", "3")
    run = generate(model_with_a_bad_token, *arguments)
    assert run.returncode == 1
    assert run.stdout == whole.stdout != b""
    assert b"not a finite number" in run.stderr
    run = generate(model_with_a_bad_token, *arguments, "--json")
    results = json.loads(run.stdout)["results"]
    assert run.returncode == 1
    assert [result["finish_reason"] for result in results] == ["length", "error", "abort"]
    assert len(results[0]["token_ids"]) == 3


@pytest.mark.parametrize("form", ["--json", "--jsonl"])
def test_a_prompt_that_is_refused_leaves_stdout_empty(model: str, form: str) -> None:
    assert_error(generate(model, "--prompt-ids", "5", "--prompt-ids", "99999", form), 2, "99999")


# --- Cost -------------------------------------------------------------------------------------


def test_generate_imports_only_what_it_uses(model: str) -> None:
    unused = {"numpy", "torch", "jinja2", "huggingface_hub", "tqdm", "asyncio"}
    assert not unused & imported_by("generate", "-m", model, "-p", "x", "-n", "1")


# --- The bundled model ------------------------------------------------------------------------


def test_the_bundled_model_continues_a_story() -> None:
    result = tinyvllm("generate", "--raw", "-p", "Once upon a time", "--seed", "1")
    text = result.stdout.decode()
    assert result.returncode == 0
    assert result.stderr == b""
    assert len(text.split()) > 60
    assert text.count(".") > 5


@pytest.mark.parametrize(("adjective", "animal"), [("brave", "fox"), ("shy", "owl")])
def test_the_bundled_model_tells_the_story_that_was_asked_for(adjective: str, animal: str) -> None:
    request = f"Tell me a story about a {adjective} {animal}"
    text = tinyvllm("generate", "-p", request, "-t", "0").stdout.decode()
    assert f"{adjective} {animal}" in text
    assert len(text.split()) > 60
