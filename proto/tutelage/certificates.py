"""`tutelage certificates`: an authority of one's own, and certificates by which servers and clients know each other.

    tutelage certificates --out certificates --server teacher=teacher,10.0.0.4 --client trainer --node head=10.0.0.5

Run again with other names it adds certificates of the same authority; it never overwrites a file.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.config import user_path
from tutelage.errors import EXIT_DONE, ConfigurationError
from tutelage.files import reporting_disk_errors
from tutelage.names import check_name

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

_AUTHORITY_DAYS = 3650
# A machine whose clock is a little behind takes a new certificate all the same.
_BEFORE = datetime.timedelta(minutes=5)


class Authority:
    """Signs certificates; `ca.pem` and `ca.key` in a folder, made if neither is there.

    Raises:
        ConfigurationError: only one of the two is there, or it is no certificate with an elliptic key.

    """

    def __init__(self, folder: Path) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        self._folder = folder
        certificate, key = folder / "ca.pem", folder / "ca.key"
        if certificate.exists() != key.exists():
            raise ConfigurationError(
                f"of the authority {certificate} and {key} only one is there; both sign, or neither yet", "out"
            )
        if not key.exists():
            self._key = ec.generate_private_key(ec.SECP256R1())
            self._name = _name_of("tutelage authority")
            extension = x509.BasicConstraints(ca=True, path_length=0)
            made = self._builder(self._name, self._key, _AUTHORITY_DAYS).add_extension(extension, critical=True)
            self._write("ca", made, self._key)
            return
        try:
            loaded = load_pem_private_key(key.read_bytes(), password=None)
            self._name = x509.load_pem_x509_certificate(certificate.read_bytes()).subject
        except (OSError, ValueError, TypeError) as error:
            raise ConfigurationError(f"{folder} holds no authority that can sign: {error}", "out") from error
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise ConfigurationError(f"{key} is no elliptic key, as this command makes them", "out")
        self._key = loaded

    def issue(self, name: str, hosts: list[str], days: int, *, asks: bool = False) -> None:
        """Writes `<name>.pem` and `<name>.key`.

        Args:
            name: of the files, and who the certificate says that it is.
            hosts: DNS names and addresses that a server is reached by; none makes it a client's.
            days: how long it is good.
            asks: whether a server shows it to others too, as the nodes of a Ray cluster do.

        """
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID

        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH] * bool(hosts)
        usages += [ExtendedKeyUsageOID.CLIENT_AUTH] * (asks or not hosts)
        builder = (
            self._builder(_name_of(name), key, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_host, hosts))), critical=False)
        self._write(name, builder, key)

    def _builder(self, subject: x509.Name, key: EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
        from cryptography import x509

        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BEFORE)
            .not_valid_after(now + datetime.timedelta(days=days))
        )

    def _write(self, name: str, builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey) -> None:
        from cryptography.hazmat.primitives import hashes, serialization

        pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        pem = serialization.Encoding.PEM
        _create(self._folder / f"{name}.key", key.private_bytes(pem, pkcs8, plain), 0o600)
        _create(self._folder / f"{name}.pem", builder.sign(self._key, hashes.SHA256()).public_bytes(pem), 0o644)


def _create(path: Path, content: bytes, mode: int) -> None:
    # O_EXCL: between a look and a write somebody else could put the file there.
    with reporting_disk_errors(path), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _name_of(text: str) -> x509.Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def main(arguments: list[str]) -> int:
    """Make the certificates of mutual TLS: an authority, servers', clients'."""
    parser = argparse.ArgumentParser(prog="tutelage certificates", description=main.__doc__)
    parser.add_argument("--out", "--output", type=user_path, default=Path("certificates"), metavar="DIR",
                        help="folder of the files (certificates)")  # fmt: skip
    parser.add_argument("--server", action="append", default=[], metavar="NAME=HOST[,HOST…]",
                        help="a server and the DNS names and addresses that it is reached by")  # fmt: skip
    parser.add_argument("--client", action="append", default=[], metavar="NAME", help="somebody who asks servers")
    parser.add_argument("--node", action="append", default=[], metavar="NAME=HOST[,HOST…]",
                        help="a node of Ray, which is both to the others")  # fmt: skip
    parser.add_argument("--days", type=int, default=365, help="how long the certificates are good (365)")
    options = parser.parse_args(arguments)
    nodes = dict(map(_server, options.node))
    wanted = dict(map(_server, options.server)) | {name: [] for name in options.client} | nodes
    given = len(options.server) + len(options.client) + len(options.node)
    if not wanted or len(wanted) < given or options.days < 1:
        raise ConfigurationError("name servers as --server NAME=HOST[,HOST…], clients as --client NAME, Ray's nodes "
                                 "as --node NAME=HOST[,HOST…]; each once, for a day at least", "server")  # fmt: skip
    for name in wanted:
        if check_name(name, "server") == "ca":
            raise ConfigurationError("ca is the authority's own name; choose another", "server")
    there = [file for name in wanted for file in (f"{name}.pem", f"{name}.key") if (options.out / file).exists()]
    if there:
        raise ConfigurationError(
            f"{options.out / there[0]} is there and stays; move it away to renew it, or choose another name", "out"
        )
    with reporting_disk_errors(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    authority = _authority(options.out)
    for name, hosts in wanted.items():
        authority.issue(name, hosts, options.days, asks=name in nodes)
    print(_what_goes_where(options.out, wanted, nodes))
    return EXIT_DONE


def _authority(folder: Path) -> Authority:
    try:
        return Authority(folder)
    except ModuleNotFoundError as error:
        raise ConfigurationError("certificates are made with the package cryptography, which is not installed here; "
                                 "pip install cryptography") from error  # fmt: skip


def _server(text: str) -> tuple[str, list[str]]:
    name, _, hosts = text.partition("=")
    names = [host for host in hosts.split(",") if host]
    if not names:
        raise ConfigurationError(f"{text!r} has no hosts; give NAME=HOST[,HOST…]", "server")
    return name, names


def _what_goes_where(folder: Path, wanted: dict[str, list[str]], nodes: Collection[str]) -> str:
    lines = [
        f"{folder}/ca.pem  to everybody: a server's tls.client_ca, a client's tls.ca",
        f"{folder}/ca.key  to nobody: whoever has it can make certificates; keep it off every server",
    ]
    for name, hosts in wanted.items():
        kind = "node" if name in nodes else "server" if hosts else "client"
        who = f"the {kind} {name}" + (f" ({', '.join(hosts)})" if hosts else "")
        to = "RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY" if name in nodes else "tls.certificate, tls.key"
        lines.append(f"{folder}/{name}.pem, {name}.key  to {who} alone: {to}")
    return "\n".join(lines)
