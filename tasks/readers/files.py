"""Rows out of any file of rows: what a file is, its bytes tell, and its name only where bytes cannot.

JSON arrays, one JSON value per line, CSV, TSV, Parquet, Arrow and plain text; each also inside gz, zst or zip. Files
are read as streams: the memory taken does not grow with the file. What is no data is refused by what it is.
"""

from __future__ import annotations

import gzip
import re
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from tasks.core.errors import BadData, in_one_line
from tasks.readers.text_files import EXPECTED, FileRow, Named, read_text

if TYPE_CHECKING:
    import pyarrow as pa

MAX_EXPANDED_BYTES = 20 << 30
MAX_EXPANSION = 200
"""A compressed file may grow to this size, and beyond its first 16 MiB by this factor of what was read of it so far."""

_BLOCK = 1 << 20
_PROSE = re.compile(
    r"^(readme|licen[sc]e|citation|notice|copying|source|manifest|changelog)[^.]*(\.txt|\.rst|\.cff)?$|\.md$",
    re.IGNORECASE,
)


def read_rows_of(path: Path, encoding: str = "utf-8", place: str = "") -> Iterator[FileRow]:
    """Yield the rows of one file, in its order.

    Args:
        path: the file.
        encoding: of text files; one whose line ends are those of ASCII.
        place: what the file is called in errors and rows; its path unless given.

    Raises:
        BadData: it is missing, empty, damaged, not data at all, or not in that encoding; or one of its rows is not
            well-formed.
    """
    for row in read_rows_and_errors(path, encoding, place):
        if isinstance(row.value, BadData):
            raise row.value
        yield row


def read_rows_and_errors(path: Path, encoding: str = "utf-8", place: str = "") -> Iterator[FileRow]:
    """Yield the rows of one file as `read_rows_of` does, and of one that is not well-formed a `BadData` that says why.

    What makes the place of the next row unknown is still an error of the file.
    """
    if not path.exists():
        raise BadData("there is no such file", where=str(path), fix="correct the path")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise BadData(f"is {kind}", where=str(path), expected="a file", fix="name a file, or a folder with a glob")
    check_name(str(path))
    with path.open("rb") as file:
        found = False
        for row in _read(Named(file, place or str(path), path.name), encoding):
            found = True
            yield row
    if not found:
        raise BadData("holds no rows", where=str(path), expected="at least one row", fix="fetch the file again")


def check_name(name: str) -> None:
    """Refuse the name of a file that has control characters, such as the end of a line: it would stand in every log.

    Raises:
        BadData: it has.
    """
    if in_one_line(name) != name:
        raise BadData("has control characters in its name", where=name, fix="rename the file")


def is_prose(name: str) -> bool:
    """Return whether a file's name marks it as text beside the data: README, LICENSE, SOURCE.txt and the like."""
    return _PROSE.search(name) is not None


def _read(source: Named, encoding: str, inside: Sequence[str] = ()) -> Iterator[FileRow]:
    """Yield the rows of a stream, behind whatever packing; `inside` are the packings that were opened before."""
    head = source.stream.read(4096)
    source.stream.seek(0)
    _refuse_what_is_no_data(source, head)
    packing = next((name for magic, name in _PACKINGS.items() if head.startswith(magic)), "")
    if packing:
        if len(inside) == 2 or packing in inside:
            raise BadData("is packed more than twice", where=source.place, fix="unpack it once")
        yield from _UNPACK[packing](source, encoding, (*inside, packing))
    elif head.startswith(b"PAR1"):
        yield from _read_parquet(source)
    elif head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        yield from _read_arrow(source, is_file=head.startswith(b"ARROW1"))
    else:
        yield from read_text(source, head, encoding)


def _refuse_what_is_no_data(source: Named, head: bytes) -> None:
    where = source.place
    if not head:
        raise BadData("is empty (0 bytes)", where=where, expected="at least one row", fix="fetch the file again")
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise BadData(
            "is a Git LFS pointer: it stands for the data, which was not fetched",
            where=where,
            got=head.decode("ascii", "replace").replace("\n", " ").strip()[:120],
            fix="run `git lfs pull` where the file comes from",
        )
    if re.match(rb"\s*(?:<!doctype html|<html|<\?xml|<head)", head, re.IGNORECASE):
        raise BadData("is a web page or XML, not rows", where=where, fix="check the address and the credentials")
    for magic, what in _NO_DATA.items():
        if head.startswith(magic):
            raise BadData(f"is {what}, not rows", where=where, expected=EXPECTED)


_PACKINGS = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"PK\x03\x04": "zip", b"PK\x05\x06": "zip"}
_NO_DATA = {
    b"%PDF": "a PDF document",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"SQLite format 3": "a database",
    b"\x7fELF": "a program",
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
}


# --- packings ---------------------------------------------------------------------------------------------------------


def _read_packed(source: Named, encoding: str, inside: Sequence[str]) -> Iterator[FileRow]:
    """Yield the rows of a gz or zst file."""
    inner = re.sub(r"\.(gz|gzip|zst|zstd)$", "", source.name, flags=re.IGNORECASE)
    with _unpacked(source, inside[-1]) as stream:
        yield from _read(Named(stream, source.place, inner), encoding, inside)


@contextmanager
def _unpacked(source: Named, packing: str) -> Iterator[IO[bytes]]:
    """Unpack the bytes into a temporary file, because tables are read from their end and packings are not."""
    import pyarrow as pa

    source.stream.seek(0)
    with tempfile.TemporaryFile() as file:
        try:
            if packing == "gz":
                with gzip.open(source.stream) as stream:
                    _copy(stream, file, source.place, source.stream.tell)
            else:
                with pa.CompressedInputStream(pa.PythonFile(source.stream, mode="r"), "zstd") as stream:
                    _copy(stream, file, source.place, source.stream.tell)
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            _raise_if_storage(error)
            raise BadData(
                f"is a damaged {packing} file",
                where=source.place,
                got=str(error).split("\n")[0],
                fix="fetch the file again",
            ) from error
        file.seek(0)
        yield file


def _raise_if_storage(error: Exception) -> None:
    """Re-raise an error of a full or broken disk, so that it is reported as such."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def _most_bytes(packed_bytes: int) -> int:
    """Return the most bytes that packed bytes may expand to."""
    return min(MAX_EXPANDED_BYTES, max(_BLOCK << 4, packed_bytes * MAX_EXPANSION))


def _copy(stream: Any, file: IO[bytes], place: str, packed_bytes: Callable[[], int]) -> None:
    """Unpack a stream into a file, as long as it does not grow too much for the packed bytes that were read so far."""
    size = 0
    while block := stream.read(_BLOCK):
        size += len(block)
        if size > (limit := _most_bytes(packed_bytes())):
            raise BadData(
                "expands too far; was it made to fill the disk?",
                where=place,
                got=f"more than {size:,} bytes out of {packed_bytes():,}",
                expected=f"at most {limit:,}",
                fix="unpack it yourself if you trust it",
            )
        file.write(block)


def _read_zip(source: Named, encoding: str, inside: Sequence[str]) -> Iterator[FileRow]:
    """Yield the rows of every data file in a zip archive, by name."""
    try:
        with zipfile.ZipFile(source.stream) as archive:
            members = [m for m in sorted(archive.infolist(), key=lambda m: m.filename) if not m.is_dir()]
            for member in members:
                _check_member(member, source.place)
            data = [m for m in members if not is_prose(PurePosixPath(m.filename).name) and not _of_the_packer(m)]
            total = sum(m.file_size for m in data)
            if total > MAX_EXPANDED_BYTES or any(m.file_size > _most_bytes(m.compress_size) for m in data):
                raise BadData(
                    "expands too far; was it made to fill the disk?", where=source.place, got=f"{total:,} bytes"
                )
            for member in data:
                place = f"{source.place}!{member.filename}"
                with archive.open(member) as packed, tempfile.TemporaryFile() as file:
                    _copy(packed, file, place, lambda: member.compress_size)  # noqa: B023  # called at once
                    file.seek(0)
                    name = PurePosixPath(member.filename).name
                    yield from _read(Named(file, place, name), encoding, inside)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error) as error:
        raise BadData(
            "is a damaged zip archive", where=source.place, got=str(error), fix="fetch the file again"
        ) from error


def _of_the_packer(member: zipfile.ZipInfo) -> bool:
    """Return whether a member is one of the files that a Mac adds to archives."""
    path = PurePosixPath(member.filename)
    return path.parts[0] == "__MACOSX" or path.name.startswith(".")


def _check_member(member: zipfile.ZipInfo, archive: str) -> None:
    where, path = f"{archive}!{member.filename}", PurePosixPath(member.filename)
    check_name(where)
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
        raise BadData("a member of the archive leads out of it", where=where, fix="do not trust this archive")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise BadData("a member of the archive is a link", where=where, fix="pack the file itself")
    if member.flag_bits & 1:
        raise BadData("the archive is encrypted", where=where, fix="unpack it")


_UNPACK: dict[str, Callable[[Named, str, Sequence[str]], Iterator[FileRow]]] = {
    "gz": _read_packed,
    "zst": _read_packed,
    "zip": _read_zip,
}


# --- tables -----------------------------------------------------------------------------------------------------------


def _read_parquet(source: Named) -> Iterator[FileRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source.stream)
        yield from _rows_of_batches(file.iter_batches(batch_size=1024), source.place)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        _raise_if_storage(error)
        raise _damaged("Parquet", source, error) from error


def _read_arrow(source: Named, *, is_file: bool) -> Iterator[FileRow]:
    import pyarrow as pa

    try:
        if is_file:
            reader = pa.ipc.open_file(source.stream)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(source.stream))
        yield from _rows_of_batches(batches, source.place)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        _raise_if_storage(error)
        raise _damaged("Arrow", source, error) from error


def _damaged(kind: str, source: Named, error: Exception) -> BadData:
    return BadData(
        f"is not a whole {kind} file",
        where=source.place,
        got=str(error).split("\n")[0],
        fix="fetch the file again",
    )


def _rows_of_batches(batches: Iterator[pa.RecordBatch], place: str) -> Iterator[FileRow]:
    number = 0
    for batch in batches:
        repeated = {name for name in batch.schema.names if batch.schema.names.count(name) > 1}
        if repeated:
            raise BadData(f'column "{min(repeated)}" appears twice', where=place, fix="rename one of them")
        for start in range(0, batch.num_rows, 1024):
            for value in batch.slice(start, 1024).to_pylist():
                number += 1
                yield FileRow(place, number, {name: _without_nulls(inner) for name, inner in value.items()})


def _without_nulls(value: Any) -> Any:
    """Leave out the nulls of objects: Arrow gives every object of a column the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
