"""The files by which the two sides of a connection know each other, as settings and as flags; needs no gRPC."""

from __future__ import annotations

import argparse
from pathlib import Path

from pydantic import model_validator

from tutelage.config import SPELLINGS, Config, user_path, validate
from tutelage.errors import ConfigurationError


class ServerTls(Config):
    """How a server shows who it is, and whom it lets in."""

    certificate: Path
    """PEM file: the server's certificate, followed by those between it and the root."""

    key: Path
    """PEM file: the certificate's private key."""

    client_ca: Path | None = None
    """PEM file: only clients with a certificate from here are let in (mutual TLS); none means all are."""


class ClientTls(Config):
    """How a client knows its server, and shows who it is."""

    ca: Path
    """PEM file: the server's certificate must come from here."""

    certificate: Path | None = None
    """PEM file: the client's own certificate, for a server that asks for one."""

    key: Path | None = None
    """PEM file: its private key."""

    @model_validator(mode="after")
    def _a_pair(self) -> ClientTls:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a certificate and its key come together; give both or neither")
        return self


class ClientAccess(Config):
    """How a client knows the server that it asks, and shows who it is."""

    tls: ClientTls | None = None
    """How to know the server; none means an unencrypted connection."""

    token_file: Path | None = None
    """File with the bearer token that the server asks for."""


def add_client_flags(parser: argparse.ArgumentParser, scope: str) -> None:
    """Adds the flags of a command that asks a server; `client_access` reads them.

    Args:
        parser: of the command.
        scope: that the command needs a token for, if the server asks for tokens.

    """

    def add(name: str, text: str) -> None:
        spellings = next(names for names in SPELLINGS if name in names)
        flags = [f"--{each.replace('_', '-')}" for each in reversed(spellings)]
        parser.add_argument(*flags, dest=name, type=user_path, metavar="FILE", help=text)

    add("ca", "PEM file that the server's certificate must come from: use TLS")
    add("certificate", "PEM file: our own certificate, if the server asks for one")
    add("key", "PEM file: its private key")
    add("token_file", f"file with a bearer token of scope {scope}")


def client_access(options: argparse.Namespace) -> ClientAccess:
    """What the flags of `add_client_flags` say.

    Raises:
        ConfigurationError: a certificate without its key or the reverse, or either without --ca.

    """
    files = {"ca": options.ca, "certificate": options.certificate, "key": options.key}
    tls = files if any(files.values()) else None
    if tls and options.ca is None:
        raise ConfigurationError("a certificate of our own is shown over TLS only; give the server's --ca too", "ca")
    return validate(ClientAccess, {"tls": tls, "token_file": options.token_file})
