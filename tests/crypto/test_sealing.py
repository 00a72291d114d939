"""Sealed shares open for one prekey, sender and context only, and every malformed key is the peer's fault."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kyber_py.ml_kem import ML_KEM_768
from official import official

from edge_sdk.crypto import sealing
from edge_sdk.crypto.hashing import derive_key, frame
from edge_sdk.crypto.sealing import (
    MLKEM_CIPHERTEXT_BYTES,
    MLKEM_PUBLIC_BYTES,
    OVERHEAD_BYTES,
    PREKEY_SEED_BYTES,
    Prekey,
    PrekeyPublic,
    Sealer,
    encapsulate,
)
from edge_sdk.errors import ParameterError, PeerError

X25519 = official("rfc7748_x25519")
AEAD = official("rfc8439_chacha20_poly1305")["aead"]
MLKEM = official("fips203_mlkem768")
FIELD = 2**255 - 19

SEED = bytes(range(96))
COINS = b"coins for the encapsulation only"
SENDER_SEED = b"the sender's fresh sealing seed!"
CONTEXT = (b"tid", b"sender", b"\1")


def fixed(coins: bytes):
    """Encapsulation with chosen coins, by an implementation that shares no code with the library's."""
    return lambda public: ML_KEM_768._encaps_internal(public, coins)


PREKEY = Prekey(SEED)
SEALER = Sealer(SENDER_SEED, fixed(COINS))
PLAINTEXT = b"a share of two bytes"
SEALED = SEALER.seal(PREKEY.public, PLAINTEXT, *CONTEXT)


def unhex(case, *names):
    return tuple(bytes.fromhex(case[name]) for name in names)


def scalar_multiplication(scalar: bytes, point: bytes) -> bytes:
    """X25519 as the module calls it."""
    return sealing._exchange(sealing.X25519PrivateKey.from_private_bytes(scalar), point, "test")


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("case", X25519["scalar_multiplication"])
def test_the_exchange_gives_the_vectors_of_rfc_7748(case):
    scalar, point, out = unhex(case, "scalar", "u", "out")
    assert scalar_multiplication(scalar, point) == out


def test_the_exchange_gives_the_iterated_vectors_of_rfc_7748():
    start, after_1, after_1000 = unhex(X25519["iterated"], "start", "after_1", "after_1000")
    scalar, point = start, start
    for count in range(1000):
        scalar, point = scalar_multiplication(scalar, point), scalar
        if count == 0:
            assert scalar == after_1
    assert scalar == after_1000


def test_both_sides_keys_and_shared_secret_are_those_of_rfc_7748():
    alice, alice_public, bob, bob_public, shared = unhex(
        X25519["diffie_hellman"], "alice_private", "alice_public", "bob_private", "bob_public", "shared"
    )
    assert Sealer(alice, encapsulate).public_key == alice_public
    assert Prekey(bob + bytes(64)).public.x25519 == bob_public
    assert scalar_multiplication(alice, bob_public) == scalar_multiplication(bob, alice_public) == shared


@pytest.mark.parametrize("case", AEAD, ids=[case["section"] for case in AEAD])
def test_the_librarys_aead_gives_the_vectors_of_rfc_8439(case):
    key, nonce, aad, plaintext, ciphertext, tag = unhex(case, "key", "nonce", "aad", "plaintext", "ciphertext", "tag")
    assert sealing.ChaCha20Poly1305(key).encrypt(nonce, plaintext, aad) == ciphertext + tag
    assert sealing.ChaCha20Poly1305(key).decrypt(nonce, ciphertext + tag, aad) == plaintext


@pytest.mark.parametrize("case", MLKEM["known_answers"], ids=[0, 1])
def test_prekeys_and_decapsulation_give_the_known_answers_of_ml_kem_768(case):
    seed, public, coins, ciphertext, shared, rejected, implicit = unhex(
        case, "seed", "ek", "m", "c", "shared", "rejected_c", "rejected_shared"
    )
    prekey = Prekey(bytes(32) + seed)
    assert prekey.public.mlkem == public
    assert prekey._lattice.decapsulate(ciphertext) == shared
    assert prekey._lattice.decapsulate(rejected) == implicit
    assert fixed(coins)(public) == (shared, ciphertext)


@pytest.mark.parametrize("case", MLKEM["decapsulation"], ids=[case["comment"] for case in MLKEM["decapsulation"]])
def test_decapsulation_gives_the_known_answers_of_unusual_ciphertexts(case):
    seed, public, ciphertext, shared = unhex(case, "seed", "ek", "c", "shared")
    prekey = Prekey(bytes(32) + seed)
    assert prekey.public.mlkem == public
    assert prekey._lattice.decapsulate(ciphertext) == shared


@pytest.mark.parametrize("case", MLKEM["encapsulation"], ids=[case["comment"] for case in MLKEM["encapsulation"]])
def test_encapsulation_with_chosen_coins_gives_the_known_answers(case):
    public, coins, ciphertext, shared = unhex(case, "ek", "m", "c", "shared")
    assert fixed(coins)(public) == (shared, ciphertext)


@given(st.binary(min_size=64, max_size=64), st.binary(min_size=32, max_size=32))
@settings(max_examples=10)
def test_the_library_agrees_with_an_independent_ml_kem(seed, coins):
    public, private = ML_KEM_768._keygen_internal(seed[:32], seed[32:])
    prekey = Prekey(bytes(32) + seed)
    assert prekey.public.mlkem == public
    shared, ciphertext = ML_KEM_768._encaps_internal(public, coins)
    assert prekey._lattice.decapsulate(ciphertext) == shared
    shared, ciphertext = encapsulate(public)
    assert ML_KEM_768.decaps(private, ciphertext) == shared


def test_encapsulate_draws_fresh_coins():
    assert encapsulate(PREKEY.public.mlkem) != encapsulate(PREKEY.public.mlkem)


@given(st.binary(max_size=300), st.lists(st.binary(max_size=40), max_size=4))
@settings(max_examples=30)
def test_what_was_sealed_opens(plaintext, context):
    sealer = Sealer(SENDER_SEED, encapsulate)
    sealed = sealer.seal(PREKEY.public, plaintext, *context)
    assert len(sealed) == len(plaintext) + OVERHEAD_BYTES
    assert PREKEY.open(sealer.public_key, sealed, *context) == plaintext


def test_sealing_is_deterministic_under_fixed_coins_and_is_the_documented_composition():
    assert Sealer(SENDER_SEED, fixed(COINS)).seal(PREKEY.public, PLAINTEXT, *CONTEXT) == SEALED
    lattice, ciphertext = ML_KEM_768._encaps_internal(PREKEY.public.mlkem, COINS)
    elliptic = scalar_multiplication(SENDER_SEED, PREKEY.public.x25519)
    key = derive_key(
        elliptic + lattice, "share key", SEALER.public_key, PREKEY.public.x25519, PREKEY.public.mlkem, ciphertext
    )
    body = sealing.ChaCha20Poly1305(key).encrypt(bytes(12), PLAINTEXT, frame("sealed share", *CONTEXT))
    assert ciphertext + body == SEALED


def test_every_flipped_bit_of_the_sealed_bytes_is_refused():
    for bit in range(8 * len(SEALED)):
        with pytest.raises(PeerError, match="does not open"):
            PREKEY.open(SEALER.public_key, flipped(SEALED, bit), *CONTEXT)


def test_every_flipped_bit_of_the_senders_key_is_refused():
    # The top bit too, which X25519 itself ignores: the key enters the derivation as bytes.
    for bit in range(256):
        with pytest.raises(PeerError, match="sealed share"):
            PREKEY.open(flipped(SEALER.public_key, bit), SEALED, *CONTEXT)


def test_every_flipped_bit_of_the_context_is_refused():
    for place, part in enumerate(CONTEXT):
        for bit in range(8 * len(part)):
            context = [*CONTEXT[:place], flipped(part, bit), *CONTEXT[place + 1 :]]
            with pytest.raises(PeerError, match="does not open"):
                PREKEY.open(SEALER.public_key, SEALED, *context)


@pytest.mark.parametrize(
    "context",
    [(), CONTEXT[:2], (*CONTEXT, b""), CONTEXT[::-1], (b"tidsender", b"", b"\1"), (b"tids", b"ender", b"\1")],
)
def test_context_parts_in_another_order_number_or_split_are_refused(context):
    with pytest.raises(PeerError, match="does not open"):
        PREKEY.open(SEALER.public_key, SEALED, *context)


@pytest.mark.parametrize(
    "seed",
    [bytes(96), flipped(SEED, 40), SEED[:32] + bytes(64), bytes(32) + SEED[32:]],
    ids=["other", "one bit of X25519", "the X25519 half only", "the ML-KEM half only"],
)
def test_another_prekey_does_not_open(seed):
    # With one right half it still does not: both secrets are needed.
    with pytest.raises(PeerError, match="does not open"):
        Prekey(seed).open(SEALER.public_key, SEALED, *CONTEXT)


def test_another_senders_key_does_not_open():
    with pytest.raises(PeerError, match="does not open"):
        PREKEY.open(Sealer(bytes(32), encapsulate).public_key, SEALED, *CONTEXT)


@pytest.mark.parametrize("length", [0, 1, MLKEM_CIPHERTEXT_BYTES, OVERHEAD_BYTES - 1])
def test_sealed_bytes_that_are_too_short_are_refused(length):
    with pytest.raises(PeerError, match=f"{length} bytes is too short"):
        PREKEY.open(SEALER.public_key, SEALED[:length], *CONTEXT)


@pytest.mark.parametrize("sealed", [SEALED[:OVERHEAD_BYTES], SEALED[:-1], SEALED + b"\0"])
def test_truncated_and_extended_sealed_bytes_are_refused(sealed):
    with pytest.raises(PeerError, match="does not open"):
        PREKEY.open(SEALER.public_key, sealed, *CONTEXT)


def test_the_list_of_low_order_points_is_complete():
    # On the curve or its twist, u has an order that divides 8 exactly if three doublings lead to infinity. The five
    # such u are 0, 1, -1 and the two roots of the order-8 condition; each has every encoding of 32 bytes listed.
    def doubles_away(u):
        x, z = u, 1
        for _ in range(3):
            x, z = (x * x - z * z) ** 2 % FIELD, 4 * x * z * (x * x + 486662 * x * z + z * z) % FIELD
        return z == 0

    listed = {int.from_bytes(bytes.fromhex(point), "little") for point in X25519["low_order"]}
    values = {point % 2**255 % FIELD for point in listed}
    assert all(doubles_away(u) for u in values)
    assert len(values) == 5
    assert not doubles_away(9)
    encodings = {u + k * FIELD for u in values for k in (0, 1) if u + k * FIELD < 2**255}
    assert listed == {e + top for e in encodings for top in (0, 2**255)}


@pytest.mark.parametrize("point", X25519["low_order"])
def test_a_low_order_point_is_refused_as_a_prekey_and_as_a_senders_key(point):
    with pytest.raises(PeerError, match=r"^prekey: not a usable X25519 key"):
        SEALER.seal(PrekeyPublic(bytes.fromhex(point), PREKEY.public.mlkem), PLAINTEXT, *CONTEXT)
    with pytest.raises(PeerError, match=r"^sealed share: not a usable X25519 key"):
        PREKEY.open(bytes.fromhex(point), SEALED, *CONTEXT)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_an_x25519_key_of_another_length_is_refused(size):
    with pytest.raises(PeerError, match=r"^prekey: "):
        SEALER.seal(PrekeyPublic(b"\x09" * size, PREKEY.public.mlkem), PLAINTEXT)
    with pytest.raises(PeerError, match=r"^sealed share: "):
        PREKEY.open(b"\x09" * size, SEALED, *CONTEXT)


@pytest.mark.parametrize("case", MLKEM["invalid_public_keys"], ids=[c["reason"] for c in MLKEM["invalid_public_keys"]])
def test_an_invalid_ml_kem_key_is_refused(case):
    with pytest.raises(PeerError, match="not a valid ML-KEM-768 public key"):
        encapsulate(bytes.fromhex(case["ek"]))
    sealer = Sealer(SENDER_SEED, encapsulate)
    with pytest.raises(PeerError, match="not a valid ML-KEM-768 public key"):
        sealer.seal(PrekeyPublic(PREKEY.public.x25519, bytes.fromhex(case["ek"])), PLAINTEXT)


@pytest.mark.parametrize("public", [b"", bytes(32), b"\xff" * MLKEM_PUBLIC_BYTES])
def test_bytes_that_are_no_ml_kem_key_are_refused(public):
    with pytest.raises(PeerError, match="not a valid ML-KEM-768 public key"):
        encapsulate(public)


def test_two_seals_with_fresh_coins_share_no_ciphertext():
    sealer = Sealer(SENDER_SEED, encapsulate)
    first, second = (sealer.seal(PREKEY.public, PLAINTEXT, *CONTEXT) for _ in range(2))
    assert first[:MLKEM_CIPHERTEXT_BYTES] != second[:MLKEM_CIPHERTEXT_BYTES]
    assert first[MLKEM_CIPHERTEXT_BYTES:] != second[MLKEM_CIPHERTEXT_BYTES:]


def test_two_members_get_unrelated_ciphertexts_of_the_same_share():
    other = Prekey(bytes(96)).public
    body, other_body = SEALED[MLKEM_CIPHERTEXT_BYTES:], SEALER.seal(other, PLAINTEXT, *CONTEXT)[MLKEM_CIPHERTEXT_BYTES:]
    assert body != other_body


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_sealing_seed_of_another_length_is_refused_unseen(size):
    seed = (SENDER_SEED * 2)[:size]
    with pytest.raises(ParameterError, match=f"32 bytes, not {size}") as caught:
        Sealer(seed, encapsulate)
    assert "the sender" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 32, 95, 97])
def test_a_prekey_seed_of_another_length_is_refused_unseen(size):
    seed = (b"secret! " * 13)[:size]
    with pytest.raises(ParameterError, match=f"{PREKEY_SEED_BYTES} bytes, not {size}") as caught:
        Prekey(seed)
    assert "secret" not in str(caught.value)


def test_no_secret_is_in_a_repr_an_error_or_a_pickle():
    texts = [repr(PREKEY), str(PREKEY), repr(SEALER), str(SEALER)]
    for call in (
        lambda: PREKEY.open(bytes(32), SEALED),
        lambda: PREKEY.open(SEALER.public_key, SEALED, b"other"),
        lambda: SEALER.seal(PrekeyPublic(bytes(32), PREKEY.public.mlkem), PLAINTEXT),
    ):
        with pytest.raises(PeerError) as caught:
            call()
        error = caught.value
        while error is not None:
            texts.append(repr(error))
            error = error.__cause__
    for secret in (SEED, SENDER_SEED, COINS, PLAINTEXT):
        for text in texts:
            assert secret[:8].hex() not in text
            assert repr(secret[:8])[2:-1] not in text
    assert PREKEY.public.x25519.hex()[:16] in repr(PREKEY)
    for holder in (PREKEY, SEALER):
        assert not hasattr(holder, "__dict__")
        with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
            pickle.dumps(holder)
