"""Signatures with a key on this disk: any change of any file is refused, and so is another key."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tasks.core.artifacts import atomic_folder, digests
from tasks.core.errors import BadInput, BadModel
from tasks.registry.signing import PASSWORD, SIGNING_KEY, VERIFYING_KEY, sign, signing_key, verify, verify_model


def openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key pair as OpenSSL makes it, another pair, and the first one's private key behind a password."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("own", "other"):
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(folder / f"{name}.pem"))
        openssl("ec", "-in", str(folder / f"{name}.pem"), "-pubout", "-out", str(folder / f"{name}.pub"))
    locked = ["pkcs8", "-topk8", "-in", str(folder / "own.pem"), "-out", str(folder / "locked.pem")]
    openssl(*locked, "-passout", "pass:open sesame")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "model.safetensors").write_bytes(bytes(range(256)))
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text("{}")
    return tmp_path / "model"


def test_a_change_of_any_byte_of_any_file_is_refused(keys: Path, model: Path, tmp_path: Path) -> None:
    sign(model, tmp_path / "model.sig", keys / "own.pem")
    verify(model, tmp_path / "model.sig", keys / "own.pub")
    for name in (*digests(model), "manifest.json"):
        for place in (0, -1):
            content = bytearray((model / name).read_bytes())
            content[place] ^= 1
            (model / name).write_bytes(content)
            with pytest.raises(BadModel, match="the signature does not fit"):
                verify(model, tmp_path / "model.sig", keys / "own.pub")
            content[place] ^= 1
            (model / name).write_bytes(content)
    (model / "more.json").write_text("{}")
    with pytest.raises(BadModel, match="the signature does not fit"):
        verify(model, tmp_path / "model.sig", keys / "own.pub")


def test_another_key_does_not_verify(keys: Path, model: Path, tmp_path: Path) -> None:
    sign(model, tmp_path / "model.sig", keys / "other.pem")
    with pytest.raises(BadModel, match="the signature does not fit"):
        verify(model, tmp_path / "model.sig", keys / "own.pub")


def test_where_a_key_is_given_nothing_unsigned_is_loaded(
    keys: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify_model(model, tmp_path)  # nobody asked
    monkeypatch.setenv(VERIFYING_KEY, str(keys / "own.pub"))
    with pytest.raises(BadModel, match="is not signed"):
        verify_model(model, tmp_path)
    sign(model, tmp_path / "model.sig", keys / "own.pem")
    verify_model(model, tmp_path)


def test_a_key_behind_a_password(keys: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="holds no private key"):
        sign(model, tmp_path / "model.sig", keys / "locked.pem")
    monkeypatch.setenv(PASSWORD, "open sesame")
    sign(model, tmp_path / "model.sig", keys / "locked.pem")
    verify(model, tmp_path / "model.sig", keys / "own.pub")


def test_what_is_no_key_is_told_without_its_content(
    keys: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = (keys / "own.pem").read_text().replace("BEGIN", "BEGAN")
    (tmp_path / "broken.pem").write_text(secret)
    with pytest.raises(BadInput, match="holds no private key") as caught:
        sign(model, tmp_path / "model.sig", tmp_path / "broken.pem")
    assert not any(line in str(caught.value) for line in secret.splitlines())
    assert caught.value.__cause__ is None
    shutil.copyfile(tmp_path / "broken.pem", tmp_path / "model.sig")
    with pytest.raises(BadInput, match="holds no public key"):
        verify(model, tmp_path / "model.sig", tmp_path / "broken.pem")
    monkeypatch.setenv(SIGNING_KEY, str(tmp_path / "nowhere.pem"))
    with pytest.raises(BadInput, match="there is no such key"):
        signing_key()
