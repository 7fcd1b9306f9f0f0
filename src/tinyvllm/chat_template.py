"""Chat templates: a list of messages in, the prompt that the model was trained on out.

A template is a Jinja program that comes with the checkpoint. It runs in Jinja's sandbox with the
extras that Transformers gives it, and renders what Transformers renders. Jinja is imported when
the first template is rendered, not before: a run without a chat does not pay for it.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from tinyvllm.errors import CheckpointError, InvalidRequestError, TinyvllmError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]

# A chat of a million tokens stays below it. It stops a template that writes for ever; one that
# computes for ever is not stopped: a template is code that comes with the model its user chose.
MAX_RENDERED_CHARS = 16 << 20

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # the first is the one to write


@dataclass(frozen=True)
class ChatTemplate:
    """One template: its text, where it comes from, and the error that a flaw in it becomes."""

    source: str
    origin: str
    flaw: type[TinyvllmError] = CheckpointError

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. `variables` are seen by the template as they are named."""
        import jinja2

        values = {
            "messages": [_message(message) for message in messages],
            "tools": _plain(tools),
            "documents": _plain(documents),
            "add_generation_prompt": add_generation_prompt,
            **_plain(variables or {}),
        }
        if not values["messages"]:
            raise InvalidRequestError("there are no messages to render. Give at least one.")
        template = self._compiled
        pieces, size = [], 0
        try:
            for piece in template.generate(values):
                size += len(piece)
                if size > MAX_RENDERED_CHARS:
                    raise InvalidRequestError(  # the messages decide how much it writes
                        f"{self.origin}: the chat template wrote more than {MAX_RENDERED_CHARS} "
                        "characters. Shorten the messages, or give another template."
                    )
                pieces.append(piece)
        except TinyvllmError:
            raise
        except jinja2.exceptions.SecurityError as error:
            raise self.flaw(
                f"{self.origin}: the chat template does what a template may not: {error} "
                "Do not use this checkpoint before you have read its template."
            ) from error
        except Exception as error:  # whatever Python raises where template and messages disagree
            raise InvalidRequestError(
                f"{self.origin}: the chat template cannot render these messages: "
                f"{type(error).__name__}: {error}. Compare their keys with those that it reads."
            ) from error
        return "".join(pieces)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        import jinja2

        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            where, what = f"{self.origin}, line {error.lineno}", str(error.message)
        except (RecursionError, MemoryError, OverflowError, SyntaxError) as error:
            where, what = self.origin, f"{type(error).__name__}: {error}"
        raise self.flaw(
            f"{where}: the chat template is not valid Jinja: {what}. "
            "Correct it, or prompt the model without a template."
        )


def with_one_text(message: Message, where: str) -> Message:
    """The message with OpenAI's list of parts joined by line ends: most templates know no parts.

    where: which message it is, for the error.
    """
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type") != "text":
            raise InvalidRequestError(
                f"{where} has the content {part!r:.60}; this model reads text only. Take it out."
            )
        texts.append(text)
    return {**message, "content": "\n".join(texts)}


def _message(message: object) -> dict[Any, Any]:
    """A plain copy of a message, without the keys that are None, as Transformers passes it on."""
    if not isinstance(message, Mapping):
        raise InvalidRequestError(
            f"a message is a {type(message).__name__}, not a dict. "
            'Write it as {"role": "user", "content": "..."}.'
        )
    copy = {key: _plain(value) for key, value in message.items() if value is not None}
    for key in _REASONING_KEYS:
        if key in copy:
            return {"thinking": copy[key], **copy, "reasoning_content": copy[key]}
    return copy


def _plain(value: Any) -> Any:
    """A copy made of JSON types only: other objects have methods that the sandbox cannot judge."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):  # a subclass, such as an enum: strip it to the base type
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_plain(item) for item in value])
    raise InvalidRequestError(
        f"a chat template can be given only JSON values, not a {type(value).__name__}. "
        "Convert it to str, int, float, list or dict."
    )


def _raise_exception(message: object) -> None:
    raise InvalidRequestError(
        f"the chat template refuses these messages: {message} Change their roles or their order."
    )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes <, >, & and ' for HTML, which no model has been trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(date_format: str) -> str:
    return datetime.datetime.now().strftime(date_format)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes, parser

    class Generation(jinja2.ext.Extension):
        """{% generation %}...{% endgeneration %} marks what to train on; here it only renders."""

        tags = {"generation"}  # noqa: RUF012  (Jinja declares it so)

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment
