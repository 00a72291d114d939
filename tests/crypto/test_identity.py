"""Ed25519 by RFC 8032, signatures bound to their label, and no secret shown."""

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from official import official

from edge_sdk.crypto import identity as module
from edge_sdk.crypto.hashing import frame
from edge_sdk.crypto.identity import Identity, check_signature
from edge_sdk.errors import ParameterError, PeerError

CASES = official("rfc8032_ed25519")["cases"]
GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493
SEED = bytes(range(0x41, 0x61))
ALICE, BOB = Identity(SEED), Identity(bytes(32))


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_keys_and_signatures_are_those_of_rfc_8032(case):
    seed, message = bytes.fromhex(case["seed"]), bytes.fromhex(case["message"])
    assert Identity(seed).public_key.hex() == case["public"]
    private = module.Ed25519PrivateKey.from_private_bytes(seed)
    assert private.sign(message).hex() == case["signature"]
    # Ours is the same signature over the framed message, so it never verifies as a plain one.
    assert Identity(seed).sign("test", message) == private.sign(frame("test", message))
    with pytest.raises(PeerError):
        check_signature(Identity(seed).public_key, "test", message, bytes.fromhex(case["signature"]))


@given(st.binary(max_size=100))
def test_a_signature_verifies_and_is_deterministic(body):
    signature = ALICE.sign("ticket", body)
    check_signature(ALICE.public_key, "ticket", body, signature)
    assert signature == Identity(SEED).sign("ticket", body)


@pytest.mark.parametrize(
    ("key", "label", "body"),
    [
        (ALICE.public_key, "seal", b"body"),
        (ALICE.public_key, "ticke", b"body"),
        (ALICE.public_key, "ticketb", b"ody"),
        (ALICE.public_key, "ticket", b"bodx"),
        (ALICE.public_key, "ticket", b""),
        (BOB.public_key, "ticket", b"body"),
    ],
)
def test_a_signature_under_another_label_body_or_key_is_refused(key, label, body):
    with pytest.raises(PeerError, match=rf"^{label}: the signature is not valid"):
        check_signature(key, label, body, ALICE.sign("ticket", b"body"))


def test_every_flipped_bit_of_a_signature_is_refused():
    signature = ALICE.sign("ticket", b"body")
    for bit in range(8 * len(signature)):
        changed = bytearray(signature)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PeerError):
            check_signature(ALICE.public_key, "ticket", b"body", bytes(changed))


def test_a_signature_has_no_second_form():
    # S + L satisfies the equation too; RFC 8032 section 5.1.7 refuses it.
    signature = ALICE.sign("ticket", b"body")
    second = int.from_bytes(signature[32:], "little") + GROUP_ORDER
    with pytest.raises(PeerError):
        check_signature(ALICE.public_key, "ticket", b"body", signature[:32] + second.to_bytes(32, "little"))


FIELD = 2**255 - 19
SMALL_ORDER_KEYS = [(y + top).to_bytes(32, "little") for y in sorted(module._SMALL_ORDER_Y) for top in (0, 2**255)]


def test_the_list_of_small_order_keys_is_complete():
    # On -x^2 + y^2 = 1 + d x^2 y^2 a point's double has y' = (y^2 + x^2) / (1 - d x^2 y^2). The curve has cofactor 8.
    d = -121665 * pow(121666, -1, FIELD) % FIELD

    def doubled(y):
        x_squared = (y * y - 1) * pow(d * y * y + 1, -1, FIELD) % FIELD
        return (y * y + x_squared) * pow(1 - d * x_squared * y * y, -1, FIELD) % FIELD

    values = {y % FIELD for y in module._SMALL_ORDER_Y}
    assert all(doubled(doubled(doubled(y))) == 1 for y in values)
    assert sum(1 if y in (1, FIELD - 1) else 2 for y in values) == 8  # x = 0 has one sign, every other x two
    assert {y + FIELD for y in values if y + FIELD < 2**255} <= module._SMALL_ORDER_Y
    assert doubled(doubled(doubled(4 * pow(5, -1, FIELD) % FIELD))) != 1  # the base point


@pytest.mark.parametrize("key", SMALL_ORDER_KEYS, ids=bytes.hex)
def test_a_key_of_small_order_signs_nothing(key):
    # R = the neutral element and S = 0: valid under such a key for one body in eight or more, were it accepted.
    signature = (1).to_bytes(32, "little") + bytes(32)
    for i in range(64):
        with pytest.raises(PeerError, match=r"^ticket: "):
            check_signature(key, "ticket", b"%d" % i, signature)
    with pytest.raises(PeerError, match="small order"):
        check_signature(key, "ticket", b"body", signature)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_public_key_of_another_length_is_the_peers_fault(size):
    with pytest.raises(PeerError):
        check_signature(bytes(size), "ticket", b"body", ALICE.sign("ticket", b"body"))


@pytest.mark.parametrize("size", [0, 63, 65, 1000])
def test_a_signature_of_another_length_is_the_peers_fault(size):
    with pytest.raises(PeerError):
        check_signature(ALICE.public_key, "ticket", b"body", bytes(size))


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_seed_of_another_length_is_refused_without_showing_it(size):
    seed = (SEED + SEED)[:size]
    with pytest.raises(ParameterError, match=f"32 bytes, not {size}") as caught:
        Identity(seed)
    assert seed[:8].hex() not in str(caught.value) or not seed
    assert "ABCDEFGH" not in str(caught.value)


def test_an_identity_shows_its_public_key_only():
    for text in (repr(ALICE), str(ALICE), f"{ALICE!r:>60}", repr([ALICE])):
        assert ALICE.public_key.hex()[:16] in text
        assert SEED.hex()[:16] not in text
        assert "ABCDEFGH" not in text
    assert not hasattr(ALICE, "__dict__")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_identity_is_not_pickled(protocol):
    with pytest.raises(TypeError, match="not to be pickled"):
        pickle.dumps(ALICE, protocol)


def test_an_identity_is_not_copied_either():
    with pytest.raises(TypeError):
        copy.copy(ALICE)
    with pytest.raises(TypeError):
        copy.deepcopy(ALICE)


def test_the_known_answer_of_the_protocol_document():
    identity = Identity(bytes(range(32)))
    assert identity.public_key.hex() == "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
    assert identity.sign("x", b"\x01\x02").hex() == (
        "bee6a1261c24a97e34463964f48d71bd8e3ebc6c25bd1da76aa83bc2735fa0de"
        "5fbf4d4b1490771a2465140e3143449e07bd8dcb591aa1aa5eb5ee840c380c04"
    )
