"""A conversation: messages in OpenAI's form, their file, and the prompt that they make."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeAlias

from tinyvllm.chat_template import with_one_text
from tinyvllm.errors import InvalidRequestError
from tinyvllm.tokenizer import Tokenizer

Message: TypeAlias = dict[str, Any]  # {"role": "user", "content": "..."}


class Conversation:
    """What has been said. A change that the chat template refuses raises and changes nothing.

    A turn's prompt is the template's text of all messages. Tokens that the model wrote itself stay
    the tokens that they were, as far as they spell that text: another split of the same characters
    would not be found in the prefix cache, and is not what the model wrote.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._known_text = ""  # the last prompt and its answer, as text and as tokens
        self._known_ids: list[int] = []
        self.messages: list[Message] = []
        self.set_system(system)

    @property
    def system(self) -> str | None:
        """The system prompt."""
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    def set_system(self, text: str | None) -> None:
        """None: without one."""
        rest = self.messages[self.system is not None :]
        system = [] if text is None else [{"role": "system", "content": text}]
        self._replace([*system, *rest])

    def reset(self) -> None:
        """Forgets everything but the system prompt."""
        self.messages = self.messages[: self.system is not None]

    def ask(self, text: str) -> list[int]:
        """Adds a message of the user's. Returns the prompt for the answer to it."""
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered = self._tokenizer.apply_chat_template(messages)
        ids = self._tokenizer.encode(rendered, add_special_tokens=False)
        if self._known_ids and rendered.startswith(self._known_text):
            rest = rendered[len(self._known_text) :]
            continued = self._known_ids + self._tokenizer.encode(rest, add_special_tokens=False)
            # Not so where a tokenizer begins a text with a space of its own.
            if self._decode(continued) == self._decode(ids):
                ids = continued
        self.messages = messages
        self._known_text, self._known_ids = rendered, ids
        return ids

    def answer(self, text: str, token_ids: list[int]) -> None:
        """Adds the answer to the last question. token_ids may end in a token that is no text."""
        self.messages = [*self.messages, {"role": "assistant", "content": text}]
        for ids in (token_ids, token_ids[:-1]):
            if self._decode(ids) == text:
                self._known_text += text
                self._known_ids = self._known_ids + ids
                return

    def take_back(self) -> None:
        """Forgets the last question, which has got no answer."""
        self.messages = self.messages[:-1]

    def load(self, path: Path) -> None:
        """Goes on from a file: a JSON list of messages, or an object with such a list in it."""
        if not path.is_file():
            raise InvalidRequestError(f"{path}: no such file.")
        try:
            value = json.loads(path.read_bytes())
        except OSError as error:
            raise InvalidRequestError(f"{path}: cannot be read: {error.strerror}.") from None
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{path}: not a JSON file: {error}.") from None
        if isinstance(value, dict):
            value = value.get("messages")
        if not isinstance(value, list):
            raise InvalidRequestError(
                f"{path}: no list of messages. It must look like "
                '[{"role": "user", "content": "Hello"}, ...].'
            )
        messages = [_message(item, f"{path}: message {i}") for i, item in enumerate(value, 1)]
        try:
            self._replace(messages)
        except RecursionError:
            raise InvalidRequestError(f"{path}: its lists lie too deep in each other.") from None

    def save(self, path: Path) -> None:
        """Writes the messages, wholly or not at all."""
        text = json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise InvalidRequestError(f"{path}: cannot be written: {error.strerror}.") from None

    def _replace(self, messages: list[Message]) -> None:
        try:
            json.dumps(messages, ensure_ascii=False).encode()  # as `save` will
        except UnicodeEncodeError:
            raise InvalidRequestError(
                "a message has half a character, or a byte that is not UTF-8. Take it out."
            ) from None
        last = messages[-1]["role"] if messages else None
        question = [] if last == "user" else [{"role": "user", "content": "?"}]
        self._tokenizer.apply_chat_template([*messages, *question])  # what it refuses, it says
        self.messages = messages

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _message(value: Any, where: str) -> Message:
    """A message of text. Other keys than role and content are kept, for the chat template."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise InvalidRequestError(f"{where}: not an object with a role and a content.")
    message = dict(with_one_text(value, where))
    if not isinstance(message.get("content"), str):
        raise InvalidRequestError(f"{where}: there is no content; give a text.")
    return message
