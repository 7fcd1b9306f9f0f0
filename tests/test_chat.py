"""`tinyvllm chat` as a person at a terminal has it, and the conversation behind it."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cli_process
from families import FAMILIES
from tinyvllm import LLM, SamplingParams
from tinyvllm.cli import chat as chat_command
from tinyvllm.cli.conversation import Conversation
from tinyvllm.cli.terminal import Interrupts, Output, Stopped
from tinyvllm.cli.word_wrap import WordWrap
from tinyvllm.errors import CapacityError, InvalidRequestError
from tinyvllm.llm import BUNDLED_MODEL
from tinyvllm.request import ActiveRequest
from tinyvllm.stderr import printable

COMMAND = [*cli_process.COMMAND, "chat"]
FOX = "Tell me a story about a brave fox"
OWL = "Tell me a story about a shy owl"


class Terminal:
    """A process on a terminal of its own, where Ctrl-C is a signal as it is for a person."""

    def __init__(self, *arguments: str, answers: int | None = None, columns: int = 200) -> None:
        """answers: a file descriptor for stdout in place of the terminal."""
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        self.before = termios.tcgetattr(slave)
        self._slave = slave
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=slave,
            stdout=slave if answers is None else answers,
            stderr=slave,
            preexec_fn=take_terminal,
            # Nobody here answers where the cursor is.
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )
        self._unread = ""

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def prompt(self) -> None:
        """Waits until the program waits for a line."""
        self.expect(r"(?m)^>")

    def line(self, text: str) -> None:
        """Types a line once the program waits for one."""
        self.prompt()
        self.send(f"{text}\r")
        self.expect(re.escape(text) + r"[^\n]*\n")  # the editor shows it and goes on below

    def expect(self, pattern: str, seconds: float = 30) -> str:
        """Waits until the screen shows what matches. Returns all up to its end, once."""
        until = time.monotonic() + seconds
        while (match := re.search(pattern, self._unread)) is None:
            ready, _, _ = select.select([self._master], [], [], until - time.monotonic())
            assert ready, f"{pattern!r} has not come, but {self._unread[-2000:]!r}"
            self._unread += self._read()
        shown, self._unread = self._unread[: match.end()], self._unread[match.end() :]
        return shown

    def end(self) -> tuple[int, str]:
        """Waits for the end of the process. Its exit code, and what it still showed."""
        code = self.process.wait(timeout=30)
        while select.select([self._master], [], [], 0)[0]:
            self._unread += self._read()
        return code, self._unread

    @property
    def is_as_before(self) -> bool:
        """Whether the terminal is in the mode in which the process found it."""
        return termios.tcgetattr(self._slave) == self.before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
        os.close(self._slave)

    def _read(self) -> str:
        """What the process writes, without the escape sequences of its line editor."""
        text = os.read(self._master, 1 << 16).decode(errors="replace").replace("\r", "")
        return re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>]|\][^\x07]*\x07)", "", text)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Starts chats, and ends those that still run."""
    terminals: list[Terminal] = []

    def start(*arguments: str, **options: Any) -> Terminal:
        terminals.append(Terminal(*arguments, **options))
        return terminals[-1]

    yield start
    for one in terminals:
        one.close()


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(BUNDLED_MODEL, max_num_seqs=1) as llm:
        yield llm


def ask(llm: LLM, conversation: Conversation, text: str, **options: Any) -> tuple[str, int, int]:
    """A turn: the answer, the tokens of its prompt, and how many of them were cached."""
    ids = conversation.ask(text)
    (result,) = llm.generate([ids], SamplingParams(**{"max_tokens": 400, **options}), False)
    answer = result.outputs[0]
    conversation.answer(answer.text, answer.token_ids)
    return answer.text, len(ids), result.num_cached_tokens or 0


# --- The conversation ---------------------------------------------------------------------------


def test_a_turn_computes_only_what_is_new(llm: LLM) -> None:
    llm.reset_prefix_cache()
    conversation = Conversation(llm.get_tokenizer())
    known = 0  # tokens of the turns before
    for question in (FOX, OWL, "Tell me a story about a clever crow"):
        before = llm.stats()["generation_tokens"]
        _, num_prompt, num_cached = ask(llm, conversation, question, temperature=0.8, seed=5)
        # Whole blocks of 16 are found; of the answer its last token was never computed.
        assert num_cached >= (known - 1) // 16 * 16
        assert num_prompt - num_cached < 16 + 16
        known = num_prompt + llm.stats()["generation_tokens"] - before


def test_what_the_model_wrote_stays_the_tokens_that_it_wrote(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    conversation = Conversation(tokenizer)
    prompt = conversation.ask("Hello")
    # An answer letter by letter, as no tokenizer would split it, and the token that ends it.
    letters = [token for letter in "castle" for token in tokenizer.encode(letter, False)]
    end = tokenizer.encode("<|end|>", add_special_tokens=False)
    assert len(letters) == 6
    conversation.answer("castle", letters + end)
    continued = conversation.ask("More")
    assert continued[: len(prompt) + 6] == prompt + letters
    assert tokenizer.decode(continued, False) == tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "castle"},
            {"role": "user", "content": "More"},
        ]
    )


def test_an_answer_that_the_template_changes_is_tokenized_anew(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    conversation = Conversation(tokenizer)
    conversation.ask("Hello")
    conversation.answer("  spaces  ", tokenizer.encode("  spaces  ", add_special_tokens=False))
    ids = conversation.ask("More")  # the story model's template trims contents
    assert ids == tokenizer.encode_chat(conversation.messages)[1]


def test_a_question_taken_back_leaves_no_trace(llm: LLM) -> None:
    conversation = Conversation(llm.get_tokenizer(), system="Be kind.")
    first = conversation.ask(FOX)
    conversation.take_back()
    assert conversation.messages == [{"role": "system", "content": "Be kind."}]
    assert conversation.ask(FOX) == first


def test_the_system_prompt_can_be_set_removed_and_survives_a_reset(llm: LLM) -> None:
    conversation = Conversation(llm.get_tokenizer())
    ask(llm, conversation, FOX, max_tokens=4)
    conversation.set_system("Be kind.")
    conversation.set_system("Be brief.")
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant"]
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    conversation.set_system(None)
    assert conversation.messages == []


def test_a_file_gives_the_conversation_back(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    conversation = Conversation(llm.get_tokenizer(), system="Be kind.")
    text, _, _ = ask(llm, conversation, "Tell me a story about a brave fox. 狐", max_tokens=20)
    conversation.save(path)
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Tell me a story about a brave fox. 狐"},
        {"role": "assistant", "content": text},
    ]
    other = Conversation(llm.get_tokenizer())
    other.load(path)
    assert other.messages == conversation.messages
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_may_have_the_form_of_a_request(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    path.write_text(json.dumps({"model": "x", "messages": [{"role": "user", "content": parts}]}))
    conversation = Conversation(llm.get_tokenizer())
    conversation.load(path)
    assert conversation.messages == [{"role": "user", "content": "Hel\nlo"}]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("\xff", "not a JSON file"),
        ("3", "no list of messages"),
        ("[3]", "message 1: not an object with a role and a content"),
        ('[{"role": "user"}]', "message 1: there is no content"),
        ('[{"role": "user", "content": [{"type": "image_url"}]}]', "message 1 has .* text only"),
        ('[{"role": "pirate", "content": "Ahoy"}]', "unknown role: pirate"),
        ('[{"role": "user", "content": "\\ud83d"}]', "half a character"),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(
    llm: LLM, tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(text.encode("latin-1"))
    conversation = Conversation(llm.get_tokenizer(), system="Be kind.")
    with pytest.raises(InvalidRequestError, match=complaint):
        conversation.load(path)
    assert conversation.messages == [{"role": "system", "content": "Be kind."}]


def test_lists_that_lie_deep_in_each_other_are_refused_or_can_be_saved(
    llm: LLM, tmp_path: Path
) -> None:
    # How deep is too deep depends on Python: 700 is in 3.11 and is not in 3.12.
    path = tmp_path / "talk.json"
    path.write_text('[{"role": "user", "content": "x", "y": ' + "[" * 700 + "]" * 700 + "}]")
    conversation = Conversation(llm.get_tokenizer())
    refusal = ""
    try:
        conversation.load(path)
    except InvalidRequestError as error:
        refusal = str(error)
    if refusal:
        assert "too deep" in refusal
        assert conversation.messages == []
    else:
        conversation.save(path)
        conversation.load(path)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/talk.json", "a\0b"])
def test_a_file_name_that_cannot_be_is_no_end_of_the_conversation(llm: LLM, name: str) -> None:
    conversation = Conversation(llm.get_tokenizer())
    with pytest.raises(InvalidRequestError, match="cannot"):
        conversation.save(chat_command._path(name))


def test_a_system_prompt_that_is_no_text_is_refused(llm: LLM) -> None:
    conversation = Conversation(llm.get_tokenizer(), system="Be kind.")
    with pytest.raises(InvalidRequestError, match="half a character"):
        conversation.set_system("\udcff")
    assert conversation.system == "Be kind."


def test_a_failed_save_leaves_the_old_file(llm: LLM, tmp_path: Path) -> None:
    conversation = Conversation(llm.get_tokenizer())
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        conversation.save(tmp_path)  # a directory
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        conversation.save(tmp_path / "no such directory" / "talk.json")
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_a_model_writes_drives_the_terminal() -> None:
    text = "\x1b]0;title\x07\x1b[2J\x9b2J\r\x08\x7f\u202e tab\t line\n caf\u00e9 \U0001f98a"
    shown = printable(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert len(shown) == len(text)
    assert shown.endswith(" tab\t line\n caf\u00e9 \U0001f98a")


@pytest.mark.parametrize("piece", [1, 2, 7, 1000])
def test_lines_break_between_words_however_the_text_comes(piece: int) -> None:
    text = "The quick brown fox jumps\n  over it. A supercalifragilistic word or two.\n\n\u72d0"
    wrap = WordWrap(columns=10)
    parts = [wrap.push(text[i : i + piece]) for i in range(0, len(text), piece)]
    assert "".join(parts) + wrap.finish() == (
        "The quick\nbrown fox\njumps\n  over it.\nA\nsupercalifragilistic\nword or\ntwo.\n\n\u72d0"
    )


def test_a_word_without_end_does_not_hold_the_text_back() -> None:
    wrap = WordWrap(columns=80)
    shown = wrap.push("x" * 1000)
    assert len(shown) > 900
    assert shown + wrap.finish() == "x" * 1000


# --- In a terminal ------------------------------------------------------------------------------


def test_an_answer_comes_while_it_is_made(terminal: Callable[..., Terminal]) -> None:
    chat = terminal("--seed", "1", "--ignore-eos", "-n", "600", "--temperature", "1.5")
    chat.expect(r"bundled: bfloat16.*\n.*/help lists the commands, Ctrl-D leaves")
    chat.line(FOX)
    began = time.monotonic()
    chat.expect(r"\w+ \w+")
    first = time.monotonic() - began
    chat.expect(r"cut off after 600 tokens \(--max-tokens\)")
    assert first < 0.5 * (time.monotonic() - began)
    chat.prompt()
    chat.send("\x04")
    assert chat.end()[0] == 0
    assert chat.is_as_before


def test_only_answers_go_to_stdout(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    path = tmp_path / "answers"
    with path.open("wb") as file:
        chat = terminal("-t", "0", answers=file.fileno())
        chat.line(FOX)
        chat.line("/stats")
        chat.expect("seed")
        chat.line("/exit")
        assert chat.end()[0] == 0
    with LLM(BUNDLED_MODEL) as llm:
        params = SamplingParams(temperature=0, max_tokens=400)
        (result,) = llm.chat([{"role": "user", "content": FOX}], params, False)
    assert path.read_text() == result.outputs[0].text + "\n"


def test_ctrl_c_stops_the_answer_and_not_the_program(
    terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    path = tmp_path / "talk.json"
    chat = terminal("--seed", "1", "--ignore-eos", "--temperature", "1.5")
    chat.line(FOX)
    chat.expect(r"\w+ \w+ \w+")
    chat.send("\x03")
    chat.expect("stopped; what is there of it stays")
    chat.line(f"/save {path}")
    chat.expect("2 messages written")
    question, answer = json.loads(path.read_text())
    assert question["content"] == FOX
    assert answer["role"] == "assistant"
    assert len(answer["content"].split()) > 2
    chat.line(OWL)  # and it answers again
    chat.expect(r"\w+ \w+ \w+")
    chat.send("\x03")
    chat.expect("stopped")
    chat.prompt()
    chat.send("\x03")  # the second one, at an empty prompt
    assert chat.end()[0] == 0
    assert chat.is_as_before


def test_ctrl_c_at_the_prompt_clears_the_line_asks_and_then_leaves(
    terminal: Callable[..., Terminal],
) -> None:
    chat = terminal()
    chat.prompt()
    chat.send("half a message\x03")
    chat.expect("half a message")
    chat.prompt()
    chat.send("\x03")
    chat.expect("Ctrl-C once more, or Ctrl-D, leaves")
    chat.prompt()
    chat.send("\x03")
    assert chat.end()[0] == 0
    assert chat.is_as_before


@pytest.mark.parametrize("busy", [False, True], ids=["at the prompt", "in an answer"])
def test_sigterm_ends_it_with_the_terminal_as_it_was(
    terminal: Callable[..., Terminal], busy: bool
) -> None:
    chat = terminal("--ignore-eos")
    chat.prompt()
    if busy:
        chat.send(f"{FOX}\r")
        chat.expect(r"\n.*\w+ \w+ \w+")
    chat.process.send_signal(signal.SIGTERM)
    code, shown = chat.end()
    assert code == 143
    assert "Traceback" not in shown
    assert chat.is_as_before


def test_a_signal_is_not_lost_in_a_callback_of_the_line_editors_event_loop() -> None:
    def callback() -> None:
        raise Stopped(143)

    async def prompt() -> None:
        asyncio.get_running_loop().call_soon(callback)
        await asyncio.sleep(1)

    with pytest.raises(Stopped) as stopped:
        asyncio.run(prompt())
    assert stopped.value.exit_code == 143


def test_stats_show_that_a_turn_pays_only_for_its_new_tokens(
    terminal: Callable[..., Terminal],
) -> None:
    chat = terminal("--seed", "5")
    chat.line("/stats")
    chat.expect("no answer yet")
    known = 0
    for question in (FOX, OWL):
        chat.line(question)
        chat.line("/stats")
        chat.expect("last answer: ")
        shown = chat.expect("context: .*\n")
        prompt, cached, computed, output = map(int, re.findall(r"\d+", shown)[:4])
        assert prompt == cached + computed
        assert cached >= (known - 1) // 16 * 16
        assert computed < 32
        known = prompt + output
        assert f"context: {known} of 2048 tokens" in shown
    assert known > 300


def test_save_and_load_go_on_where_it_was(
    terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    path, other = tmp_path / "talk.json", tmp_path / "other.json"
    chat = terminal("-t", "0", "-n", "10", "--system", "Be kind.")
    chat.line("/save")
    chat.expect("/save needs a file name the first time")
    chat.line(FOX)
    chat.expect("cut off after 10 tokens")
    chat.line(f"/save {path}")
    chat.expect(f"3 messages written to {path}")
    chat.line("/reset")
    chat.expect("The conversation is empty. The system prompt stays.")
    chat.line(f"/load {path}")
    chat.expect(f"3 messages read from {path}")
    chat.expect("the last one, assistant: ")
    chat.line(OWL)
    chat.expect("cut off after 10 tokens")
    chat.line("/save")  # to the same file
    chat.expect(f"5 messages written to {path}")
    other.write_text("precious")
    chat.line(f"/save {other}")
    chat.expect("other.json exists. Choose another name, or remove it first.")
    assert other.read_text() == "precious"
    roles = [message["role"] for message in json.loads(path.read_text())]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    chat.line("/load")
    chat.expect("/load needs the name of a file")
    chat.line(f"/load {tmp_path / 'none.json'}")
    chat.expect("none.json: no such file")


def test_an_error_of_the_engine_ends_the_turn_and_not_the_conversation(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter([FOX, OWL, FOX, "/exit"])
    errors: Iterator[Exception | None] = iter([None] * 10 + [CapacityError("no memory")])
    step = llm.step

    def failing_step() -> list[ActiveRequest]:
        if (error := next(errors, None)) is not None:
            raise error
        return step()

    monkeypatch.setattr(chat_command, "_line_editor", lambda _: None)
    monkeypatch.setattr(chat_command, "_read_line", lambda _: next(lines))
    monkeypatch.setattr(llm, "step", failing_step)
    conversation = Conversation(llm.get_tokenizer())
    params = SamplingParams(temperature=0, max_tokens=8)
    chat_command._Chat(llm, params, conversation, Output(), Interrupts()).run()
    assert "no memory" in capsys.readouterr().err
    asked = [message["content"] for message in conversation.messages[::2]]
    assert asked == [FOX, FOX]  # and the question in between is taken back
    assert llm.stats()["num_requests_running"] == 0


def test_system_help_and_what_is_no_command(terminal: Callable[..., Terminal]) -> None:
    chat = terminal("-n", "5")
    chat.line("/system")
    chat.expect("There is no system prompt")
    chat.line("/system Be kind.")
    chat.expect("system prompt: Be kind.\n")
    chat.line("/system -")
    chat.expect("There is no system prompt")
    chat.line("/help")
    for name in ("/reset", "/system", "/save", "/load", "/stats", "/help", "/exit", "Ctrl-C"):
        chat.expect(re.escape(name))
    chat.line("/lod x")
    chat.expect("There is no command /lod. Did you mean /load?")
    chat.line("/etc/passwd is a file")  # a message
    chat.expect("cut off after 5 tokens")
    chat.line(" /help")
    chat.expect("cut off after 5 tokens")


def test_tab_completes_commands_and_files(
    terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    (tmp_path / "conversation.json").write_text('[{"role": "user", "content": "Hello there"}]')
    chat = terminal("--quiet")
    chat.prompt()
    chat.send("/he\t")
    chat.expect("lp")  # the editor may draw what is new only
    chat.send("\r")
    chat.expect(r"/reset +begin anew")
    chat.prompt()
    chat.send(f"/load {tmp_path}/conv\t")
    chat.expect(r"ersation\.json")
    chat.send("\r")
    chat.expect("1 message read from")


def test_a_message_may_have_several_lines(
    terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    path = tmp_path / "talk.json"
    chat = terminal("-n", "5")
    chat.prompt()
    chat.send("one\x1b\rtwo\r")
    chat.expect("cut off after 5 tokens")
    chat.prompt()
    chat.send("\x1b[200~three\nfour\x1b[201~\r")  # as a terminal pastes
    chat.expect("cut off after 5 tokens")
    chat.line(f"/save {path}")
    chat.expect("4 messages written")
    contents = [message["content"] for message in json.loads(path.read_text())]
    assert contents[::2] == ["one\ntwo", "three\nfour"]


def test_earlier_messages_come_back_with_the_arrow_key(terminal: Callable[..., Terminal]) -> None:
    chat = terminal("-n", "5")
    chat.line("/system Be kind.")
    chat.line("/system -")
    chat.expect("There is no system prompt")
    chat.prompt()
    chat.send("\x1b[A\x1b[A\r")
    chat.expect("system prompt: Be kind.\n")


def test_a_full_context_says_what_to_do(terminal: Callable[..., Terminal]) -> None:
    chat = terminal("--max-model-len", "64", "--ignore-eos", columns=400)
    chat.line(FOX)
    chat.expect("the answer is cut off: the context of 64 tokens is full. /reset begins anew")
    chat.line(OWL)
    chat.expect(r"has \d+ tokens, the context holds 64")
    chat.expect("/reset begins anew, /save FILE keeps this conversation, and a start with a larger")
    chat.expect(r"--max-model-len \(at most 2048\)")
    chat.line("/reset")
    chat.line(FOX)
    chat.expect("the answer is cut off")


# --- Where it refuses ---------------------------------------------------------------------------


def test_it_refuses_a_standard_input_that_is_no_terminal() -> None:
    for stdin in (subprocess.DEVNULL, subprocess.PIPE):
        result = subprocess.run(COMMAND, stdin=stdin, capture_output=True, timeout=60)
        assert result.returncode == 2
        assert result.stdout == b""
        assert b"tinyvllm generate" in result.stderr


def test_it_refuses_a_model_without_a_chat_template(
    terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    chat = terminal("--model", str(FAMILIES["llama-3.2-v5"].write(tmp_path)))
    chat.expect("the model has no chat template")
    assert chat.end()[0] == 2
