"""The bill of materials, against what pip itself finds."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

from tasks.core.artifacts import as_json
from tasks.register.sbom import normalised, sbom


def test_it_lists_what_pip_lists_and_what_needs_what() -> None:
    bill = sbom()
    command = [sys.executable, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert {normalised(each["name"]): each["version"] for each in bill["components"]} == {
        normalised(each["name"]): each["version"] for each in listed
    }
    needs = {each["ref"]: each["dependsOn"] for each in bill["dependencies"]}
    references = {each["bom-ref"] for each in bill["components"]}
    assert needs.keys() == references
    assert {needed for each in needs.values() for needed in each} <= references
    safetensors = f"pkg:pypi/safetensors@{version('safetensors')}"
    assert safetensors in needs[f"pkg:pypi/transformers@{version('transformers')}"]


def test_it_has_the_form_of_cyclonedx_and_the_same_environment_gives_the_same_bytes() -> None:
    first, second = sbom(), sbom()
    assert as_json(first) == as_json(second)
    assert (first["bomFormat"], first["specVersion"], first["version"]) == ("CycloneDX", "1.6", 1)
    assert first["serialNumber"].startswith("urn:uuid:")
    known = {"type", "bom-ref", "name", "version", "purl", "licenses"}
    for component in first["components"]:
        assert component["type"] == "library"
        assert component.keys() <= known
    licences = {each["name"]: each.get("licenses") for each in first["components"]}
    assert licences["transformers"] in (
        [{"license": {"name": "Apache 2.0 License"}}],
        [{"expression": "Apache-2.0"}],
    )
