"""Where a key stands in a file that people write, and what is no file of theirs."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.toml_file import place, tables
from edge_sdk.errors import ParameterError

TEXT = """\
name = "digits"
[ privacy ]
clip = 0.5
target = {readers = 1.0}
[privacy.adaptive]
"least" = 0.1
[schedule]
"""


@pytest.mark.parametrize(
    ("path", "where"),
    [
        (("name",), "line 1: name"),
        (("missing",), "missing"),
        (("privacy",), "line 2: [privacy]"),
        (("privacy", "clip"), "line 3: [privacy] clip"),
        (("privacy", "delta"), "line 2: [privacy] delta"),
        (("privacy", "target", "readers"), "line 4: [privacy.target] readers"),
        (("privacy", "adaptive", "least"), "line 6: [privacy.adaptive] least"),
        (("schedule", "open_s"), "line 7: [schedule] open_s"),
        (("a\nb",), r"a\nb"),
        ((), ""),
    ],
)
def test_a_key_is_found_by_its_line(path, where):
    assert place(TEXT, path) == where


@pytest.mark.parametrize(
    "text", ["a = ", "a = 1\na = 2", "a = " + "9" * 5000, "a = " + "[" * 5000 + "]" * 5000, "a = 2026-13-45", "\0"]
)
def test_what_is_no_toml_is_one_error_with_the_file_s_name(text):
    with pytest.raises(ParameterError, match=r"^task\.toml: not TOML"):
        tables(text, "task.toml")


@given(st.text(max_size=300))
def test_any_text_is_tables_or_a_parameter_error(text):
    with suppress(ParameterError):
        assert isinstance(tables(text, "x"), dict)
