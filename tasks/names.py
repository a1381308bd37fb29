"""Names in the MLflow registry: of models, of their aliases, and of what a version holds."""

from __future__ import annotations

import re

CHAMPION, CHALLENGER = "champion", "challenger"
"""The aliases that temper itself gives: what is in use, and what was registered last."""

ARTIFACT = "model"
"""The name under which a version keeps its model folder."""

ABOUT = "about.d"
"""And its description: card, lineage, bill of materials, signature. No method can be called so."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ALIAS = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_VERSION = re.compile(r"v\d+")


def registry_name(name: str) -> str:
    """The name of a registered model, if it is one.

    MLflow itself lets through names that look alike (Cyrillic letters) or that no address can hold.

    Raises:
        ValueError: it is none.
    """
    if _NAME.fullmatch(name) is None:
        raise ValueError("a name may use A-Z a-z 0-9 . _ - and begins with a letter or digit, at most 100 characters")
    return name


def method_alias(alias: str) -> str:
    """The alias of a method's latest version, if a method may be called so.

    A method called like an alias that means something else would move that alias past the gate.

    Raises:
        ValueError: MLflow or temper gives the alias another meaning, or it has other characters.
    """
    if alias in (CHAMPION, CHALLENGER, "latest") or _VERSION.fullmatch(alias):
        raise ValueError(f'alias "{alias}" is reserved: call the method otherwise')
    if _ALIAS.fullmatch(alias) is None:
        raise ValueError("an alias may use a-z 0-9 _ -, at most 64 characters")
    return alias
