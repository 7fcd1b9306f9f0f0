"""The command line: `tinyvllm COMMAND ...`. Commands are loaded when they are called.

stdout carries the answer and nothing else. What goes wrong is one line on stderr and an exit code:

    0 done                         4 it will not fit
    1 failed while running         5 no such device
    2 usage, or an unusable input  130 SIGINT, 143 SIGTERM
    3 the model cannot be loaded   141 the reader of stdout has gone
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module

import click

from tinyvllm.cli.terminal import Stopped, handle_signals
from tinyvllm.errors import TinyvllmError

_COMMANDS = {
    "generate": "Continue prompts, or answer them.",
    "run-batch": "Answer a file of requests, one a line.",
    "inspect": "What a model is, and whether it fits.",
    "env": "What a bug report needs to know.",
}


class _Commands(click.Group):
    """The modules beside this one, imported by name: `--help` must not load an engine."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"tinyvllm.cli.{name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"tinyvllm {version('tinyvllm')}")
        ctx.exit()


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
def cli() -> None:
    """An LLM inference engine that one person can read in a weekend and still use for real work."""


def main() -> None:
    """The entry point: runs a command, and turns whatever ends it into an exit code."""
    handle_signals()
    try:
        code = _run()
    except Stopped as stopped:
        code = stopped.exit_code
    # What is left in Python's buffers of a closed pipe would raise once more at exit.
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def _run() -> int:
    try:
        result = cli.main(prog_name="tinyvllm", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except TinyvllmError as error:
        return _fail(str(error), error.exit_code)
    except MemoryError:
        return _fail("out of memory. Try a smaller --max-model-len.", 4)
    except BrokenPipeError:
        raise Stopped(141) from None
    except OSError as error:
        return _fail(f"{error}.", 1)
    except Exception as error:
        if os.environ.get("TINYVLLM_DEBUG"):
            traceback.print_exc()
        message = f"{type(error).__name__}: {error}".replace("\n", " ")
        return _fail(
            f"internal error, please report it: {message} (TINYVLLM_DEBUG=1 shows where)", 1
        )


def _fail(message: str, code: int) -> int:
    click.echo(f"tinyvllm: error: {message}", err=True)
    return code
