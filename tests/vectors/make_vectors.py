"""Write the test vectors: `python tests/vectors/make_vectors.py [DIRECTORY]`, by default beside this file.

Everything comes from fixed entropy, ML-KEM's coins included, so that two runs give the same bytes, and a difference to
what is checked in is a change of the protocol. An implementation in another language is held to the JSON alone:

- bytes are lower-case hex; integers are integers; there are no floating-point numbers outside of messages;
- bulk is given by its SHA-256 and length where its origin is in the file, whole where it is not;
- a case with "success": false must be refused, at the step that it names, for the reason of which the start of this
  project's wording is given; the state from before it stands.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from kyber_py.ml_kem import ML_KEM_768

from edge_sdk.crypto import masks, ring, sealing, shamir
from edge_sdk.crypto.gaussian import GaussianTable, gaussian_table
from edge_sdk.crypto.hashing import content_hash, derive_key, frame, tagged_hash
from edge_sdk.crypto.identity import Identity, check_signature
from edge_sdk.crypto.merkle import MerkleTree, check_inclusion, merkle_root
from edge_sdk.crypto.stream import KeyStream, uniform_residues
from edge_sdk.errors import SordinoError
from edge_sdk.protocol import aggregator, authority, contributor, member, messages, plan
from edge_sdk.protocol.anchors import Anchors
from edge_sdk.protocol.messages import (
    Abort,
    Anchor,
    Certificate,
    Complaint,
    Delivery,
    Envelope,
    Epoch,
    Frozen,
    Grouping,
    GroupResult,
    Header,
    Member,
    Message,
    NoisePlan,
    PrekeyOffer,
    Receipt,
    Release,
    Seal,
    SealedShare,
    SealSignature,
    Signed,
    Ticket,
    Transcript,
    Work,
    encode,
    label_of,
    message_hash,
    sign,
    wrap,
)
from edge_sdk.protocol.rounds import Round, prekey_public, share_context

Json = dict[str, Any]
INLINE_BYTES = 2048
LATE_S = 1_000_000  # prekeys and epochs outlive every ticket here
"""Replies up to this size are written out; larger ones by hash: what they are made of is in the file."""


def fixed(name: str, number: int = 0, length: int = 32) -> bytes:
    """Entropy for the vectors: nothing up the sleeve."""
    return hashlib.shake_256(f"sordino vectors/{name}/{number}".encode()).digest(length)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def little(array: np.ndarray[Any, Any], kind: str) -> bytes:
    return array.astype(kind).tobytes()


def refusal(call: Callable[[], object], reason: str) -> Json:
    """What a failing case says, after the code did refuse for that reason."""
    try:
        call()
    except SordinoError as error:
        if reason not in str(error):
            raise AssertionError(f"refused for another reason: {error}") from error
        named = next(kind for kind in type(error).__mro__ if kind.__module__ == SordinoError.__module__)
        return {"success": False, "error": named.__name__, "reason": reason}
    raise AssertionError(f"not refused: {reason}")


# --- Cryptography --------------------------------------------------------------------------------------------------


def hashing_vectors() -> Json:
    cases: list[Json] = []
    splits: list[tuple[str, list[bytes]]] = [
        ("no parts", []),
        ("one empty part", [b""]),
        ("ab, c", [b"ab", b"c"]),
        ("a, bc", [b"a", b"bc"]),
        ("abc", [b"abc"]),
        ("300 bytes", [bytes(range(256)) + bytes(44)]),
    ]
    for name, parts in splits:
        given: Json = {"success": True, "name": name, "label": "beacon", "parts": [part.hex() for part in parts]}
        cases.append({**given, "operation": "frame", "result": frame("beacon", *parts).hex()})
        cases.append({**given, "operation": "tagged_hash", "result": tagged_hash("beacon", *parts).hex()})
        secret = fixed("secret")
        cases.append(
            {
                **given, "operation": "derive_key", "secret": secret.hex(), "length": 42,
                "result": derive_key(secret, "beacon", *parts, length=42).hex(),
            }
        )  # fmt: skip
    for name, short, length in (
        ("a secret of 31 bytes", fixed("secret")[:31], 32),
        ("more than HKDF can give", fixed("secret"), 8161),
    ):
        cases.append(
            {
                "name": name, "operation": "derive_key", "step": "derive_key", "label": "beacon", "parts": [],
                "secret": short.hex(), "length": length,
                **refusal(
                    lambda s=short, n=length: derive_key(s, "beacon", length=n),
                    f"a key of {length} bytes from {len(short)}",
                ),
            }
        )  # fmt: skip
    content = fixed("content", length=100)
    cases.append(
        {
            "success": True, "name": "a blob's address", "operation": "content_hash", "content": content.hex(),
            "result": content_hash(content).hex(),
        }
    )  # fmt: skip
    return {"about": "Framing, hashing and key derivation.", "cases": cases}


def stream_vectors() -> Json:
    key = fixed("stream")
    cases: list[Json] = []
    for index in (0, 1, 2**32, 2**96 - 1):
        stream = KeyStream(key, index)
        reads = [stream.read(count).tobytes().hex() for count in (5, 60, 7)]
        cases.append(
            {
                "success": True, "name": f"reads follow one another, index {index}", "operation": "read",
                "key": key.hex(), "index": str(index), "counts": [5, 60, 7], "result": reads,
            }
        )  # fmt: skip
    cases.append(
        {
            "success": True, "name": "words, 16 then 64 bits", "operation": "words", "key": key.hex(),
            "words16": KeyStream(key).words16(8).tolist(),
            "words64": [f"{word:016x}" for word in KeyStream(key).words64(4).tolist()],
        }
    )  # fmt: skip
    for modulus, count in ((1, 4), (2, 16), (65521, 16), (65521, 5000), (40000, 300), (65536, 8)):
        values = uniform_residues(KeyStream(key), modulus, count)
        cases.append(
            {
                "success": True, "name": f"{count} residues modulo {modulus}", "operation": "residues",
                "key": key.hex(), "modulus": modulus, "count": count, "first": values[:16].tolist(),
                "last": values[-4:].tolist(), "sha256_of_u16": sha256(little(values, "<u2")),
            }
        )  # fmt: skip
    for modulus in (0, 65537):
        cases.append(
            {
                "name": f"no residues modulo {modulus}", "operation": "residues", "key": key.hex(),
                "modulus": modulus, "count": 1, "step": "uniform_residues",
                **refusal(lambda m=modulus: uniform_residues(KeyStream(key), m, 1), f"modulus {modulus} is not in"),
            }
        )  # fmt: skip
    cases.append(
        {
            "name": "a key of 31 bytes", "operation": "read", "key": key[:31].hex(), "index": "0", "counts": [1],
            "step": "key", **refusal(lambda: KeyStream(key[:31]), "a stream key has 32 bytes"),
        }
    )  # fmt: skip
    cases.append(
        {
            "name": "an index of 97 bits", "operation": "read", "key": key.hex(), "index": str(2**96), "counts": [1],
            "step": "index", **refusal(lambda: KeyStream(key, 2**96), "a stream index lies in [0, 2^96)"),
        }
    )  # fmt: skip
    return {"about": "ChaCha20 as a generator, and exactly uniform residues.", "cases": cases}


def gaussian_vectors() -> Json:
    table = gaussian_table(masks.SIGMA_NUMERATOR, masks.SIGMA_DENOMINATOR)
    cases: list[Json] = [
        {
            "success": True, "name": "the table for sigma = 9/2", "operation": "table", "numerator": 9,
            "denominator": 2, "bound": table.bound, "boundaries": [f"{b:032x}" for b in table.boundaries],
            "sha256_of_i8_table": sha256(table.table.tobytes()), "undecided_prefixes": int((table.table == -128).sum()),
        }
    ]  # fmt: skip
    for position in (0, 40, table.bound, table.bound + 1, 80, len(table.boundaries) - 1):
        boundary = table.boundaries[position]
        for value in (boundary - 1, boundary):
            prefix, high, low = value >> 112, value >> 64 & (1 << 48) - 1, value & (1 << 64) - 1
            cases.append(
                {
                    "success": True, "name": f"{'at' if value == boundary else 'below'} boundary {position}",
                    "operation": "settle", "uniform": f"{value:032x}", "result": table.settle(prefix, high, low),
                }
            )  # fmt: skip
    for number, count in enumerate((3, 64, 100_000)):
        key = fixed("gaussian", number)
        stream = KeyStream(key)
        samples = table.sample(stream, count)
        cases.append(
            {
                "success": True, "name": f"{count} samples", "operation": "sample", "key": key.hex(), "count": count,
                "first": samples[:64].tolist(), "sha256_of_i8": sha256(samples.tobytes()),
                "next_stream_bytes": stream.read(8).tobytes().hex(),
            }
        )  # fmt: skip
    for numerator, denominator in ((0, 1), (19, 2), (-9, 2), (9, 0)):
        cases.append(
            {
                "name": f"sigma = {numerator}/{denominator}", "operation": "table", "step": "table",
                "numerator": numerator, "denominator": denominator,
                **refusal(lambda n=numerator, d=denominator: GaussianTable(n, d), "is not in (0, 9]"),
            }
        )  # fmt: skip
    return {"about": "The discrete Gaussian of the mask's secrets and errors.", "cases": cases}


def sparse(coefficients: Mapping[int, int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    dense = np.zeros(ring.DEGREE, dtype=np.int64)
    for position, value in coefficients.items():
        dense[position] = value
    return dense


def edges(blocks: np.ndarray[Any, Any]) -> Json:
    flat = blocks.reshape(-1)
    return {
        "first": flat[:8].tolist(),
        "last": flat[-8:].tolist(),
        "count": int(flat.size),
        "sha256_of_u32": sha256(little(flat, "<u4")),
    }


def masks_vectors() -> Json:
    cases: list[Json] = []
    tid = fixed("tid")
    public = ring.public_blocks(masks._public_stream(tid), 17)
    cases.append(
        {"success": True, "name": "17 blocks", "operation": "public", "tid": tid.hex(), "blocks": 17, **edges(public)}
    )
    factors = {
        "one": {0: 1},
        "X": {1: 1},
        "X^2047, which wraps with a sign": {2047: 1},
        "a few": {0: 3, 1: -2, 1024: 7, 2047: -11},
        "at the limit of a factor": {0: 10**6, 5: -(10**6), 2047: 999_999},
    }
    key = fixed("factor block")
    for name, factor in factors.items():
        block = ring.public_blocks(KeyStream(key), 1)
        out = np.empty_like(block)
        ring.ShortFactor(sparse(factor)).multiply_into(block, out)
        cases.append(
            {
                "success": True, "name": f"product with {name}", "operation": "product", "block_key": key.hex(),
                "factor": {str(k): v for k, v in factor.items()}, **edges(out),
            }
        )  # fmt: skip
    for limit in (10**6 + 1, -(10**6) - 1):
        cases.append(
            {
                "name": f"a coefficient of {limit}", "operation": "product", "block_key": key.hex(),
                "factor": {"7": limit}, "step": "factor",
                **refusal(lambda v=limit: ring.ShortFactor(sparse({7: v})), "must not pass 10^6"),
            }
        )  # fmt: skip
    total = np.zeros((17, ring.DEGREE), dtype=np.uint32)
    secrets = np.zeros(ring.DEGREE, dtype=np.int64)
    plain = np.zeros_like(total)
    parties = []
    for number in range(3):
        entropy, message_key = fixed("mask entropy", number), fixed("mask message", number)
        message = ring.public_blocks(KeyStream(message_key), 17) & np.uint32(0xFFFF_F000)
        plain += message
        secret = masks.expand_secret(entropy, tid)
        masks.add_mask(message, secret, entropy, tid)
        parties.append({"entropy": entropy.hex(), "message_key": message_key.hex()})
        cases.append(
            {
                "success": True, "name": f"mask of party {number}, over two segments", "operation": "mask",
                "tid": tid.hex(), **parties[-1], "message_and": 0xFFFF_F000, "blocks": 17,
                "secret_first": secret[:32].tolist(), "secret_sha256_of_i8": sha256(little(secret, "<i1")),
                **edges(message),
            }
        )  # fmt: skip
        total += message
        secrets += secret
    masks.remove_mask(total, secrets, tid)
    cases.append(
        {
            "success": True, "name": "the sum, unmasked: messages and small errors", "operation": "unmask",
            "tid": tid.hex(), "parties": parties, "message_and": 0xFFFF_F000, "blocks": 17, **edges(total),
            "largest_error": int(np.abs((total - plain).view(np.int32)).max()),
        }
    )  # fmt: skip
    return {"about": "The ring Z_2^32[X]/(X^2048+1), the public polynomial and masks.", "cases": cases}


def shamir_vectors() -> Json:
    cases: list[Json] = []
    for sources, target, modulus in (([1, 2, 3], 0, 65521), ([0, -1, 1, 2], 5, 65521), ([1, 3], 0, 2**255 - 19)):
        cases.append(
            {
                "success": True, "name": f"Lagrange {sources} to {target}", "operation": "lagrange",
                "sources": sources, "target": target, "modulus": str(modulus),
                "result": [str(w) for w in shamir.lagrange(sources, target, modulus)],
            }
        )  # fmt: skip
    cases.append(
        {
            "name": "a point twice", "operation": "lagrange", "sources": [1, 2, 65522], "target": 0,
            "modulus": "65521", "step": "lagrange",
            **refusal(lambda: shamir.lagrange([1, 2, 65522], 0), "are not distinct"),
        }
    )  # fmt: skip
    for m, c, rho in ((1, 1, 1), (4, 0, 1), (4, 1, 0), (4, 3, 2), (257, 3, 1)):
        cases.append(
            {
                "name": f"m={m} c={c} rho={rho}", "operation": "share", "members": m, "corrupt": c, "packing": rho,
                "secrets": [], "key": fixed("sharing").hex(), "step": "parameters",
                **refusal(lambda a=m, b=c, d=rho: shamir.PackedShamir(a, b, d), "no sharing with"),
            }
        )  # fmt: skip
    for m, c, rho, wrong_sets in (
        (5, 1, 1, [[], [2], [4, 5]]),
        (7, 2, 1, [[1, 7], [1, 2, 3]]),
        (30, 15, 8, [[3, 9, 30]]),
    ):
        scheme = shamir.PackedShamir(m, c, rho)
        key = fixed("sharing", m)
        secrets = (np.arange(3 * rho, dtype=np.int64) * 7 - 20) * (-1) ** np.arange(3 * rho)
        shares = scheme.share(secrets, KeyStream(key))
        given: Json = {"members": m, "corrupt": c, "packing": rho}
        cases.append(
            {
                "success": True, "name": f"sharing among {m}, c={c}, rho={rho}", "operation": "share", **given,
                "secrets": secrets.tolist(), "key": key.hex(), "shares": shares.tolist(),
            }
        )  # fmt: skip
        for wrong in wrong_sets:
            answers = {n: shares[n - 1].copy() for n in range(1, m + 1)}
            for n in wrong:
                answers[n] = (answers[n] + 1000 * n + np.arange(3)) % shamir.PRIME
            cases.append(reconstruction(f"{wrong} of {m} answer wrong", scheme, given, answers))
        few = {n: shares[n - 1] for n in range(m, m - scheme.threshold, -1)}
        cases.append(reconstruction(f"the last {scheme.threshold} of {m} answer", scheme, given, few))
        del few[m]
        cases.append(reconstruction(f"one answer too few of {m}", scheme, given, few))
    scheme = shamir.PackedShamir(4, 2, 1)
    garbled = {n: np.array([n * n * n * 9973 % shamir.PRIME], dtype=np.int64) for n in range(1, 5)}
    cases.append(
        reconstruction("nothing fits", scheme, {"members": 4, "corrupt": 2, "packing": 1}, garbled)
    )  # fmt: skip
    return {
        "about": "Packed Shamir sharing over F_65521. 'reconstruct' gives the first candidate whose secrets are all of "
        "magnitude at most `limit`, and the members that are not on its polynomials.",
        "cases": cases,
    }


def reconstruction(name: str, scheme: shamir.PackedShamir, given: Json, answers: Mapping[int, Any]) -> Json:
    limit = 500
    case: Json = {
        "name": name, "operation": "reconstruct", **given, "limit": limit,
        "answers": {str(n): value.tolist() for n, value in answers.items()},
    }  # fmt: skip
    if len(answers) < scheme.threshold:
        reason = f"{len(answers)} answers, {scheme.threshold} needed"
        failed = refusal(lambda: next(scheme.candidates(answers, lambda s: True)), reason)
        return {**case, "step": "reconstruct", **failed}
    small = lambda secrets: bool(np.abs(secrets).max() <= limit)  # noqa: E731
    for secrets, disagree in scheme.candidates(answers, small):
        if small(secrets):
            return {**case, "success": True, "result": secrets.tolist(), "disagreeing": sorted(disagree)}
    return {**case, "success": False, "step": "reconstruct", "error": "none", "reason": "no candidate is short"}


LOW_ORDER = "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"
"""A point of order 8 on Curve25519 (RFC 7748 section 7's check is for these)."""


def coins_of(coins: bytes) -> Callable[[bytes], tuple[bytes, bytes]]:
    def encapsulate(public: bytes) -> tuple[bytes, bytes]:
        pair: tuple[bytes, bytes] = ML_KEM_768._encaps_internal(public, coins)
        return pair

    return encapsulate


def sealing_vectors() -> Json:
    seed, sender_seed, coins = fixed("prekey", length=96), fixed("sender"), fixed("coins")
    prekey = sealing.Prekey(seed)
    context = (fixed("tid"), (7).to_bytes(4, "little"), b"")
    sealer = sealing.Sealer(sender_seed, coins_of(coins))
    plaintext = fixed("plaintext", length=50)
    sealed = sealer.seal(prekey.public, plaintext, *context)
    given: Json = {
        "operation": "open", "prekey_seed": seed.hex(), "sender_key": sealer.public_key.hex(),
        "context": [part.hex() for part in context], "sealed": sealed.hex(),
    }  # fmt: skip
    cases: list[Json] = [
        {
            "success": True, "name": "sealing with given coins", **given, "operation": "seal",
            "sender_seed": sender_seed.hex(), "coins": coins.hex(), "prekey_x25519": prekey.public.x25519.hex(),
            "prekey_mlkem": prekey.public.mlkem.hex(), "plaintext": plaintext.hex(),
        },
        {"success": True, "name": "opening", **given, "plaintext": plaintext.hex()},
    ]  # fmt: skip
    tag_off, ciphertext_off = bytearray(sealed), bytearray(sealed)
    tag_off[-1] ^= 1
    ciphertext_off[0] ^= 1
    does_not_open = "does not open under this prekey, sender and context"
    other = sealing.Sealer(fixed("sender", 1), coins_of(coins)).public_key
    faults: list[tuple[str, Json, str]] = [
        ("a bit of the tag", {"sealed": bytes(tag_off).hex()}, does_not_open),
        ("a bit of the ML-KEM ciphertext", {"sealed": bytes(ciphertext_off).hex()}, does_not_open),
        ("one byte short", {"sealed": sealed[:-1].hex()}, does_not_open),
        ("shorter than its overhead", {"sealed": sealed[:1103].hex()}, "1103 bytes is too short"),
        ("another sender", {"sender_key": other.hex()}, does_not_open),
        ("another prekey", {"prekey_seed": fixed("prekey", 1, 96).hex()}, does_not_open),
        ("another context", {"context": [*given["context"][:2], "00"]}, does_not_open),
        ("parts of the context moved", {"context": ["", *given["context"][:2]]}, does_not_open),
        ("a sender key of zero", {"sender_key": bytes(32).hex()}, "not a usable X25519 key"),
        ("a sender key of order 8", {"sender_key": LOW_ORDER}, "not a usable X25519 key"),
        ("a sender key of 31 bytes", {"sender_key": bytes(31).hex()}, "not a usable X25519 key"),
    ]
    for name, changed, reason in faults:
        case = {**given, **changed}
        failed = refusal(lambda c=case: open_case(c), reason)
        cases.append({"name": name, "operation": "open", "step": "open", "like": "opening", **changed, **failed})
    for name, public, reason in (
        ("a prekey point of order 8", (bytes.fromhex(LOW_ORDER), prekey.public.mlkem), "not a usable X25519 key"),
        ("an ML-KEM key that is not reduced", (prekey.public.x25519, b"\xff" * 1184), "not a valid ML-KEM-768"),
        ("an ML-KEM key of another length", (prekey.public.x25519, prekey.public.mlkem[:-1]), "not a valid ML-KEM-768"),
    ):
        point, lattice = public
        case = {
            "operation": "seal", "sender_seed": sender_seed.hex(), "prekey_x25519": point.hex(),
            "prekey_mlkem": lattice.hex(), "plaintext": plaintext.hex(), "context": given["context"],
        }  # fmt: skip
        cases.append({"name": name, "step": "seal", **case, **refusal(lambda c=case: seal_case(c), reason)})
    return {
        "about": "Shares sealed to hybrid prekeys, X25519 and ML-KEM-768. A case that is 'like' another has its fields "
        "where it gives none of its own.",
        "cases": cases,
    }


def open_case(case: Json) -> bytes:
    prekey = sealing.Prekey(bytes.fromhex(case["prekey_seed"]))
    context = [bytes.fromhex(part) for part in case["context"]]
    return prekey.open(bytes.fromhex(case["sender_key"]), bytes.fromhex(case["sealed"]), *context)


def seal_case(case: Json) -> bytes:
    public = sealing.PrekeyPublic(bytes.fromhex(case["prekey_x25519"]), bytes.fromhex(case["prekey_mlkem"]))
    encapsulate = coins_of(bytes.fromhex(case["coins"])) if "coins" in case else sealing.encapsulate
    sealer = sealing.Sealer(bytes.fromhex(case["sender_seed"]), encapsulate)
    return sealer.seal(public, bytes.fromhex(case["plaintext"]), *(bytes.fromhex(part) for part in case["context"]))


def identity_vectors() -> Json:
    seed = fixed("identity")
    identity = Identity(seed)
    cases: list[Json] = []
    for label, body in (("ticket", b""), ("ticket", b"body"), ("header", b"body")):
        cases.append(
            {
                "success": True, "name": f"{label}, {len(body)} bytes", "operation": "sign", "seed": seed.hex(),
                "public_key": identity.public_key.hex(), "label": label, "body": body.hex(),
                "signature": identity.sign(label, body).hex(),
            }
        )  # fmt: skip
    given = {"public_key": identity.public_key, "body": b"body", "signature": identity.sign("ticket", b"body")}
    flipped = bytes([given["signature"][0] ^ 1]) + given["signature"][1:]
    for name, label, changed in (
        ("another label", "header", {}),
        ("another body", "ticket", {"body": b"bodY"}),
        ("another key", "ticket", {"public_key": Identity(fixed("identity", 1)).public_key}),
        ("a key that is no point", "ticket", {"public_key": b"\x02" + bytes(31)}),
        ("a flipped bit", "ticket", {"signature": flipped}),
        ("a signature of 63 bytes", "ticket", {"signature": flipped[:63]}),
        ("a signature of zeros", "ticket", {"signature": bytes(64)}),
    ):
        parts = {**given, **changed}
        cases.append(
            {
                "name": name, "operation": "verify", "step": "verify", "label": label,
                **{key: value.hex() for key, value in parts.items()},
                **refusal(
                    lambda p=parts, n=label: check_signature(p["public_key"], n, p["body"], p["signature"]),
                    f"{label}: the signature is not valid under key",
                ),
            }
        )  # fmt: skip
    return {"about": "Ed25519 over framed, labelled bytes.", "cases": cases}


def merkle_vectors() -> Json:
    cases: list[Json] = []
    for size in (1, 2, 3, 5, 8, 13):
        leaves = [fixed("leaf", i, i % 5) for i in range(size)]
        tree = MerkleTree(leaves)
        cases.append(
            {
                "success": True, "name": f"a tree of {size}", "operation": "tree", "leaves": [x.hex() for x in leaves],
                "root": tree.root.hex(), "proofs": [[h.hex() for h in tree.proof(i)] for i in range(size)],
            }
        )  # fmt: skip
    leaves = [fixed("leaf", i) for i in range(5)]
    tree = MerkleTree(leaves)
    for name, index, size, content, proof in (
        ("another leaf's content", 2, 5, leaves[3], tree.proof(2)),
        ("another place", 3, 5, leaves[2], tree.proof(2)),
        ("another leaf's proof", 2, 5, leaves[2], tree.proof(1)),
        ("a hash too few", 2, 5, leaves[2], tree.proof(2)[:-1]),
        ("a hash too many", 2, 5, leaves[2], (*tree.proof(2), bytes(32))),
        ("outside the tree", 5, 5, leaves[4], tree.proof(4)),
        ("a tree of another size", 2, 3, leaves[2], tree.proof(2)),
        ("an inner node as a leaf", 0, 3, tree._levels[0][0] + tree._levels[0][1], tree.proof(0)[1:]),
    ):
        cases.append(
            {
                "name": name, "operation": "inclusion", "step": "inclusion", "root": tree.root.hex(), "size": size,
                "index": index, "content": content.hex(), "proof": [h.hex() for h in proof],
                **refusal(
                    lambda s=size, i=index, c=content, p=proof: check_inclusion(tree.root, s, i, c, p),
                    "inclusion proof: ",
                ),
            }
        )  # fmt: skip
    return {"about": "Merkle trees as in RFC 9162 section 2.1.", "cases": cases}


def plan_vectors() -> Json:
    cases: list[Json] = []
    for kind, m, roster, corrupt in (
        ("everyone", 4, 4, 1), ("everyone", 5, 5, 1), ("everyone", 10, 10, 3), ("everyone", 20, 20, 6),
        ("helpers", 3, 50, 5), ("helpers", 4, 50, 5), ("helpers", 5, 1000, 50), ("helpers", 7, 1000, 50),
        ("drawn", 30, 1000, 50), ("drawn", 40, 1000, 50), ("drawn", 100, 10_000, 500), ("drawn", 64, 1 << 20, 10_000),
    ):  # fmt: skip
        t = plan.thresholds(kind, m, roster, corrupt)  # type: ignore[arg-type]
        cases.append(
            {
                "success": True, "name": f"{kind}, {m} of {roster}", "operation": "thresholds", "committee": kind,
                "members": m, "roster": roster, "corrupt_devices": corrupt, "corrupt": t.corrupt,
                "packing": t.packing, "quorum": t.quorum, "answers": t.answers, "may_be_absent": t.may_be_absent,
                "polynomials": t.polynomials,
            }
        )  # fmt: skip
    for kind, m, roster, corrupt, reason in (
        ("everyone", 3, 3, 1, "cannot be its own committee"),
        ("everyone", 4, 5, 1, "'everyone' means all 5"),
        ("everyone", 10, 10, 4, "tolerates 3"),
        ("helpers", 2, 50, 5, "pin at least 3"),
        ("drawn", 11, 10, 1, "cannot draw 11"),
        ("drawn", 5, 100, 50, "leave no quorum"),
    ):
        cases.append(
            {
                "name": f"{kind}, {m} of {roster}, {corrupt} corrupt", "operation": "thresholds", "step": "thresholds",
                "committee": kind, "members": m, "roster": roster, "corrupt_devices": corrupt,
                **refusal(lambda a=kind, b=m, c=roster, d=corrupt: plan.thresholds(a, b, c, d), reason),
            }
        )  # fmt: skip
    for n_max in (2, 3, 4, 9, 10, 100, 161, 162, 647, 648, 1000, 10_000):
        cases.append(
            {
                "success": True, "name": f"n_max = {n_max}", "operation": "delta_bits", "n_max": n_max,
                "result": plan.delta_bits(n_max),
            }
        )  # fmt: skip
    for roster, corrupt, groups in ((100, 5, 1), (100, 5, 4), (1000, 50, 4), (1000, 50, 16), (10_000, 100, 64)):
        cases.append(
            {
                "success": True, "name": f"{corrupt} of {roster} in {groups} groups", "operation": "corrupt_in_group",
                "roster": roster, "corrupt_devices": corrupt, "groups": groups,
                "result": plan.corrupt_in_group(roster, corrupt, groups),
            }
        )  # fmt: skip
    for dimension, bits in ((1, 7), (2031, 8), (2032, 8), (100_000, 10)):
        layout = plan.Layout(dimension, bits)
        values = np.arange(dimension, dtype=np.int64) * 77_777 - 500
        coded = layout.encode(values).reshape(-1)
        cases.append(
            {
                "success": True, "name": f"{dimension} integers, Delta = 2^{bits}", "operation": "layout",
                "dimension": dimension, "delta_bits": bits, "modulus_bits": layout.modulus_bits,
                "blocks": layout.blocks, "masked_bytes": layout.masked_bytes,
                "integer_i": "77777 i - 500", "sha256_of_u32": sha256(little(coded, "<u4")),
            }
        )  # fmt: skip
        cases.append(
            {
                "name": f"a masked vector of {layout.masked_bytes - 1} bytes", "operation": "from_bytes",
                "step": "from_bytes", "dimension": dimension, "delta_bits": bits, "bytes": layout.masked_bytes - 1,
                **refusal(lambda x=layout: x.from_bytes(bytes(x.masked_bytes - 1)), "masked vector: "),
            }
        )  # fmt: skip
    return {"about": "Numbers that both sides derive: thresholds, Delta, layout. Integers only.", "cases": cases}


# --- Messages and epochs -------------------------------------------------------------------------------------------


def signed_json(signed: Signed) -> Json:
    return {"body": signed.body.hex(), "signature": signed.signature.hex()}


def fields_json(value: object) -> Any:
    """A message as JSON: bytes in hex, fields by name, floats in Python's shortest notation as text."""
    if isinstance(value, Message):
        return {name: fields_json(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list | tuple):
        return [fields_json(item) for item in value]
    return value


def messages_vectors() -> Json:
    author = Identity(fixed("author"))
    key, other = author.public_key, Identity(fixed("author", 1)).public_key
    tid, digest = fixed("tid"), fixed("digest")
    frozen = Frozen(1, key, 3, fixed("previous"), other, fixed("root"), 1000, 50, "helpers", 3, sorted([key, other]),
                    LATE_S)  # fmt: skip
    offer = PrekeyOffer(key, other, 2**53 - 1, fixed("x25519"), fixed("mlkem", length=1184), 2**40 - 1)
    noise = NoisePlan("example", 0.1, 1e-4, 100.0, 0.05, 2.5, 1.0, 0.3)
    work = Work(0.125, 0, 0, 0.0, 0)
    header = Header(
        tid,
        1048575,
        key,
        [digest, tid],
        1,
        fixed("sealing key"),
        fixed("masked"),
        fixed("shares"),
        Anchor(2**53 - 1, fixed("link")),
    )
    certificate = Certificate(tid, digest, [(1, fixed("signature", 1, 64)), (256, fixed("signature", 2, 64))])
    examples: list[Message] = [
        frozen,
        Epoch(frozen, fixed("entropy"), [Member(key, None), Member(other, 65536)], [Grouping(1, 50), Grouping(2, 49)]),
        offer,
        noise,
        work,
        Ticket(
            1, fixed("epoch"), "fashion-mnist.v1", 127, fixed("previous"), fixed("bundle"), fixed("parameters"),
            1 << 27, 10_000, 128, 64, noise, work, [sign(author, offer)], 1_800_000_000, (1 << 40) - 1,
        ),
        header.ledger,
        header,
        SealedShare(fixed("sealed", length=40), [digest]),
        Delivery(tid, [(sign(author, header), SealedShare(b"\x00", [])), (sign(author, header), None)]),
        Complaint(tid, 255, [0, 127, 128, 65535, 65536]),
        Receipt(tid, 256, digest),
        Seal(tid, [[(0, digest), (1048575, tid)], []]),
        SealSignature(tid, digest, 256),
        certificate,
        Release(tid, digest, 1, [bytes(range(64)), None]),
        Abort(tid, "too late: 3 of 5 \u2265 4"),
        GroupResult(3, None, "the padding is not zero"),
        Transcript(tid, digest, certificate, [GroupResult(3, digest, ""), GroupResult(0, None, "left out")]),
        Envelope("ticket", b"\x90"),
        Signed(b"\xc0", bytes(64)),
    ]  # fmt: skip
    cases: list[Json] = []
    for message in examples:
        kind, body = type(message), encode(message)
        case: Json = {
            "success": True, "name": label_of(kind), "operation": "decode", "kind": label_of(kind),
            "fields": fields_json(message), "encoded": body.hex(), "hash": message_hash(kind, body).hex(),
        }  # fmt: skip
        if kind in messages.SIGNED:
            case |= {"author_key": key.hex(), "signature": sign(author, message).signature.hex()}
            case["wire_sha256"] = sha256(wrap(kind, sign(author, message)))
        elif kind in messages.PLAIN:
            case["wire_sha256"] = sha256(wrap(kind, message))
        cases.append(case)

    def refuse(name: str, kind: type[Message], data: bytes, reason: str) -> None:
        failed = refusal(lambda: messages.decode(kind, data), reason)
        given = {"name": name, "operation": "decode", "step": "decode", "kind": label_of(kind), "encoded": data.hex()}
        cases.append({**given, **failed})

    pack = msgspec.msgpack.encode
    grouping = encode(Grouping(1, 50))
    receipt = encode(Receipt(tid, 256, digest))
    canonical = "not in its one canonical encoding"
    refuse("no bytes", Grouping, b"", "grouping: ")
    refuse("a byte after the end", Grouping, grouping + b"\x00", "grouping: ")
    refuse("a byte short", Grouping, grouping[:-1], "grouping: ")
    refuse("a field missing", Grouping, pack([1]), "grouping: ")
    refuse("a field too many", Grouping, pack([1, 50, 50]), "grouping: ")
    refuse("a map for an array", Grouping, pack({"groups": 1, "corrupt": 50}), "grouping: ")
    refuse("a small integer in 16 bits", Grouping, b"\x92\xcd\x00\x01\x32", canonical)
    refuse("a small integer in 8 bits", Grouping, b"\x92\xcc\x01\x32", canonical)
    refuse("a small integer as a signed one", Grouping, b"\x92\xd0\x01\x32", canonical)
    refuse("a small array with 16 bits of length", Grouping, b"\xdc\x00\x02\x01\x32", canonical)
    refuse("a small array with 32 bits of length", Grouping, b"\xdd\x00\x00\x00\x02\x01\x32", canonical)
    refuse("an array said to be of 2^32 - 1", Grouping, b"\xdd\xff\xff\xff\xff\x01\x32", "grouping: ")
    refuse("an integer as a float", Grouping, pack([1.0, 50]), "grouping: ")
    refuse("a truth value for an integer", Grouping, pack([True, 50]), "grouping: ")
    refuse("text for an integer", Grouping, pack(["1", 50]), "grouping: ")
    refuse("an integer below its limit", Grouping, pack([0, 50]), "grouping: ")
    refuse("an integer above its limit", Grouping, pack([65, 50]), "grouping: ")
    refuse("an integer of 64 bits", Grouping, pack([2**64 - 1, 50]), "grouping: ")
    refuse("a negative integer", Grouping, pack([-1, 50]), "grouping: ")
    refuse("an extension type", Grouping, b"\x92\xd4\x01\x01\x32", "grouping: ")
    refuse("deep nesting", Grouping, b"\x91" * 600 + b"\xc0", "grouping: ")
    refuse("a hash of 31 bytes", Receipt, pack([tid[1:], 256, digest]), "receipt: ")
    refuse("a hash of 33 bytes", Receipt, pack([tid + b"\0", 256, digest]), "receipt: ")
    refuse("text for bytes", Receipt, pack(["a" * 32, 256, digest]), "receipt: ")
    refuse("bytes with 16 bits of length", Receipt, receipt.replace(b"\xc4\x20", b"\xc5\x00\x20", 1), canonical)
    refuse("a sender beyond any roster", Receipt, pack([tid, 1 << 20, digest]), "receipt: ")
    one = b"\xcb" + bytes.fromhex("3ff0000000000000")
    refuse(
        "a float of 32 bits",
        NoisePlan,
        b"\x98\xa6device\xca" + bytes.fromhex("3f800000") + 6 * one,
        canonical,
    )
    for name, bits in (
        ("not a number", "7ff8000000000000"), ("infinity", "7ff0000000000000"), ("minus zero", "8000000000000000"),
        ("zero", "0000000000000000"), ("a negative number", "bff0000000000000"), ("1e30", "46293e5939a08cea"),
    ):  # fmt: skip
        refuse(f"{name} as a clip", NoisePlan, b"\x98\xa6device\xcb" + bytes.fromhex(bits) + 6 * one, "noiseplan: ")
    refuse("an unknown privacy unit", NoisePlan, pack(["user"] + 7 * [1.0]), "noiseplan: ")
    for position, value in ((4, -0.0), (4, -1.0), (4, math.nan), (5, 0.0), (6, 0.0), (6, 1.5), (7, 0.0), (7, math.nan)):
        changed = ["device"] + 7 * [1.0]
        changed[position] = value
        field_name = NoisePlan.__struct_fields__[position]
        refuse(f"noise plan: {field_name} {value}", NoisePlan, pack(changed), "noiseplan: ")
    for position, wrong in ((0, -0.0), (0, math.inf), (1, -1), (1, 1_000_001), (2, 1.0), (3, -0.0), (4, 1 << 53)):
        changed = [0.5, 1, 0, 0.0, 0]
        changed[position] = wrong
        refuse(f"work: {Work.__struct_fields__[position]} {wrong}", Work, pack(changed), "work: ")
    refuse("no group", Seal, pack([tid, []]), "seal: ")
    refuse("an entry of three", Seal, pack([tid, [[[0, digest, 0]]]]), "seal: ")
    refuse("no reason", Abort, pack([tid, ""]), "abort: ")
    refuse("text that is not UTF-8", Abort, b"\x92\xc4\x20" + tid + b"\xa1\xff", "abort: ")
    ticket = msgspec.msgpack.decode(encode(next(x for x in examples if isinstance(x, Ticket))))
    for name, position, value in (
        ("another version", 0, 2), ("an empty task", 2, ""), ("a task in capitals", 2, "A"),
        ("a task with a line end", 2, "a\n"),
        ("no dimension", 7, 0), ("a dimension too large", 7, (1 << 27) + 1), ("one honest device", 9, 1),
        ("a deadline too late", 14, 1 << 40),
    ):  # fmt: skip
        changed = [*ticket]
        changed[13] = [[b"", bytes(64)]]
        changed[position] = value
        refuse(f"ticket: {name}", Ticket, pack(changed), "ticket: ")
    for name, data, reason in (
        ("an envelope of a kind that does not travel", encode(Envelope("frozen", encode(frozen))), "no message is"),
        ("an envelope with capitals", encode(Envelope("Ticket", b"\x90")), "no message is called 'Ticket'"),
        ("an author's kind without a signature", encode(Envelope("receipt", receipt)), "signed: "),
        ("a signed kind that has no author", encode(Envelope("certificate", encode(sign(author, certificate)))),
         "certificate: "),
        ("an envelope in another encoding", b"\xdc\x00\x02" + encode(Envelope("ticket", b"\x90"))[1:], canonical),
    ):  # fmt: skip
        cases.append(
            {
                "name": name, "operation": "unwrap", "step": "unwrap", "wire": data.hex(),
                **refusal(lambda d=data: messages.unwrap(d), reason),
            }
        )  # fmt: skip
    return {
        "about": "Every kind of message: fields, encoding, hash, the author's signature; and what must not decode.",
        "cases": cases,
    }


@dataclass
class Fleet:
    """Everybody's keys, and the epoch."""

    name: str
    committee: Any
    corrupt: int
    group_counts: Sequence[int]
    devices: list[bytes]
    helpers: list[bytes]
    size: int | None = None

    def __post_init__(self) -> None:
        self.authority = Identity(fixed(f"{self.name}/authority"))
        self.coordinator = Identity(fixed(f"{self.name}/coordinator"))
        self.identities = [Identity(seed) for seed in self.devices]
        boxes = [Identity(seed) for seed in self.helpers]
        self.roster = authority.Roster([identity.public_key for identity in self.identities])
        self.frozen = authority.freeze(
            self.authority, self.roster, coordinator=self.coordinator.public_key, corrupt_devices=self.corrupt,
            committee=self.committee, committee_size=self.size, expires_s=LATE_S,
            helpers=[box.public_key for box in boxes],
        )  # fmt: skip
        self.entropy = fixed(f"{self.name}/beacon")
        self.signed = authority.draw(self.authority, self.frozen, self.roster, self.entropy, self.group_counts)
        self.epoch = authority.FleetEpoch(self.authority.public_key, self.signed)
        by_key = {identity.public_key: (identity, seed) for identity, seed in
                  zip([*self.identities, *boxes], [*self.devices, *self.helpers], strict=True)}  # fmt: skip
        self.members = [by_key[entry.key][0] for entry in self.epoch.members]
        self.member_seeds = [by_key[entry.key][1] for entry in self.epoch.members]

    def json(self) -> Json:
        t = self.epoch.thresholds
        return {
            "committee": self.committee,
            "committee_size": self.size,
            "expires_s": LATE_S,
            "corrupt_devices": self.corrupt,
            "group_counts": list(self.group_counts),
            "authority_seed": fixed(f"{self.name}/authority").hex(),
            "authority_key": self.authority.public_key.hex(),
            "coordinator_seed": fixed(f"{self.name}/coordinator").hex(),
            "device_seeds": [seed.hex() for seed in self.devices],
            "helper_seeds": [seed.hex() for seed in self.helpers],
            "member_seeds": [seed.hex() for seed in self.member_seeds],
            "roster": [key.hex() for key in self.roster.keys],
            "roster_root": self.roster.root.hex(),
            "frozen": signed_json(self.frozen),
            "beacon_entropy": self.entropy.hex(),
            "beacon": self.epoch.beacon.hex(),
            "epoch": signed_json(self.signed),
            "epoch_id": self.epoch.id.hex(),
            "committee_indices": [entry.index for entry in self.epoch.members],
            "group_ranks": authority.ranks(self.epoch.beacon, "groups", len(self.roster)).tolist(),
            "corrupt_in_group": {str(g): c for g, c in self.epoch.corrupt_in_group.items()},
            "thresholds": {"corrupt": t.corrupt, "packing": t.packing, "quorum": t.quorum, "answers": t.answers},
        }


def everyone() -> Fleet:
    return Fleet("everyone", "everyone", 1, (1,), [fixed("everyone/device", i) for i in range(5)], [])


def helpers() -> Fleet:
    seeds = [fixed("helpers/device", i) for i in range(4)]
    return Fleet("helpers", "helpers", 1, (1,), seeds, [fixed("helpers/helper", i) for i in range(3)])


def grouped() -> Fleet:
    seeds = [fixed("groups/device", i) for i in range(9)]
    return Fleet("groups", "helpers", 1, (1, 2), seeds, [fixed("groups/helper", i) for i in range(3)])


def drawn() -> Fleet:
    return Fleet("drawn", "drawn", 2, (1, 4), [fixed("drawn/device", i) for i in range(60)], [], 20)


def epoch_vectors() -> Json:
    cases: list[Json] = []
    fleets = [everyone(), helpers(), drawn()]
    for fleet in fleets:
        case = {"success": True, "name": f"an epoch of {fleet.name}", "operation": "draw", **fleet.json()}
        for seeds in ("device_seeds", "helper_seeds", "member_seeds"):
            del case[seeds]  # an epoch is made of public keys
        case["helper_keys"] = [key.hex() for key in fleet.epoch.frozen.helpers]
        case["coordinator_key"] = fleet.coordinator.public_key.hex()
        cases.append(case)

    def refuse(fleet: Fleet, name: str, reason: str, signed: Signed) -> None:
        key = fleet.authority.public_key
        cases.append(
            {
                "name": name, "operation": "epoch", "step": "epoch", "authority_key": key.hex(),
                "epoch": signed_json(signed), **refusal(lambda: authority.FleetEpoch(key, signed), reason),
            }
        )  # fmt: skip

    for fleet in fleets:
        stated = messages.decode(Epoch, fleet.signed.body)
        with_ = lambda e=stated, **changed: msgspec.structs.replace(e, **changed)  # noqa: E731
        frozen_with = lambda e=stated, **changed: msgspec.structs.replace(  # noqa: E731
            e, frozen=msgspec.structs.replace(e.frozen, **changed)
        )
        again = lambda message, f=fleet: sign(f.authority, message)  # noqa: E731
        if fleet.name == "everyone":
            refuse(fleet, "signed by the coordinator", "signature is not valid", sign(fleet.coordinator, stated))
            off = fleet.signed.body[:-1] + bytes([fleet.signed.body[-1] ^ 1])
            refuse(fleet, "a changed byte", "signature is not valid", Signed(off, fleet.signed.signature))
            odd = b"\xdc\x00\x04" + fleet.signed.body[1:]
            refuse(fleet, "not canonical", "canonical", Signed(odd, fleet.authority.sign("epoch", odd)))
            refuse(
                fleet, "signed as a frozen roster", "signature is not valid",
                Signed(fleet.signed.body, fleet.authority.sign("frozen", fleet.signed.body)),
            )  # fmt: skip
            refuse(fleet, "another fleet's", "another fleet", again(frozen_with(fleet=fleet.coordinator.public_key)))
            refuse(fleet, "more corrupt than tolerated", "tolerates 1", again(frozen_with(corrupt_devices=2)))
            refuse(
                fleet, "everybody corrupt", "5 corrupt devices in a roster of 5", again(frozen_with(corrupt_devices=5))
            )
            refuse(fleet, "a member missing", "not the one that the beacon", again(with_(members=stated.members[1:])))
            refuse(
                fleet, "a key twice", "a member is listed twice",
                again(with_(members=[Member(stated.members[0].key, m.index) for m in stated.members])),
            )  # fmt: skip
        elif fleet.name == "helpers":
            refuse(
                fleet, "other helpers", "not the pinned helpers",
                again(with_(members=[*stated.members[:2], Member(fleet.coordinator.public_key, None)])),
            )  # fmt: skip
            refuse(
                fleet, "a helper with a place in the roster", "not the one that the beacon",
                again(with_(members=[*stated.members[:2], Member(stated.members[2].key, 0)])),
            )  # fmt: skip
            refuse(
                fleet, "a number of groups twice", "listed twice",
                again(with_(groupings=[Grouping(1, 1), Grouping(1, 1)])),
            )  # fmt: skip
            refuse(
                fleet, "more corrupt in a group than in the roster", "is not possible",
                again(with_(groupings=[Grouping(1, 2)])),
            )  # fmt: skip
        else:
            refuse(
                fleet, "another beacon", "not the one that the beacon", again(with_(entropy=fixed("another beacon")))
            )
            chosen = [*stated.members[1:], Member(fleet.roster.keys[59], 59)]
            if stated.members[-1].index == 59:
                chosen = [Member(fleet.roster.keys[0], 0), *stated.members[1:]]
            refuse(fleet, "a chosen member", "not the one that the beacon", again(with_(members=chosen)))
            refuse(
                fleet, "fewer corrupt in every group than in the roster", "is not possible",
                again(with_(groupings=[Grouping(1, 1)])),
            )  # fmt: skip
            refuse(
                fleet, "a committee without quorum", "leave no quorum",
                again(frozen_with(committee_size=5, corrupt_devices=30)),
            )  # fmt: skip
    return {"about": "From a frozen roster and a beacon to the committee and the groups.", "cases": cases}


# --- Rounds --------------------------------------------------------------------------------------------------------

CLOSES_S, EXPIRES_S = 1000, 2000


@dataclass
class Script:
    """One round, played by the code and written down step by step, refusals in their places."""

    fleet: Fleet
    groups: int
    dimension: int
    steps: list[Json] = field(default_factory=list)
    replies: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        fleet = self.fleet
        self.prekey_seeds = [fixed(f"{fleet.name}/prekey", i, 96) for i in range(len(fleet.members))]
        self.members, self.offers = [], []
        for identity, seed in zip(fleet.members, self.prekey_seeds, strict=True):
            state, offer = member.offer_prekey(member.MemberState(), identity, fleet.authority.public_key, seed, LATE_S)
            self.members.append(state)
            self.offers.append(offer)
        self.ticket = Ticket(
            1, fleet.epoch.id, "vectors", 0, authority.FIRST, fixed("bundle"), fixed("parameters"), self.dimension,
            len(fleet.devices), 2, self.groups, NoisePlan("device", 1.0, 0.5, 100.0, 0.0, 1.0, 1.0, 1.0),
            Work(0.5, 1, 0, 0.0, 0), self.offers, CLOSES_S, EXPIRES_S,
        )  # fmt: skip
        self.round = Round(fleet.epoch, sign(fleet.coordinator, self.ticket))
        self.terms = contributor.Terms(fixed("bundle"))
        self.devices: list[contributor.State] = [contributor.Idle("vectors") for _ in fleet.devices]
        self.coordinator: aggregator.State = aggregator.Collecting(self.round)
        self.sent: dict[int, contributor.Contribution] = {}

    def entropy(self, device: int) -> bytes:
        return fixed(f"{self.fleet.name}/entropy", device)

    def coins(self, device: int) -> list[bytes]:
        return [fixed(f"{self.fleet.name}/coins/{device}", i) for i in range(len(self.members))]

    def integers(self, device: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.arange(self.dimension, dtype=np.int64) * (device + 1) - 50 * device

    def ledger(self, device: int) -> Anchor:
        return Anchor(2 * device + 1, fixed(f"{self.fleet.name}/ledger", device))

    def enrolled(self, device: int) -> contributor.Enrolled:
        identity = self.fleet.identities[device]
        return contributor.Enrolled(identity, *self.fleet.roster.enrolment(identity.public_key))

    # What is given to a party: bytes that the file holds, or what an earlier step gave.

    def resolve(self, message: Json) -> bytes:
        match message:
            case {"hex": data}:
                return bytes.fromhex(data)
            case {"reply_of": step}:
                return self.replies[step]
            case {"ticket": True}:
                return wrap(Ticket, self.round.signed)
            case {"delivery": items}:
                return wrap(Delivery, self.delivery(items))
        raise AssertionError(message)

    def delivery(self, items: Sequence[Sequence[int]]) -> Delivery:
        """items: (device, member whose share is shown, or 0 for the header alone)."""
        listed: list[tuple[Signed, SealedShare | None]] = []
        for device, number in items:
            sent = self.sent[device]
            header = messages.decode(Header, sent.header.body)
            shares = aggregator.split_shares(self.round, header, sent.shares)
            listed.append((sent.header, shares[number - 1] if number else None))
        return Delivery(self.round.tid, listed)

    def note(self, step: Json, reply: bytes | None = None) -> int:
        if reply is not None:
            size: Json = {"bytes": len(reply), "sha256": sha256(reply)}
            step["reply"] = {"hex": reply.hex()} if len(reply) <= INLINE_BYTES else size
        self.steps.append(step)
        self.replies.append(reply or b"")
        return len(self.steps) - 1

    def give(self, party: str, name: str, message: Json, now_s: int, reason: str | None = None) -> int:
        """Bytes to a device, a member or the coordinator. With a reason: it must refuse."""
        data = self.resolve(message)
        step: Json = {"name": name, "party": party, "operation": "message", "message": message, "now_s": now_s}
        step["message_sha256"] = sha256(data)
        role, _, number = party.partition(" ")
        fleet, i = self.fleet, int(number or 0)

        def run() -> tuple[object, bytes | None]:
            if role == "device":
                return contributor.step(self.devices[i], data, fleet.epoch, self.terms, now_s), None
            if role == "member":
                return member.step(self.members[i - 1], data, fleet.epoch, fleet.members[i - 1], now_s)
            return aggregator.step(self.coordinator, data), None

        if reason is not None:
            return self.note({**step, "step": f"{role} step", **refusal(run, reason)})
        after, reply = run()
        if role == "device":
            self.devices[i] = after  # type: ignore[assignment]
        elif role == "member":
            self.members[i - 1] = after  # type: ignore[assignment]
        else:
            self.coordinator = after  # type: ignore[assignment]
        return self.note({**step, "success": True, "state": self.state_of(party)}, reply)

    def state_of(self, party: str) -> str:
        role, _, number = party.partition(" ")
        if role == "device":
            return type(self.devices[int(number)]).__name__
        if role == "member":
            session = self.members[int(number) - 1].sessions.get(self.round.tid)
            return type(session).__name__
        return aggregator.phase(self.coordinator)

    def contribute(
        self,
        device: int,
        now_s: int,
        *,
        flip_share_of: int | None = None,
        sealing_key: str | None = None,
        values_of: Sequence[int] | None = None,
    ) -> int:
        """A dealer that breaks the rules: the last bit of that member's sealed share is the other one, or it holds one
        value again and again (member, value), or the header names another sealing key; the header binds it all the
        same."""
        training = self.devices[device]
        assert isinstance(training, contributor.Training)
        coins = iter(self.coins(device))
        encapsulate = lambda public: coins_of(next(coins))(public)  # noqa: E731
        sent = training.contribute(
            self.integers(device), self.enrolled(device), self.ledger(device), self.entropy(device), encapsulate, now_s
        )
        header, masked, shares = sent.contribution
        size = self.round.share_bytes
        if flip_share_of is not None:
            last = size * flip_share_of - 1
            shares = shares[:last] + bytes([shares[last] ^ 1]) + shares[last + 1 :]
        if values_of is not None:
            number, value = values_of
            sealer = sealing.Sealer(
                derive_key(seed_of(self, device), "sealing key", self.round.tid),
                coins_of(self.coins(device)[number - 1]),
            )
            stated = messages.decode(Header, header.body)
            context = share_context(self.round.tid, stated.sender, stated.key, number, stated.masked)
            plaintext = value.to_bytes(2, "little") * self.round.thresholds.polynomials
            resealed = sealer.seal(prekey_public(self.round.prekeys[number - 1]), plaintext, *context)
            shares = shares[: size * (number - 1)] + resealed + shares[size * number :]
        if (flip_share_of, sealing_key, values_of) != (None, None, None):
            changed: Json = {"shares": merkle_root([shares[i : i + size] for i in range(0, len(shares), size)])}
            if sealing_key is not None:
                changed["sealing_key"] = bytes.fromhex(sealing_key)
            stated = msgspec.structs.replace(messages.decode(Header, header.body), **changed)
            header = sign(self.fleet.identities[device], stated)
        contribution = contributor.Contribution(header, masked, shares)
        self.devices[device] = contributor.Sent(self.round, sent.sender, contribution)
        self.sent[device] = contribution
        return self.note(
            {
                "success": True, "name": "contributes", "party": f"device {device}", "operation": "contribute",
                "now_s": now_s, "header": signed_json(header), "state": "Sent",
                "masked_sha256": sha256(masked), "shares_sha256": sha256(shares),
                "flip_share_of": flip_share_of, "sealing_key": sealing_key, "values_of": values_of,
            }
        )  # fmt: skip

    def accept(
        self, name: str, header: Signed, masked_of: int, shares_of: int, now_s: int, reason: str | None = None,
        flip: str | None = None,
    ) -> int:  # fmt: skip
        """flip: 'masked' or 'shares': the lowest bit of its first byte is the other one; 'longer masked' or 'longer
        shares': a zero byte follows it."""
        masked, shares = self.sent[masked_of].masked, self.sent[shares_of].shares
        if flip == "masked":
            masked = bytes([masked[0] ^ 1]) + masked[1:]
        if flip == "shares":
            shares = bytes([shares[0] ^ 1]) + shares[1:]
        if flip == "longer masked":
            masked += b"\0"
        if flip == "longer shares":
            shares += b"\0"
        contribution = contributor.Contribution(header, masked, shares)
        step: Json = {
            "name": name, "party": "coordinator", "operation": "accept", "header": signed_json(header),
            "masked_of": masked_of, "shares_of": shares_of, "flip": flip, "now_s": now_s,
        }  # fmt: skip
        run = lambda: aggregator.accept(self.coordinator, contribution, self.fleet.coordinator, now_s)  # noqa: E731
        if reason is not None:
            return self.note({**step, "step": "accept", **refusal(run, reason)})
        accepted = run()
        self.coordinator = accepted.state
        return self.note({**step, "success": True, "state": self.state_of("coordinator")}, accepted.receipt)

    def seal(self, now_s: int) -> int:
        assert isinstance(self.coordinator, aggregator.Collecting)
        sealed = aggregator.seal(self.coordinator, self.fleet.coordinator, now_s)
        self.coordinator = sealed
        signed = sealed.seal if isinstance(sealed, aggregator.Sealed) else sealed.notice
        kind = Seal if isinstance(sealed, aggregator.Sealed) else Abort
        return self.note(
            {"success": True, "name": "fixes the set", "party": "coordinator", "operation": "seal", "now_s": now_s,
             "state": self.state_of("coordinator")},
            wrap(kind, signed),
        )  # fmt: skip

    def certificate(self) -> int:
        assert isinstance(self.coordinator, aggregator.Certified)
        return self.note(
            {"success": True, "name": "shows the certificate", "party": "coordinator", "operation": "certificate",
             "state": self.state_of("coordinator")},
            wrap(Certificate, self.coordinator.certificate),
        )  # fmt: skip

    def open(self, name: str, add: Sequence[int] | None = None, reason: str | None = None) -> aggregator.Done:
        """add: (group, coefficient, value) added to the sum of the masked vectors before it is opened."""
        state = self.coordinator
        assert isinstance(state, aggregator.Certified)
        by_index = {self.enrolled(device).index: sent for device, sent in self.sent.items()}
        sums = {
            g: aggregator.sum_masked(self.round, (by_index[sender].masked for sender in senders))
            for g, senders in enumerate(state.groups)
        }
        if add is not None:
            sums[add[0]].reshape(-1)[add[1]] += np.uint32(add[2])
        done = aggregator.open_round(state, sums, self.fleet.coordinator, final=True)
        assert isinstance(done, aggregator.Done)
        step: Json = {"name": name, "party": "coordinator", "operation": "open", "add": add}
        if reason is not None:
            assert add is not None
            assert reason in done.reasons[add[0]], done.reasons
            assert set(done.sums) == {g for g, s in enumerate(state.groups) if s} - {add[0]}
            self.note({**step, "success": False, "step": "open", "error": "RoundAborted", "reason": reason})
            return done
        self.coordinator = done
        groups = [
            {
                "contributors": len(senders),
                "values": done.sums[g].values.tolist() if g in done.sums else None,
                "signed": done.sums[g].signed(self.round.layout.modulus_bits).tolist() if g in done.sums else None,
                "disagreeing": sorted(done.sums[g].disagreeing) if g in done.sums else None,
                "reason": done.reasons.get(g),
            }
            for g, senders in enumerate(state.groups)
        ]
        self.note({**step, "success": True, "state": "DONE", "groups": groups}, wrap(Transcript, done.transcript))
        return done

    def json(self, about: str) -> Json:
        return {
            "about": about,
            "fleet": self.fleet.json(),
            "bundle": fixed("bundle").hex(),
            "task": "vectors",
            "prekeys": [
                {
                    "seed": seed.hex(),
                    "expires_s": LATE_S,
                    "offer_sha256": sha256(offer.body),
                    "signature": offer.signature.hex(),
                }
                for seed, offer in zip(self.prekey_seeds, self.offers, strict=True)
            ],
            "ticket": signed_json(self.round.signed),
            "tid": self.round.tid.hex(),
            "layout": {"delta_bits": self.round.layout.delta_bits, "blocks": self.round.layout.blocks},
            "min_group": self.round.min_group,
            "devices": [
                {
                    "index": self.enrolled(i).index,
                    "group": self.fleet.epoch.group_of(self.enrolled(i).index, self.groups),
                    "enrolment": [h.hex() for h in self.enrolled(i).proof],
                    "ledger": fields_json(self.ledger(i)),
                    "entropy": self.entropy(i).hex(),
                    "coins": [coins.hex() for coins in self.coins(i)],
                    "integers": self.integers(i).tolist(),
                }
                for i in range(len(self.fleet.devices))
            ],
            "steps": self.steps,
        }

    # The honest course, in parts.

    def collect(self, devices: Sequence[int], faults: Mapping[int, Json] | None = None) -> None:
        for device in devices:
            self.give(f"device {device}", "takes the ticket", {"ticket": True}, 0)
            self.contribute(device, 1, **(faults or {}).get(device, {}))
            receipt = self.accept("takes it", self.sent[device].header, device, device, 2)
            self.give(f"device {device}", "has its receipt", {"reply_of": receipt}, 3)

    def inspect(self, number: int) -> None:
        self.give(f"member {number}", "takes the ticket", {"ticket": True}, 4)
        items = [[device, number] for device in self.sent]
        opened = self.give(f"member {number}", "opens its shares", {"delivery": items}, 4)
        if self.replies[opened]:
            self.give("coordinator", f"a complaint of member {number}", {"reply_of": opened}, 4)

    def signed_hex(self, identity: Identity, message: Message) -> Json:
        return {"hex": wrap(type(message), sign(identity, message)).hex()}


def header_of(script: Script, device: int, **changed: Any) -> Signed:
    header = messages.decode(Header, script.sent[device].header.body)
    return sign(script.fleet.identities[device], msgspec.structs.replace(header, **changed))


def round_everyone() -> Json:
    """Five devices that are their own committee; every refusal of members and coordinator in its place."""
    script = Script(everyone(), 1, 24)
    fleet, tid = script.fleet, script.round.tid
    coordinator = fleet.coordinator
    indices = [script.enrolled(i).index for i in range(5)]
    m1 = "member 1"
    script.give("device 0", "a receipt before anything", script.signed_hex(coordinator, Receipt(tid, 0, tid)), 0,
                "receipt: not expected while Idle")  # fmt: skip
    script.give("device 0", "no message at all", {"hex": ""}, 0, "envelope: ")
    script.give("device 0", "late", {"ticket": True}, CLOSES_S, "has closed")
    script.collect([0, 1, 2])
    for device in (3, 4):
        script.give(f"device {device}", "takes the ticket", {"ticket": True}, 0)
    script.give("device 3", "the same ticket again", {"ticket": True}, 1, "ticket: not expected while Training")
    script.give("device 0", "the same round again", {"ticket": True}, 1, "is the same round again")
    script.contribute(3, 1)
    other = header_of(script, 3, sender=indices[4])
    script.accept("at another's place", other, 3, 3, 2, "inclusion proof")
    script.accept("of another ticket", header_of(script, 3, tid=fixed("another")), 3, 3, 2, "it is for another ticket")
    script.accept("in another group", header_of(script, 3, group=1), 3, 3, 2, "but the beacon says 0")
    forged = Signed(script.sent[3].header.body, fleet.identities[4].sign("header", script.sent[3].header.body))
    script.accept("signed by another", forged, 3, 3, 2, "signature is not valid")
    script.accept("with another's vector", script.sent[3].header, 2, 3, 2, "is not the one its header binds")
    script.accept("with another's shares", script.sent[3].header, 3, 2, 2, "are not the ones that its header binds")
    script.accept("a bit of the vector", script.sent[3].header, 3, 3, 2, "is not the one its header binds", "masked")
    script.accept("a bit of the shares", script.sent[3].header, 3, 3, 2, "are not the ones", "shares")
    script.accept("a byte more of the vector", script.sent[3].header, 3, 3, 2, "8193 bytes instead", "longer masked")
    script.accept("a byte more of shares", script.sent[3].header, 3, 3, 2, "26001 bytes instead", "longer shares")
    script.accept("late", script.sent[3].header, 3, 3, CLOSES_S, "the round has closed")
    receipt = script.accept("takes it", script.sent[3].header, 3, 3, 2)
    again = script.accept("takes it again", script.sent[3].header, 3, 3, 2)
    assert script.replies[receipt] == script.replies[again]
    twice = header_of(script, 3, sealing_key=fixed("another key"))
    script.accept("another by the same sender", twice, 3, 3, 2, "already sent another one")
    digest = message_hash(Header, script.sent[3].header.body)
    script.give(
        "device 3",
        "a receipt that a member signed",
        script.signed_hex(fleet.members[0], Receipt(tid, indices[3], digest)),
        3,
        "signature is not valid",
    )
    script.give("device 3", "another's receipt", script.signed_hex(coordinator, Receipt(tid, indices[4], digest)), 3,
                "another round or sender")  # fmt: skip
    script.give(
        "device 3",
        "a receipt for another contribution",
        script.signed_hex(coordinator, Receipt(tid, indices[3], fixed("another"))),
        3,
        "names another contribution",
    )
    script.give(
        "device 3",
        "the abort of another ticket",
        script.signed_hex(coordinator, Abort(fixed("another"), "over")),
        3,
        "abort: it is for another ticket",
    )
    script.give("device 3", "has its receipt", {"reply_of": receipt}, 3)
    script.give("device 4", "the round is aborted", script.signed_hex(coordinator, Abort(tid, "over")), 3)

    # Members.
    everybody = [[device, 1] for device in range(4)]
    script.give(m1, "a delivery before the ticket", {"delivery": everybody}, 4, "does not know")
    script.give(m1, "an expired ticket", {"ticket": True}, EXPIRES_S, "ticket: it has expired")
    script.give(m1, "takes the ticket", {"ticket": True}, 4)
    script.give(m1, "takes the same ticket again", {"ticket": True}, 4)
    second = msgspec.structs.replace(script.ticket, expires_s=EXPIRES_S + 1)
    script.give(m1, "a second ticket of the round", script.signed_hex(coordinator, second), 4, "equivocates")
    script.give(m1, "another member's share", {"delivery": [[0, 2]]}, 4, "is not the one it signed")
    script.give(m1, "one share and one header", {"delivery": [[0, 1], [1, 0]]}, 4)
    wrong = wrap(Delivery, Delivery(tid, [(header_of(script, 0, sealing_key=fixed("another key")), None)]))
    script.give(m1, "two contributions of one sender", {"hex": wrong.hex()}, 4, "signed two contributions")
    script.give(m1, "opens the rest", {"delivery": everybody}, 4)
    for number in (2, 3, 4):
        script.inspect(number)
    unknown = Complaint(tid, 1, [indices[4]])
    script.give("coordinator", "a complaint about nobody", script.signed_hex(fleet.members[0], unknown), 4,
                "has not contributed")  # fmt: skip
    framed = Complaint(tid, 1, [indices[0]])
    script.give("coordinator", "a complaint in another's name", script.signed_hex(fleet.members[1], framed), 4,
                "signature is not valid")  # fmt: skip
    script.give("coordinator", "a member that there is not",
                script.signed_hex(fleet.members[0], Complaint(tid, 6, [])), 4, "this committee has 5")  # fmt: skip
    entries = sorted((indices[i], message_hash(Header, script.sent[i].header.body)) for i in range(4))
    empty = Certificate(tid, fixed("set"), [])
    script.give(m1, "a certificate before the set", {"hex": wrap(Certificate, empty).hex()}, 4,
                "not expected while Inspecting")  # fmt: skip
    sealed = script.seal(CLOSES_S)
    for name, seal, reason in (
        ("a set below h + F", Seal(tid, [entries[:2]]), "2 contributors, 3 needed"),
        ("an empty set", Seal(tid, [[]]), "every group is empty"),
        ("a sender twice", Seal(tid, [[*entries, entries[-1]]]), "ascending order of distinct senders"),
        ("senders out of order", Seal(tid, [entries[::-1]]), "ascending order of distinct senders"),
        ("a header never shown", Seal(tid, [[(i, fixed("header")) for i, _ in entries]]), "was not shown"),
        ("a sender beyond the roster", Seal(tid, [[*entries, (5, tid)]]), "sender 5 is not of group 0"),
        ("more senders than n_max", Seal(tid, [[*entries, (6, tid), (7, tid)]]), "more than n_max = 5"),
        ("another number of groups", Seal(tid, [entries, []]), "2 groups instead of 1"),
        ("another ticket's set", Seal(fixed("another"), [entries]), "does not know"),
    ):
        script.give(m1, name, script.signed_hex(coordinator, seal), CLOSES_S, reason)
    script.give(m1, "a set that a member signed", script.signed_hex(fleet.members[0], Seal(tid, [entries])), CLOSES_S,
                "signature is not valid")  # fmt: skip
    script.give(m1, "an expired set", {"reply_of": sealed}, EXPIRES_S, "the ticket has expired")
    first = script.give(m1, "signs the set", {"reply_of": sealed}, CLOSES_S)
    assert script.give(m1, "signs it again", {"reply_of": sealed}, CLOSES_S) == first + 1
    script.give(m1, "another set", script.signed_hex(coordinator, Seal(tid, [entries[:3]])), CLOSES_S,
                "already signed another set")  # fmt: skip
    script.give(m1, "a delivery after signing", {"delivery": everybody}, CLOSES_S, "not expected while Committed")
    script.accept("the receipt was lost: takes it after the seal", script.sent[3].header, 3, 3, CLOSES_S)
    script.accept("another contribution after the seal", twice, 3, 3, CLOSES_S, "already sent another one")
    digest = script.coordinator.digest  # type: ignore[union-attr]
    astray = SealSignature(tid, fixed("set"), 1)
    script.give("coordinator", "a signature over another set", script.signed_hex(fleet.members[0], astray), CLOSES_S,
                "signed another set")  # fmt: skip
    script.give(
        "coordinator",
        "a release before the certificate",
        script.signed_hex(fleet.members[0], Release(tid, digest, 1, [None])),
        CLOSES_S,
        "not expected while SEALED",
    )
    script.give("coordinator", "a signature of member 1", {"reply_of": first}, CLOSES_S)
    for number in (2, 3, 4):
        signature = script.give(f"member {number}", "signs the set", {"reply_of": sealed}, CLOSES_S)
        script.give("coordinator", f"a signature of member {number}", {"reply_of": signature}, CLOSES_S)
    shown = script.certificate()
    valid = script.coordinator.certificate  # type: ignore[union-attr]
    signatures = valid.signatures
    for name, certificate, reason in (
        ("short of the quorum", signatures[:3], "3 signatures, 4 needed"),
        ("a member twice", [*signatures[:3], signatures[0]], "counted twice"),
        ("a member that there is not", [*signatures[:3], (6, signatures[3][1])], "this committee has 5"),
        ("a signature of another", [*signatures[:3], (5, signatures[3][1])], "signature is not valid"),
    ):
        data = wrap(Certificate, Certificate(tid, valid.seal, certificate))
        script.give(m1, name, {"hex": data.hex()}, CLOSES_S, reason)
    data = wrap(Certificate, Certificate(tid, fixed("set"), signatures))
    script.give(m1, "a certificate over another set", {"hex": data.hex()}, CLOSES_S, "over another set")
    script.give(m1, "an expired certificate", {"reply_of": shown}, EXPIRES_S, "the ticket has expired")
    release = script.give(m1, "releases its sum", {"reply_of": shown}, CLOSES_S)
    script.give(m1, "releases it again", {"reply_of": shown}, CLOSES_S)
    script.give(m1, "an abort comes too late", script.signed_hex(coordinator, Abort(tid, "over")), CLOSES_S)
    sums = messages.decode(Release, signed_of(script.replies[release]).body)
    too_large = b"\xf1\xff" + (sums.sums[0] or b"")[2:]
    off = b"\x00\x00" + (sums.sums[0] or b"")[2:]
    for name, parts, reason in (
        ("a residue that is too large", [too_large], "not below 65521"),
        ("a sum too short", [b"\x00\x00"], "group 0 has 2 bytes"),
        ("two groups", [None, None], "2 groups instead of 1"),
    ):
        bad = Release(tid, digest, 1, parts)
        script.give("coordinator", name, script.signed_hex(fleet.members[0], bad), CLOSES_S, reason)
    astray_release = Release(tid, fixed("set"), 1, [None])
    script.give("coordinator", "a release for another set", script.signed_hex(fleet.members[0], astray_release),
                CLOSES_S, "answers for another set")  # fmt: skip
    script.give("coordinator", "the release of member 1", {"reply_of": release}, CLOSES_S)
    script.give(
        "coordinator",
        "another release of member 1",
        script.signed_hex(fleet.members[0], Release(tid, digest, 1, [off])),
        CLOSES_S,
        "answered differently before",
    )
    for number in (2, 3):
        release = script.give(f"member {number}", "releases its sum", {"reply_of": shown}, CLOSES_S)
        script.give("coordinator", f"the release of member {number}", {"reply_of": release}, CLOSES_S)
    lie = script.give("member 4", "releases its sum", {"reply_of": shown}, CLOSES_S)
    true = messages.decode(Release, signed_of(script.replies[lie]).body).sums[0] or b""
    wrong_sum = Release(tid, digest, 4, [(int.from_bytes(true[:2], "little") ^ 1).to_bytes(2, "little") + true[2:]])
    script.give("coordinator", "a wrong answer of member 4, within the bound",
                script.signed_hex(fleet.members[3], wrong_sum), CLOSES_S)  # fmt: skip
    count, pad = script.dimension, script.dimension + 1
    delta = 1 << script.round.layout.delta_bits
    script.open("the count is off by one", [0, count, delta], "the count is 5, not 4")
    script.open("a pad is not zero", [0, pad, delta], "the padding is not zero")
    script.open("a residual of half of Delta", [0, 0, delta // 2], "a residual is too large")
    done = script.open("the sum opens; member 4 disagrees, which proves nothing")
    expected = sum(script.integers(i) for i in range(4))
    assert np.array_equal(done.sums[0].signed(script.round.layout.modulus_bits), expected)
    assert done.sums[0].disagreeing == {4}
    script.give("coordinator", "after the end", {"reply_of": first}, CLOSES_S, "not expected while DONE")
    return script.json("A round of five devices that are their own committee, with what each step must refuse.")


def signed_of(wire: bytes) -> Signed:
    message = messages.unwrap(wire)[1]
    assert isinstance(message, Signed)
    return message


def round_helpers() -> Json:
    """Four devices, three helpers, one of them asleep, and nothing refused."""
    script = Script(helpers(), 1, 24)
    script.collect(range(4))
    for number in (1, 2, 3):
        script.inspect(number)
    finish(script, (1, 2, 3), (1, 3))
    return script.json("A round of four devices with three helpers, one of which never releases.")


def round_groups() -> Json:
    """Nine devices in two groups, of which three deal badly.

    Device A's share does not open for member 2, and device B's for nobody: its sealing key is a point of low order.
    Device C's opens for member 2, to values that are not below 65521. Member 2 complains about three senders, more than
    may be corrupt, and is not believed on its word alone; more than c members complain about B. So B is left out, A and
    C stay, and member 2 has no sum for their group: the others' open it.
    """
    script = Script(grouped(), 2, 24)
    fleet, tid = script.fleet, script.round.tid
    group_of = [fleet.epoch.group_of(script.enrolled(i).index, 2) for i in range(9)]
    a, b = group_of.index(0), group_of.index(1)
    c = group_of.index(0, a + 1)
    faults: dict[int, Json] = {
        a: {"flip_share_of": 2}, b: {"sealing_key": LOW_ORDER}, c: {"values_of": [2, shamir.PRIME]},
    }  # fmt: skip
    script.collect(range(9), faults)
    for number in (1, 2, 3):
        script.inspect(number)
    sealed = script.seal(CLOSES_S)
    entries = [
        sorted(
            (script.enrolled(i).index, message_hash(Header, script.sent[i].header.body))
            for i in range(9)
            if group_of[i] == g and i != b
        )
        for g in range(2)
    ]
    assert script.coordinator.groups == tuple(tuple(i for i, _ in group) for group in entries)  # type: ignore[union-attr]
    moved = sorted([*entries[1], entries[0][0]])
    for name, seal, reason in (
        ("the groups exchanged", Seal(tid, entries[::-1]), "is not of group 0"),
        ("a sender moved to another group", Seal(tid, [entries[0][1:], moved]), "is not of group 1"),
        ("a sender in both groups", Seal(tid, [entries[0], moved]), "is not of group 1"),
        ("one group below h + F", Seal(tid, [entries[0], entries[1][:2]]), "group 1 has 2 contributors, 3 needed"),
        ("one group only", Seal(tid, entries[:1]), "1 groups instead of 2"),
    ):
        script.give("member 1", name, script.signed_hex(fleet.coordinator, seal), CLOSES_S, reason)
    finish(script, (1, 2, 3), (1, 2, 3), sealed, garble=True)
    return script.json("A round of nine devices in two groups, three of which deal badly, opened one by one.")


def finish(
    script: Script, signing: Sequence[int], releasing: Sequence[int], sealed: int | None = None, *, garble: bool = False
) -> None:
    sealed = script.seal(CLOSES_S) if sealed is None else sealed
    for number in signing:
        signature = script.give(f"member {number}", "signs the set", {"reply_of": sealed}, CLOSES_S)
        script.give("coordinator", f"a signature of member {number}", {"reply_of": signature}, CLOSES_S)
    shown = script.certificate()
    for number in releasing:
        release = script.give(f"member {number}", "releases its sums", {"reply_of": shown}, CLOSES_S)
        script.give("coordinator", f"the release of member {number}", {"reply_of": release}, CLOSES_S)
    if garble:
        script.open("one group is garbled: the other opens", [1, 2047, 1 << 31], "the padding is not zero")
    sealed_groups = script.coordinator.groups  # type: ignore[union-attr]
    done = script.open("the sums open")
    for g, senders in enumerate(sealed_groups):
        expected = sum(script.integers(i) for i in script.sent if script.enrolled(i).index in senders)
        assert np.array_equal(done.sums[g].signed(script.round.layout.modulus_bits), expected)


def ticket_vectors() -> Json:
    """Tickets against one epoch and one device's terms."""
    script = Script(helpers(), 1, 24)
    fleet, ticket = script.fleet, script.ticket
    offers = msgspec.msgpack.encode(script.offers).hex()
    cases: list[Json] = []

    def case(name: str, signed: Signed, reason: str | None = None) -> None:
        stated = signed_json(signed)
        stated["body"] = stated["body"].replace(offers, "{offers}")
        given: Json = {"name": name, "operation": "ticket", "ticket": stated}
        if reason is None:
            round_ = Round(fleet.epoch, signed)
            layout = {"delta_bits": round_.layout.delta_bits, "blocks": round_.layout.blocks}
            cases.append(
                {
                    **given, "success": True, "tid": round_.tid.hex(), "min_group": round_.min_group,
                    "layout": layout, "share_bytes": round_.share_bytes,
                    "fields": fields_json(msgspec.structs.replace(round_.ticket, prekeys=[])),
                }
            )  # fmt: skip
        else:
            cases.append({**given, "step": "ticket", **refusal(lambda: Round(fleet.epoch, signed), reason)})

    def changed(**fields: Any) -> Signed:
        return sign(fleet.coordinator, msgspec.structs.replace(ticket, **fields))

    def offered(i: int, **fields: Any) -> list[Signed]:
        offer = messages.decode(PrekeyOffer, script.offers[i].body)
        offers = [*script.offers]
        offers[i] = sign(fleet.members[i], msgspec.structs.replace(offer, **fields))
        return offers

    case("a ticket", sign(fleet.coordinator, ticket))
    case("signed by the authority", sign(fleet.authority, ticket), "signature is not valid")
    case("of another epoch", changed(epoch=fixed("another")), "for another epoch")
    case("more groups than the epoch allows", changed(groups=2), "no round of 2 groups")
    case("n_max beyond the roster", changed(n_max=5), "more than the roster's 4")
    case("expires when it closes", changed(expires_s=CLOSES_S), "expires before it closes")
    case("a cohort that n_max cannot hold", changed(honest=4), "do not fit in n_max 4")
    early = offered(1, expires_s=EXPIRES_S - 1)
    case("a prekey that ends before the ticket", changed(prekeys=early), "outlive the prekey")
    case("a ticket that ends after its epoch", changed(expires_s=LATE_S + 1), "outlive its epoch")
    case("a prekey missing", changed(prekeys=script.offers[:2]), "2 prekeys for a committee of 3")
    case("two prekeys exchanged", changed(prekeys=script.offers[::-1]), "prekeyoffer: the signature is not valid")
    case("a prekey for another fleet", changed(prekeys=offered(0, fleet=fixed("fleet"))), "another fleet or member")
    case("a prekey in another's name", changed(prekeys=offered(2, member=fixed("x"))), "another fleet or member")
    case(
        "a prekey of low order", changed(prekeys=offered(1, x25519=bytes.fromhex(LOW_ORDER))), "not a usable X25519 key"
    )
    case("a prekey that is no ML-KEM key", changed(prekeys=offered(1, mlkem=b"\xff" * 1184)), "not a valid ML-KEM-768")
    example = msgspec.structs.replace(ticket.noise, unit="example", example_rate=0.25)
    local, gradients = Work(0.5, 1, 0, 0.0, 0), Work(0.0, 0, 0, 0.0, 0)
    case("unit example", changed(noise=example, work=gradients))
    case("unit device for ten steps", changed(work=Work(0.5, 0, 10, 0.01, 600)))
    for name, work, reason in (
        ("no learning rate", Work(0.0, 1, 0, 0.0, 0), "work.learning_rate is 0"),
        ("neither epochs nor steps", Work(0.5, 0, 0, 0.0, 0), "work.epochs is 0 and work.steps is 0"),
        ("both epochs and steps", Work(0.5, 1, 1, 0.0, 0), "work.epochs is 1 and work.steps is 1"),
    ):
        case(f"unit device: {name}", changed(work=work), reason)
    drawn = msgspec.structs.replace(ticket.noise, example_rate=0.5)
    case("unit device: a draw of examples", changed(noise=drawn, work=local), "noise.example_rate is 0.5")
    for name, work, reason in (
        ("a step of the local parameters", Work(0.5, 0, 0, 0.0, 0), "work.learning_rate is 0.5"),
        ("epochs", Work(0.0, 1, 0, 0.0, 0), "work.epochs is 1"),
        ("steps", Work(0.0, 0, 1, 0.0, 0), "work.steps is 1"),
        ("a proximal term", Work(0.0, 0, 0, 0.01, 0), "work.proximal is 0.01"),
        ("weights", Work(0.0, 0, 0, 0.0, 600), "work.weight_cap is 600"),
    ):
        case(f"unit example: {name}", changed(noise=example, work=work), reason)
    odd = b"\xdd\x00\x00\x00\x10" + encode(ticket)[3:]  # the array's length in 32 bits
    case("not canonical", Signed(odd, fleet.coordinator.sign("ticket", odd)), "canonical")

    def device(name: str, reason: str, idle: contributor.Idle, terms: contributor.Terms, now_s: int = 0) -> None:
        cases.append(
            {
                "name": name, "operation": "terms", "step": "terms", "now_s": now_s,
                "last": {"task": idle.task, "round": idle.round, "tid": idle.tid.hex()},
                "terms": {"bundle": terms.bundle.hex(), "min_honest": terms.min_honest,
                          "min_noise_multiplier": terms.min_noise_multiplier},
                **refusal(lambda: idle.on_ticket(script.round, terms, now_s), reason),
            }
        )  # fmt: skip

    terms, idle = contributor.Terms(fixed("bundle")), contributor.Idle("vectors")
    device("another bundle", "is not the one registered", idle, contributor.Terms(fixed("another")))
    device("a cohort below the device's floor", "below this device's 3", idle, contributor.Terms(fixed("bundle"), 3))
    device("noise below the device's floor", "floor of 1000", idle, contributor.Terms(fixed("bundle"), 2, 1000))
    device("another task", "it is for task vectors", contributor.Idle("another"), terms)
    device("the same round", "the same round again", contributor.Idle("vectors", 0, script.round.tid), terms)
    device("an older round", "before the last one", contributor.Idle("vectors", 3, fixed("tid")), terms)
    device("not chained", "does not follow", contributor.Idle("vectors", -1, fixed("another")), terms)
    device("closed", "has closed", idle, terms, CLOSES_S)
    return {
        "about": "Tickets against one epoch. In a body, {offers} stands for the hex of `offers`, the list of prekeys. "
        "The cases named 'terms' give the first ticket to a device in a state.",
        "offers": offers,
        "authority_key": fleet.authority.public_key.hex(), "epoch": signed_json(fleet.signed), "cases": cases,
    }  # fmt: skip


def seed_of(script: Script, device: int) -> bytes:
    """What a device of the script derives its contribution from."""
    message = script.round.layout.encode(script.integers(device))
    key = script.enrolled(device).identity.public_key
    return contributor.contribution_seed(script.entropy(device), script.round.tid, key, message)


def contribution_vectors() -> Json:
    """One contribution whole, with what lies between its entropy and its bytes."""
    script = Script(helpers(), 1, 24)
    script.give("device 0", "takes the ticket", {"ticket": True}, 0)
    script.contribute(0, 1)
    sent, tid = script.sent[0], script.round.tid
    entropy, device = script.entropy(0), script.enrolled(0)
    own = seed_of(script, 0)
    secret = masks.expand_secret(own, tid)
    sharing_key = derive_key(own, "sharing", tid)
    values = script.round.thresholds.sharing.share(secret, KeyStream(sharing_key))
    header = messages.decode(Header, sent.header.body)
    context = [share_context(tid, device.index, device.identity.public_key, n, header.masked) for n in (1, 2, 3)]
    case: Json = {
        "success": True, "name": "a contribution", "operation": "contribute",
        "ticket": signed_json(script.round.signed), "tid": tid.hex(), "seed": script.fleet.devices[0].hex(),
        "ledger": fields_json(script.ledger(0)), "index": device.index,
        "enrolment": [h.hex() for h in device.proof], "entropy": entropy.hex(),
        "coins": [coins.hex() for coins in script.coins(0)], "integers": script.integers(0).tolist(),
        "secret_first": secret[:64].tolist(), "secret_sha256_of_i8": sha256(little(secret, "<i1")),
        "sharing_key": sharing_key.hex(),
        "share_values": [
            {"first": row[:8].tolist(), "sha256_of_u16": sha256(little(row, "<u2"))} for row in values
        ],
        "share_contexts": [[part.hex() for part in parts] for parts in context],
        "contribution_seed": own.hex(),
        "sealing_key_seed": derive_key(own, "sealing key", tid).hex(), "header_fields": fields_json(header),
        "header": signed_json(sent.header), "masked": sent.masked.hex(), "shares": sent.shares.hex(),
        "size": sent.size,
    }  # fmt: skip
    training = contributor.Idle("vectors").on_ticket(script.round, script.terms, 0)
    encapsulate = coins_of(script.coins(0)[0])
    faults: list[tuple[str, Json, str]] = [
        ("an integer too few", {"integers": [0] * 23}, "a contribution is (24,) integers"),
        ("entropy of 31 bytes", {"entropy": entropy[:31].hex()}, "takes 32 bytes of entropy"),
        ("after the deadline", {"now_s": CLOSES_S}, "closed while this device trained"),
    ]
    cases = [case]
    for name, changed, reason in faults:
        given: Json = {"integers": [0] * 24, "entropy": entropy.hex(), "now_s": 1, **changed}
        failed = refusal(
            lambda g=given: training.contribute(
                np.array(g["integers"], dtype=np.int64),
                device,
                script.ledger(0),
                bytes.fromhex(g["entropy"]),
                encapsulate,
                g["now_s"],
            ),
            reason,
        )
        cases.append({"name": name, "operation": "contribute", "step": "contribute", **given, **failed})
    return {
        "about": "One contribution whole: entropy, ML-KEM coins and integers in; header, masked vector, shares out.",
        "authority_key": script.fleet.authority.public_key.hex(), "epoch": signed_json(script.fleet.signed),
        "bundle": fixed("bundle").hex(), "cases": cases,
    }  # fmt: skip


def anchors_vectors() -> Json:
    """Headers in the order in which a member sees them, and which it must take for a sign of a fork."""
    cases: list[Json] = []

    def case(name: str, *shown: tuple[str, int, int, int], by: int = 1, reason: str | None = None) -> None:
        """shown: (task, round, entries, link); all but the last by device 1, the last by `by`."""
        anchors, written = Anchors(), []
        for i, (task, number, entries, link) in enumerate(shown):
            owner = by if i == len(shown) - 1 else 1
            written.append({"key": owner, "task": task, "round": number, "entries": entries, "link": link})
            header = Header(bytes(32), 3, bytes([owner] * 32), [], 0, bytes(32), bytes(32), bytes(32),
                            Anchor(entries, bytes([link] * 32)))  # fmt: skip
            before = anchors
            anchors = before.shown(task, number, [header])
        step: Json = {"name": name, "operation": "anchors", "shown": written}
        if reason is not None:
            step |= {"step": "the last", **refusal(lambda: before.check(task, number, header), reason)}
        else:
            before.check(task, number, header)
            step |= {"success": True}
        newest = [
            {"key": key[0], "task": task, "round": at.round, "entries": at.anchor.entries, "link": at.anchor.link[0]}
            for key, heads in sorted(anchors.newest.items())
            for task, at in sorted(heads.items())
        ]
        cases.append({**step, "newest": newest, "forked": sorted(key[0] for key in anchors.forked)})

    another = "another one than in round 7 of a"
    case("a first header", ("a", 0, 0, 1))
    case("a longer ledger in a later round", ("a", 0, 1, 1), ("a", 1, 2, 2))
    case("the same header again", ("a", 0, 1, 1), ("a", 0, 1, 1))
    case("as long in a later round", ("a", 0, 1, 1), ("a", 1, 1, 1), reason="and had 1 in round 0")
    case("shorter in a later round", ("a", 0, 5, 1), ("a", 9, 4, 2), reason="and had 5 in round 0")
    case("one head in two tasks", ("a", 7, 5, 1), ("b", 0, 5, 1))
    case("shorter in another task", ("a", 7, 5, 1), ("b", 9, 4, 2))
    case("another link of the same length", ("a", 7, 5, 1), ("a", 8, 5, 2), reason=another)
    case("the same in another task", ("a", 7, 5, 1), ("b", 0, 5, 2), reason=another)
    case("an older round shown late", ("a", 7, 5, 1), ("a", 6, 4, 2))
    case("as long as another task's", ("a", 7, 5, 1), ("b", 1, 9, 3), ("a", 8, 9, 3))
    forked = (("a", 0, 5, 1), ("a", 1, 4, 2))
    case("longer again after a rollback", *forked, ("a", 2, 6, 3), reason="as an earlier header showed")
    case("another task after a rollback", *forked, ("b", 0, 6, 3), reason="as an earlier header showed")
    case("another device after one's rollback", *forked, ("a", 2, 1, 3), by=2)
    return {
        "about": "Ledger heads shown to a member, in order: whether the last one fits, and what is kept after it. A "
        "key or link n stands for 32 bytes n.",
        "cases": cases,
    }


FILES: dict[str, Callable[[], Json]] = {
    "hashing": hashing_vectors,
    "stream": stream_vectors,
    "gaussian": gaussian_vectors,
    "masks": masks_vectors,
    "shamir": shamir_vectors,
    "sealing": sealing_vectors,
    "identity": identity_vectors,
    "merkle": merkle_vectors,
    "plan": plan_vectors,
    "messages": messages_vectors,
    "epoch": epoch_vectors,
    "ticket": ticket_vectors,
    "contribution": contribution_vectors,
    "anchors": anchors_vectors,
    "round_everyone": round_everyone,
    "round_helpers": round_helpers,
    "round_groups": round_groups,
}


def render(content: Json) -> str:
    """Sorted keys, one value a line, but lists of integers in one."""
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=True)
    return re.sub(r"\[\s+(-?\d+(?:,\s+-?\d+)*)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text) + "\n"


def main(arguments: Sequence[str]) -> None:
    folder = Path(arguments[0]) if arguments else Path(__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in FILES.items():
        (folder / f"{name}.json").write_text(render(make()), encoding="ascii")


if __name__ == "__main__":
    main(sys.argv[1:])
