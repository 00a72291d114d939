"""Who floods is dropped unread and then kept out; who sends what it was asked for never is."""

import pytest
from fleet import Fleet, add_task, assert_exact, enrol, make_devices, make_helpers, rounds_in
from hypothesis import given
from hypothesis import strategies as st

from coordinator import events
from coordinator.quotas import COSTLY, FRAMES_S, MOST_EXPECTED, PATIENCE, SILENCE_S, STOCK, Quotas
from coordinator.store import Store
from edge_sdk.protocol.plan import delta_bits
from edge_sdk.transport.wire import CHUNK_BYTES, Chunk, Hello, Prekeys, Pull, encode_frame

DEVICES, HELPERS = 5, 3


def taken(quotas, device, frames, now_s):
    return sum(quotas.take(device, now_s) for _ in range(frames))


def test_a_device_has_a_stock_of_frames_that_fills_up_with_time():
    quotas = Quotas()
    assert taken(quotas, "a", int(STOCK) + 50, 0.0) == STOCK
    assert quotas.dropped("a") == 50
    assert taken(quotas, "a", 10_000, 1.0) == FRAMES_S
    assert taken(quotas, "a", 10_000, 1e6) == STOCK


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 5000), st.floats(-10, 100)), max_size=12))
def test_nobody_s_flood_takes_anything_from_another(floods):
    quotas, now_s = Quotas(), 0.0
    for device, frames, passed_s in floods:
        now_s += passed_s
        taken(quotas, device, frames, now_s)
        quotas.kept_out(now_s)
    assert taken(quotas, "honest", int(STOCK), now_s) == STOCK
    assert "honest" not in quotas.kept_out(now_s)


@given(st.lists(st.integers(1, 32), max_size=50))
def test_what_was_asked_for_is_free(asked):
    quotas = Quotas(stock=0.0)
    for frames in asked:
        quotas.expect("a", frames, 0.0)
        assert taken(quotas, "a", frames + 1, 0.0) == frames
    assert taken(quotas, "b", 1, 0.0) == 0


def test_who_is_asked_and_does_not_send_gathers_no_licence_to_flood():
    quotas = Quotas(stock=0.0)
    for _ in range(1000):
        quotas.expect("a", 32, 0.0)
    assert taken(quotas, "a", 100_000, 0.0) == MOST_EXPECTED


def test_a_costly_frame_counts_as_several():
    quotas, refusals = Quotas(), 0
    while quotas.take("a", 0.0):
        quotas.charge("a", 0.0)
        refusals += 1
    assert refusals == pytest.approx(STOCK / (COSTLY + 1), abs=1)


@pytest.mark.parametrize("per_s", [20, 50, 99])
def test_costly_frames_without_end_cost_no_more_than_their_price_and_keep_their_sender_out(per_s):
    quotas, looked_at, kept_out_s = Quotas(), 0, None
    for number in range(120 * per_s):
        now_s = number / per_s
        if quotas.take("a", now_s):
            quotas.charge("a", now_s)
            looked_at += 1
        if kept_out_s is None and quotas.kept_out(now_s):
            kept_out_s = now_s
    assert looked_at <= STOCK / (1 + COSTLY) + 120 * FRAMES_S / (1 + COSTLY) + 1
    assert kept_out_s is not None
    assert kept_out_s < 60


def test_a_debt_is_bounded():
    quotas = Quotas()
    for _ in range(10_000):
        quotas.charge("a", 0.0)
    assert taken(quotas, "a", 10, 0.0) == 0
    assert taken(quotas, "a", 10, 1.01 * STOCK / FRAMES_S) == 10


def test_who_goes_on_is_kept_out_for_a_while_and_then_heard_again():
    quotas = Quotas()
    taken(quotas, "a", int(STOCK) + PATIENCE - 1, 0.0)
    assert quotas.kept_out(0.0) == frozenset()
    quotas.take("a", 0.0)
    assert quotas.kept_out(0.0) == {"a"}
    assert quotas.kept_out(SILENCE_S - 1) == {"a"}
    assert quotas.kept_out(SILENCE_S) == frozenset()
    assert quotas.take("a", SILENCE_S)


def test_a_device_that_is_somewhat_too_fast_now_and_then_is_not_kept_out():
    quotas = Quotas()
    for hour in range(100):
        taken(quotas, "a", int(STOCK) + PATIENCE // 2, 3600.0 * hour)
        assert quotas.kept_out(3600.0 * hour) == frozenset()


FLOODS = {
    "hello": encode_frame(Hello(1, 0, 0, False, [])),
    "garbage": b"\xc1" * 20,
    "chunks": encode_frame(Chunk(bytes(32), 0, bytes(CHUNK_BYTES), [])),
    "pulls": encode_frame(Pull(bytes(32), [0])),
    "prekeys": encode_frame(Prekeys([])),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_one_device_that_floods_gets_its_stock_of_frames_looked_at_and_the_round_goes_on(tmp_path, flood, caplog):
    parties, boxes = make_devices(DEVICES + 1), make_helpers(HELPERS)
    mallory = parties.pop()
    store = Store(tmp_path / "fleet")
    enrol(store, [*parties, mallory], boxes)
    add_task(store, n_max=DEVICES)
    store.close()
    kept_out = []
    fleet = Fleet(tmp_path / "fleet", parties + boxes, keep_out=kept_out.append)
    fleet.connect()
    link = fleet.hub.connect(mallory.name)
    looked_at = []
    original = fleet.server._on_frame
    fleet.server._on_frame = lambda device, *rest: looked_at.append(device) or original(device, *rest)
    turns = 0
    while not fleet.saw(events.TaskDone)():
        turns += 1
        assert turns < 200
        for _ in range(400):
            link.send(FLOODS[flood])
        fleet.turn()
    fleet.close()
    (truth,) = rounds_in(fleet.directory)
    assert_exact(truth, fleet.devices, 32 - delta_bits(DEVICES))
    assert truth.senders == {device.enrolled.index for device in parties}
    assert looked_at.count(mallory.name) <= STOCK + FRAMES_S * turns * 0.1 + 1
    assert kept_out[0] == {mallory.name}
    said = [line for line in caplog.messages if mallory.name[:16] in line]
    assert len(said) <= 2 + (STOCK + FRAMES_S * turns * 0.1) / COSTLY
    refused = [event.device for event in fleet.events if isinstance(event, events.Refused)]
    assert set(refused) == {mallory.name}
