"""How a device joins a fleet, once: from a token to a certificate, a ledger and a policy (docs/services.md section 2).

The token pins everything that the device will ever trust. The keys are on disk before anybody is asked, every step may
be repeated, and `enrolment.json` is written last: a device that lost power anywhere in between joins with the same
token again.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import http.client
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from msgspec import Meta

from edge_sdk.crypto.hashing import content_hash, frame, tagged_hash
from edge_sdk.crypto.identity import KEY_BYTES, Identity
from edge_sdk.errors import ParameterError, PeerError, TransportError
from edge_sdk.files import open_locked, reason, write_once, write_whole
from edge_sdk.ledger import create_ledger, is_ledger_of
from edge_sdk.policy import default_policy_toml

PREFIX = "sordino1."
SECRET_BYTES = 32
CHECK_BYTES = 4
MAX_TOKEN_CHARACTERS = 4096
MAX_ANSWER_BYTES = 64 << 10
TIMEOUT_S = 20.0
EXCHANGE_S = 60.0
RENEW_SHARE = 1 / 3
"""A certificate is renewed when less than this share of its life is left."""

_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

Role = Literal["device", "helper"]
Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
HexKey = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Url = Annotated[str, Meta(min_length=1, max_length=512)]
S = TypeVar("S", bound=msgspec.Struct)


class Refused(PeerError):
    """The fleet does not let this device in. code: one of `REASONS`, or what an unknown server said."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


REASONS = {
    "malformed": "the enrolment service could not read the request: are both sides of the same version?",
    "unknown": "the enrolment service does not know this token: was it made by another coordinator?",
    "expired": "the token has expired: ask the operator for a new one (`edge-coordinator invite`)",
    "spent": "the token was used by another device (or a copy of this card): ask the operator for a new one",
    "enrolled": "this device is enrolled already, in another role or with other tags: use a token for the same",
    "stranger": "the coordinator does not know this device (any more): ask the operator for a token",
    "revoked": "the operator revoked this device",
    "signature": "the enrolment service did not accept this device's signature: its key files do not belong together",
    "busy": "the enrolment service is busy: try again in a minute",
}
"""What a service may answer, and what that means to who stands before the device."""


class Token(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An invitation: single use. Everything but the secret is a pin, which nothing that comes later overrides."""

    url: Url
    """Of the enrolment service, https."""
    ca: Key
    """SHA-256 of the CA's certificate (DER)."""
    secret: Key
    expires_s: Annotated[int, Meta(ge=0, lt=1 << 40)]
    authority: Key
    coordinator: Key
    publishers: Annotated[list[Key], Meta(min_length=1, max_length=16)]
    role: Role

    def __repr__(self) -> str:
        return f"Token(url={self.url!r}, role={self.role!r}, expires_s={self.expires_s})"

    @property
    def text(self) -> str:
        """As it is handed to people: a prefix, and base64url of a checksum and the fields in MessagePack."""
        body = msgspec.msgpack.encode(self)
        return PREFIX + base64.urlsafe_b64encode(content_hash(body)[:CHECK_BYTES] + body).rstrip(b"=").decode()

    @classmethod
    def read(cls, text: str) -> Token:
        """Raises ParameterError that says what is wrong with it, without repeating it: it may hold a secret."""
        text = "".join(text.split())  # mail programs break long lines
        if not text.startswith(PREFIX):
            raise ParameterError(f"this is not a token: one begins with {PREFIX!r}")
        if len(text) > MAX_TOKEN_CHARACTERS:
            raise ParameterError(f"this is not a token: it has {len(text)} characters")
        try:
            encoded = text[len(PREFIX) :].encode("ascii")
            data = base64.b64decode(encoded + b"=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        except (UnicodeEncodeError, binascii.Error) as error:
            raise ParameterError("the token has characters that no token has: copy it again, whole") from error
        check, body = data[:CHECK_BYTES], data[CHECK_BYTES:]
        if content_hash(body)[:CHECK_BYTES] != check:
            raise ParameterError("the token was not copied whole: its checksum does not fit")
        token = _decode_msgpack(body)
        _host_and_port(token.url)
        return token


def _decode_msgpack(body: bytes) -> Token:
    try:
        return msgspec.msgpack.decode(body, type=Token)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ParameterError(f"the token cannot be read: {error}") from error


class EnrolRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /enrol, as JSON. csr: DER, its CN the identity in hexadecimal.  signature: `enrol_statement`, by identity"""

    version: Literal[1]
    secret: Key
    identity: Key
    csr: Annotated[bytes, Meta(min_length=1, max_length=8192)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


class RenewRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /renew, as JSON. signature: over the CSR under the label "renew", by the identity that was enrolled."""

    version: Literal[1]
    identity: Key
    csr: Annotated[bytes, Meta(min_length=1, max_length=8192)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


class Admission(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer to both. certificate: PEM.  broker: the URL that the device connects to."""

    certificate: Annotated[str, Meta(max_length=16384)]
    broker: Url
    fleet: Annotated[str, Meta(min_length=1, max_length=64)]


class Refusal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Any other answer. error: a key of `REASONS`."""

    error: Annotated[str, Meta(max_length=64)]


class Membership(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device holds after it joined: `enrolment.json`. The keys are what its token pinned, in hexadecimal."""

    version: Literal[1]
    fleet: Annotated[str, Meta(min_length=1, max_length=64)]
    role: Role
    device: HexKey
    """Its own identity's public key, and its certificate's CN."""
    authority: HexKey
    coordinator: HexKey
    publishers: Annotated[tuple[HexKey, ...], Meta(min_length=1)]
    broker: Url
    enrolment: Url
    ca: HexKey

    @classmethod
    def read(cls, directory: Path) -> Membership:
        """Raises ParameterError if the device has not joined, or on a file that is not what `join` wrote."""
        path = directory / "enrolment.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError as error:
            raise ParameterError(f"{directory} has not joined a fleet: `edge-device join TOKEN` does that") from error
        except (OSError, msgspec.MsgspecError, ValueError) as error:
            raise ParameterError(f"{path}: {reason(error)}") from error


def enrol_statement(token_hash: bytes, csr: bytes) -> bytes:
    """What the identity signs under the label "enrol": this certificate request, with this token."""
    return frame("enrol", token_hash, csr)


def token_hash(secret: bytes) -> bytes:
    """What the coordinator keeps in place of a token's secret, 32 bytes."""
    return tagged_hash("token", secret)


def join(directory: Path, token: str, tasks: Sequence[str] = ()) -> Membership:
    """Join the fleet that the token invites to; on return everything that a device needs is on disk, durably.

    tasks: names of those that the owner allows from the start; more can be added to policy.toml at any time.

    Writes identity.key (32-byte seed), tls.key, ca.pem, tls.pem, device.toml, enrolment.json, and for a device, which
    unlike a helper has data, policy.toml and ledger.
    Joining the same fleet twice is harmless: the directory stays the device that it is, and the token is not used.
    After an error or a power cut it may be called again with the same token.
    Raises ParameterError on a bad token or directory, Refused with the reason, PeerError if the service is not the one
    that the token pins, TransportError if it cannot be reached.
    """
    invitation = Token.read(token)
    policy = default_policy_toml(invitation.authority, invitation.coordinator, invitation.publishers, tasks)
    with _locked(directory):
        if (directory / "enrolment.json").exists():
            return _joined_before(directory, invitation)
        _refuse_what_is_left_of_another(directory)
        for rest in directory.glob("*.new"):
            rest.unlink()  # of a try that was cut short; maybe a second copy of a key
        identity = _identity(directory)
        key = _tls_key(directory)
        ca = _pinned_ca(invitation)
        csr = _csr(identity, key)
        hashed = token_hash(invitation.secret)
        request = EnrolRequest(
            version=1,
            secret=invitation.secret,
            identity=identity.public_key,
            csr=csr,
            signature=identity.sign("enrol", enrol_statement(hashed, csr)),
        )
        admission = _ask(invitation.url, "/enrol", request, ca)
        certificate = _checked(admission.certificate, ca, key, identity)
        write_whole(directory / "ca.pem", ca.public_bytes(serialization.Encoding.PEM))
        write_whole(directory / "tls.pem", certificate.public_bytes(serialization.Encoding.PEM))
        write_once(directory / "device.toml", DEVICE_TOML.encode())
        if invitation.role == "device":
            write_once(directory / "policy.toml", policy.encode())
            # A ledger that is there was made by an earlier try, and nothing was ever sent: enrolment.json comes last.
            if not (directory / "ledger").exists():
                create_ledger(directory / "ledger", identity.public_key)
        membership = Membership(
            version=1,
            fleet=admission.fleet,
            role=invitation.role,
            device=identity.public_key.hex(),
            authority=invitation.authority.hex(),
            coordinator=invitation.coordinator.hex(),
            publishers=tuple(key.hex() for key in invitation.publishers),
            broker=admission.broker,
            enrolment=invitation.url,
            ca=invitation.ca.hex(),
        )
        _write_membership(directory, membership)
        return membership


def renew(directory: Path) -> Membership:
    """A fresh certificate for the same keys, from the service that was joined. Also learns the broker's newest URL.

    Errors as `join`; the old certificate stays until the new one is there and was checked.
    """
    with _locked(directory):
        membership = Membership.read(directory)
        identity, key = _stored_identity(directory), _stored_tls_key(directory)
        ca = _read_pem(directory / "ca.pem")
        if content_hash(ca.public_bytes(serialization.Encoding.DER)).hex() != membership.ca:
            raise ParameterError(f"{directory / 'ca.pem'} is not the certificate that this device's token pinned")
        csr = _csr(identity, key)
        request = RenewRequest(
            version=1, identity=identity.public_key, csr=csr, signature=identity.sign("renew", frame("renew", csr))
        )
        admission = _ask(membership.enrolment, "/renew", request, ca)
        certificate = _checked(admission.certificate, ca, key, identity)
        write_whole(directory / "tls.pem", certificate.public_bytes(serialization.Encoding.PEM))
        if admission.broker != membership.broker:
            membership = msgspec.structs.replace(membership, broker=admission.broker)
            _write_membership(directory, membership)
        return membership


def renewal_due(directory: Path, now_s: float) -> bool:
    """Whether less than a third of the certificate's life is left. Raises ParameterError if there is none to read."""
    certificate = _read_pem(directory / "tls.pem")
    start, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    return now_s > end - (end - start) * RENEW_SHARE


DEVICE_TOML = """\
# What this device has to offer. Its owner writes this file; policy.toml says what is allowed to be done with it.

# [tasks.keywords]                 # a task's name, as the operator tells it
# examples = "examples.npz"        # arrays, relative to this directory
"""


def tls_key(entropy: bytes) -> ec.EllipticCurvePrivateKey:
    """A P-256 key from 48 bytes of entropy, so many that the remainder is even to 2^-128 (FIPS 186-5, A.2.1)."""
    if len(entropy) != 48:
        raise ParameterError(f"a TLS key is made from 48 bytes, not {len(entropy)}")
    return ec.derive_private_key(1 + int.from_bytes(entropy, "big") % (_P256_ORDER - 1), ec.SECP256R1())


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS 8, not encrypted: the file's mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def private_directory(directory: Path) -> None:
    """Make the directory, or see that only its owner can read it. Raises ParameterError if others can."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = directory.stat().st_mode
        if mode & 0o077:
            if any(directory.iterdir()):
                raise ParameterError(f"{directory} can be read by others and is not empty: chmod 700 it if it is ours")
            directory.chmod(0o700)
    except OSError as error:
        raise ParameterError(f"{directory}: {error.strerror or error}") from error


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One join at a time: two would make two identities and spend the token for the one that is lost."""
    private_directory(directory)
    handle = open_locked(directory, os.O_RDONLY, f"another process is joining in {directory}")
    try:
        yield
    finally:
        os.close(handle)


def _write_membership(directory: Path, membership: Membership) -> None:
    write_whole(directory / "enrolment.json", msgspec.json.format(msgspec.json.encode(membership), indent=2) + b"\n")


def _joined_before(directory: Path, invitation: Token) -> Membership:
    membership = Membership.read(directory)
    pinned = (membership.ca, membership.authority, membership.coordinator)
    if pinned != (invitation.ca.hex(), invitation.authority.hex(), invitation.coordinator.hex()):
        raise ParameterError(
            f"{directory} belongs to the fleet {membership.fleet} already: another fleet's device needs another "
            "directory, with an identity and a ledger of its own"
        )
    if membership.role == "device" and not (directory / "ledger").exists():
        raise ParameterError(
            f"{directory} has joined but its ledger is gone: what this device spent is unknown. Restore it from a "
            "backup that is not older than its last round, or start anew in an empty directory"
        )
    return membership


def _refuse_what_is_left_of_another(directory: Path) -> None:
    """What another identity spent and promised is not a new one's: beside them the device would never run, and the
    token would be spent. A try of ours that was cut short has the key before it has any of them."""
    has_key = (directory / "identity.key").exists()
    for name in ("ledger", "state.db"):
        path = directory / name
        if path.exists():
            owned = has_key and (name != "ledger" or is_ledger_of(path, _stored_identity(directory).public_key))
            if not owned:
                raise ParameterError(
                    f"{path} is of another identity than this directory's: put that one's identity.key back, or join "
                    "in another directory. The token was not used"
                )


def _identity(directory: Path) -> Identity:
    write_once(directory / "identity.key", os.urandom(KEY_BYTES))
    return _stored_identity(directory)


def _stored_identity(directory: Path) -> Identity:
    path = directory / "identity.key"
    try:
        return Identity(path.read_bytes())
    except (OSError, ParameterError) as error:
        raise ParameterError(f"{path}: {reason(error)}") from error


def _tls_key(directory: Path) -> ec.EllipticCurvePrivateKey:
    write_once(directory / "tls.key", private_pem(tls_key(os.urandom(48))))
    return _stored_tls_key(directory)


def _stored_tls_key(directory: Path) -> ec.EllipticCurvePrivateKey:
    path = directory / "tls.key"
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ParameterError(f"{path}: {reason(error)}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ParameterError(f"{path} is not a key on P-256")
    return key


def _read_pem(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ParameterError(f"{path}: {reason(error)}") from error


def _csr(identity: Identity, key: ec.EllipticCurvePrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.public_key.hex())])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def _host_and_port(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 443
        (host or "").encode("idna")  # as the resolver will have it
    except ValueError as error:
        raise ParameterError(f"the enrolment service's URL cannot be read: {error}") from error
    if parts.scheme != "https" or not host or parts.username or parts.query or parts.path not in ("", "/"):
        raise ParameterError(f"the enrolment service's URL is {url!r}: it has to be https://HOST:PORT")
    return host, port


def _pinned_ca(invitation: Token) -> x509.Certificate:
    """The CA's certificate. It comes over a connection that nobody vouches for, and is checked against the token."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    status, body = _exchange(invitation.url, "GET", "/ca", None, context)
    if status != 200:
        raise PeerError(f"{invitation.url}/ca answered {status}: is that the enrolment service?")
    try:
        certificate = x509.load_pem_x509_certificate(body)
    except ValueError as error:
        raise PeerError(f"{invitation.url}/ca is no certificate: {error}") from error
    if content_hash(certificate.public_bytes(serialization.Encoding.DER)) != invitation.ca:
        raise PeerError(
            f"the CA at {invitation.url} is not the one that the token pins: somebody stands between, or the "
            "coordinator was set up anew since the token was made. Nothing was sent"
        )
    return certificate


def _ask(url: str, path: str, request: EnrolRequest | RenewRequest, ca: x509.Certificate) -> Admission:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=ca.public_bytes(serialization.Encoding.PEM).decode())
    status, body = _exchange(url, "POST", path, msgspec.json.encode(request), context)
    if status == 200:
        return _decode_json(body, Admission, url)
    try:
        code = msgspec.json.decode(body, type=Refusal).error
    except (msgspec.MsgspecError, ValueError):
        code = f"HTTP status {status}"
    raise Refused(code, REASONS.get(code, f"the enrolment service refused: {code!r}"))


def _decode_json(body: bytes, kind: type[S], url: str) -> S:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PeerError(f"{url} gave an answer that cannot be read: {error}") from error


def _exchange(url: str, method: str, path: str, body: bytes | None, context: ssl.SSLContext) -> tuple[int, bytes]:
    """(status, body). Raises TransportError or PeerError with what people can do about it.

    All of it within EXCHANGE_S: a socket's timeout is one read's, and whoever drips a byte now and then, before or
    after the handshake, would hold this device for days. What is given up is left to a daemon thread.
    """
    answers: queue.SimpleQueue[tuple[int, bytes] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(_ask_once(url, method, path, body, context))
        except Exception as error:  # noqa: BLE001  # it is raised in the thread that asked
            answers.put(error)

    threading.Thread(target=ask, name="enrolment", daemon=True).start()
    try:
        answer = answers.get(timeout=EXCHANGE_S)
    except queue.Empty:
        host, port = _host_and_port(url)
        raise TransportError(f"{host}:{port} answers too slowly: given up after {EXCHANGE_S:.0f} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _ask_once(url: str, method: str, path: str, body: bytes | None, context: ssl.SSLContext) -> tuple[int, bytes]:
    host, port = _host_and_port(url)
    connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    headers = {"Content-Type": "application/json"} if body is not None else {}
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        answer = response.read(MAX_ANSWER_BYTES + 1)
    except ssl.SSLCertVerificationError as error:
        raise _certificate_error(url, error) from error
    except socket.gaierror as error:
        raise TransportError(
            f"{host} has no address: is the name right, and is this device online? ({error})"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise TransportError(f"{host}:{port} cannot be reached: {error or type(error).__name__}") from error
    finally:
        connection.close()
    if len(answer) > MAX_ANSWER_BYTES:
        raise PeerError(f"{url} answered more than {MAX_ANSWER_BYTES} bytes: it is no enrolment service")
    return response.status, answer


_NOT_YET_VALID, _HAS_EXPIRED = 9, 10
"""X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED of OpenSSL."""


def _certificate_error(url: str, error: ssl.SSLCertVerificationError) -> PeerError | TransportError:
    if error.verify_code in (_NOT_YET_VALID, _HAS_EXPIRED):
        clock = dt.datetime.fromtimestamp(time.time(), dt.UTC).strftime("%Y-%m-%d %H:%M")
        return TransportError(
            f"this device's clock says {clock} UTC, a time at which the service's certificate is not valid: set the "
            "clock (`timedatectl`), or have the operator restart the coordinator if the clock is right"
        )
    return PeerError(f"{url} did not prove that it is the pinned service: {error.verify_message}. Nothing was sent")


def _checked(pem: str, ca: x509.Certificate, key: ec.EllipticCurvePrivateKey, identity: Identity) -> x509.Certificate:
    """The certificate, if it is of this CA, for this key and this identity. Raises PeerError otherwise."""
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise PeerError(f"the certificate that came is not of the pinned CA: {error}") from error
    names = [name.value for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if certificate.public_key() != key.public_key() or names != [identity.public_key.hex()]:
        raise PeerError("the certificate that came is for another device")
    return certificate
