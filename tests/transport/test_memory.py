"""The hub in memory: it loses, repeats and overtakes exactly what a test says, and nothing else."""

import threading

import pytest

from edge_sdk.errors import ParameterError, TransportError
from edge_sdk.transport import Connected, Hub, Inbound, Lost, Transport
from edge_sdk.transport.chunks import Blob, Download
from edge_sdk.transport.memory import Fate, MemoryHub, Passing, chance
from edge_sdk.transport.wire import MAX_FRAME_BYTES, Chunk, Leaving, Pull, decode_down, decode_up, encode_frame

A, B = "aa" * 32, "bb" * 32
LEAVING = encode_frame(Leaving())


def hub_and(*devices: str, fate=lambda _: Fate.ARRIVE):
    hub = MemoryHub(fate)
    transports = [hub.connect(device) for device in devices]
    assert hub.receive(0) == [Connected()]
    for transport in transports:
        assert transport.receive(0) == Connected()
    return hub, *transports


def received(transport: Transport) -> list:
    items = []
    while (item := transport.receive(0)) is not None:
        items.append(item)
    return items


def test_frames_reach_their_device_and_the_hub_in_order():
    hub, a, b = hub_and(A, B)
    for n in range(3):
        a.send(b"a%d" % n)
        b.send(b"b%d" % n)
        hub.send(A, b"to a %d" % n)
    assert hub.receive(0) == [Inbound(d, p + b"%d" % n) for n in range(3) for d, p in ((A, b"a"), (B, b"b"))]
    assert received(a) == [b"to a 0", b"to a 1", b"to a 2"]
    assert received(b) == []
    hub.send("cc" * 32, b"nobody hears it")
    assert hub.receive(0) == []


@pytest.mark.parametrize(
    ("fates", "arrives"),
    [
        ([Fate.DROP], [1, 2]),
        ([Fate.DUPLICATE], [0, 0, 1, 2]),
        ([Fate.HOLD], [1, 0, 2]),
        ([Fate.HOLD, Fate.HOLD], [2, 0, 1]),
        ([Fate.HOLD, Fate.DROP], [2, 0]),
        ([Fate.ARRIVE, Fate.ARRIVE, Fate.HOLD], [0, 1]),
    ],
)
@pytest.mark.parametrize("up", [True, False])
def test_a_script_says_what_becomes_of_each_frame(fates, arrives, up):
    def fate(passing: Passing) -> Fate:
        assert passing.frame == b"%d" % passing.number
        return fates[passing.number] if passing.up is up and passing.number < len(fates) else Fate.ARRIVE

    hub, a = hub_and(A, fate=fate)
    for n in range(3):
        a.send(b"%d" % n)
        hub.send(A, b"%d" % n)
    up_frames, down_frames = [i.frame for i in hub.receive(0)], received(a)
    assert (up_frames if up else down_frames) == [b"%d" % n for n in arrives]
    assert (down_frames if up else up_frames) == [b"0", b"1", b"2"]


def test_chance_gives_each_fault_about_as_often_as_asked_and_the_same_for_the_same_entropy():
    fate = chance(b"entropy", drop=0.2, duplicate=0.1, hold=0.3)
    passings = [Passing(A, up, number, b"") for up in (True, False) for number in range(4000)]
    fates = [fate(p) for p in passings]
    for kind, share in ((Fate.DROP, 0.2), (Fate.DUPLICATE, 0.1), (Fate.HOLD, 0.3), (Fate.ARRIVE, 0.4)):
        assert abs(fates.count(kind) / len(fates) - share) < 0.03
    again = chance(b"entropy", drop=0.2, duplicate=0.1, hold=0.3)
    assert [again(p) for p in reversed(passings)][::-1] == fates
    assert [chance(b"other", drop=0.2, duplicate=0.1, hold=0.3)(p) for p in passings] != fates


@pytest.mark.parametrize("faults", [{"drop": 0.6, "hold": 0.6}, {"drop": -0.1}, {"hold": float("nan")}])
def test_chances_that_are_no_probabilities_are_refused(faults):
    with pytest.raises(ParameterError, match="probabilities"):
        chance(b"", **faults)


def test_a_link_that_breaks_loses_what_was_on_its_way_and_leaves_the_last_will():
    hub, a, b = hub_and(A, B)
    hub.send(A, b"lost")
    hub.disconnect(A, "pulled the plug")
    hub.disconnect(A)
    a.send(b"not heard")
    hub.send(A, b"not heard")
    b.send(b"heard")
    assert hub.receive(0) == [Inbound(A, LEAVING), Inbound(B, b"heard")]
    assert received(a) == [Lost("pulled the plug")]
    hub.reconnect(A)
    hub.send(A, b"again")
    assert received(a) == [Connected(), b"again"]


def test_a_broker_that_dies_loses_everything_and_no_will_is_published():
    hub, a, b = hub_and(A, B)
    a.send(b"lost")
    hub.send(B, b"lost")
    hub.stop_broker()
    a.send(b"not heard")
    hub.send(B, b"not heard")
    late = hub.connect("cc" * 32)
    assert received(late) == []
    hub.start_broker()
    assert hub.receive(0) == [Lost("the broker is gone"), Connected()]
    assert received(a) == received(b) == [Lost("the broker is gone"), Connected()]
    assert received(late) == [Connected()]
    a.send(b"heard")
    hub.restart_broker()
    assert [type(item) for item in hub.receive(0)] == [Lost, Connected]


def test_a_second_connection_takes_the_first_ones_place():
    hub, old = hub_and(A)
    new = hub.connect(A)
    hub.send(A, b"for the new one")
    old.send(b"not heard")
    assert received(new) == [Connected(), b"for the new one"]
    assert received(old) == [Lost("another connection took over")]
    old.close()
    hub.send(A, b"still")
    assert received(new) == [b"still"]
    assert hub.receive(0) == []


def test_after_close_every_call_says_so_and_waiting_ends():
    hub, a = hub_and(A)
    errors = []

    def wait():
        try:
            a.receive(60)
        except TransportError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    a.close()
    a.close()
    waiting.join(10)
    assert len(errors) == 1
    for call in (lambda: a.send(b""), lambda: a.receive(0)):
        with pytest.raises(TransportError, match="closed"):
            call()
    hub.close()
    hub.close()
    for call in (lambda: hub.send(A, b""), lambda: hub.receive(0), lambda: hub.connect(A)):
        with pytest.raises(TransportError, match="closed"):
            call()


def test_frames_over_the_limit_and_over_the_queue_are_dropped_and_counted():
    hub = MemoryHub(max_queued=2)
    a = hub.connect(A)
    a.send(bytes(MAX_FRAME_BYTES + 1))
    assert hub.dropped == 1
    a.send(bytes(MAX_FRAME_BYTES))
    for _ in range(3):
        a.send(b"x")
        hub.send(A, b"y")
    assert [type(item) for item in hub.receive(0)] == [Connected, Inbound]
    assert received(a) == [Connected(), b"y"]
    assert hub.dropped == 6


@pytest.mark.parametrize("name", ["", "aa" * 31, "AA" * 32, "gg" * 32, "aa" * 32 + "\n"])
def test_only_a_device_name_can_connect(name):
    with pytest.raises(ParameterError, match="64 hexadecimal digits"):
        MemoryHub().connect(name)


def test_a_blob_goes_through_a_bad_link_between_two_threads():
    hub: Hub
    device: Transport
    hub, device = hub_and(A, fate=chance(b"bad link", drop=0.2, duplicate=0.1, hold=0.2))
    data = bytes(range(256)) * 8000
    blob = Blob.of(data)

    def serve():
        while True:
            try:
                frame = device.receive(60)
            except TransportError:
                return
            if isinstance(frame, bytes):
                pull = decode_down(frame)
                assert isinstance(pull, Pull)
                for index in pull.chunks:
                    device.send(encode_frame(blob.chunk(index)))

    server = threading.Thread(target=serve)
    server.start()
    try:
        download = Download(blob.ref, window=4)
        now_s = 0.0
        for _ in range(1000):
            if download.complete:
                break
            if (pull := download.pull(now_s)) is not None:
                hub.send(A, encode_frame(pull))
            items = hub.receive(0.05)
            for item in items:
                chunk = decode_up(item.frame)
                assert isinstance(chunk, Chunk)
                download.add(chunk, now_s)
            if not items:
                now_s = max(now_s, download.due_s)
        assert download.data() == data
    finally:
        device.close()
        server.join(10)
