"""Writes docs/cli.md from the commands' own help: `make docs`. A test holds the two together."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import click

import tinyvllm.cli
from tinyvllm.cli.program import cli

TARGET = Path(__file__).parent / "cli.md"

_HEAD = """\
# The command line

<!-- Written by `make docs` from the commands themselves. Change their help, not this file. -->
"""


def text() -> str:
    """The whole page."""
    context = _context(cli, "tinyvllm", None)
    exit_codes = inspect.cleandoc(tinyvllm.cli.__doc__ or "").partition("\n\n")[2]
    what, _, codes = exit_codes.partition("\n\n")
    lines = [
        _HEAD,
        *_page(cli, context),
        "### Exit codes\n",
        what + "\n",
        f"```\n{dedent(codes)}\n```\n",
    ]
    for command, child in _subcommands(cli, context):
        lines += _page(command, child)
    return "\n".join(lines)


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    return click.Context(command, parent, info_name=name, **command.context_settings)


def _subcommands(
    command: click.Command, context: click.Context
) -> Iterator[tuple[click.Command, click.Context]]:
    """All commands under this one, those of a group after the group."""
    if not isinstance(command, click.Group):
        return
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None, f"{name} is listed and cannot be had"
        child = _context(found, name, context)
        yield found, child
        yield from _subcommands(found, child)


def _page(command: click.Command, context: click.Context) -> Iterator[str]:
    yield f"## {context.command_path}\n"
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield f"```\n{usage}\n```\n"
    yield from _prose(command.help or "")
    if isinstance(command, click.Group):
        yield "| command | |\n|---|---|"
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield f"| `{context.command_path} {name}` | {_cell(found.get_short_help_str(200))} |"
        yield ""
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and isinstance(parameter, click.Option):
            sections.setdefault(getattr(parameter, "section", "Help"), []).append(record)
    for title, records in sections.items():
        yield f"| {title} | |\n|---|---|"
        for names, help in records:
            yield f"| `{_cell(names)}` | {_cell(help)} |"
        yield ""
    yield from _prose(command.epilog or "")


def _prose(source: str) -> Iterator[str]:
    """Paragraphs; one that click must not wrap becomes a block, its title stays outside."""
    for paragraph in inspect.cleandoc(source).split("\n\n"):
        if not paragraph.startswith("\b\n"):
            yield " ".join(paragraph.split()) + "\n"
            continue
        title, _, block = paragraph.removeprefix("\b\n").partition("\n")
        yield f"{title}\n\n```\n{inspect.cleandoc(block)}\n```\n"


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", r"\|")


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
