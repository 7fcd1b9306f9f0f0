"""Options in sections, and kinds of option values that click does not have."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import click


class Option(click.Option):
    """An option that --help lists under a title."""

    def __init__(self, *names: Any, section: str, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.section = section


option = partial(click.option, cls=Option)  # @option("--name", section=..., ...)


class Command(click.Command):
    """A command whose --help lists its options by section, in the order of their first options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):  # not an argument
                title = getattr(parameter, "section", "Help")
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


class Count(click.ParamType):
    """A whole number, also as 2k (2,000), 2K (2,048) or 25.6k."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        unit = _UNITS.get(text[-1:], 1)
        try:
            number = int(text) if unit == 1 else float(text[:-1]) * unit
            if number != int(number) or int(number) < 0:
                raise ValueError
        except (ValueError, OverflowError):
            self.fail(f"{text!r} is not a whole number such as 512, 2k or 2K.", param, ctx)
        if number >= 1 << 63:
            self.fail(f"{text!r} is too large.", param, ctx)
        return int(number)


class ModelName(click.ParamType):
    """A directory or a hub model. An empty text, such as of an unset variable, names none."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value:
            self.fail("it is empty. Leave it out for the bundled story model.", param, ctx)
        return str(value)


class Lengths(click.ParamType):
    """Numbers as llama-bench takes them: 512,128, or the ranges 1-8, 128-512+128, 1-4096*2."""

    name = "numbers"
    _MOST = 1000

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int]:
        numbers: list[int] = []
        for part in str(value).split(","):
            match = re.fullmatch(r"(\w+)(?:-(\w+)(?:([+*])(\w+))?)?", part.strip())
            if match is None:
                self.fail(
                    f"{part!r} is not a number or a range such as 512, 128-512+128 or 1-4096*2.",
                    param,
                    ctx,
                )
            first, last, sign, step = match.groups()
            number = Count().convert(first, param, ctx)
            end = Count().convert(last or first, param, ctx)
            factor = Count().convert(step, param, ctx) if sign == "*" else 1
            summand = Count().convert(step or 1, param, ctx) if sign != "*" else 0
            if not 1 <= number <= end or (factor < 2 and summand < 1):
                self.fail(f"{part!r} does not go up from a number of at least 1.", param, ctx)
            while number <= end:
                numbers.append(number)
                number = number * factor + summand
                if len(numbers) > self._MOST:
                    self.fail(f"{value!r} has more than {self._MOST} numbers.", param, ctx)
        return numbers


class LengthRange(click.ParamType):
    """A number of tokens, or the two ends of a range of them: 512, 100:1024."""

    name = "range"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        low, _, high = str(value).partition(":")
        ends = Count().convert(low, param, ctx), Count().convert(high or low, param, ctx)
        if not 1 <= ends[0] <= ends[1]:
            self.fail(f"{value!r} is not a range such as 512 or 100:1024.", param, ctx)
        return ends


class TokenIds(click.ParamType):
    """Token ids with commas between them."""

    name = "ids"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int]:
        try:
            return [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{str(value)[:60]!r} is not a list of token ids such as 1,2,3.", param, ctx)


class TokenBias(click.ParamType):
    """ID=BIAS."""

    name = "bias"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, float]:
        token, _, bias = str(value).partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"{str(value)[:60]!r} is not ID=BIAS such as 42=-100.", param, ctx)
