"""The threat model's table of attacks is held to what is tested."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_test_that_the_threat_model_names_is_there():
    text = (ROOT / "docs" / "threat-model.md").read_text()
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", text))
    defined = set(re.findall(r"^def (test_[a-z0-9_]+)", (ROOT / "tests/protocol/test_attacks.py").read_text(), re.M))
    assert len(named) > 50
    assert named - defined == set()
    files = set(re.findall(r"`((?:tests|edge_sdk|coordinator)/[a-z0-9_/]+\.py)`", text))
    assert files
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []
