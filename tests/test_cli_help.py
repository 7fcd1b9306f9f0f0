"""What the command line says of itself: help in groups, examples, completion, and at what cost."""

from __future__ import annotations

import os
import re
import resource
import subprocess
from collections.abc import Iterator

import click
import pytest

from cli_process import COMMAND, imported_by
from tinyvllm.cli.program import cli

NAMES = list(cli.list_commands(click.Context(cli)))
HEAVY = {
    "asyncio",
    "huggingface_hub",
    "jinja2",
    "numpy",
    "prompt_toolkit",
    "tinyvllm._core",
    "tinyvllm.llm",
    "tokenizers",
    "tqdm",
}


def help_of(*names: str) -> str:
    result = subprocess.run([*COMMAND, *names, "--help"], capture_output=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.decode()


def commands() -> Iterator[tuple[str, ...]]:
    """All commands, subcommands too."""
    for name in NAMES:
        yield (name,)
        command = cli.get_command(click.Context(cli), name)
        if isinstance(command, click.Group):
            for subname in command.list_commands(click.Context(command)):
                yield (name, subname)


ALL = list(commands())


def test_help_lists_every_command_in_its_group() -> None:
    text = help_of()
    groups = re.split(r"^([A-Z][^\n:]*):$", text, flags=re.MULTILINE)
    sections = dict(zip(groups[1::2], groups[2::2], strict=True))
    assert "generate" in sections["Use a model"]
    assert "bench" in sections["Look and measure"]
    for name in NAMES:
        assert sum(f"  {name} " in section for section in sections.values()) == 1


@pytest.mark.parametrize("names", [(), *ALL], ids=lambda names: " ".join(names) or "itself")
def test_help_imports_no_engine(names: tuple[str, ...]) -> None:
    assert not HEAVY & imported_by(*names, "--help")


def test_help_takes_less_than_a_third_of_a_second() -> None:
    """Of CPU time, in the best of five runs: others may use the machine, too."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        help_of()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.3


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--help"], {}),
        (["--version"], {}),
        (["generate", "--help"], {}),
        ([], {"_TINYVLLM_COMPLETE": "zsh_source"}),
    ],
)
def test_a_reader_that_has_gone_is_exit_141_and_no_message(
    arguments: list[str], environment: dict[str, str]
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    result = subprocess.run(
        [*COMMAND, *arguments],
        stdout=write_end,
        stderr=subprocess.PIPE,
        timeout=60,
        env={**os.environ, **environment},
    )
    os.close(write_end)
    assert (result.returncode, result.stderr) == (141, b"")


def completed(words: str, shell: str = "bash") -> list[str]:
    """What the shell gets to offer after these words."""
    environment = {
        "_TINYVLLM_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    result = subprocess.run(
        COMMAND, capture_output=True, timeout=60, env={**os.environ, **environment}
    )
    assert result.stderr == b""
    return [line.partition(",")[2] for line in result.stdout.decode().splitlines()]


def test_completion_knows_commands_options_and_values() -> None:
    assert completed("tinyvllm ") == NAMES
    assert completed("tinyvllm ch") == ["chat"]
    assert completed("tinyvllm bench ") == ["latency", "throughput"]
    assert completed("tinyvllm generate --max-t") == ["--max-tokens"]
    assert completed("tinyvllm bench latency --output ") == ["md", "csv", "json", "jsonl"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_switched_on_as_the_help_says(shell: str) -> None:
    assert f"_TINYVLLM_COMPLETE={shell}_source tinyvllm" in help_of()
    result = subprocess.run(
        COMMAND,
        capture_output=True,
        timeout=60,
        env={**os.environ, "_TINYVLLM_COMPLETE": f"{shell}_source"},
    )
    assert result.returncode == 0
    assert b"_TINYVLLM_COMPLETE" in result.stdout


@pytest.mark.parametrize("words", ["tinyvllm ", "tinyvllm chat --"])
def test_completion_imports_no_engine(words: str) -> None:
    assert not HEAVY & imported_by(
        _TINYVLLM_COMPLETE="bash_complete",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split(" ")) - 1),
    )
