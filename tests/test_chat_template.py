"""Templates render what Transformers renders, and nothing that they do can hurt.

The three templates are ours, in the manner of those that the supported families ship. The prompts
they must give are written out, so that the tests need no Transformers; where it is installed, it is
asked as well, on many more conversations.
"""

from __future__ import annotations

import datetime
import enum
import re
import subprocess
import sys
from typing import Any

import pytest

from tinyvllm import chat_template
from tinyvllm.chat_template import ChatTemplate
from tinyvllm.errors import CheckpointError, InvalidRequestError

HEADERS = """\
{{- bos_token }}
{%- if date_string is not defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "1 Jan 2025" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today is " + date_string + ".\\n\\n" }}
{%- if tools is not none %}
    {{- "You may call these functions:\\n\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.role == 'ipython' %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("One tool call at a time, please!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

CHATML = """\
{%- set ns = namespace(last=-1, n=0) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- continue %}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- if message.reasoning_content is string and loop.index0 > ns.last %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
            {{- call.function.arguments | tojson(sort_keys=true, separators=(',', ':')) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

INST = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Roles must alternate: user, assistant, user, ...") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles, not " + message["role"] + "!") }}
    {%- endif %}
{%- endfor %}
"""

TEMPLATES = {"headers": HEADERS, "chatml": CHATML, "inst": INST}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

SYSTEM = {"role": "system", "content": " Be <brief> & 'kind'. "}
HELLO = {"role": "user", "content": "Grüße, 世界!\n"}
ANSWER = {"role": "assistant", "content": "Hallo."}
THOUGHT = {"role": "assistant", "content": "4", "reasoning": "\n2 + 2\n", "tool_calls": None}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "find", "arguments": {"q": "ü", "n": 1}}}
    ],
}
RESULT = {"role": "tool", "content": "[1, 2]"}
TOOL = {
    "type": "function",
    "function": {"name": "find", "description": "<Finds> 'é'", "parameters": {"type": "object"}},
}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [HELLO],
    "with a system message": [SYSTEM, HELLO],
    "two turns": [SYSTEM, HELLO, ANSWER, HELLO],
    "ends with the assistant": [HELLO, ANSWER],
    "reasoning": [HELLO, THOUGHT],
    "reasoning of an earlier turn": [HELLO, THOUGHT, HELLO],
    "tool call": [SYSTEM, HELLO, CALL, RESULT],
    "wrong order": [HELLO, HELLO],
    "unknown role": [HELLO, {"role": "critic", "content": "hm"}],
    "no content": [HELLO, {"role": "assistant"}],
}


class Noon(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2025, 7, 9, 12)


@pytest.fixture(autouse=True)
def stopped_clock(monkeypatch):
    monkeypatch.setattr(chat_template.datetime, "datetime", Noon)


def render(source: str, messages: Any, **options: Any) -> str:
    options.setdefault("variables", TOKENS)
    return ChatTemplate(source, "chat_template.jinja").render(messages, **options)


def test_headers_with_the_date():
    assert render(HEADERS, [SYSTEM, HELLO]) == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday is 09 Jul 2025.\n\n"
        "Be <brief> & 'kind'.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGrüße, 世界!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_headers_with_a_tool_a_call_and_a_variable():
    variables = {**TOKENS, "date_string": "today"}
    got = render(HEADERS, [HELLO, CALL, RESULT], tools=[TOOL], variables=variables)
    assert got == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Today is today.\n\nYou may call these functions:\n\n"
        '{\n    "type": "function",\n    "function": {\n        "name": "find",\n'
        '        "description": "<Finds> \'é\'",\n        "parameters": {\n'
        '            "type": "object"\n        }\n    }\n}\n\n<|eot_id|>'
        "<|start_header_id|>user<|end_header_id|>\n\nGrüße, 世界!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "find", "parameters": {"q": "ü", "n": 1}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"[1, 2]"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_chatml_with_reasoning_and_generation_blocks():
    got = render(CHATML, [SYSTEM, HELLO, THOUGHT], add_generation_prompt=False)
    assert got == (
        "<|im_start|>system\n Be <brief> & 'kind'. <|im_end|>\n"
        "<|im_start|>user\nGrüße, 世界!\n<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n2 + 2\n</think>\n\n4<|im_end|>\n"
    )


def test_chatml_with_a_tool_call_and_thinking_off():
    variables = {**TOKENS, "enable_thinking": False}
    got = render(CHATML, [SYSTEM, HELLO, CALL, RESULT], tools=[TOOL], variables=variables)
    assert got == (
        "<|im_start|>system\n Be <brief> & 'kind'. \n\n# Tools\n<tools>\n"
        '{"type": "function", "function": {"name": "find", "description": "<Finds> \'é\'", '
        '"parameters": {"type": "object"}}}\n</tools><|im_end|>\n'
        "<|im_start|>user\nGrüße, 世界!\n<|im_end|>\n"
        '<|im_start|>assistant\n\n<tool_call>\n{"name": "find", "arguments": {"n":1,"q":"ü"}}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>tool\n[1, 2]<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_inst_with_turns():
    assert render(INST, [SYSTEM, HELLO, ANSWER, HELLO]) == (
        "<s>[INST] Grüße, 世界!\n[/INST] Hallo.</s>"
        "[INST]  Be <brief> & 'kind'. \n\nGrüße, 世界!\n[/INST]"
    )


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools", "tools"])
def test_transformers_renders_the_same(
    transformers, monkeypatch, conversation, name, prompt, tools
):
    module = sys.modules["transformers.utils.chat_template_utils"]
    monkeypatch.setattr(module, "datetime", Noon)
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_object=_backend(), **TOKENS)
    options = {"tools": tools, "add_generation_prompt": prompt, "documents": [{"title": "t"}]}
    messages = CONVERSATIONS[conversation]
    extra = {"enable_thinking": False}
    want, refusal = None, None
    try:
        want = oracle.apply_chat_template(
            messages, chat_template=TEMPLATES[name], tokenize=False, **options, **extra
        )
    except Exception as error:  # Jinja's, or what the template's code raises
        refusal = str(error)
    options["variables"] = {**TOKENS, **extra}
    if refusal is None:
        assert render(TEMPLATES[name], messages, **options) == want
    else:
        with pytest.raises(InvalidRequestError, match=re.escape(refusal)):
            render(TEMPLATES[name], messages, **options)


def _backend():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.BPE({"<s>": 0, "</s>": 1}, []))


SNIPPETS = {
    "blocks eat their line": "  {% if true %}\n  a\n  {% endif %}\nb\n",
    "tojson keeps characters": "{{ {'é<>&': [1, 2.5, None, true]} | tojson }}",
    "tojson in ASCII": "{{ 'é' | tojson(ensure_ascii=true) }}",
    "tojson in order": "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, indent=1) }}",
    "tojson with separators": "{{ [1, {'a': 2}] | tojson(separators=(',', ':')) }}",
    "an undefined name": "a{{ nothing }}b{{ nothing is defined }}{{ messages[0].nothing }}",
    "break and continue": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
    "{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "generation is a scope": "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}"
    "{% endgeneration %}{{ a }}",
    "generation in a loop": "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.role }}"
    "{% endgeneration %}{% endfor %}",
    "macros": "{% macro f(x, y=2) %}{{ x }}-{{ y }}{% endmacro %}{{ f(1) }}{{ f(1, y='z') }}",
    "documents": "{% for d in documents %}{{ d.title }}{{ loop.last }}{% endfor %}",
    "namespace and dict": "{% set ns = namespace(a=dict(x=1)) %}{% set ns.a = ns.a.x + 1 %}"
    "{{ ns.a }}",
    "slices and filters": "{{ messages[-1]['content'][1:4] | upper }}"
    "{{ [3, 1] | sort | join(',') }}",
    "methods": "{{ 'a,b'.split(',')[-1] }}{{ {'a': 1}.items() | list }}{{ ' x '.strip() }}",
    "a last newline": "a\n",
    "Windows lines": "a\r\n{% if true %}\r\nb\r\n{% endif %}",
    "comments": "a {#- no -#} b{# x #}\nc",
    "None is None": "{{ none }}{{ messages[0].nothing is none }}{{ tools }}",
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_transformers_reads_the_language_the_same(transformers, name):
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_object=_backend(), **TOKENS)
    documents = [{"title": "t"}, {"title": "u"}]
    want = oracle.apply_chat_template(
        [SYSTEM, HELLO], chat_template=SNIPPETS[name], tokenize=False, documents=documents
    )
    got = render(SNIPPETS[name], [SYSTEM, HELLO], documents=documents, add_generation_prompt=False)
    assert got == want


def test_keys_that_are_none_are_as_if_they_were_not_there():
    source = "{{ 'tool_calls' in messages[0] }}{{ messages[0].keys() | list }}"
    assert render(source, [THOUGHT]).startswith("False")


def test_a_refusal_carries_the_template_s_words():
    with pytest.raises(InvalidRequestError, match="Roles must alternate: user, assistant"):
        render(INST, [HELLO, HELLO])


def test_no_messages_are_refused():
    with pytest.raises(InvalidRequestError, match="no messages"):
        render(INST, [])


@pytest.mark.parametrize("messages", [["hello"], [None], [["role", "user"]]])
def test_a_message_that_is_no_dict_is_refused(messages):
    with pytest.raises(InvalidRequestError, match="not a dict"):
        render(INST, messages)


@pytest.mark.parametrize("value", [object(), b"x", {1, 2}, len])
def test_values_that_are_not_json_are_refused(value):
    with pytest.raises(InvalidRequestError, match="only JSON values, not a"):
        render("{{ messages[0].content }}", [{"role": "user", "content": [value]}])


def test_subclasses_are_reduced_to_json_types():
    class Role(str, enum.Enum):
        USER = "user"

    assert render("{{ messages[0].role }}", [{"role": Role.USER}]) == "user"


@pytest.mark.parametrize(
    ("source", "where"),
    [
        ("a\nb {% if %}", "chat_template.jinja, line 2"),
        ("{% for m in messages %}", "chat_template.jinja, line 1"),
        ("\n\n{{ 1 | no_such_filter }}", "chat_template.jinja, line 3"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "chat_template.jinja"),
    ],
)
def test_a_syntax_error_names_the_file(source, where):
    with pytest.raises(CheckpointError, match="not valid Jinja") as error:
        render(source, [HELLO])
    assert str(error.value).startswith(where)


def test_a_caller_s_own_template_is_the_caller_s_mistake():
    template = ChatTemplate("{% if %}", "the template given", flaw=InvalidRequestError)
    with pytest.raises(InvalidRequestError, match="the template given, line 1"):
        template.render([HELLO])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content }}",
        "{{ nothing.at.all }}",
        "{{ 1 // 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10**9) }}",
    ],
)
def test_what_a_template_cannot_render_is_a_clean_error(source):
    with pytest.raises(InvalidRequestError, match=r"chat_template.jinja: .* cannot render"):
        render(source, [HELLO])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages[0].__class__.__name__ }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('true') }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source):
    message = dict(HELLO)
    with pytest.raises((CheckpointError, InvalidRequestError)):
        render(source, [message])
    assert message == HELLO


def test_a_template_that_writes_for_ever_is_stopped():
    source = (
        "{% for i in range(99999) %}{% for j in range(99999) %}0123456789{% endfor %}{% endfor %}"
    )
    with pytest.raises(InvalidRequestError, match="more than 16777216 characters"):
        render(source, [HELLO])


def test_messages_that_are_too_long_are_no_flaw_of_the_checkpoint():
    """A line of a batch may hold them, and must not end the run."""
    long = {"role": "user", "content": "x" * ((16 << 20) + 1)}
    with pytest.raises(InvalidRequestError, match="Shorten the messages"):
        render("{{ messages[0].content }}", [long])


def test_jinja_is_imported_only_to_render():
    code = (
        "import sys; import tinyvllm.chat_template as c; assert 'jinja2' not in sys.modules; "
        "c.ChatTemplate('x', 'f').render([{}]); assert 'jinja2' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
