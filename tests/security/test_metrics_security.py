"""Beyond loopback a service's metrics travel as its answers do: encrypted, and to those who have a certificate."""

from __future__ import annotations

import importlib.util
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tutelage.errors import ConfigurationError
from tutelage.rpc.metrics import serve_metrics
from tutelage.rpc.tls import ServerTls

SPEC = importlib.util.spec_from_file_location("certificates", Path(__file__).with_name("certificates.py"))
certificates = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(certificates)


class One(Collector):
    def collect(self):
        yield GaugeMetricFamily("seen", "Seen.", value=1)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read(url: str, context: ssl.SSLContext | None = None) -> str:
    with urllib.request.urlopen(url, timeout=5, context=context) as answer:
        return answer.read().decode()


def test_beyond_loopback_they_are_encrypted_and_ask_for_a_certificate(tmp_path: Path, port: int) -> None:
    ours, theirs = certificates.Authority(tmp_path, "ours"), certificates.Authority(tmp_path, "theirs")
    tls = ServerTls(**ours.issue("127.0.0.1"), client_ca=ours.ca)
    stop = serve_metrics("0.0.0.0", port, One(), tls)
    try:
        nobody, stranger, known = (ssl.create_default_context(cafile=ours.ca) for _ in range(3))
        stranger.load_cert_chain(*theirs.issue("prometheus").values())
        known.load_cert_chain(*ours.issue("prometheus").values())
        assert "seen 1.0" in read(f"https://127.0.0.1:{port}/metrics", known)
        for context in (nobody, stranger):
            with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
                read(f"https://127.0.0.1:{port}/metrics", context)
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            read(f"http://127.0.0.1:{port}/metrics")
        with socket.create_connection(("127.0.0.1", port)):  # connects, says nothing, and holds up nobody
            assert "seen 1.0" in read(f"https://127.0.0.1:{port}/metrics", known)
    finally:
        stop()


def test_on_loopback_they_are_plain_text(tmp_path: Path, port: int) -> None:
    stop = serve_metrics(
        "127.0.0.1", port, One(), ServerTls(**certificates.Authority(tmp_path, "a").issue("127.0.0.1"))
    )
    assert "seen 1.0" in read(f"http://127.0.0.1:{port}/metrics")
    stop()


def test_a_certificate_that_cannot_be_read_is_said(tmp_path: Path, port: int) -> None:
    tls = ServerTls(certificate=tmp_path / "none.pem", key=tmp_path / "none.key")
    with pytest.raises(ConfigurationError, match="cannot serve metrics at"):
        serve_metrics("0.0.0.0", port, One(), tls)
