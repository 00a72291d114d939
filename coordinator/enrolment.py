"""The enrolment service: tokens in, certificates out (docs/services.md section 2).

`Desk` decides, and knows no network; `EnrolmentService` is the HTTPS around it. Every refusal is logged with its
reason; the asker is told only what the holder of its token may know.
"""

from __future__ import annotations

import contextlib
import http.server
import logging
import os
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from io import BufferedIOBase
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from sqlalchemy.exc import OperationalError

from coordinator.ca import CertificateAuthority, read_csr
from coordinator.refusals import Refusals
from coordinator.rows import CertificateRow, Transaction
from coordinator.store import Store
from edge_sdk.crypto.hashing import frame
from edge_sdk.crypto.identity import check_signature
from edge_sdk.enrolment import (
    RENEW_SHARE,
    SECRET_BYTES,
    Admission,
    EnrolRequest,
    Refusal,
    Refused,
    RenewRequest,
    Role,
    Token,
    enrol_statement,
    token_hash,
)
from edge_sdk.errors import ParameterError, PeerError, printable

log = logging.getLogger("sordino.enrolment")

MAX_BODY_BYTES = 32 << 10
MAX_HEAD_BYTES = 8 << 10
"""Of a request line and its headers: the library would take a hundred of 64 KiB each."""

MAX_CONNECTIONS = 64
"""Handled at a time. The files are small, and an operator enrols few devices a second."""

CONNECTION_S = 15.0
"""A connection that lives longer is cut: whoever sends a byte now and then must not hold a thread."""

BUSINESS_S = 2.0
"""An honest request takes less. Where every place is taken, the oldest connection that has taken longer makes room, one
whose handshake is not done before others: whoever holds all places and says nothing keeps nobody out."""

MAX_TAGS = 16

MAX_CERTIFICATES_A_DAY = 8
"""Of one device. It may ask with a new key each time, and each certificate takes room, and time while others wait."""


@dataclass(frozen=True)
class Pins:
    """What goes into every token, besides its secret. url: the enrolment service's."""

    url: str
    authority: bytes
    coordinator: bytes
    publishers: tuple[bytes, ...]


class Desk:
    """Makes tokens, and gives a certificate for one: once, to one identity, and to that one as often as it asks."""

    def __init__(
        self,
        store: Store,
        ca: CertificateAuthority,
        pins: Pins,
        *,
        fleet: str,
        broker_url: str,
        certificate_days: int,
    ) -> None:
        self._store = store
        self._ca = ca
        self._pins = pins
        self._fleet = fleet
        self._broker_url = broker_url
        self._days = certificate_days

    def invite(self, role: Role, tags: Sequence[str], lifetime_s: int, now_s: int) -> Token:
        """A new token. Only the hash of its secret is stored, so it cannot be shown again.

        Raises ParameterError on a lifetime that is not positive, or on tags that are too many or oddly named.
        """
        if not 0 < lifetime_s <= 366 * 86_400:
            raise ParameterError(f"a token lives for 1 second to a year, not {lifetime_s} s")
        if len(tags) > MAX_TAGS or len(set(tags)) != len(tags) or not all(_is_tag(tag) for tag in tags):
            raise ParameterError(f"tags {list(tags)}: up to {MAX_TAGS} different names of a-z, 0-9, '.', '_' and '-'")
        secret = os.urandom(SECRET_BYTES)
        token = Token(
            url=self._pins.url,
            ca=self._ca.sha256,
            secret=secret,
            expires_s=now_s + lifetime_s,
            authority=self._pins.authority,
            coordinator=self._pins.coordinator,
            publishers=list(self._pins.publishers),
            role=role,
        )
        with self._store.transaction() as rows:
            rows.add_token(token_hash(secret), role, tags, now_s, token.expires_s)
        return token

    def enrol(self, request: EnrolRequest, now_s: int) -> Admission:
        """Raises Refused. The same identity with the same token is answered again, also after the token expired."""
        hashed, device = token_hash(request.secret), request.identity
        with self._store.reading() as rows:  # a stranger's request takes no writer's place
            if rows.token(hashed) is None:
                raise Refused("unknown", f"no token has the hash {hashed.hex()[:16]}")
        csr = _checked_csr(request, "enrol", enrol_statement(hashed, request.csr))
        with self._store.transaction() as rows:
            token, before = rows.token(hashed), rows.device(device)
            if token is None:
                raise Refused("unknown", f"token {hashed.hex()[:16]} is gone")
            if before is not None and before.revoked_s is not None:
                raise Refused("revoked", f"device {device.hex()[:16]} was revoked")
            if token.spent_by is None and now_s >= token.expires_s:
                raise Refused("expired", f"token {hashed.hex()[:16]} expired {now_s - token.expires_s:.0f} s ago")
            if token.spent_by not in (None, device):
                raise Refused(
                    "spent",
                    f"token {hashed.hex()[:16]} was spent by another device and now comes from {device.hex()[:16]}: "
                    "a copied card, or a token that was given twice",
                )
            if before is not None and (before.role, before.tags) != (token.role, token.tags):
                raise Refused(
                    "enrolled",
                    f"device {device.hex()[:16]} is enrolled as {before.role} {sorted(before.tags)}, and token "
                    f"{hashed.hex()[:16]} is for {token.role} {sorted(token.tags)}",
                )
            if token.spent_by is None:
                rows.spend_token(hashed, device, now_s)
                rows.add_device(device, token.role, token.tags, now_s)
                log.info("device %s enrolled as %s with token %s", device.hex()[:16], token.role, hashed.hex()[:16])
            return self._certified(rows, device, csr, now_s)

    def renew(self, request: RenewRequest, now_s: int) -> Admission:
        """Raises Refused unless the identity is enrolled and signed the request."""
        device = request.identity
        with self._store.reading() as rows:
            self._check_enrolled(rows, device)
        csr = _checked_csr(request, "renew", frame("renew", request.csr))
        with self._store.transaction() as rows:
            self._check_enrolled(rows, device)
            return self._certified(rows, device, csr, now_s)

    @staticmethod
    def _check_enrolled(rows: Transaction, device: bytes) -> None:
        row = rows.device(device)
        if row is None:
            raise Refused("stranger", f"device {device.hex()[:16]} is not enrolled and asks for renewal")
        if row.revoked_s is not None:
            raise Refused("revoked", f"device {device.hex()[:16]} was revoked and asks for renewal")

    def _certified(
        self, rows: Transaction, device: bytes, csr: x509.CertificateSigningRequest, now_s: int
    ) -> Admission:
        """The device's newest certificate while it is for the request's key, of this CA and far from its end; else a
        new one. So whoever repeats a request does not fill the store."""
        for row in reversed(rows.certificates(device)):
            certificate = x509.load_pem_x509_certificate(row.certificate)
            start, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
            fresh = row.revoked_s is None and now_s < end - (end - start) * RENEW_SHARE
            if fresh and certificate.public_key() == csr.public_key() and self._ca.issued(certificate):
                return self._admission(row.certificate)
        recent = sum(row.issued_s > now_s - 86_400 for row in rows.certificates(device))
        if recent >= MAX_CERTIFICATES_A_DAY:
            raise Refused("busy", f"device {device.hex()[:16]} got {recent} certificates within a day")
        issued = self._ca.issue_device(csr, device.hex(), now_s, self._days)
        rows.add_certificate(CertificateRow(f"{issued.serial:x}", device, issued.pem, now_s, issued.not_after_s, None))
        return self._admission(issued.pem)

    def _admission(self, pem: bytes) -> Admission:
        return Admission(pem.decode(), self._broker_url, self._fleet)


def _is_tag(tag: str) -> bool:
    return 0 < len(tag) <= 64 and all(c in "abcdefghijklmnopqrstuvwxyz0123456789._-" for c in tag)


def _checked_csr(request: EnrolRequest | RenewRequest, label: str, statement: bytes) -> x509.CertificateSigningRequest:
    try:
        check_signature(request.identity, label, statement, request.signature)
    except PeerError as error:
        raise Refused("signature", str(error)) from error
    try:
        return read_csr(request.csr, request.identity.hex())
    except PeerError as error:
        raise Refused("malformed", str(error)) from error


Ask = Callable[[EnrolRequest | RenewRequest], Admission]
"""Decides about a request, on the thread of its connection. Raises Refused."""


class EnrolmentService:
    """HTTPS on a thread of its own: GET /ca, POST /enrol, POST /renew. Stores nothing; asks `decide`."""

    def __init__(self, address: str, port: int, directory: Path, decide: Ask) -> None:
        """Listens when this returns. directory: with ca.pem, server.pem and server.key.

        Raises ParameterError if the address cannot be listened on.
        """
        ca = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(directory / "server.pem", directory / "server.key")
        try:
            self._server = _Server(address, port, context, decide, ca.public_bytes(serialization.Encoding.PEM))
        except OSError as error:
            raise ParameterError(
                f"the enrolment service cannot listen on {address}:{port}: {error.strerror}"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="enrolment", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """That it listens on."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop listening and cut what is open."""
        self._server.shutdown()
        self._server.server_close()
        self._server.cut(older_than_s=0.0)
        self._thread.join()


@dataclass
class _Open:
    """A connection. since_s: on the monotonic clock.  shaken: whether its TLS handshake is done.  cut: whether it was
    told to end."""

    since_s: float
    shaken: bool = False
    cut: bool = False


class _Server(socketserver.TCPServer):
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, address: str, port: int, context: ssl.SSLContext, decide: Ask, ca_pem: bytes) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.decide = decide
        self.ca_pem = ca_pem
        self.refusals = Refusals(log)
        self._context = context
        self._open: dict[socket.socket, _Open] = {}
        self._lock = threading.Lock()
        super().__init__((address, port), _Handler)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """Hand the connection to a thread, if one is free. Not one byte is read here, so nobody blocks the others."""
        assert isinstance(request, socket.socket)  # noqa: S101 - a TCPServer's are
        now_s = time.monotonic()
        with self._lock:
            here = [(entry, connection) for connection, entry in self._open.items() if not entry.cut]
            slow = [(entry, connection) for entry, connection in here if now_s - entry.since_s >= BUSINESS_S]
            if len(here) < MAX_CONNECTIONS:
                pass
            elif slow:
                entry, connection = min(slow, key=lambda one: (one[0].shaken, one[0].since_s))
                entry.cut = True
                _cut(connection)
            else:
                self.refusals.say("", f"{_peer(client_address)} turned away: {MAX_CONNECTIONS} connections are open")
                self.shutdown_request(request)
                return
            self._open[request] = _Open(now_s)
        threading.Thread(target=self._serve, args=(request, client_address), name="enrolling", daemon=True).start()

    def _serve(self, raw: socket.socket, client_address: object) -> None:
        secured: socket.socket | ssl.SSLSocket = raw
        try:
            raw.settimeout(CONNECTION_S)
            secured = self._context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
            with self._lock:
                # Before the handshake, which may be a slow one.
                entry = self._open[secured] = self._open.pop(raw)
            secured.do_handshake()
            entry.shaken = True
            self.finish_request(secured, client_address)
        except (OSError, ValueError) as error:
            self.refusals.say("", f"{_peer(client_address)}: connection ended: {printable(str(error))}")
        except Exception:
            log.exception("%s: the request failed", _peer(client_address))
        finally:
            with self._lock:
                self._open.pop(raw, None)
                self._open.pop(secured, None)
            self.shutdown_request(secured)

    def service_actions(self) -> None:
        """Called several times a second by the accepting loop."""
        self.cut(CONNECTION_S)

    def cut(self, older_than_s: float) -> None:
        """End connections that have lived longer than they may."""
        now_s = time.monotonic()
        with self._lock:
            late = [connection for connection, entry in self._open.items() if now_s - entry.since_s >= older_than_s]
        for connection in late:
            _cut(connection)


def _cut(connection: socket.socket) -> None:
    """End a connection that another thread serves, which then forgets it."""
    with contextlib.suppress(OSError):  # it ended meanwhile
        # The plain socket's shutdown: that of an SSL socket would wait for the other side.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _peer(client_address: object) -> str:
    return str(client_address[0]) if isinstance(client_address, tuple) else str(client_address)


class _Head:
    """What a request is read from: the lines before its body are bounded together."""

    def __init__(self, file: BufferedIOBase) -> None:
        self._left = MAX_HEAD_BYTES
        self.read, self.close, self._readline = file.read, file.close, file.readline

    def readline(self, limit: int) -> bytes:
        line = self._readline(min(limit, self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise ConnectionError(f"a request with more than {MAX_HEAD_BYTES} bytes before its body")
        return line


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    server_version = "sordino"
    sys_version = ""
    timeout = CONNECTION_S

    def setup(self) -> None:
        super().setup()
        self.rfile = _Head(self.rfile)  # type: ignore[assignment]

    def do_GET(self) -> None:
        if self.path == "/ca":
            self._answer(HTTPStatus.OK, self.server.ca_pem, "application/x-pem-file")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "malformed", "no such page")

    def do_POST(self) -> None:
        kind: type[EnrolRequest] | type[RenewRequest]
        if self.path == "/enrol":
            kind = EnrolRequest
        elif self.path == "/renew":
            kind = RenewRequest
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "malformed", "no such page")
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 8 and int(length) <= MAX_BODY_BYTES):
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "malformed", f"Content-Length {length[:16]!r}")
            return
        body = self.rfile.read(int(length))
        try:
            request: EnrolRequest | RenewRequest = msgspec.json.decode(body, type=kind)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, "malformed", str(error))
            return
        try:
            admission = self.server.decide(request)
        except Refused as refused:
            self._refuse(HTTPStatus.FORBIDDEN, refused.code, str(refused))
        except OperationalError as error:  # another process writes for longer than we wait
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "busy", str(error.orig))
        else:
            self._answer(HTTPStatus.OK, msgspec.json.encode(admission), "application/json")

    def _refuse(self, status: HTTPStatus, code: str, reason: str) -> None:
        text = f"{self.command} {self.path[:128]!r} from {self.client_address[0]} refused ({code}): {reason[:256]!r}"
        # Whoever shows a token of ours, with the identity that it is for, is not lost among those who show nothing.
        holder = self.path == "/enrol" and code in ("spent", "expired", "enrolled", "revoked")
        self.server.refusals.say("who holds a token" if holder else "", text)
        self._answer(status, msgspec.json.encode(Refusal(code)), "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        log.debug("%s %r", self.client_address[0], format % arguments)
