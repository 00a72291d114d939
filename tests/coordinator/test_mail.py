"""What goes out and when: bulk waits for the broker, and the server is woken for it."""

from coordinator.mail import ROOM_BYTES, UNSENT_BYTES, Mail
from edge_sdk.transport.chunks import Blob
from edge_sdk.transport.wire import CHUNK_BYTES, decode_down

BLOB = Blob.of(bytes(3 * CHUNK_BYTES))


class Hub:
    """The broker takes nothing until it is told to."""

    def __init__(self):
        self.unsent_bytes, self.sent = 0, []

    def send(self, device, frame):
        self.sent.append((device, decode_down(frame)))
        self.unsent_bytes += len(frame)


def test_bulk_waits_while_the_broker_has_enough_and_the_server_is_woken_before_it_has_nothing():
    hub = Hub()
    mail = Mail(hub)
    assert mail.room_bytes is None
    for number in range(100):
        mail.serve(f"device{number}", BLOB, [0, 1])
    assert mail.room_bytes == ROOM_BYTES < UNSENT_BYTES
    mail.send_bulk()
    before = len(hub.sent)
    assert UNSENT_BYTES < hub.unsent_bytes < UNSENT_BYTES + 2 * CHUNK_BYTES
    mail.send_bulk()
    assert len(hub.sent) == before
    hub.unsent_bytes = ROOM_BYTES
    mail.send_bulk()
    assert len(hub.sent) > before
    while mail.room_bytes is not None:
        hub.unsent_bytes = 0
        mail.send_bulk()
    assert sorted((device, chunk.index) for device, chunk in hub.sent) == sorted(
        (f"device{number}", index) for number in range(100) for index in (0, 1)
    )


def test_devices_take_turns_and_what_is_asked_for_twice_goes_out_once():
    hub = Hub()
    mail = Mail(hub)
    for device in ("a", "b"):
        mail.serve(device, BLOB, [0, 1])
        mail.serve(device, BLOB, [1, 2])
    mail.send_bulk()
    assert [(device, chunk.index) for device, chunk in hub.sent] == [
        ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)
    ]  # fmt: skip


def test_who_went_away_is_sent_nothing_more():
    hub = Hub()
    mail = Mail(hub)
    mail.serve("a", BLOB, [0])
    mail.note("a", lambda: None)
    mail.forget("a")
    mail.send_bulk()
    assert (hub.sent, mail.room_bytes) == ([], None)
