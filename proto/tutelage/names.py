"""Names that become metadata keys, folders and Ray actors, and addresses: one rule each, one place."""

from __future__ import annotations

import hashlib
import re

from tutelage.errors import ConfigurationError

_LONGEST = 64
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
_LARGEST_PORT, _DIGEST = 65535, 8


def check_name(name: str, field: str) -> str:
    """The name itself if it is 1 … 64 of a-z 0-9 . _ - and starts with a letter or digit.

    Raises:
        ConfigurationError: any other name, `../x` and the like among them.

    """
    if not _NAME.match(name):
        raise ConfigurationError(
            f"{name!r} is not a name; use 1 to 64 of a-z, 0-9, '.', '_', '-', starting with a letter or digit",
            field,
        )
    return name


def name_in_run(run: str, student: str) -> str:
    """What a teacher counts a student under: its run and its id, since students of two runs may have one id.

    A name as `check_name` has it: what is longer is cut, and told apart by a digest of the whole.
    """
    whole = f"{run}.{student}"
    if len(whole) <= _LONGEST:
        return whole
    digest = hashlib.sha256(whole.encode()).hexdigest()[:_DIGEST]
    return f"{whole[: _LONGEST - _DIGEST - 1]}-{digest}"


def check_address(address: str, field: str = "") -> str:
    """The address itself if it is HOST:PORT with a port that a client can connect to; `dns:` may stand before it.

    Raises:
        ConfigurationError: there is no port, or none of that number, or a scheme such as http: stands before it.

    """
    host, _, port = address.rpartition(":")
    named = host and ("/" not in host or host.startswith("dns:"))
    if not named or not port.isdecimal() or not 1 <= int(port) <= _LARGEST_PORT:
        raise ConfigurationError(
            f"{address!r} is no address; give HOST:PORT, with a port of 1 to {_LARGEST_PORT}", field
        )
    return address


def check_host(host: str) -> str:
    """The host itself if it is one to listen on: a name or an IP address of either version, without a port.

    Raises:
        ConfigurationError: it is empty, or a port stands behind it.

    """
    if not host or host.count(":") == 1:
        raise ConfigurationError(f"{host!r} is no host to listen on; give 127.0.0.1, say, and the port by itself")
    return host


def address_of(host: str, port: int) -> str:
    """HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
