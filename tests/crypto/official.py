"""The official vectors of tests/vectors/official, each file with its source named inside."""

import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent.parent / "vectors" / "official"


def official(name: str) -> Any:
    """The content of one file, by its name without the extension."""
    return json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
