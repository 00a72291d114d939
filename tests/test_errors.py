"""What a peer sent ends in logs: it must not write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.enrolment import Refused
from edge_sdk.errors import MAX_TEXT, PeerError, printable

FORGED = "x'\n2026-01-01 00:00:00,000 INFO coordinator: device ffffffffffffffff is revoked\n\x1b[2J"


@given(st.text())
def test_what_is_said_of_a_peer_is_one_line_of_a_bounded_length(text):
    said = str(PeerError(text))
    assert said.isprintable()
    assert len(said) <= MAX_TEXT


def test_what_is_escaped_is_no_longer_than_the_rest():
    assert len(printable("\U000e0001" * 500)) == MAX_TEXT


@given(st.text(st.characters(categories=["L", "N", "P"]), max_size=MAX_TEXT))
def test_words_stay_as_they_are(text):
    assert printable(text) == text


def test_what_is_cut_says_so_and_keeps_its_end():
    text = "frame: invalid value " + "A" * 130_000 + " - at `unit`"
    assert printable(text).startswith("frame: invalid value AAA")
    assert printable(text).endswith("AAA - at `unit`")
    assert len(printable(text)) == MAX_TEXT


@pytest.mark.parametrize("error", [PeerError(f"frame: {FORGED}"), Refused("spent", FORGED)])
def test_nobody_writes_a_line_in_another_s_name(error):
    assert "\n" not in str(error)
    assert "\x1b" not in str(error)
    assert "ffffffffffffffff is revoked" in str(error)
