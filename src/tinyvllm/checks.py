"""What Python hands to the C++ engine as numbers: values of another kind are refused by name."""

from __future__ import annotations

import operator
from typing import Any

from tinyvllm.errors import InvalidRequestError


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise InvalidRequestError(f"{name} is {value!r}; it must be a whole number.") from None


def integer(name: str, value: Any, bits: int) -> int:
    """bits: of the C++ type, its sign among them."""
    whole = _whole(name, value)
    if not -(1 << (bits - 1)) <= whole < 1 << (bits - 1):
        raise InvalidRequestError(f"{name} is {whole}; it does not fit in {bits} bits.")
    return whole


def number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value.__float__())  # numpy's scalars have it, texts have not
    except (AttributeError, TypeError, ValueError):
        raise InvalidRequestError(f"{name} is {value!r}; it must be a number.") from None
    except OverflowError:
        raise InvalidRequestError(f"{name} is {value!r:.60}; it is too large.") from None


def seed_number(value: Any) -> int:
    seed = _whole("seed", value)
    if not 0 <= seed < 1 << 64:
        raise InvalidRequestError(f"seed is {seed}; it must be from 0 to 2^64 - 1.")
    return seed
