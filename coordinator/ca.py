"""The fleet's certificate authority: who may reach the broker (docs/services.md section 2).

A certificate says which device a connection is; what a device says in the protocol it signs with its identity. So the
CA can lock devices out and let strangers in, and still read nothing: who counts is the fleet authority's roster.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_sdk.crypto.hashing import content_hash
from edge_sdk.enrolment import private_pem, tls_key
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.files import write_once, write_whole

COORDINATOR = "coordinator"
"""CN of the coordinator's client certificate. A device's is 64 hexadecimal digits, so none can have it."""

BACKDATED_S = 86_400
"""Certificates begin a day before they are made: most small devices have no clock that runs while they are off."""

AUTHORITY_DAYS = 365 * 20
SERVER_DAYS = 365 * 5
MAX_CSR_BYTES = 8192


@dataclass(frozen=True)
class Issued:
    """A device's certificate. serial: what the revocation list names.  not_after_s: Unix seconds."""

    pem: bytes
    serial: int
    not_after_s: int


class CertificateAuthority:
    """The CA whose key lies in a directory. `now_s` is Unix seconds throughout.

    Files: ca.key, ca.pem; server.key, server.pem (the broker's and the enrolment service's); client.key, client.pem
    (the coordinator's own at the broker); crl.pem. Keys have mode 0600.
    """

    def __init__(self, directory: Path) -> None:
        """Raises ParameterError that names the file which is missing or not what it should be."""
        self.directory = directory
        self._key = _read_key(directory / "ca.key")
        self.pem = _read(directory / "ca.pem")
        self.certificate = _read_certificate(directory / "ca.pem")
        if _spki(self._key.public_key()) != _spki(self.certificate.public_key()):
            raise ParameterError("ca.key is not the key of ca.pem")

    @classmethod
    def create(cls, directory: Path, fleet: str, now_s: int) -> CertificateAuthority:
        """The directory's CA, made if there is none. A crash between key and certificate leaves a key that is used."""
        write_once(directory / "ca.key", private_pem(tls_key(os.urandom(48))), mode=0o600)
        if not (directory / "ca.pem").exists():
            key = _read_key(directory / "ca.key")
            name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{fleet} fleet CA")])
            builder = _builder(name, name, key.public_key(), now_s, AUTHORITY_DAYS)
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
            subject = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
            certificate = builder.add_extension(subject, critical=False).sign(key, hashes.SHA256())
            write_once(directory / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))
        return cls(directory)

    @property
    def sha256(self) -> bytes:
        """What tokens pin: the hash of the certificate's DER, as `openssl x509 -fingerprint -sha256` prints it."""
        return content_hash(self.certificate.public_bytes(serialization.Encoding.DER))

    def ensure_service_certificates(self, names: Sequence[str], now_s: int) -> bool:
        """Make server.pem for these host names and addresses and client.pem, where missing, outdated or near their end.

        Returns whether server.pem is new. Raises ParameterError on a name that is neither host name nor address.
        """
        wanted = [_general_name(name) for name in names]
        if not wanted:
            raise ParameterError("the server's certificate needs a name: what devices call this machine")
        changed = self._ensure("server", names[0], ExtendedKeyUsageOID.SERVER_AUTH, wanted, now_s)
        self._ensure("client", COORDINATOR, ExtendedKeyUsageOID.CLIENT_AUTH, None, now_s)
        return changed

    def issue_device(self, csr: x509.CertificateSigningRequest, device: str, now_s: int, days: int) -> Issued:
        """A client certificate for `device` and the request's key. Of the request nothing else is taken over."""
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 - read_csr saw to it
        certificate = self._issue(name, key, ExtendedKeyUsageOID.CLIENT_AUTH, None, now_s, days)
        return Issued(
            certificate.public_bytes(serialization.Encoding.PEM),
            certificate.serial_number,
            int(certificate.not_valid_after_utc.timestamp()),
        )

    def write_crl(self, serials: Iterable[int], now_s: int) -> None:
        """Replace crl.pem by one that names these certificates.

        It is valid as long as the CA: a list that ran out would lock everybody out, and it is we who put it in place.
        """
        start = _time(now_s - BACKDATED_S)
        builder = x509.CertificateRevocationListBuilder(
            issuer_name=self.certificate.subject,
            last_update=start,
            next_update=self.certificate.not_valid_after_utc,
        )
        for serial in sorted(set(serials)):
            revoked = x509.RevokedCertificateBuilder(serial_number=serial, revocation_date=start)
            builder = builder.add_revoked_certificate(revoked.build())
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(x509.CRLNumber(now_s), critical=False)
        crl = builder.add_extension(authority, critical=False).sign(self._key, hashes.SHA256())
        write_whole(self.directory / "crl.pem", crl.public_bytes(serialization.Encoding.PEM))

    def _ensure(
        self, stem: str, cn: str, use: x509.ObjectIdentifier, names: Sequence[x509.GeneralName] | None, now_s: int
    ) -> bool:
        key_path, path = self.directory / f"{stem}.key", self.directory / f"{stem}.pem"
        write_once(key_path, private_pem(tls_key(os.urandom(48))), mode=0o600)
        key = _read_key(key_path)
        if path.exists() and self._still_good(_read_certificate(path), key, names, now_s):
            return False
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn[:64])])
        certificate = self._issue(subject, key.public_key(), use, names, now_s, SERVER_DAYS)
        write_whole(path, certificate.public_bytes(serialization.Encoding.PEM))
        return True

    def _still_good(
        self,
        certificate: x509.Certificate,
        key: ec.EllipticCurvePrivateKey,
        names: Sequence[x509.GeneralName] | None,
        now_s: int,
    ) -> bool:
        if _spki(certificate.public_key()) != _spki(key.public_key()) or not self.issued(certificate):
            return False
        if names is not None:
            extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
            if set(extension.value) != set(names):
                return False
        start = certificate.not_valid_before_utc.timestamp()
        end = certificate.not_valid_after_utc.timestamp()
        return start <= now_s < end - (end - start) / 3

    def issued(self, certificate: x509.Certificate) -> bool:
        """Whether this CA signed it."""
        try:
            certificate.verify_directly_issued_by(self.certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def _issue(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        use: x509.ObjectIdentifier,
        names: Sequence[x509.GeneralName] | None,
        now_s: int,
        days: int,
    ) -> x509.Certificate:
        builder = _builder(subject, self.certificate.subject, key, now_s, days)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        if names is not None:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return builder.add_extension(authority, critical=False).sign(self._key, hashes.SHA256())


def read_csr(der: bytes, device: str) -> x509.CertificateSigningRequest:
    """A device's request, if it is for a P-256 key, signed by that key, and its CN is `device`.

    Raises PeerError that names what is wrong.
    """
    if len(der) > MAX_CSR_BYTES:
        raise PeerError(f"certificate request: {len(der)} bytes is over the limit of {MAX_CSR_BYTES}")
    try:
        csr = x509.load_der_x509_csr(der)
        names = csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        key = csr.public_key()
        signed = csr.is_signature_valid
    except Exception as error:
        raise PeerError(f"certificate request: it cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise PeerError("certificate request: the key is not on P-256")
    if not signed:
        raise PeerError("certificate request: it is not signed by its own key")
    if len(names) != 1 or names[0].value != device:
        raise PeerError("certificate request: its CN is not the identity's public key in hexadecimal")
    return csr


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now_s: int, days: int
) -> x509.CertificateBuilder:
    serial = (int.from_bytes(os.urandom(20), "big") >> 1) | 1  # positive, at most 20 bytes (RFC 5280, 4.1.2.2)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(_time(now_s - BACKDATED_S))
        .not_valid_after(_time(now_s + days * 86_400))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    labels = name.split(".")
    if len(name) > 253 or not all(_is_label(label) for label in labels):
        raise ParameterError(f"{name!r} is neither a host name nor an address")
    return x509.DNSName(name)


def _is_label(label: str) -> bool:
    plain = label.isascii() and label.replace("-", "").replace("_", "").isalnum()
    return plain and len(label) <= 63 and not label.startswith("-") and not label.endswith("-")


def _time(unix_s: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(unix_s, dt.UTC)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ParameterError(f"{path} is missing: `edge-coordinator init` makes it") from error


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(_read(path), None)
    except (ValueError, TypeError) as error:
        raise ParameterError(f"{path} is not a private key in PEM: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ParameterError(f"{path} is not a key on P-256")
    return key


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError as error:
        raise ParameterError(f"{path} is not a certificate in PEM: {error}") from error


def _spki(key: object) -> bytes:
    return key.public_bytes(  # type: ignore[attr-defined,no-any-return]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
