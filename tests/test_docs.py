"""docs/cli.md is what the commands say, the examples in help and documents run, and the files that
documents name are there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parent.parent

# An example with a model is one that this machine may not have; `chat` wants a terminal.
OTHER_MODEL = re.compile(r"DIR|ORG/NAME|--model|-m |^tinyvllm chat")


def test_cli_md_is_what_the_commands_say() -> None:
    # In a process of its own: a command remembers the help option that it was first asked for.
    code = "import make_cli; print(make_cli.text(), end='')"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "docs", capture_output=True, text=True, check=True
    ).stdout
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == said, "docs/cli.md is stale: run `make docs` and commit it"


def commands() -> Iterator[click.Command]:
    from tinyvllm.cli.program import cli

    def walk(command: click.Command) -> Iterator[click.Command]:
        yield command
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                found = command.get_command(context, name)
                assert found is not None
                yield from walk(found)

    return walk(cli)


def examples() -> list[str]:
    """Of all help texts, and the lines that begin with a prompt in README.md and docs/."""
    found: list[str] = []
    for command in commands():
        for line in (command.epilog or "").splitlines():
            if re.match(r" +(tinyvllm|\S.*\| tinyvllm) ", line):
                found.append(line.strip())
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for line in document.read_text(encoding="utf-8").splitlines():
            if line.startswith("$ ") and "tinyvllm " in line:
                found.append(line.removeprefix("$ ").replace(".venv/bin/tinyvllm", "tinyvllm"))
    return [line for line in dict.fromkeys(found) if not OTHER_MODEL.search(line)]


def test_every_command_has_examples() -> None:
    for command in commands():
        if not isinstance(command, click.Group):
            assert "Examples:" in (command.epilog or ""), command


@pytest.mark.parametrize("example", examples())
def test_examples_with_the_bundled_model_run(example: str, tmp_path: Path) -> None:
    program = f'tinyvllm() {{ {shlex.quote(sys.executable)} -m tinyvllm.cli "$@"; }}'
    result = subprocess.run(
        ["bash", "-c", f"set -eo pipefail\n{program}\n{example}"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_the_tests_behind_the_promises_are_there() -> None:
    promises = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[^`]*)`", promises)
    assert len(set(named)) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_story_in_the_readme_is_the_one_that_comes() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    session = re.search(r"\n\$ \.venv/bin/tinyvllm (generate .*)\n((?:.*\n)+?)```", readme)
    assert session
    command = [sys.executable, "-m", "tinyvllm.cli", *shlex.split(session[1])]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert session[2].split() == said.split()
