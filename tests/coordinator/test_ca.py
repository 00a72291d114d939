import os
import shutil
import stat
import subprocess

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coordinator.ca import BACKDATED_S, CertificateAuthority, read_csr
from edge_sdk.enrolment import tls_key
from edge_sdk.errors import ParameterError, PeerError

NOW = 1_800_000_000
DEVICE = "ab" * 32
OPENSSL = shutil.which("openssl")


@pytest.fixture
def ca(tmp_path):
    return CertificateAuthority.create(tmp_path, "testfleet", NOW)


def csr(key, cn=DEVICE, extensions=()):
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn)])
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def key(fill=1):
    return tls_key(bytes([fill]) * 48)


def verify(ca, path, *flags):
    done = subprocess.run(
        [OPENSSL, "verify", "-x509_strict", "-attime", str(NOW), "-CAfile", ca.directory / "ca.pem", *flags, path],
        capture_output=True,
        check=False,
        text=True,
    )
    return done.returncode == 0, done.stdout + done.stderr


def test_keys_are_readable_by_their_owner_only_and_survive_a_second_create(ca):
    again = CertificateAuthority.create(ca.directory, "another name", NOW + 5)
    assert again.sha256 == ca.sha256
    ca.ensure_service_certificates(["localhost"], NOW)
    for name in ("ca.key", "server.key", "client.key"):
        assert stat.S_IMODE(os.stat(ca.directory / name).st_mode) == 0o600


def test_a_device_certificate_takes_key_and_cn_and_nothing_else_of_the_request(ca):
    wish = x509.BasicConstraints(ca=True, path_length=None)
    request = read_csr(csr(key(), extensions=[wish]), DEVICE)
    issued = ca.issue_device(request, DEVICE, NOW, 365)
    certificate = x509.load_pem_x509_certificate(issued.pem)
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.CLIENT_AUTH
    ]
    assert certificate.subject.rfc4514_string() == f"CN={DEVICE}"
    assert certificate.public_key() == key().public_key()
    assert certificate.not_valid_before_utc.timestamp() == NOW - BACKDATED_S
    assert issued.not_after_s == NOW + 365 * 86_400
    assert issued.serial == certificate.serial_number


def test_openssl_takes_what_the_ca_makes_and_refuses_what_it_revoked(ca):
    ca.ensure_service_certificates(["fleet.example.org", "10.0.0.7", "::1"], NOW)
    issued = ca.issue_device(read_csr(csr(key()), DEVICE), DEVICE, NOW, 365)
    device = ca.directory / "device.pem"
    device.write_bytes(issued.pem)
    ca.write_crl([], NOW)
    crl = ["-crl_check", "-CRLfile", ca.directory / "crl.pem"]
    assert verify(ca, ca.directory / "server.pem", "-purpose", "sslserver", "-verify_ip", "10.0.0.7")[0]
    assert verify(ca, ca.directory / "server.pem", "-verify_hostname", "fleet.example.org")[0]
    assert not verify(ca, ca.directory / "server.pem", "-verify_hostname", "other.example.org")[0]
    assert verify(ca, ca.directory / "client.pem", "-purpose", "sslclient", *crl)[0]
    assert verify(ca, device, "-purpose", "sslclient", *crl)[0]
    assert not verify(ca, device, "-purpose", "sslserver")[0], "a device can stand in for the broker"
    ca.write_crl([issued.serial], NOW)
    accepted, said = verify(ca, device, "-purpose", "sslclient", *crl)
    assert not accepted
    assert "revoked" in said


@pytest.mark.parametrize(
    ("der", "reason"),
    [
        (csr(key(), cn="coordinator"), "CN"),
        (csr(rsa.generate_private_key(65537, 2048)), "P-256"),
        (csr(ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (csr(key())[:-1] + bytes([csr(key())[-1] ^ 1]), "signed|read"),
        (b"", "read"),
        (b"\x30\x80" * 1000, "read"),
        (bytes(9000), "limit"),
    ],
)
def test_a_request_that_is_not_what_a_device_makes_is_refused_by_name(der, reason):
    with pytest.raises(PeerError, match=reason):
        read_csr(der, DEVICE)


def test_service_certificates_are_made_anew_when_names_change_or_the_end_is_near(ca):
    assert ca.ensure_service_certificates(["localhost"], NOW)
    assert not ca.ensure_service_certificates(["localhost"], NOW + 86_400)
    assert ca.ensure_service_certificates(["localhost", "10.0.0.7"], NOW + 86_400)
    assert ca.ensure_service_certificates(["localhost", "10.0.0.7"], NOW + 4 * 365 * 86_400)


@pytest.mark.parametrize("name", ["", "a b", "-x", "x" * 64, "host/..", "10.0.0.7:80"])
def test_a_name_that_is_no_host_is_refused(ca, name):
    with pytest.raises(ParameterError, match="neither a host name nor an address"):
        ca.ensure_service_certificates([name], NOW)


def test_an_exchanged_key_file_is_found_at_the_start(ca):
    (ca.directory / "ca.key").unlink()
    with pytest.raises(ParameterError, match=r"ca\.key is missing"):
        CertificateAuthority(ca.directory)
    other = ca.directory / "other"
    other.mkdir()
    CertificateAuthority.create(other, "x", NOW)
    (other / "ca.key").rename(ca.directory / "ca.key")
    with pytest.raises(ParameterError, match="not the key of"):
        CertificateAuthority(ca.directory)


def test_every_serial_is_drawn_anew_and_positive(ca):
    request = read_csr(csr(key()), DEVICE)
    serials = {ca.issue_device(request, DEVICE, NOW, 1).serial for _ in range(20)}
    assert len(serials) == 20
    assert all(0 < serial < 1 << 159 for serial in serials)
