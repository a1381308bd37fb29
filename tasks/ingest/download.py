"""Files from elsewhere, fetched once: pinned by their SHA-256, resumed after a break, never from a private address."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from tasks.core.artifacts import digest
from tasks.core.errors import BadData, Transient

if TYPE_CHECKING:
    import httpx

_BLOCK = 1 << 20
_REDIRECTS = 5
_TIMEOUT_S = 30.0


class Pinned(NamedTuple):
    """Pinned file: its address, its digest in hexadecimal, and how large it may be."""

    url: str
    sha256: str
    max_bytes: int


def public_address(host: str, port: int) -> str:
    """Return one address of a host, after checking that all of its addresses are public.

    Raises:
        BadData: one of them is private, or of this machine: a file of rows has no business there.
        Transient: the name cannot be resolved.
    """
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise Transient("the host cannot be found", where=host, got=str(error), fix="check the address") from error
    private = sorted(address for address in found if not ipaddress.ip_address(address.partition("%")[0]).is_global)
    if private:
        raise BadData("leads to a private address", where=host, got=private[0], expected="a public one")
    return min(found, key=lambda address: (":" in address, address))  # IPv4 first: not every network has the other


def fetch(
    wanted: Pinned,
    folder: Path,
    *,
    resolve: Callable[[str, int], str] = public_address,
    client: Callable[[], Any] | None = None,
) -> Path:
    """Fetch the file, or take it from the folder if it was fetched before.

    Args:
        wanted: an https:// address, or one of an object store (s3://, gs://, az://, abfs://).
        folder: where fetched files are kept, under their digest.
        resolve: gives the address of a host; the connection is made to that very address.
        client: makes the HTTP client.

    Raises:
        BadData: not that digest, too large, a private address, a redirection to another host, or not there.
        Transient: the connection broke; what came so far is kept, and the next try goes on from there.
    """
    target = folder / wanted.sha256 / (PurePosixPath(urlsplit(wanted.url).path).name or "file")
    if target.is_file() and digest(target) == wanted.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    if wanted.url.startswith("https://"):
        _fetch_https(wanted, part, resolve, client or _client)
    else:
        _fetch_object(wanted, part)
    found = digest(part)
    if found != wanted.sha256:
        part.unlink()
        raise BadData(
            "is not the file that params pin",
            where=wanted.url,
            got=f"sha256 {found}",
            expected=wanted.sha256,
            fix="find out why it changed; if it may, write the new digest into params.yaml",
        )
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(target)
    return target


def _client() -> httpx.Client:
    import httpx

    return httpx.Client(timeout=_TIMEOUT_S, follow_redirects=False, trust_env=False)


def _fetch_https(wanted: Pinned, part: Path, resolve: Callable[[str, int], str], client: Callable[[], Any]) -> None:
    import httpx

    url = wanted.url
    try:
        with client() as http:
            for _ in range(_REDIRECTS):
                with _answer(http, url, part.stat().st_size if part.exists() else 0, resolve) as answer:
                    if not answer.has_redirect_location:
                        _receive(answer, wanted, part)
                        return
                    url = _followed(url, answer.headers["location"])
    except httpx.HTTPError as error:
        raise Transient(
            "the connection broke", where=wanted.url, got=str(error), fix="run it again; it goes on from here"
        ) from error
    raise BadData("leads from one address to the next without end", where=wanted.url)


@contextmanager
def _answer(http: Any, url: str, have: int, resolve: Callable[[str, int], str]) -> Iterator[Any]:
    """Request the rest of a file, at the very address that was checked."""
    parts = urlsplit(url)
    host, port = str(parts.hostname), parts.port or 443
    address = resolve(host, port)
    numeric = f"[{address}]" if ":" in address else address
    headers = {"Host": parts.netloc, "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    path = parts.path or "/"
    there = f"https://{numeric}:{port}{path}" + (f"?{parts.query}" if parts.query else "")
    with http.stream("GET", there, headers=headers, extensions={"sni_hostname": host}) as answer:
        yield answer


def _followed(url: str, location: str) -> str:
    new = urljoin(url, location)
    if urlsplit(new).scheme != "https" or urlsplit(new).netloc != urlsplit(url).netloc:
        raise BadData("leads to another host", where=url, got=new, fix="give that address, if you trust it")
    return new


def _receive(answer: Any, wanted: Pinned, part: Path) -> None:
    if answer.status_code == 416:  # there is nothing beyond what came before
        return
    if answer.status_code >= 500 or answer.status_code == 429:
        raise Transient("the server is in trouble", where=wanted.url, got=f"HTTP {answer.status_code}")
    if answer.status_code not in (200, 206):
        raise BadData("is not given out", where=wanted.url, got=f"HTTP {answer.status_code}", fix="check the address")
    # as it comes: blocks of a size are held back until they are full, and lost when the connection breaks
    _write(answer.iter_bytes(), wanted, part, append=answer.status_code == 206)


def _write(blocks: Iterator[bytes], wanted: Pinned, part: Path, *, append: bool) -> None:
    size = part.stat().st_size if append else 0
    with part.open("ab" if append else "wb") as file:
        for block in blocks:
            size += len(block)
            if size > wanted.max_bytes:
                file.close()
                part.unlink()
                raise BadData(
                    "is larger than its source allows", where=wanted.url, expected=f"{wanted.max_bytes:,} bytes"
                )
            file.write(block)


def _fetch_object(wanted: Pinned, part: Path) -> None:
    """Fetch a file from an object store, by fsspec's library for it; environment variables hold the credentials."""
    import fsspec

    try:
        with fsspec.open(wanted.url, "rb") as file:
            _write(iter(lambda: file.read(_BLOCK), b""), wanted, part, append=False)
    except ImportError as error:
        raise BadData(
            "needs a library that is not installed",
            where=wanted.url,
            got=str(error),
            fix="install it into .venv with pip",
        ) from error
    except FileNotFoundError as error:
        raise BadData("there is no such object", where=wanted.url, got=str(error)) from error
    except OSError as error:
        raise Transient("the object store does not answer", where=wanted.url, got=str(error)) from error
