"""The small files of a model: text and JSON. What is wrong with one is an error that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinyvllm.errors import CheckpointError

MAX_FILE_BYTES = 256 << 20  # the largest tokenizer.json in use has about 35 MB


def read_text(path: Path) -> str | None:
    """The text of a file; None where there is no such file."""
    try:
        if not path.is_file():
            if path.exists():  # a pipe would be waited for
                raise CheckpointError(f"{path}: is not a file. Give a regular file.")
            return None
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
        return data.decode()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file."""
    text = read_text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: holds a {type(value).__name__}, not a JSON object. Download it again."
        )
    return value


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read: {error}. Download it again.")
