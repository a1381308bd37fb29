"""The bill of materials of an environment: every installed package, in the form of CycloneDX 1.6 (ECMA-424).

The same environment gives the same bytes: there is no time in it, and its serial number is made of its content.
"""

from __future__ import annotations

import re
import sysconfig
import uuid
import warnings
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

SBOM = "sbom.cdx.json"


def sbom(installed: Iterable[Distribution] | None = None) -> str:
    """Build the SBOM of this environment, as JSON: its packages, and which needs which.

    Args:
        installed: packages; by default all of this environment, the first of each name.
    """
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6

    packages: dict[str, Distribution] = {}
    for package in _installed() if installed is None else installed:
        packages.setdefault(normalized_name(package.metadata["Name"]), package)
    components = {name: _component(name, package) for name, package in packages.items()}
    bom = Bom(components=components.values(), serial_number=uuid.UUID(int=0))
    bom.metadata.component = Component(name="temper", type=ComponentType.APPLICATION, bom_ref="temper-model")
    bom.metadata.timestamp = None  # type: ignore[assignment]
    for name, package in packages.items():
        bom.register_dependency(components[name], [components[needed] for needed in _needed(package, packages)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is said of what the model itself needs
        unnumbered = JsonV1Dot6(bom).output_as_string()
        bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, unnumbered)
        return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _installed() -> Iterable[Distribution]:
    """Yield what pip lists; on sys.path there may be more, such as what setuptools brings along for itself."""
    return distributions(path=list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))))


def normalized_name(name: str) -> str:
    """Normalise a package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _component(name: str, package: Distribution) -> Component:
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model.component import Component
    from packageurl import PackageURL

    purl = PackageURL("pypi", None, name, package.version)
    told = package.metadata.json  # names in lower case with _; what is absent is no key
    licence = " ".join(str(told.get("license_expression") or told.get("license", "")).split())
    known = licence and len(licence) < 100  # longer: some put the whole text there
    return Component(
        name=package.metadata["Name"],
        version=package.version,
        bom_ref=str(purl),
        purl=purl,
        licenses=[LicenseFactory().make_from_string(licence)] if known else [],
    )


def _needed(package: Distribution, packages: dict[str, Distribution]) -> list[str]:
    """Name the packages that this one requires here, without its extras."""
    from packaging.requirements import Requirement

    asked = [Requirement(line) for line in package.requires or []]
    names = {normalized_name(each.name) for each in asked if not each.marker or each.marker.evaluate({"extra": ""})}
    return sorted(names & packages.keys())
