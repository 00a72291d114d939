"""Prekey offers: what is kept of what members send, and what a ticket takes."""

import pytest
from fleet import AUTHORITY, START_S, make_helpers, seed

from coordinator import prekeys
from coordinator.prekeys import Chosen, choose, keeping, new_offers
from coordinator.store import Store
from edge_sdk.crypto.hashing import derive_key
from edge_sdk.crypto.sealing import Prekey
from edge_sdk.errors import PeerError
from edge_sdk.protocol import messages
from edge_sdk.protocol.messages import PrekeyOffer

FLEET = AUTHORITY.public_key
ONE, TWO = make_helpers(2)
KEY, OTHER = ONE.identity.public_key, TWO.identity.public_key
LATER_S = int(START_S) + 1000


def offer(serial, expires_s=LATER_S, *, member=ONE, history="one", **replaced):
    public = Prekey(derive_key(seed(history, serial), "prekey", length=96)).public
    fields = {"fleet": FLEET, "member": member.identity.public_key, "serial": serial, "x25519": public.x25519,
              "mlkem": public.mlkem, "expires_s": expires_s}  # fmt: skip
    return messages.sign(member.identity, PrekeyOffer(**fields | replaced))


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    yield store
    store.close()


def take(store, *offers, now_s=START_S, key=KEY):
    """The serials that are new; they are kept."""
    with store.reading() as t:
        fresh = new_offers(t, FLEET, key, offers, now_s)
    with store.transaction() as t:
        keeping(key, fresh, now_s)(t)
    return sorted(fresh)


def test_an_offer_is_new_once_however_often_it_is_sent(store):
    assert take(store, offer(0), offer(1), offer(0)) == [0, 1]
    assert take(store, offer(1), offer(2)) == [2]


def test_another_offer_under_a_serial_gives_a_rolled_back_member_away_and_nothing_of_the_frame_is_kept(store):
    take(store, offer(0))
    for offers in ((offer(1), offer(0, history="another")), (offer(2), offer(2, history="another"))):
        with pytest.raises(PeerError, match="rolled-back member"):
            take(store, *offers)
    assert take(store, offer(1), offer(2)) == [1, 2]


def test_the_bound_holds_for_frames_of_one_batch_too(store, monkeypatch):
    monkeypatch.setattr(prekeys, "MAX_SPARE_PREKEYS", 3)
    with store.reading() as t:
        frames = [new_offers(t, FLEET, KEY, [offer(2 * n), offer(2 * n + 1)], START_S) for n in range(4)]
    with store.transaction() as t:
        for fresh in frames:
            keeping(KEY, fresh, START_S)(t)
    with store.reading() as t:
        assert t.spare_prekeys(KEY, START_S) == 3
        assert t.prekey(KEY, 2) is not None


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (offer(0, member=TWO), "signature"),
        (offer(0, fleet=bytes(32)), "another fleet or member"),
        (offer(0, member=ONE, x25519=bytes(32)), "low order"),
        (offer(0, mlkem=b"\xff" * 1184), "ML-KEM"),
    ],
)
def test_an_offer_that_no_share_could_be_sealed_to_is_refused(store, bad, match):
    with pytest.raises(PeerError, match=match):
        take(store, bad)


def test_what_is_kept_of_one_member_is_bounded_and_the_expired_make_room(store, monkeypatch):
    monkeypatch.setattr(prekeys, "MAX_SPARE_PREKEYS", 3)
    soon_s = int(START_S) + 10
    assert take(store, offer(0, int(START_S)), *(offer(n, soon_s) for n in range(1, 4)), offer(4)) == [1, 2, 3]
    assert take(store, offer(4)) == []
    assert take(store, offer(4), now_s=soon_s + 1.0) == [4]
    with store.reading() as t:
        assert t.prekey(KEY, 1) is None


def test_two_frames_of_one_batch_may_bring_the_same_offer(store):
    with store.reading() as t:
        both = [new_offers(t, FLEET, KEY, [offer(0)], START_S) for _ in range(2)]
    with store.transaction() as t:
        for fresh in both:
            keeping(KEY, fresh, START_S)(t)
    assert take(store, offer(0)) == []


def test_a_ticket_takes_of_each_member_the_first_offer_that_lives_as_long(store):
    take(store, offer(0, LATER_S - 1), offer(1), offer(2))
    take(store, offer(7, member=TWO), key=OTHER)
    with store.reading() as t:
        assert choose(t, [OTHER, KEY], LATER_S) == Chosen([(OTHER, 7), (KEY, 1)], [offer(7, member=TWO), offer(1)])


def test_if_any_member_has_none_all_that_have_none_are_named(store):
    take(store, offer(0))
    with store.reading() as t:
        assert choose(t, [OTHER, KEY, bytes(32)], LATER_S) == [OTHER, bytes(32)]
        assert choose(t, [KEY, OTHER], LATER_S + 1) == [KEY, OTHER]
