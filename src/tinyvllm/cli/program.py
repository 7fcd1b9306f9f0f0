"""The program `tinyvllm`: its commands, and the exit code of whatever ends one."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from tinyvllm.cli.startup import importing

with importing():
    import click
    from click.shell_completion import CompletionItem

    from tinyvllm.cli.terminal import Stopped, handle_signals
    from tinyvllm.errors import TinyvllmError
    from tinyvllm.stderr import telling

# Title -> command -> what it does. `run-batch` is `command` in the module run_batch, and so on.
_GROUPS = {
    "Use a model": {
        "generate": "Continue prompts, or answer them.",
        "chat": "Talk with a model in the terminal.",
        "run-batch": "Answer a file of requests (OpenAI's batch format).",
    },
    "Look and measure": {
        "inspect": "What is in a model, and whether it will fit.",
        "bench": "Measure latency and throughput.",
        "env": "Versions, CPU and GPU features: what a bug report needs.",
    },
}
_COMMANDS = {name: help for group in _GROUPS.values() for name, help in group.items()}


@contextmanager
def _reader_may_go() -> Iterator[None]:
    """A closed pipe is Stopped(141). Where it gets hold of one, click ends the program with 1."""
    try:
        yield
    except BrokenPipeError:
        raise Stopped(141) from None


class _Commands(click.Group):
    """The modules beside this one, imported by name: `--help` must not load an engine."""

    def make_context(self, *arguments: Any, **settings: Any) -> click.Context:
        with _reader_may_go():  # of --help and --version
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        with _reader_may_go():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        with importing():
            module = import_module(f"tinyvllm.cli.{name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, _COMMANDS))  # the groups' columns stand under each other
        for title, commands in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), text) for name, text in commands.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """click's own would import every command for its help."""
        names = [name for name in _COMMANDS if name.startswith(incomplete)]
        return [
            *(CompletionItem(name, help=_COMMANDS[name]) for name in names),
            *click.Command.shell_complete(self, ctx, incomplete),
        ]


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"tinyvllm {version('tinyvllm')}")
        ctx.exit()


_EPILOG = """\b
Examples:
  tinyvllm generate --prompt "Tell me a story about a brave fox"
  tinyvllm chat --model DIR
  tinyvllm bench latency --model llama-3.2-1b

\b
Completion of commands and options with the Tab key:
  bash, in ~/.bashrc:  eval "$(_TINYVLLM_COMPLETE=bash_source tinyvllm)"
  zsh, in ~/.zshrc:    eval "$(_TINYVLLM_COMPLETE=zsh_source tinyvllm)"
  fish, in ~/.config/fish/config.fish:
    _TINYVLLM_COMPLETE=fish_source tinyvllm | source
"""


@click.command(
    cls=_Commands,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},  # of all commands
)
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


def run() -> None:
    """Runs a command, and turns whatever ends it into an exit code."""
    handle_signals()
    try:
        code = _exit_code()
    except Stopped as stopped:
        code = stopped.exit_code
    # What is left in Python's buffers of a closed pipe would raise once more at exit.
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def _exit_code() -> int:
    try:
        with _reader_may_go():  # of a completion, which click writes before it makes a context
            result = cli.main(prog_name="tinyvllm", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        with telling():
            error.show()
        return error.exit_code
    except TinyvllmError as error:
        return _fail(str(error), error.exit_code)
    except MemoryError:
        return _fail("out of memory. Try a smaller --max-model-len.", 4)
    except OSError as error:
        return _fail(f"{error}.", 1)
    except Exception as error:
        if isinstance(error, ImportError) and isinstance(error.__cause__, Stopped):
            raise error.__cause__ from None  # a signal while a module in C++ was imported
        if os.environ.get("TINYVLLM_DEBUG"):
            traceback.print_exc()
        message = f"{type(error).__name__}: {error}".replace("\n", " ")
        return _fail(
            f"internal error, please report it: {message} (TINYVLLM_DEBUG=1 shows where)", 1
        )


def _fail(message: str, code: int) -> int:
    with telling():
        click.echo(f"tinyvllm: error: {message}", err=True)
    return code
