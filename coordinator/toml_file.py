"""Files that people write: their tables, and where in them a key stands, for errors that name the line."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from edge_sdk.errors import ParameterError, printable

KeyPath = tuple[str, ...]
"""Of a key: ("privacy", "clip")."""


def tables(text: str, source: str) -> dict[str, Any]:
    """A file's content. source: its name, for messages. Raises ParameterError on what is no TOML."""
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ParameterError(f"{source}: not TOML: {error}") from error
    except ValueError as error:  # a number of thousands of digits
        raise ParameterError(f"{source}: not TOML that can be read: {error}") from error


def place(text: str, path: KeyPath) -> str:
    """ "line 12: [privacy] clip" for ("privacy", "clip"); the table's line if the key is not in it."""
    *names, key = path or ("",)
    name = printable(f"[{'.'.join(names)}] {key}" if names else key)
    inside, line_of_table = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        header = re.match(r"\[\s*([^\[\]]+?)\s*\]", stripped)
        if header:
            inside = re.sub(r"\s*\.\s*", ".", header[1])
            if inside == ".".join(names):
                line_of_table = number
            if inside == ".".join(path):
                return f"line {number}: [{inside}]"
        elif inside == ".".join(names) and re.match(rf"[\"']?{re.escape(key)}[\"']?\s*[=.]", stripped):
            return f"line {number}: {name}"
        elif names and inside == ".".join(names[:-1]) and re.match(rf"{re.escape(names[-1])}\s*[=.]", stripped):
            line_of_table = number  # an inline table
    return f"line {line_of_table}: {name}" if line_of_table else name
