"""`tinyvllm chat`: a conversation in the terminal."""

from __future__ import annotations

import difflib
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinyvllm.cli.model_options import (
    INTERACTIVE_STEP_TOKENS,
    engine_options,
    model_options,
    open_llm,
    quiet_option,
    sampling_options,
    sampling_params,
)
from tinyvllm.cli.options import Command, option
from tinyvllm.cli.terminal import (
    Interrupts,
    Output,
    Stopped,
    catch_interrupts,
)
from tinyvllm.errors import InvalidRequestError, TinyvllmError
from tinyvllm.stderr import printable, tell

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from tinyvllm.cli.conversation import Conversation
    from tinyvllm.llm import LLM
    from tinyvllm.outputs import RequestOutput
    from tinyvllm.sampling_params import SamplingParams

_EPILOG = """\b
Examples:
  tinyvllm chat
  tinyvllm chat --model DIR --system "You answer in one sentence."
  tinyvllm chat --model ORG/NAME --temperature 0.7 --max-tokens 500
"""


@click.command(cls=Command, epilog=_EPILOG)
@model_options()
@option("-s", "--system", section="Prompt", metavar="TEXT", help="System prompt.")
@sampling_options(default_max_tokens="as many as the context holds")
@quiet_option(kept="No greeting and no notes.")
@engine_options()
def command(**options: Any) -> None:
    """Talk with a model in the terminal.

    Enter sends a message, Alt-Enter (or Escape, Enter) begins a new line in it, the arrow keys
    bring earlier ones back. Ctrl-C stops an answer; what was written of it stays in the
    conversation. Ctrl-D, or Ctrl-C twice, leaves. /help lists the commands, such as /save.

    Only answers go to stdout. For scripts and pipes there is `tinyvllm generate`.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise click.UsageError(
            "chat reads from a terminal, and standard input is none. For pipes and scripts there "
            "is `tinyvllm generate`, which takes a prompt on stdin."
        )
    output = Output()

    from tinyvllm.cli.conversation import Conversation
    from tinyvllm.cli.report import note

    with open_llm(
        options,
        max_num_seqs=1,
        max_num_batched_tokens=INTERACTIVE_STEP_TOKENS,
        generation_config=options["generation_config"],
        seed=options["seed"],
    ) as llm:
        tokenizer = llm.get_tokenizer()
        if not tokenizer.has_chat_template:
            raise InvalidRequestError(
                f"{llm.directory}: the model has no chat template, so it cannot hold a "
                "conversation. `tinyvllm generate` continues text with it."
            )
        sampling, _ = sampling_params(llm, options, max_tokens=None)
        conversation = Conversation(tokenizer, options["system"])
        if not options["quiet"]:
            info = llm.stats()
            note(
                f"{options['model'] or 'bundled'}: {info['dtype']}, {info['device']} "
                f"{info['isa']}, {info['num_threads']} threads"
            )
            note("/help lists the commands, Ctrl-D leaves")
        with catch_interrupts() as interrupts:
            _Chat(llm, sampling, conversation, output, interrupts).run()


@dataclass
class _Totals:
    """Tokens of all turns."""

    answers: int = 0
    cached: int = 0
    computed: int = 0
    output: int = 0


@dataclass
class _Turn:
    """The figures of one answer."""

    prompt_tokens: int
    cached: int
    output_tokens: int
    first_token_seconds: float | None
    tokens_per_second: float | None  # after the first


class _Chat:
    """Reads lines, answers messages, and does what slash commands say, until the user leaves."""

    def __init__(
        self,
        llm: LLM,
        sampling: SamplingParams,
        conversation: Conversation,
        output: Output,
        interrupts: Interrupts,
    ) -> None:
        self._llm = llm
        self._sampling = sampling
        self._conversation = conversation
        self._output = output
        self._interrupts = interrupts
        self._file: Path | None = None  # which the conversation was last saved to or loaded from
        self._turn: _Turn | None = None
        self._totals = _Totals()
        self._context_tokens = 0
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/reset": ("", "begin anew; the system prompt stays", self._reset),
            "/system": ("[TEXT]", "show the system prompt or set it; '-' removes it", self._system),
            "/save": ("[FILE]", "write the conversation, as JSON in OpenAI's form", self._save),
            "/load": ("FILE", "go on with a conversation from such a file", self._load),
            "/stats": ("", "tokens and speed, of the last answer and of all", self._stats),
            "/help": ("", "this list", self._help),
            "/exit": ("", "leave, as Ctrl-D does", self._exit),
        }
        self._leaving = False

    def run(self) -> None:
        session = _line_editor(list(self._commands))
        interrupted = False  # the last thing that the user did was Ctrl-C
        while not self._leaving:
            try:
                line = _read_line(session)
            except EOFError:
                return
            except KeyboardInterrupt:
                if session.default_buffer.text:
                    interrupted = False  # it was for the line
                elif interrupted:
                    return
                else:
                    interrupted = True
                    _say("Ctrl-C once more, or Ctrl-D, leaves. /save FILE keeps the conversation.")
                continue
            self._interrupts.seen = False
            try:
                self._take(line)
            except TinyvllmError as error:
                _say(str(error))
            interrupted = self._interrupts.seen
            _say("")  # between what was said and the next line

    def _take(self, line: str) -> None:
        """A line that begins with / and a word is a command, any other a message."""
        name, _, rest = line.strip().partition(" ")
        if line.startswith("/") and "/" not in name[1:]:
            if name in self._commands:
                self._commands[name][2](rest.strip())
                return
            nearest = difflib.get_close_matches(name, self._commands, n=1, cutoff=0.5)
            meant = f" Did you mean {nearest[0]}?" if nearest else ""
            _say(
                f"There is no command {name}.{meant} /help lists the commands; a message that "
                "begins with / needs a space before it."
            )
        elif line.strip():
            # What is no UTF-8 comes from the terminal as surrogates, which are no text.
            self._answer(line.strip().encode("utf-8", "replace").decode())

    def _answer(self, message: str) -> None:
        ids = self._conversation.ask(message)
        limit = self._llm.stats()["max_model_len"]
        if len(ids) >= limit:
            self._conversation.take_back()
            raise InvalidRequestError(
                f"the context is full: with this message the conversation has {len(ids)} tokens, "
                f"the context holds {limit}, and the answer needs room, too. {self._way_out()}"
            )
        try:
            result = self._generate(ids)
        except BaseException:
            self._conversation.take_back()
            raise
        answer = result.outputs[0]
        if answer.text:
            self._conversation.answer(answer.text, answer.token_ids)
        else:
            self._conversation.take_back()
        self._context_tokens = len(ids) + len(answer.token_ids)
        if answer.finish_reason == "abort":
            kept = "what is there of it stays" if answer.text else "the question is taken back"
            _say(f"stopped; {kept}")
        elif answer.finish_reason == "length" and self._context_tokens >= limit:
            _say(f"the answer is cut off: the context of {limit} tokens is full. {self._way_out()}")
        elif answer.finish_reason == "length":
            _say(f"the answer is cut off after {len(answer.token_ids)} tokens (--max-tokens)")
        elif not answer.text:
            _say("the model ended its answer at once; the question is taken back")

    def _way_out(self) -> str:
        info = self._llm.stats()
        more = info["max_model_len"] < info["model_max_position_embeddings"]
        return "/reset begins anew, /save FILE keeps this conversation" + (
            f", and a start with a larger --max-model-len (at most "
            f"{info['model_max_position_embeddings']}) makes room."
            if more
            else "."
        )

    def _generate(self, ids: list[int]) -> RequestOutput:
        """Streams an answer to stdout, until it ends or SIGINT comes."""
        from tinyvllm.cli.word_wrap import WordWrap
        from tinyvllm.request import ParsedPrompt

        began = time.perf_counter()
        token_times: list[float] = []
        request = self._llm.add(ParsedPrompt(None, ids), self._sampling, incremental=True)
        result = request.new_output()
        # A file gets the text as it is, a terminal what it may have.
        wrap = WordWrap(shutil.get_terminal_size().columns) if self._output.is_terminal else None
        try:
            while not request.finished:
                self._llm.step()
                if self._interrupts.seen:
                    self._llm.abort(request)
                for delta in request.take_deltas():
                    token_times += [time.perf_counter()] * len(delta.token_ids)
                    result.add(delta)
                    self._output.write(wrap.push(printable(delta.text)) if wrap else delta.text)
                self._output.flush()
        finally:
            self._llm.abort(request)
            self._output.write(wrap.finish() if wrap else "")
            self._output.end_line()
            self._output.flush()
        if request.error is not None:
            raise request.error
        request.fill_in(result)
        self._count(result, began, token_times)
        return result

    def _count(self, result: RequestOutput, began: float, token_times: list[float]) -> None:
        num_prompt, num_output = len(result.prompt_token_ids), len(token_times)
        cached = result.num_cached_tokens or 0
        seconds = token_times[-1] - token_times[0] if token_times else 0.0
        self._turn = _Turn(
            prompt_tokens=num_prompt,
            cached=cached,
            output_tokens=num_output,
            first_token_seconds=token_times[0] - began if token_times else None,
            tokens_per_second=(num_output - 1) / seconds if seconds > 0 else None,
        )
        self._totals.answers += 1
        self._totals.cached += cached
        self._totals.computed += num_prompt - cached
        self._totals.output += num_output

    # --- Slash commands ---------------------------------------------------------------------------

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._context_tokens = 0
        stays = " The system prompt stays." if self._conversation.system is not None else ""
        _say(f"The conversation is empty.{stays}")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.set_system(None if text == "-" else text)
        system = self._conversation.system
        _say("There is no system prompt." if system is None else f"system prompt: {system}")

    def _save(self, name: str) -> None:
        path = _path(name) if name else self._file
        if path is None:
            raise InvalidRequestError("/save needs a file name the first time: /save FILE")
        if path != self._file and path.exists():
            raise InvalidRequestError(f"{path} exists. Choose another name, or remove it first.")
        self._conversation.save(path)
        self._file = path
        _say(f"{_count_of(len(self._conversation.messages), 'message')} written to {path}")

    def _load(self, name: str) -> None:
        if not name:
            raise InvalidRequestError("/load needs the name of a file: /load FILE")
        path = _path(name)
        self._conversation.load(path)
        self._file = path
        self._context_tokens = 0
        messages = self._conversation.messages
        _say(f"{_count_of(len(messages), 'message')} read from {path}")
        if messages:
            text = " ".join(messages[-1]["content"].split())
            _say(f"the last one, {messages[-1]['role']}: {text[:200]}{'...' * (len(text) > 200)}")

    def _stats(self, _: str) -> None:
        info, turn, totals = self._llm.stats(), self._turn, self._totals
        if turn is None:
            _say("no answer yet")
        else:
            first, speed = turn.first_token_seconds, turn.tokens_per_second
            _say(
                f"last answer: {turn.prompt_tokens} prompt tokens ({turn.cached} cached, "
                f"{turn.prompt_tokens - turn.cached} computed), {turn.output_tokens} output tokens"
                + (f"; first token after {first:.3f} s" if first is not None else "")
                + (f", then {speed:.1f} tokens/s" if speed is not None else "")
            )
            _say(
                f"{_count_of(totals.answers, 'answer')}: {totals.cached} prompt tokens cached, "
                f"{totals.computed} computed, {totals.output} output tokens"
            )
        _say(f"context: {self._context_tokens} of {info['max_model_len']} tokens")
        _say(f"seed {self._llm.seed}")

    def _help(self, _: str) -> None:
        for name, (arguments, text, _function) in self._commands.items():
            _say(f"{f'{name} {arguments}':16s} {text}")
        _say(f"{'Alt-Enter':16s} begin a new line in a message")
        _say(f"{'Ctrl-C':16s} stop an answer, or clear the line; twice: leave")

    def _exit(self, _: str) -> None:
        self._leaving = True


def _path(name: str) -> Path:
    """A file as the user names it."""
    if "\0" in name:
        raise InvalidRequestError("the name of a file cannot have a NUL character.")
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~ of a user whom nobody knows
        return Path(name)


def _say(line: str) -> None:
    """A line that is no answer, on stderr."""
    width = shutil.get_terminal_size().columns
    wrapped = textwrap.wrap(printable(line), width, initial_indent="  ", subsequent_indent="  ")
    tell("\n".join(wrapped))


def _count_of(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _read_line(session: PromptSession[str]) -> str:
    """The next line. What a signal raises in the middle of the editor's event loop, its callbacks
    report as an error of their own; so the loop handles SIGTERM, and Stopped comes from here."""
    import asyncio

    application = session.app

    def stop() -> None:
        if application.future is not None and not application.future.done():
            application.exit(exception=Stopped(128 + signal.SIGTERM))

    def handle_sigterm() -> None:
        if before is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)

    before = signal.getsignal(signal.SIGTERM)
    try:
        return session.prompt(pre_run=handle_sigterm)
    finally:
        signal.signal(signal.SIGTERM, before)  # the loop leaves the default


def _line_editor(commands: list[str]) -> PromptSession[str]:
    """Lines with editing, a history of this session, and Tab for commands and file names."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    files = PathCompleter(expanduser=True)

    class CommandCompleter(Completer):
        """A command, or the file that /save or /load is to have."""

        def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
            text = document.text_before_cursor
            name, space, file = text.partition(" ")
            if space and name in ("/save", "/load"):
                yield from files.get_completions(Document(file), event)
            elif not space and text.startswith("/"):
                for command in commands:
                    if command.startswith(text):
                        yield Completion(command, start_position=-len(text))

    return PromptSession(
        FormattedText([("bold", "> ")]),
        multiline=True,  # a long message wraps, and a pasted one keeps its lines
        prompt_continuation="  ",
        key_bindings=keys,
        completer=CommandCompleter(),
        complete_while_typing=False,
        # stdout is for answers, which may go to a file.
        output=create_output(sys.stderr if sys.stderr and sys.stderr.isatty() else sys.stdout),
    )
