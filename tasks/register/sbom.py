"""The bill of materials of an environment: every installed package, in the form of CycloneDX 1.6 (ECMA-424).

The same environment gives the same bytes: there is no time in it, and its serial number is made of its content.
"""

from __future__ import annotations

import re
import sysconfig
import uuid
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from typing import Any

from tasks.core.artifacts import as_json

SBOM = "sbom.cdx.json"


def sbom(installed: Iterable[Distribution] | None = None) -> dict[str, Any]:
    """Build the SBOM of this environment: its packages, and which needs which.

    Args:
        installed: packages; by default all of this environment, the first of each name.
    """
    packages: dict[str, Distribution] = {}
    for package in _installed() if installed is None else installed:
        packages.setdefault(normalised(package.metadata["Name"]), package)
    chosen = dict(sorted(packages.items()))
    content: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": "temper", "bom-ref": "temper-model"}},
        "components": [_component(name, package) for name, package in chosen.items()],
        "dependencies": [
            {"ref": _reference(name, package), "dependsOn": _needed(package, chosen)}
            for name, package in chosen.items()
        ],
    }
    return {**content, "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, as_json(content))}"}


def _installed() -> Iterable[Distribution]:
    """Yield what pip lists; on sys.path there may be more, such as what setuptools brings along for itself."""
    return distributions(path=list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))))


def normalised(name: str) -> str:
    """Normalise a package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _reference(name: str, package: Distribution) -> str:
    return f"pkg:pypi/{name}@{package.version.replace('+', '%2B')}"


def _component(name: str, package: Distribution) -> dict[str, Any]:
    reference = _reference(name, package)
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": reference,
        "name": package.metadata["Name"],
        "version": package.version,
        "purl": reference,
    }
    told = package.metadata.json  # names in lower case with _; what is absent is no key
    licence = " ".join(str(told.get("license", "")).split())
    if expression := told.get("license_expression"):
        component["licenses"] = [{"expression": expression}]
    elif licence and len(licence) < 100:
        component["licenses"] = [{"license": {"name": licence}}]  # longer: some put the whole text there
    return component


def _needed(package: Distribution, packages: dict[str, Distribution]) -> list[str]:
    """List the packages that this one requires here, without its extras."""
    from packaging.requirements import Requirement

    asked = [Requirement(line) for line in package.requires or []]
    names = {normalised(each.name) for each in asked if not each.marker or each.marker.evaluate({"extra": ""})}
    return sorted(_reference(name, packages[name]) for name in names & packages.keys())
