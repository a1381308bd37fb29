"""Signatures of model folders by OpenSSF model-signing, with keys on this disk; nothing asks a network.

TEMPER_SIGNING_KEY names the file of a private key (an elliptic curve's, PEM): with it, what is registered is signed.
TEMPER_VERIFYING_KEY names the file of the public key: with it, nothing is loaded or promoted that it does not verify.
A password of the private key is read from TEMPER_SIGNING_PASSWORD. Keys themselves are never read by temper's own code.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tasks.core.errors import BadInput, BadModel

SIGNATURE = "model.sig"
SIGNING_KEY, VERIFYING_KEY, PASSWORD = "TEMPER_SIGNING_KEY", "TEMPER_VERIFYING_KEY", "TEMPER_SIGNING_PASSWORD"


def signing_key() -> Path | None:
    """Return the file of the key to sign with, if one is named.

    Raises:
        BadInput: there is no such file.
    """
    return _key(SIGNING_KEY)


def sign(folder: Path, signature: Path, key: Path) -> None:
    """Sign every file of a model folder.

    Args:
        folder: what is signed.
        signature: the file to write, outside of the folder.
        key: the file of a private key.

    Raises:
        BadInput: the file holds no private key that can be used.
    """
    from model_signing import signing

    said = os.environ.get(PASSWORD)
    password: Any = said.encode() if said else None  # the library says str and hands it on to one that wants bytes
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key, password=password)
    except (ValueError, TypeError) as error:
        raise BadInput(
            "holds no private key of an elliptic curve that can be read",
            where=f"{SIGNING_KEY}={key}",
            got=type(error).__name__,  # its words may repeat what the file holds
            fix="make one: openssl ecparam -name prime256v1 -genkey -noout -out FILE; its password is " + PASSWORD,
        ) from None
    config.sign(folder, signature)


def verify_model(folder: Path, about: Path) -> None:
    """Verify the signature of a registered model's folder, if TEMPER_VERIFYING_KEY is set.

    Args:
        folder: the model folder.
        about: the folder with its description, where the signature is.

    Raises:
        BadModel: it is not signed, by another key, or was changed since.
        BadInput: there is no such key.
    """
    if key := _key(VERIFYING_KEY):
        verify(folder, about / SIGNATURE, key)


def verify(folder: Path, signature: Path, key: Path) -> None:
    """Verify that every file of a folder is what was signed.

    Raises:
        BadModel: it is not signed, by another key, or was changed since.
        BadInput: the file holds no public key.
    """
    from model_signing import verifying

    if not signature.is_file():
        raise BadModel(
            "is not signed",
            where=str(folder),
            expected=f"a signature by the key of {VERIFYING_KEY}",
            fix=f"register it with {SIGNING_KEY}, or unset {VERIFYING_KEY}",
        )
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (ValueError, TypeError) as error:
        raise BadInput("holds no public key", where=f"{VERIFYING_KEY}={key}", got=type(error).__name__) from None
    try:
        config.verify(folder, signature)
    except ValueError as error:
        raise BadModel(
            "the signature does not fit: the files were changed, or another key signed them",
            where=str(folder),
            got=str(error).split("\n")[0],
            fix="register it again",
        ) from error


def _key(variable: str) -> Path | None:
    named = os.environ.get(variable)
    if not named:
        return None
    if not Path(named).is_file():
        raise BadInput("there is no such key", where=f"{variable}={named}", expected="the file of a key")
    return Path(named)
