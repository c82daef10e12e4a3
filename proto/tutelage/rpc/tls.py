"""The files by which the two sides of an encrypted connection know each other; importable without gRPC."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from tutelage.config import Config


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
