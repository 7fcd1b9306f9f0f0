"""OpenAI's completions and chat completions: the body of a request in, the body of a response out.

Fields have OpenAI's names and meanings; sampling fields that OpenAI lacks have vLLM's. A null is a
field left out. What would change the answer and is not implemented is refused by its name, and so
is a field that nobody knows; what can only be noted (`user`, `metadata`) is passed over, and so is
`model`: there is one, and the response names it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyvllm.chat_template import Message, with_one_text
from tinyvllm.errors import InvalidRequestError
from tinyvllm.generation_config import SamplingDefaults
from tinyvllm.outputs import CompletionOutput, Logprob, RequestOutput, best_logprobs
from tinyvllm.request import ParsedPrompt
from tinyvllm.sampling_params import SamplingParams
from tinyvllm.text_engine import TextEngine
from tinyvllm.tokenizer import Tokenizer

COMPLETIONS = "/v1/completions"
CHAT_COMPLETIONS = "/v1/chat/completions"

_DEFAULT_MAX_TOKENS = 16  # of completions; a chat's answer may fill the context
_MIN_LOGPROB = -9999.0  # JSON has no infinity

# SamplingParams fields that go by the same name here.
SAMPLING_FIELDS = frozenset(
    {
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "ignore_eos",
        "max_tokens",
        "min_tokens",
        "logit_bias",
        "skip_special_tokens",
    }
)
_OWN_FIELDS = {
    COMPLETIONS: frozenset({"prompt", "logprobs"}),
    CHAT_COMPLETIONS: frozenset(
        {"messages", "logprobs", "top_logprobs", "max_completion_tokens", "chat_template_kwargs"}
    ),
}
_NOTED = frozenset(
    {
        "model",
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "parallel_tool_calls",
    }
)
# Fields that can be only at the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}

# What a template gets from its caller in another way.
_NO_VARIABLES = {"self", "messages", "template", "tools", "documents", "add_generation_prompt"}


class ApiError(InvalidRequestError):
    """A request that is refused, as OpenAI's error object says it."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


@dataclass(frozen=True)
class ApiRequest:
    """A request of one of the two endpoints, ready for the engine."""

    endpoint: str
    prompts: list[ParsedPrompt]  # several for completions only
    params: SamplingParams  # for each of them

    def response(
        self,
        outputs: Sequence[RequestOutput],
        tokenizer: Tokenizer,
        *,
        number: int | str,
        model: str,
        created: int,
    ) -> dict[str, Any]:
        """The body of the response. `outputs`: one a prompt. `number`: what its id ends in."""
        chat = self.endpoint == CHAT_COMPLETIONS
        make_choice = _chat_choice if chat else _completion_choice
        completions = [one for output in outputs for one in output.outputs]
        num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        num_output_tokens = sum(len(one.token_ids) for one in completions)
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{number}",
            "object": "chat.completion" if chat else "text_completion",
            "created": created,
            "model": model,
            "choices": [
                {
                    "index": index,
                    **make_choice(one, self.params.logprobs, tokenizer),
                    "finish_reason": one.finish_reason,
                    "stop_reason": one.stop_reason,
                }
                for index, one in enumerate(completions)
            ],
            "usage": {
                "prompt_tokens": num_prompt_tokens,
                "completion_tokens": num_output_tokens,
                "total_tokens": num_prompt_tokens + num_output_tokens,
            },
        }


def parse_request(
    endpoint: Any,
    body: Any,
    engine: TextEngine,
    defaults: SamplingDefaults,
    flags: Mapping[str, Any],
) -> ApiRequest:
    """Raises InvalidRequestError (an ApiError where one field is to blame).

    flags: SamplingParams fields for those that the body leaves out; defaults: for those that flags
    leave out, too. Without max_tokens among them it is OpenAI's: 16 tokens, or what is left of the
    context for a chat.
    """
    if not isinstance(endpoint, str) or endpoint not in _OWN_FIELDS:  # a list has no hash
        raise ApiError(
            f"url is {endpoint!r:.80}; give {CHAT_COMPLETIONS} or {COMPLETIONS}.",
            param="url",
            code="unknown_url",
            status=404,
        )
    if not isinstance(body, Mapping):
        raise ApiError(f"body is {body!r:.60}; give an object.", param="body")
    fields = {name: value for name, value in body.items() if value is not None}
    _check_fields(fields, SAMPLING_FIELDS | _OWN_FIELDS[endpoint])
    sampling = {name: fields[name] for name in SAMPLING_FIELDS & fields.keys()}
    if endpoint == CHAT_COMPLETIONS:
        prompts = [parse_messages(engine, fields.get("messages"), fields)]
        if "max_completion_tokens" in fields:
            sampling["max_tokens"] = fields["max_completion_tokens"]
        default_max_tokens = None
    else:
        prompts = [engine.parse(prompt) for prompt in _prompts(fields.get("prompt"))]
        default_max_tokens = _DEFAULT_MAX_TOKENS
    sampling["logprobs"] = _num_logprobs(endpoint, fields)
    values = defaults.merge({**flags, **sampling}, max_tokens=default_max_tokens)
    return ApiRequest(endpoint, prompts, sampling_params(values))


def sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams of values from JSON. As in OpenAI's API, a seed may be negative."""
    seed, bias = values.get("seed"), values.get("logit_bias")
    if isinstance(seed, int) and -(1 << 63) <= seed < 0:
        values = {**values, "seed": seed + (1 << 64)}
    if bias is not None:
        try:
            values = {**values, "logit_bias": {int(id): number for id, number in bias.items()}}
        except (AttributeError, ValueError):
            raise ApiError(
                f"logit_bias is {bias!r:.60}; give an object of token ids and numbers.",
                param="logit_bias",
            ) from None
    stop, stop_token_ids = values.get("stop", ()), values.get("stop_token_ids", ())
    if not isinstance(stop, (str, list, tuple)):
        raise ApiError(f"stop is {stop!r:.60}; give a text or a list of texts.", param="stop")
    if not isinstance(stop_token_ids, (list, tuple)):
        raise ApiError(
            f"stop_token_ids is {stop_token_ids!r:.60}; give a list.", param="stop_token_ids"
        )
    return SamplingParams(**values)


def parse_messages(
    engine: TextEngine, messages: Any, options: Mapping[str, Any] | None = None
) -> ParsedPrompt:
    """A conversation as the prompt that the model's chat template makes of it.

    options: may have chat_template_kwargs, which become variables of the template.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError(
            f"messages is {messages!r:.60}; give a list of objects with role and content.",
            param="messages",
        )
    variables = (options or {}).get("chat_template_kwargs", {})
    if not isinstance(variables, dict) or variables.keys() & _NO_VARIABLES:
        raise ApiError(
            f"chat_template_kwargs is {variables!r:.60}; give an object of the template's own "
            "variables, such as enable_thinking.",
            param="chat_template_kwargs",
        )
    if not engine.get_tokenizer().has_chat_template:
        raise ApiError(
            f"the model has no chat template. Give a prompt to {COMPLETIONS}.", param="messages"
        )
    return engine.parse_chat(
        [_message(message, index) for index, message in enumerate(messages)],
        chat_template_kwargs=variables,
    )


def _message(message: Any, index: int) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(
            f"messages[{index}] is {message!r:.60}; give an object with role and content.",
            param=f"messages[{index}]",
        )
    try:
        return with_one_text(message, f"messages[{index}]")
    except InvalidRequestError as error:
        raise ApiError(str(error), param=f"messages[{index}].content") from None


def _prompts(prompt: Any) -> list[Any]:
    """A text, token ids, or a list of either -> a list of prompts."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, (str, list)) for item in prompt):
            return prompt
        if all(isinstance(item, int) for item in prompt):
            return [prompt]
    raise ApiError(
        f"prompt is {prompt!r:.60}; give a text, a list of token ids, or a list of either.",
        param="prompt",
    )


def _num_logprobs(endpoint: str, fields: Mapping[str, Any]) -> int | None:
    """A number for completions; true, and another field for the number, for a chat."""
    wanted = fields.get("logprobs")
    if endpoint == COMPLETIONS:
        if wanted is None or (isinstance(wanted, int) and not isinstance(wanted, bool)):
            return wanted
        raise ApiError(f"logprobs is {wanted!r:.60}; give a whole number.", param="logprobs")
    if wanted not in (None, True, False):
        raise ApiError(f"logprobs is {wanted!r:.60}; give true or false.", param="logprobs")
    best = fields.get("top_logprobs", 0)
    if not isinstance(best, int) or isinstance(best, bool):
        raise ApiError(f"top_logprobs is {best!r:.60}; give a number.", param="top_logprobs")
    if best and not wanted:
        raise ApiError("top_logprobs needs logprobs: true.", param="top_logprobs")
    return best if wanted else None


def _check_fields(fields: Mapping[str, Any], known: frozenset[str]) -> None:
    for name, value in fields.items():
        if name in known or name in _NOTED:
            continue
        if name not in _NEUTRAL:
            nearest = difflib.get_close_matches(name[:60], known, n=1, cutoff=0.0)[0]
            raise ApiError(f'unknown field "{name:.60}"; the nearest is "{nearest}".', param=name)
        if value not in _NEUTRAL[name]:
            text = json.dumps(value)
            raise ApiError(f"{name} is {text:.60}, which is not implemented.", param=name)


# --- Choices --------------------------------------------------------------------------------------


def _chat_choice(
    output: CompletionOutput, num_best: int | None, tokenizer: Tokenizer
) -> dict[str, Any]:
    logprobs = None
    if output.logprobs is not None:
        logprobs = {
            "content": [
                {
                    **_chat_logprob(token, entries[token], tokenizer),
                    "top_logprobs": [
                        _chat_logprob(other, entry, tokenizer)
                        for other, entry in best_logprobs(entries, num_best)
                    ],
                }
                for token, entries in zip(output.token_ids, output.logprobs, strict=True)
            ]
        }
    return {"message": {"role": "assistant", "content": output.text}, "logprobs": logprobs}


def _chat_logprob(token: int, entry: Logprob, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": entry.decoded_token,
        "logprob": max(entry.logprob, _MIN_LOGPROB),
        "bytes": list(tokenizer.token_bytes(token)),
    }


def _completion_choice(
    output: CompletionOutput, num_best: int | None, tokenizer: Tokenizer
) -> dict[str, Any]:
    if output.logprobs is None:
        return {"text": output.text, "logprobs": None}
    tokens, values, best, offsets = [], [], [], []
    offset = 0
    for token, entries in zip(output.token_ids, output.logprobs, strict=True):
        text = entries[token].decoded_token or ""
        tokens.append(text)
        values.append(max(entries[token].logprob, _MIN_LOGPROB))
        by_text: dict[str, float] = {}  # of two tokens that look the same, the better one stays
        for _, entry in [*best_logprobs(entries, num_best), (token, entries[token])]:
            by_text.setdefault(entry.decoded_token or "", max(entry.logprob, _MIN_LOGPROB))
        best.append(by_text)
        offsets.append(offset)
        offset += len(text)
    logprobs = {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": best,
        "text_offset": offsets,
    }
    return {"text": output.text, "logprobs": logprobs}
