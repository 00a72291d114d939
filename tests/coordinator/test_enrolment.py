import base64
import contextlib
import http.client
import json
import logging
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError

from coordinator import enrolment as service_module
from coordinator.ca import CertificateAuthority
from coordinator.enrolment import Desk, EnrolmentService, Pins
from coordinator.refusals import LINES, STRANGERS_LINES
from coordinator.store import Store
from edge_sdk import enrolment
from edge_sdk.crypto.identity import Identity
from edge_sdk.enrolment import EnrolRequest, Membership, Refused, Token, enrol_statement, join, renew, token_hash
from edge_sdk.errors import ParameterError, PeerError, TransportError
from edge_sdk.policy import Policy
from edge_sdk.store import Store as DeviceStore

AUTHORITY, COORDINATOR, PUBLISHER = bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 32


class Fleet:
    def __init__(self, directory, *, days=365):
        self.now = int(time.time())
        self.directory = directory
        directory.mkdir(mode=0o700)
        self.ca = CertificateAuthority.create(directory, "testfleet", self.now)
        self.ca.ensure_service_certificates(["127.0.0.1"], self.now)
        self.store = Store(directory)
        self.service = EnrolmentService("127.0.0.1", 0, directory, self.decide)
        self.url = f"https://127.0.0.1:{self.service.port}"
        pins = Pins(self.url, AUTHORITY, COORDINATOR, (PUBLISHER,))
        self.desk = Desk(
            self.store, self.ca, pins, fleet="testfleet", broker_url="mqtts://127.0.0.1:8883", certificate_days=days
        )
        self.lose_answers = 0

    def decide(self, request):
        admit = self.desk.enrol if isinstance(request, EnrolRequest) else self.desk.renew
        answer = admit(request, self.now)
        if self.lose_answers:
            self.lose_answers -= 1
            raise OperationalError("the answer", {}, TimeoutError("is lost"))
        return answer

    @property
    def devices(self):
        with self.store.reading() as rows:
            return {row.key: (row.role, row.tags) for row in rows.devices()}

    @property
    def certificates(self):
        with self.store.reading() as rows:
            return rows.certificates()

    def revoke(self, device):
        with self.store.transaction() as rows:
            rows.revoke(device, self.now)

    def close(self):
        self.service.close()
        self.store.close()

    def invite(self, role="device", tags=(), lifetime_s=3600):
        return self.desk.invite(role, tags, lifetime_s, self.now).text


@pytest.fixture
def fleet(tmp_path):
    fleet = Fleet(tmp_path / "fleet")
    yield fleet
    fleet.close()


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# Joining


def test_join_leaves_everything_that_a_device_needs_readable_by_its_owner_only(fleet, tmp_path):
    device = tmp_path / "device"
    membership = join(device, fleet.invite(tags=["kitchen"]), tasks=["keywords"])
    assert set(files(device)) == {
        "identity.key", "tls.key", "ca.pem", "tls.pem", "device.toml", "policy.toml", "ledger", "enrolment.json",
    }  # fmt: skip
    assert stat.S_IMODE(device.stat().st_mode) == 0o700
    assert all(stat.S_IMODE((device / name).stat().st_mode) == 0o600 for name in ("identity.key", "tls.key"))
    identity = Identity((device / "identity.key").read_bytes())
    assert membership == Membership.read(device)
    assert membership.device == identity.public_key.hex()
    assert (membership.authority, membership.coordinator) == (AUTHORITY.hex(), COORDINATOR.hex())
    assert membership.publishers == (PUBLISHER.hex(),)
    assert membership.broker == "mqtts://127.0.0.1:8883"
    assert fleet.devices == {identity.public_key: ("device", {"kitchen"})}
    policy = Policy.from_toml((device / "policy.toml").read_text())
    assert policy.publishers == (PUBLISHER.hex(),)
    assert set(policy.tasks) == {"keywords"}
    certificate = x509.load_pem_x509_certificate((device / "tls.pem").read_bytes())
    assert certificate.subject.rfc4514_string() == f"CN={membership.device}"


def test_a_helper_has_no_data_and_so_neither_policy_nor_ledger(fleet, tmp_path):
    token = fleet.invite(role="helper")
    assert join(tmp_path / "helper", token).role == "helper"
    assert join(tmp_path / "helper", token).role == "helper"
    assert set(files(tmp_path / "helper")) == {
        "identity.key", "tls.key", "ca.pem", "tls.pem", "device.toml", "enrolment.json",
    }  # fmt: skip


def test_joining_twice_changes_nothing_and_asks_nobody(fleet, tmp_path):
    token = fleet.invite()
    join(tmp_path / "device", token)
    before = files(tmp_path / "device")
    fleet.service.close()
    join(tmp_path / "device", token)
    assert files(tmp_path / "device") == before


def test_an_answer_that_is_lost_after_the_token_was_spent_does_not_brick_the_device(fleet, tmp_path):
    token = fleet.invite()
    fleet.lose_answers = 1
    with pytest.raises(Refused, match="busy"):
        join(tmp_path / "device", token)
    assert len(fleet.devices) == 1, "the token should be spent by now"
    fleet.now += 7200  # and it has expired since
    join(tmp_path / "device", token)
    assert len(fleet.devices) == 1
    assert len(fleet.certificates) == 1, "the same certificate is given again"


CUT = """
import os, sys
from pathlib import Path
from edge_sdk import enrolment

directory = Path(sys.argv[1])
real = {name: getattr(os, name) for name in ("link", "replace", "fsync", "open", "unlink")}


def dies_at(count):
    # SIGKILL's equal: no handler and no finally runs. Every call that changes the directory is a place to die.
    left = [count]

    def wrap(function):
        def call(*arguments, **named):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return function(*arguments, **named)

        return call

    for name, function in real.items():
        setattr(os, name, wrap(function))


count = 0
while True:
    child = os.fork()
    if child == 0:
        dies_at(count)
        enrolment.join(directory / str(count), sys.stdin.readline().strip())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(count, os.waitstatus_to_exitcode(status), flush=True)
    if os.waitstatus_to_exitcode(status) != 9:
        break
    count += 1
"""


def test_a_power_cut_at_any_step_leaves_a_device_that_joins_with_the_same_token(fleet, tmp_path):
    tokens = [fleet.invite() for _ in range(150)]
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", CUT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    cuts = 0
    with child:
        for number, token in enumerate(tokens):
            child.stdin.write(token + "\n")
            child.stdin.flush()
            count, code = child.stdout.readline().split()
            assert int(count) == number
            if code == "0":
                break
            assert code == "9"
            cuts += 1
            directory = tmp_path / str(number)
            before = files(directory) if directory.exists() else {}
            membership = join(directory, token)
            after = files(directory)
            kept = [name for name in ("identity.key", "tls.key", "ledger") if name in before]
            assert all(after[name] == before[name] for name in kept), f"cut {number} lost what was there"
            assert not [name for name in after if name.endswith(".new")], f"cut {number} leaves rests"
            with fleet.store.reading() as rows:
                assert rows.token(token_hash(Token.read(token).secret)).spent_by.hex() == membership.device
    assert code == "0"
    assert cuts > 20


def test_a_joined_device_without_its_ledger_does_not_get_a_new_one(fleet, tmp_path):
    token = fleet.invite()
    join(tmp_path / "device", token)
    (tmp_path / "device" / "ledger").unlink()
    with pytest.raises(ParameterError, match="ledger is gone"):
        join(tmp_path / "device", token)
    assert not (tmp_path / "device" / "ledger").exists()


@pytest.mark.parametrize(("left", "key"), [("ledger", None), ("state.db", None), ("ledger", bytes(32))])
def test_what_another_identity_left_is_refused_before_the_token_is_spent(fleet, tmp_path, left, key):
    """A device that forked, and whose owner removed what seemed to be in the way of joining anew."""
    device, token = tmp_path / "device", fleet.invite()
    join(device, fleet.invite())
    device_store(device).close()
    for name in {"identity.key", "enrolment.json", "ledger", "state.db"} - {left}:
        (device / name).unlink()
    shutil.rmtree(device / "outbox")
    if key is not None:
        (device / "identity.key").write_bytes(key)
    before = files(device)
    with pytest.raises(ParameterError, match=f"{left} .* of another identity.* in another directory"):
        join(device, token)
    assert files(device) == before
    with fleet.store.reading() as rows:
        assert rows.token(token_hash(Token.read(token).secret)).spent_by is None
    join(tmp_path / "anew", token)


def test_a_device_that_lost_its_enrolment_alone_joins_again_as_itself(fleet, tmp_path):
    device = tmp_path / "device"
    membership = join(device, fleet.invite())
    device_store(device).close()
    (device / "enrolment.json").unlink()
    ledger = (device / "ledger").read_bytes()
    assert join(device, fleet.invite()).device == membership.device
    assert (device / "ledger").read_bytes() == ledger


def device_store(directory) -> DeviceStore:
    """As a device that runs opens it."""
    return DeviceStore(directory, Identity((directory / "identity.key").read_bytes()).public_key, AUTHORITY)


def test_a_directory_of_one_fleet_does_not_join_another(fleet, tmp_path):
    join(tmp_path / "device", fleet.invite())
    other = Fleet(tmp_path / "other")
    try:
        with pytest.raises(ParameterError, match="belongs to the fleet testfleet already"):
            join(tmp_path / "device", other.invite())
    finally:
        other.close()


def test_a_directory_that_others_can_read_is_refused(fleet, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    (shared / "file").touch()
    with pytest.raises(ParameterError, match="chmod 700"):
        join(shared, fleet.invite())


# Refusals


def refused(caplog, code, call, *arguments):
    with caplog.at_level(logging.WARNING, "sordino.enrolment"), pytest.raises(Refused) as caught:
        call(*arguments)
    assert caught.value.code == code
    assert f"refused ({code})" in caplog.text
    return caught.value


def test_a_copied_card_is_refused_and_logged(fleet, tmp_path, caplog):
    token = fleet.invite()
    join(tmp_path / "first", token)
    error = refused(caplog, "spent", join, tmp_path / "second", token)
    assert "used by another device" in str(error)
    assert "copied card" in caplog.text
    assert len(fleet.devices) == 1


def test_an_expired_token_is_refused(fleet, tmp_path, caplog):
    token = fleet.invite(lifetime_s=60)
    fleet.now += 60
    assert "ask the operator for a new one" in str(refused(caplog, "expired", join, tmp_path / "device", token))
    assert fleet.devices == {}


def test_a_made_up_secret_is_refused(fleet, tmp_path, caplog):
    token = msgspec.structs.replace(Token.read(fleet.invite()), secret=bytes(32)).text
    refused(caplog, "unknown", join, tmp_path / "device", token)


def test_a_device_changes_its_role_by_no_token(fleet, tmp_path, caplog):
    join(tmp_path / "device", fleet.invite())
    (tmp_path / "device" / "enrolment.json").unlink()
    refused(caplog, "enrolled", join, tmp_path / "device", fleet.invite(role="helper"))
    join(tmp_path / "device", fleet.invite())
    assert [role for role, _ in fleet.devices.values()] == ["device"]


def test_a_revoked_device_gets_no_certificate_with_whatever_token(fleet, tmp_path, caplog):
    token = fleet.invite()
    device = bytes.fromhex(join(tmp_path / "device", token).device)
    fleet.revoke(device)
    refused(caplog, "revoked", renew, tmp_path / "device")
    (tmp_path / "device" / "enrolment.json").unlink()
    refused(caplog, "revoked", join, tmp_path / "device", token)
    refused(caplog, "revoked", join, tmp_path / "device", fleet.invite())


def test_an_identity_has_to_sign_the_request_with_this_token(fleet):
    secret = Token.read(fleet.invite()).secret
    victim, thief = Identity(bytes([7]) * 32), Identity(bytes([8]) * 32)
    csr = enrolment._csr(victim, enrolment.tls_key(bytes([9]) * 48))
    for signer, statement in [
        (thief, enrol_statement(token_hash(secret), csr)),
        (victim, enrol_statement(token_hash(bytes(32)), csr)),
        (victim, enrol_statement(token_hash(secret), csr + b"\0")),
    ]:
        with pytest.raises(Refused, match="signature is not valid"):
            fleet.desk.enrol(
                EnrolRequest(1, secret, victim.public_key, csr, signer.sign("enrol", statement)), fleet.now
            )
    statement = enrol_statement(token_hash(secret), csr)
    with pytest.raises(Refused, match="signature is not valid"):
        fleet.desk.enrol(EnrolRequest(1, secret, victim.public_key, csr, victim.sign("renew", statement)), fleet.now)
    assert fleet.devices == {}


def test_a_certificate_request_for_another_name_is_refused(fleet):
    secret = Token.read(fleet.invite()).secret
    thief = Identity(bytes([8]) * 32)
    csr = enrolment._csr(Identity(bytes([7]) * 32), enrolment.tls_key(bytes([9]) * 48))
    request = EnrolRequest(
        1, secret, thief.public_key, csr, thief.sign("enrol", enrol_statement(token_hash(secret), csr))
    )
    with pytest.raises(Refused, match="CN is not the identity"):
        fleet.desk.enrol(request, fleet.now)
    assert fleet.devices == {}


# The pins


def test_a_service_with_another_ca_is_refused_before_anything_is_sent(fleet, tmp_path):
    other = Fleet(tmp_path / "other")
    token = msgspec.structs.replace(Token.read(other.invite()), url=fleet.url).text
    try:
        with pytest.raises(PeerError, match="not the one that the token pins"):
            join(tmp_path / "device", token)
    finally:
        other.close()
    assert fleet.devices == {}


def test_a_service_that_shows_the_pinned_ca_without_its_key_is_refused(fleet, tmp_path):
    other = Fleet(tmp_path / "other")
    # A man in the middle: its own certificate, and the pinned CA's to show.
    other.service._server.ca_pem = fleet.ca.certificate.public_bytes(serialization.Encoding.PEM)
    token = msgspec.structs.replace(Token.read(fleet.invite()), url=other.url).text
    try:
        with pytest.raises(PeerError, match="did not prove that it is the pinned service"):
            join(tmp_path / "device", token)
    finally:
        other.close()
    assert fleet.devices == {}


def test_a_wrong_clock_is_named_as_such(fleet, tmp_path):
    late = tmp_path / "late"
    late.mkdir()
    tomorrow = int(time.time()) + 3 * 86_400  # seen from there, this machine's clock is three days behind
    ca = CertificateAuthority.create(late, "late", tomorrow)
    ca.ensure_service_certificates(["127.0.0.1"], tomorrow)
    service = EnrolmentService("127.0.0.1", 0, late, fleet.decide)
    pins = Pins(f"https://127.0.0.1:{service.port}", AUTHORITY, COORDINATOR, (PUBLISHER,))
    desk = Desk(fleet.store, ca, pins, fleet="late", broker_url="mqtts://x:1", certificate_days=1)
    try:
        with pytest.raises(TransportError, match="clock says"):
            join(tmp_path / "device", desk.invite("device", [], 60, fleet.now).text)
    finally:
        service.close()


def test_an_unreachable_host_is_named(fleet, tmp_path):
    token = fleet.invite()
    fleet.service.close()
    with pytest.raises(TransportError, match=r"127\.0\.0\.1:\d+ cannot be reached"):
        join(tmp_path / "device", token)


# Renewal


def test_renewal_gives_a_later_certificate_for_the_same_keys_and_learns_a_new_broker(tmp_path):
    fleet = Fleet(tmp_path / "fleet", days=30)
    device = tmp_path / "device"
    try:
        join(device, fleet.invite())
        before = files(device)
        assert not enrolment.renewal_due(device, fleet.now)
        assert enrolment.renewal_due(device, fleet.now + 21 * 86_400)
        renew(device)
        assert files(device) == before, "it is given again while it is fresh"
        fleet.now += 21 * 86_400
        fleet.desk._broker_url = "mqtts://elsewhere:8883"
        assert renew(device).broker == Membership.read(device).broker == "mqtts://elsewhere:8883"
        after = files(device)
        old, new = (x509.load_pem_x509_certificate(made["tls.pem"]) for made in (before, after))
        assert new.not_valid_after_utc > old.not_valid_after_utc
        assert new.public_key() == old.public_key()
        assert {name for name in after if after[name] != before[name]} == {"tls.pem", "enrolment.json"}
    finally:
        fleet.service.close()


def test_a_stranger_cannot_renew(fleet, tmp_path, caplog):
    other = Fleet(tmp_path / "other")
    join(tmp_path / "device", fleet.invite())
    fleet.desk._store = other.store
    refused(caplog, "stranger", renew, tmp_path / "device")
    other.close()


# Tokens


def test_a_token_is_read_back_whole_also_when_mail_broke_its_line(fleet):
    token = fleet.desk.invite("helper", [], 60, fleet.now)
    text = token.text
    assert Token.read(f"  {text[:70]}\n  {text[70:]}\n") == token
    assert base64.urlsafe_b64encode(token.secret)[:40].decode() not in repr(token)


def test_the_store_holds_the_hash_of_the_secret_only(fleet):
    token = Token.read(fleet.invite())
    stored = b"".join(path.read_bytes() for path in fleet.directory.glob("coordinator.db*"))
    assert token_hash(token.secret) in stored
    assert token.secret not in stored


@given(st.data())
def test_a_token_that_was_not_copied_exactly_is_refused_without_repeating_it(data):
    token = Token("https://a:1", bytes(32), bytes(32), 1, bytes(32), bytes(32), [bytes(32)], "device")
    text = token.text
    place = data.draw(st.integers(0, len(text) - 1))
    changed = data.draw(st.sampled_from([
        text[:place], text[:place] + text[place + 1 :],
        text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :], text[:place] + "é" + text[place:],
    ]))  # fmt: skip
    if changed.rstrip("=") == text:
        return
    try:
        read: Token | ParameterError = Token.read(changed)
    except ParameterError as error:
        read = error
    assert (
        read == token or len(changed) < 40 or changed[20:80] not in str(read)
    )  # the same, in base64's unused last bits


@given(st.text(max_size=200))
def test_text_that_is_no_token_is_a_parameter_error(text):
    with pytest.raises(ParameterError):
        Token.read(text)


@pytest.mark.parametrize(
    "url", ["http://a:1", "https://", "https://u:p@a", "https://a:99999", "https://a/path", "a", "https://a..b:1"]
)
def test_a_token_for_an_odd_url_is_refused(url):
    text = Token(url, bytes(32), bytes(32), 1, bytes(32), bytes(32), [bytes(32)], "device").text
    with pytest.raises(ParameterError, match="URL"):
        Token.read(text)


@pytest.mark.parametrize("tags", [["A"], [""], ["a", "a"], ["x y"], ["a"] * 17])
def test_odd_tags_are_refused(fleet, tags):
    with pytest.raises(ParameterError, match="tags"):
        fleet.desk.invite("device", tags, 60, fleet.now)


# The service against strangers


def https(fleet, method, path, body=None, headers=None):
    context = ssl.create_default_context(cafile=fleet.directory / "ca.pem")
    connection = http.client.HTTPSConnection("127.0.0.1", fleet.service.port, timeout=5, context=context)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        with connection.getresponse() as response:
            return response.status, response.read()


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/", None, 404),
        ("GET", "/../ca.key", None, 404),
        ("POST", "/ca", b"{}", 404),
        ("POST", "/enrol", b"{}", 400),
        ("POST", "/enrol", b"[" * 30_000, 400),
        ("POST", "/enrol", b"\xff\xfe", 400),
        ("POST", "/enrol", json.dumps({"version": 2}).encode(), 400),
        ("POST", "/renew", b"null", 400),
        ("DELETE", "/enrol", None, 501),
    ],
)
def test_garbage_is_refused_and_changes_nothing(fleet, method, path, body, status):
    assert https(fleet, method, path, body)[0] == status
    assert fleet.devices == {}


def test_a_length_that_is_not_a_number_is_refused(fleet):
    for length in ("40000", "-1", "1e3", "٣", "99999999999999999999"):
        raw = socket.create_connection(("127.0.0.1", fleet.service.port))
        context = ssl.create_default_context(cafile=fleet.directory / "ca.pem")
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as connection:
            connection.sendall(f"POST /enrol HTTP/1.0\r\nContent-Length: {length}\r\n\r\n".encode())
            assert b" 413 " in connection.recv(100)


def test_silent_connections_are_cut_and_do_not_keep_others_out(fleet, tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "CONNECTION_S", 0.3)
    silent = [socket.create_connection(("127.0.0.1", fleet.service.port)) for _ in range(40)]
    try:
        for connection in silent:
            connection.settimeout(10)
            assert connection.recv(1) == b"", "it should be closed by the service"
        join(tmp_path / "device", fleet.invite())
    finally:
        for connection in silent:
            connection.close()


@pytest.mark.parametrize("shaken", [False, True])
def test_a_stranger_who_holds_every_place_keeps_nobody_out(fleet, monkeypatch, shaken):
    monkeypatch.setattr(service_module, "MAX_CONNECTIONS", 8)
    monkeypatch.setattr(service_module, "BUSINESS_S", 0.2)
    context = ssl.create_default_context(cafile=fleet.directory / "ca.pem")
    held = [socket.create_connection(("127.0.0.1", fleet.service.port)) for _ in range(8)]
    if shaken:
        held = [context.wrap_socket(connection, server_hostname="127.0.0.1") for connection in held]
    deadline = time.monotonic() + 10
    try:
        while True:
            with contextlib.suppress(OSError):  # those that are there have a little time for their business
                assert https(fleet, "GET", "/ca")[0] == 200
                break
            assert time.monotonic() < deadline
        assert sum(is_open(connection) for connection in held) == 7
        for _ in range(3):  # who asks and goes takes nobody's place
            assert https(fleet, "GET", "/ca")[0] == 200
        assert sum(is_open(connection) for connection in held) == 7
    finally:
        for connection in held:
            connection.close()


def test_the_oldest_without_a_handshake_makes_room_first(fleet, monkeypatch):
    monkeypatch.setattr(service_module, "MAX_CONNECTIONS", 3)
    context = ssl.create_default_context(cafile=fleet.directory / "ca.pem")
    place, entries = ("127.0.0.1", fleet.service.port), fleet.service._server._open
    held = [context.wrap_socket(socket.create_connection(place), server_hostname="127.0.0.1")]
    held += [socket.create_connection(place) for _ in range(2)]
    deadline = time.monotonic() + 10
    try:
        while len(entries) < 3 or not any(entry.shaken for entry in list(entries.values())):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        for entry in list(entries.values()):
            entry.since_s -= 11 if entry.shaken else 10
        assert https(fleet, "GET", "/ca")[0] == 200
        assert [is_open(connection) for connection in held] == [True, False, True]
    finally:
        for connection in held:
            connection.close()


def test_a_stranger_who_knows_a_device_s_key_hides_no_copied_card(fleet, tmp_path, caplog):
    token = fleet.invite()
    device = join(tmp_path / "device", token)
    request = {"version": 1, "identity": bytes.fromhex(device.device), "csr": b"x", "signature": bytes(64)}
    body = msgspec.json.encode(enrolment.RenewRequest(**request))
    for _ in range(LINES + 2):
        assert https(fleet, "POST", "/renew", body)[0] == 403
    with pytest.raises(Refused):
        join(tmp_path / "copy", token)
    assert "refused (spent)" in caplog.messages[-1]


def is_open(connection):
    connection.settimeout(0.05)
    try:
        return connection.recv(1) != b""
    except TimeoutError:
        return True
    except OSError:
        return False


def test_a_request_of_endless_headers_is_cut_off(fleet, caplog):
    context = ssl.create_default_context(cafile=fleet.directory / "ca.pem")
    for head in (
        b"GET /" + b"a" * 60_000,
        b"GET /ca HTTP/1.0\r\n" + (b"h: " + b"a" * 200 + b"\r\n") * 90,
        b"G" * 9_000,
    ):
        raw = socket.create_connection(("127.0.0.1", fleet.service.port))
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as connection:
            connection.settimeout(10)
            with contextlib.suppress(OSError):
                connection.sendall(head)
                assert connection.recv(100) == b""
    assert sum("bytes before its body" in line for line in caplog.messages) == 3


def test_a_stranger_does_not_fill_the_log_and_hides_nobody_who_shows_a_token(fleet, tmp_path, caplog):
    token = fleet.invite()
    join(tmp_path / "device", token)
    for _ in range(STRANGERS_LINES + 20):
        assert https(fleet, "GET", "/" + "%80" * 2000)[0] == 404
    with pytest.raises(Refused):
        join(tmp_path / "copy", token)
    lines = [line for line in caplog.messages if "refus" in line]
    assert len(lines) == STRANGERS_LINES + 2
    assert "further refusals are only counted" in lines[-2]
    assert "refused (spent)" in lines[-1]
    assert max(map(len, caplog.messages)) < 600


def test_requests_from_many_at_once_all_get_their_own_certificate(fleet, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    tokens = [fleet.invite() for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        joined = list(pool.map(lambda item: join(tmp_path / f"d{item[0]}", item[1]), enumerate(tokens)))
    assert len({membership.device for membership in joined}) == 8
    for number, membership in enumerate(joined):
        certificate = x509.load_pem_x509_certificate((tmp_path / f"d{number}" / "tls.pem").read_bytes())
        assert certificate.subject.rfc4514_string() == f"CN={membership.device}"


def test_a_listening_address_that_is_taken_is_named(fleet, tmp_path):
    with pytest.raises(ParameterError, match=f"cannot listen on 127.0.0.1:{fleet.service.port}"):
        EnrolmentService("127.0.0.1", fleet.service.port, fleet.directory, fleet.decide)


def test_a_device_that_asks_for_certificates_gets_a_few_certificates_a_day(fleet, tmp_path):
    join(tmp_path / "device", fleet.invite())
    identity = Identity((tmp_path / "device" / "identity.key").read_bytes())
    refused = []
    for number in range(3 * service_module.MAX_CERTIFICATES_A_DAY):
        csr = enrolment._csr(identity, enrolment.tls_key(bytes([number]) * 48))
        request = enrolment.RenewRequest(
            version=1,
            identity=identity.public_key,
            csr=csr,
            signature=identity.sign("renew", enrolment.frame("renew", csr)),
        )
        try:
            fleet.desk.renew(request, fleet.now)
        except Refused as error:
            refused.append(error.code)
    assert len(fleet.certificates) == service_module.MAX_CERTIFICATES_A_DAY
    assert set(refused) == {"busy"}
    fleet.now += 86_400
    renew(tmp_path / "device")  # its own key, a day later


def test_a_service_that_drips_its_answer_holds_no_device(fleet, tmp_path, monkeypatch):
    """Against a man in the middle who keeps the connection just alive: reads succeed, the answer never ends."""
    let_go = threading.Event()
    monkeypatch.setattr(enrolment, "_ask_once", lambda *_: let_go.wait() and (200, b""))
    monkeypatch.setattr(enrolment, "EXCHANGE_S", 0.05)
    try:
        with pytest.raises(TransportError, match="answers too slowly"):
            enrolment.join(tmp_path / "device", fleet.invite())
    finally:
        let_go.set()
