"""The errors that tinyvllm raises, and the exit code that each becomes at the command line.

The C++ core throws the same names (csrc/base/errors.h); csrc/bindings/ maps one onto the other.
Every message says what is wrong, where, with the numbers, and one thing to try.
"""

from __future__ import annotations


class TinyvllmError(Exception):
    """Base of all errors of this package."""

    exit_code = 1


class CheckpointError(TinyvllmError):
    """A model file is missing, damaged, hostile, or changed while it was in use."""

    exit_code = 3


class UnsupportedModelError(TinyvllmError):
    """The checkpoint is sound, but asks for something that this engine does not implement."""

    exit_code = 3


class CapacityError(TinyvllmError):
    """The model, its KV cache or a request is larger than the memory that it may use."""

    exit_code = 4


class DeviceError(TinyvllmError):
    """The device that was asked for is missing or cannot be used."""

    exit_code = 5


class InvalidRequestError(TinyvllmError, ValueError):
    """A prompt, an option or a combination of options cannot be served as it stands."""

    exit_code = 2
