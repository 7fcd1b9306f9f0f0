"""The lines of a batch file: what each asks of the engine, and the line that answers it.

Two forms, told apart line by line:

    OpenAI's   {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {...}}
               {"id": ..., "custom_id": "a", "response": {"status_code": 200, "request_id": ...,
                "body": {...}}, "error": null}
    plain      {"prompt": "Once"} or {"messages": [...]}, with sampling fields and a custom_id
               {"line": 1, "custom_id": null, "text": ..., "finish_reason": ..., "stop_reason": ...,
                "prompt_tokens": ..., "completion_tokens": ..., "error": null}

A line that cannot be served is answered, too: its "error" is {"line", "code", "param", "message"},
and the response of an OpenAI line has the status code that a server would give.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tinyvllm import openai_api
from tinyvllm.cli.report import logprobs_of
from tinyvllm.errors import InvalidRequestError
from tinyvllm.generation_config import SamplingDefaults
from tinyvllm.openai_api import ApiError, ApiRequest
from tinyvllm.outputs import RequestOutput
from tinyvllm.request import ParsedPrompt
from tinyvllm.sampling_params import SamplingParams
from tinyvllm.text_engine import TextEngine

MAX_LINE_BYTES = 32 << 20
_MAX_DEPTH = 64  # of arrays and objects in each other; more would end in a RecursionError somewhere

_API_FIELDS = frozenset({"custom_id", "method", "url", "body"})
_PLAIN_FIELDS = frozenset({"custom_id", "prompt", "messages", "logprobs"})
_PLAIN_SAMPLING = openai_api.SAMPLING_FIELDS - {"n"}


@dataclass(frozen=True)
class Settings:
    """What holds for every line of a run."""

    model: str  # the name that responses give
    seed: int  # what lines without a seed get theirs from
    defaults: SamplingDefaults
    flags: Mapping[str, Any]  # SamplingParams fields of the command line
    max_tokens: int  # of plain lines that do not say


Request = tuple[ParsedPrompt, SamplingParams]


class Line:
    """One line that has been read. What is wrong with it is said by `requests`."""

    def __init__(self, number: int, value: Mapping[str, Any]) -> None:
        self.number = number  # the first one is 1
        self._value = value
        custom_id = value.get("custom_id")
        self.custom_id = custom_id if isinstance(custom_id, str) else None

    def requests(self, engine: TextEngine, settings: Settings) -> list[Request]:
        """One or more. Raises InvalidRequestError where the line cannot be served."""
        raise NotImplementedError

    def answer(
        self, outputs: Sequence[RequestOutput], engine: TextEngine, settings: Settings
    ) -> dict[str, Any]:
        """The line for the outputs of these requests."""
        raise NotImplementedError

    def refusal(self, error: Exception) -> dict[str, Any]:
        """The line for a request that has failed."""
        raise NotImplementedError

    def is_answered_by(self, answer: Mapping[str, Any]) -> bool:
        """Whether a line of an earlier run's output can be this line's answer."""
        return (
            answer.get("custom_id") == self.custom_id
            and answer.get("line", self.number) == self.number
        )

    def _error(self, error: Exception) -> dict[str, Any]:
        api_error = error if isinstance(error, ApiError) else ApiError(str(error))
        code = "invalid_request" if isinstance(error, InvalidRequestError) else "server_error"
        return {
            "line": self.number,
            "code": api_error.code or code,
            "param": api_error.param,
            "message": f"line {self.number}: {error}",
        }

    def _seeded(self, params: SamplingParams, index: int, settings: Settings) -> SamplingParams:
        """A seed by the line's number: the same in every run, also in one that resumes."""
        if params.seed is not None:
            return params
        key = f"{settings.seed}/{self.number}/{index}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        seeded = copy.copy(params)
        seeded.seed = seed
        return seeded


class ApiLine(Line):
    """A line in OpenAI's form."""

    _request: ApiRequest

    def requests(self, engine: TextEngine, settings: Settings) -> list[Request]:
        value = self._value
        if not value.keys() <= _API_FIELDS or "url" not in value:
            raise ApiError(
                f"the line has the fields {sorted(value)}; give custom_id, method, url and body, "
                "or a prompt."
            )
        if self.custom_id is None:
            raise ApiError(
                f"custom_id is {value.get('custom_id')!r:.60}; give a text.", param="custom_id"
            )
        if value.get("method", "POST") != "POST":
            raise ApiError(f"method is {value['method']!r:.60}; give POST.", param="method")
        self._request = openai_api.parse_request(
            value["url"],
            value.get("body"),
            engine,
            # As OpenAI counts: 16 tokens of completion, whatever the model's files say.
            _without_max_tokens(settings.defaults),
            settings.flags,
        )
        return [
            (prompt, self._seeded(self._request.params, index, settings))
            for index, prompt in enumerate(self._request.prompts)
        ]

    def answer(
        self, outputs: Sequence[RequestOutput], engine: TextEngine, settings: Settings
    ) -> dict[str, Any]:
        body = self._request.response(
            outputs,
            engine.get_tokenizer(),
            number=self.number,
            model=settings.model,
            created=int(time.time()),
        )
        return self._line(200, body, None)

    def refusal(self, error: Exception) -> dict[str, Any]:
        mine = isinstance(error, InvalidRequestError)
        status = error.status if isinstance(error, ApiError) else 400 if mine else 500
        found = self._error(error)
        body = {
            "error": {
                "message": str(error),
                "type": "invalid_request_error" if mine else "server_error",
                "param": found["param"],
                "code": found["code"],
            }
        }
        return self._line(status, body, found)

    def _line(
        self, status: int, body: dict[str, Any], error: dict[str, Any] | None
    ) -> dict[str, Any]:
        return {
            "id": f"batch_req_{self.number}",
            "custom_id": self.custom_id,
            "response": {
                "status_code": status,
                "request_id": f"req_{self.number}",
                "body": body,
            },
            "error": error,
        }


class PlainLine(Line):
    """{"prompt": ...} or {"messages": ...}, and SamplingParams fields beside it."""

    _params: SamplingParams

    def requests(self, engine: TextEngine, settings: Settings) -> list[Request]:
        value = {name: item for name, item in self._value.items() if item is not None}
        for name in value.keys() - _PLAIN_FIELDS - _PLAIN_SAMPLING:
            hint = ' (several outputs: "url": "/v1/completions")' if name == "n" else ""
            raise ApiError(
                f'unknown field "{name:.60}"{hint}; beside a prompt there may be custom_id and '
                f"{', '.join(sorted(_PLAIN_SAMPLING | {'logprobs'}))}.",
                param=name,
            )
        if not isinstance(value.get("custom_id", ""), str):
            raise ApiError(f"custom_id is {value['custom_id']!r:.60}; give a text.")
        if ("prompt" in value) == ("messages" in value):
            raise ApiError("give a prompt or messages, one of the two.", param="prompt")
        if "messages" in value:
            prompt = openai_api.parse_messages(engine, value["messages"])
        else:
            prompt = engine.parse(value["prompt"])
        sampling = {name: value[name] for name in value.keys() - _PLAIN_FIELDS}
        sampling["logprobs"] = value.get("logprobs")
        values = settings.defaults.merge(
            {**settings.flags, **sampling}, max_tokens=settings.max_tokens
        )
        self._params = openai_api.sampling_params(values)
        return [(prompt, self._seeded(self._params, 0, settings))]

    def answer(
        self, outputs: Sequence[RequestOutput], engine: TextEngine, settings: Settings
    ) -> dict[str, Any]:
        (output,) = outputs
        (one,) = output.outputs
        answer: dict[str, Any] = {
            "line": self.number,
            "custom_id": self.custom_id,
            "text": one.text,
            "finish_reason": one.finish_reason,
            "stop_reason": one.stop_reason,
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(one.token_ids),
            "error": None,
        }
        if one.logprobs is not None:
            answer["logprobs"] = logprobs_of(one, self._params.logprobs)
        return answer

    def refusal(self, error: Exception) -> dict[str, Any]:
        return {"line": self.number, "custom_id": self.custom_id, "error": self._error(error)}


class _Unreadable(ApiLine):
    """A line that is no JSON object. Its answer has OpenAI's form."""

    def __init__(self, number: int, error: ApiError) -> None:
        super().__init__(number, {})
        self._flaw = error

    def requests(self, engine: TextEngine, settings: Settings) -> list[Request]:
        raise self._flaw


def read_line(data: bytes, number: int) -> Line:
    """A line of either form; it may have lost what is beyond MAX_LINE_BYTES."""
    try:
        value = _parse(data)
    except ApiError as error:
        return _Unreadable(number, error)
    if value.keys() & {"url", "body"} or not value.keys() & {"prompt", "messages"}:
        return ApiLine(number, value)
    return PlainLine(number, value)


def _parse(data: bytes) -> Mapping[str, Any]:
    if len(data) > MAX_LINE_BYTES:
        raise ApiError(
            f"it has more than {MAX_LINE_BYTES} bytes. Is this a file with one request a line?",
            code="line_too_long",
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ApiError(
            f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8. Convert the file first.",
            code="invalid_utf8",
        ) from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(
            f"not JSON: {error}. A line holds one object.", code="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise ApiError(
            f"it holds a JSON {type(value).__name__}; give an object.", code="invalid_json"
        )
    if _is_deeper(value, _MAX_DEPTH):
        raise ApiError(
            f"its arrays and objects lie more than {_MAX_DEPTH} deep in each other.",
            code="invalid_json",
        )
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    items = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(item, depth - 1) for item in items)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def encode(answer: Mapping[str, Any]) -> bytes:
    """The line as it is written, with its end."""
    try:
        return json.dumps(answer, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, in a custom_id
        return json.dumps(answer).encode() + b"\n"


def _without_max_tokens(defaults: SamplingDefaults) -> SamplingDefaults:
    fields = {name: value for name, value in defaults.fields.items() if name != "max_tokens"}
    return SamplingDefaults(fields, defaults.warnings)
