"""Fetching, from a server with a certificate of its own in this process and from an object store in memory."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tasks.core.errors import BadData, Transient
from tasks.ingest.download import Pinned, fetch, public_address
from tasks.ingest.params import RemoteSource
from tasks.ingest.stage import Reading
from tests.helpers.samples import file_source

CONTENT = b'{"prompt": "q", "response": "a"}\n' * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"], self.headers.get("Range", "")))  # type: ignore[attr-defined]
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", "https://other.example/rows.jsonl")
            self.end_headers()
            return
        if self.path == "/moved":
            self.send_response(301)
            self.send_header("Location", "/rows.jsonl")
            self.end_headers()
            return
        if self.path != "/rows.jsonl":
            self.send_error(int(self.path[1:]))
            return
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        stop = start + self.server.breaks_after if self.server.breaks_after else len(CONTENT)  # type: ignore[attr-defined]
        self.wfile.write(CONTENT[start:stop])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "data.example")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("data.example")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def server(certificate: tuple[Path, Path]) -> Iterator[Any]:
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    listening.socket = context.wrap_socket(listening.socket, server_side=True)
    listening.asked, listening.breaks_after = [], 0  # type: ignore[attr-defined]
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield listening
    listening.shutdown()
    listening.server_close()


def get(server: Any, certificate: tuple[Path, Path], folder: Path, path: str, **changes: Any) -> Path:
    """Fetches by the name in the certificate, which is looked up as this machine."""
    wanted = Pinned(f"https://data.example:{server.server_address[1]}{path}", SHA256, 10**6)
    context = ssl.create_default_context(cafile=str(certificate[0]))
    return fetch(
        wanted._replace(**changes),
        folder,
        resolve=lambda *_: "127.0.0.1",
        client=lambda: httpx.Client(verify=context, trust_env=False),
    )


def test_a_file_is_fetched_once(server: Any, certificate: tuple[Path, Path], tmp_path: Path) -> None:
    path = get(server, certificate, tmp_path, "/rows.jsonl")
    assert path.read_bytes() == CONTENT
    assert get(server, certificate, tmp_path, "/rows.jsonl") == path
    assert server.asked == [("/rows.jsonl", f"data.example:{server.server_address[1]}", "")]
    path.write_bytes(b"altered")
    assert get(server, certificate, tmp_path, "/rows.jsonl").read_bytes() == CONTENT


def test_a_broken_connection_is_resumed(server: Any, certificate: tuple[Path, Path], tmp_path: Path) -> None:
    server.breaks_after = 70_000
    for _ in range(2):
        with pytest.raises(Transient, match="connection broke"):
            get(server, certificate, tmp_path, "/rows.jsonl")
    path = get(server, certificate, tmp_path, "/rows.jsonl")
    assert path.read_bytes() == CONTENT
    assert [asked[2] for asked in server.asked] == ["", "bytes=70000-", "bytes=140000-"]


def test_what_came_whole_before_a_kill_is_not_asked_for_again(
    server: Any, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / SHA256).mkdir()
    (tmp_path / SHA256 / "rows.jsonl.part").write_bytes(CONTENT)
    assert get(server, certificate, tmp_path, "/rows.jsonl").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "changes", "what"),
    [
        ("/rows.jsonl", {"sha256": "0" * 64}, "is not the file that params pin"),
        ("/rows.jsonl", {"max_bytes": 1000}, "is larger than its source allows"),
        ("/elsewhere", {}, "leads to another host"),
        ("/404", {}, "is not given out"),
        ("/403", {}, "is not given out"),
    ],
)
def test_what_is_refused(
    server: Any, certificate: tuple[Path, Path], tmp_path: Path, path: str, changes: dict[str, Any], what: str
) -> None:
    with pytest.raises(BadData, match=what):
        get(server, certificate, tmp_path, path, **changes)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_a_server_in_trouble_is_asked_again_later(server: Any, certificate: tuple[Path, Path], tmp_path: Path) -> None:
    for path in ("/500", "/503", "/429"):
        with pytest.raises(Transient, match="in trouble"):
            get(server, certificate, tmp_path, path)


def test_a_redirection_within_the_host_is_followed(server: Any, certificate: tuple[Path, Path], tmp_path: Path) -> None:
    assert get(server, certificate, tmp_path, "/moved").read_bytes() == CONTENT


def test_another_name_than_the_certificates_is_refused(
    server: Any, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    url = f"https://evil.example:{server.server_address[1]}/rows.jsonl"
    with pytest.raises(Transient, match="connection broke"):
        get(server, certificate, tmp_path, "", url=url)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "::1", "fe80::1", "fd00::1", "0.0.0.0"]
)
def test_private_addresses_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str) -> None:
    """Also when a host has a public one besides: the name may be looked up anew at every connection."""
    found = [(0, 0, 0, "", (each, 443)) for each in ("93.184.216.34", address)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert not ipaddress.ip_address(address).is_global
    with pytest.raises(BadData, match="private address"):
        fetch(Pinned("https://data.example/x", SHA256, 10), tmp_path)


def test_a_host_without_an_address_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(Transient, match="cannot be found"):
        public_address("nowhere.example", 443)


def test_an_object_store_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through fsspec's memory in the place of a bucket."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", MemoryFileSystem)
    with fsspec.open("s3://bucket/rows.jsonl", "wb") as file:
        file.write(CONTENT)
    values = {
        **file_source(tmp_path).model_dump(),
        "kind": "remote",
        "path": "data/remote.md",
        "url": "s3://bucket/rows.jsonl",
        "sha256": SHA256,
        "max_bytes": 10**6,
    }
    records = list(Reading("s", RemoteSource.model_validate(values), tmp_path).records())
    assert len(records) == 5000
    assert (records[1].id, records[1].file, records[1].row) == ("s-2", "s3://bucket/rows.jsonl", 2)
    missing = RemoteSource.model_validate({**values, "url": "s3://bucket/none.jsonl", "sha256": "0" * 64})
    with pytest.raises(BadData, match="no such object"):
        list(Reading("s", missing, tmp_path).records())


def test_a_store_whose_library_is_missing_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="library that is not installed"):
        fetch(Pinned("gs://bucket/rows.jsonl", SHA256, 10), tmp_path)
