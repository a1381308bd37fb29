from __future__ import annotations

import gzip
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow as pa
import pytest

from flows.files.inspect import any_file
from tasks.core.errors import BadData
from tasks.ingest.stage import files_below
from tasks.readers.files import read_rows_of

ROW = b'{"prompt": "a", "reply": "b"}\n'
ZEROS = b"\0" * (64 << 20)


def as_gz(content: bytes) -> bytes:
    return gzip.compress(content)


def as_zst(content: bytes) -> bytes:
    return bytes(pa.compress(content, "zstd", asbytes=True))


@pytest.mark.parametrize("pack", [as_gz, as_zst])
def test_a_bomb_is_told_where_it_begins(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """Two gibibytes, of which no more than the first 17 MiB are unpacked."""
    path = tmp_path / "bomb.jsonl.packed"
    path.write_bytes(pack(ROW * 99) + pack(ZEROS) * 32)
    with pytest.raises(BadData, match="expands too far") as caught:
        list(read_rows_of(path))
    unpacked = int(re.sub(r"\D", "", caught.value.got.partition(" bytes")[0]))
    assert 16 << 20 < unpacked <= 17 << 20
    assert caught.value.exit_code == 65
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("pack", [as_gz, as_zst])
def test_rows_that_are_packed_well_are_no_bomb(pack: Callable[[bytes], bytes], tmp_path: Path, random: Random) -> None:
    rows = b"".join(
        b'{"text": "%s %s"}\n' % (random.randbytes(16).hex().encode(), b"word " * 150) for _ in range(30_000)
    )
    assert len(rows) > 20 << 20
    packed = pack(rows)
    assert len(rows) > 20 * len(packed)
    (tmp_path / "rows.jsonl.packed").write_bytes(packed)
    assert sum(1 for _ in read_rows_of(tmp_path / "rows.jsonl.packed")) == 30_000


NAMES = [
    "a\nb: 5 rows accepted.jsonl",
    "a\rb.jsonl",
    "a\x1b[2Jb.jsonl",
    "a\u2028b.jsonl",
    "a\u202eb.jsonl",
    "a\x85b.jsonl",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_would_write_lines_of_its_own_is_refused_in_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(ROW)
    in_zip = tmp_path / "plain.zip"
    with zipfile.ZipFile(in_zip, "w") as archive:
        archive.writestr(name, ROW)
    for read in (
        lambda: list(read_rows_of(tmp_path / name)),
        lambda: list(read_rows_of(in_zip)),
        lambda: any_file(tmp_path / name),
        lambda: files_below(tmp_path, "**/*.jsonl", within=tmp_path),
    ):
        with pytest.raises(BadData, match="has control characters in its name") as caught:
            read()
        assert caught.value.exit_code == 65
        assert caught.value.line().isprintable()
        assert len(str(caught.value).splitlines()) == 2
        assert name.encode("unicode_escape").decode() in str(caught.value)


def test_a_name_that_is_no_utf8_can_be_told(tmp_path: Path) -> None:
    path = Path(str(tmp_path / "a\udc80.jsonl"))
    path.write_bytes(ROW)
    with pytest.raises(BadData, match="has control characters") as caught:
        list(read_rows_of(path))
    assert str(caught.value).encode()


@pytest.mark.parametrize("name", ["with space.jsonl", "汉字 한글.jsonl", "é\u3000ü.jsonl", "\N{FAMILY}\u200d.jsonl"])
def test_other_names_are_taken(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(ROW)
    assert len(list(read_rows_of(tmp_path / name))) == 1
