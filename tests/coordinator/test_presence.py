"""Who is there, and who is told what, without a server."""

import pytest

from coordinator.mail import Mail
from coordinator.presence import Presence


class Hub:
    unsent_bytes = 0

    def __init__(self):
        self.sent = []

    def send(self, device, frame):
        self.sent.append((device, frame))


@pytest.fixture
def told():
    """Presence, and a call that says who is sent a Welcome now. Frames are made then, from `told.frame`."""
    hub = Hub()
    mail = Mail(hub)
    presence = Presence(mail, lambda device: told.frame)

    def told():
        hub.sent.clear()
        mail.send_bulk()
        return [device for device, frame in hub.sent if frame == told.frame]

    told.frame = b"welcome"
    told.presence = presence
    return told


def test_hello_says_what_was_known_before(told):
    presence = told.presence
    assert presence.hello("a", ["tiny"]) is None
    assert "a" in presence
    before = presence.hello("a", ["tiny", "other"])
    assert (before.tasks, before.heard) == ({"tiny"}, True)
    presence.doubt()
    assert presence.hello("a", []).heard is False
    assert presence.hello("a", []).heard is True
    presence.leave("a")
    presence.leave("a")
    assert list(presence) == []
    assert presence.hello("a", []) is None


def test_whoever_comes_is_welcomed_once_with_what_is_true_when_it_leaves(told):
    told.presence.presume("a")
    told.presence.hello("a", ["tiny"])
    told.presence.hello("b", [])
    told.frame = b"what became true meanwhile"
    assert told() == ["a", "b"]
    assert told() == []


def test_who_was_there_before_a_restart_may_train_anything_and_may_have_heard_nothing(told):
    told.presence.presume("a")
    told.presence.hello("b", ["other"])
    assert told.presence.training("tiny") == ["a"]
    assert told.presence.training("other") == ["a", "b"]
    assert told.presence.hello("a", []).heard is False


def test_of_a_task_those_are_told_that_train_it_or_serve_and_are_there(told):
    told.presence.hello("trains", ["tiny"])
    told.presence.hello("serves", [])
    told.presence.hello("neither", ["other"])
    told()
    told.presence.tell("tiny", {"serves", "away"})
    assert told() == ["trains", "serves"]
    told.presence.welcome_all()
    assert told() == ["trains", "serves", "neither"]
