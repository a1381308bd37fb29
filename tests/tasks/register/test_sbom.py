"""The bill of materials, against what pip itself finds and the schema of CycloneDX."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tasks.register.sbom import normalized_name, sbom


@pytest.fixture(scope="module")
def written() -> str:
    return sbom()


def test_it_lists_what_pip_lists_and_what_needs_what(written: str) -> None:
    bill = json.loads(written)
    command = [sys.executable, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert {normalized_name(each["name"]): each["version"] for each in bill["components"]} == {
        normalized_name(each["name"]): each["version"] for each in listed
    }
    needs = {each["ref"]: each.get("dependsOn", []) for each in bill["dependencies"]}
    references = {each["bom-ref"] for each in bill["components"]}
    assert needs.keys() == references | {"temper-model"}
    assert {needed for each in needs.values() for needed in each} <= references
    safetensors = f"pkg:pypi/safetensors@{version('safetensors')}"
    assert safetensors in needs[f"pkg:pypi/transformers@{version('transformers')}"]


def test_it_has_the_form_of_cyclonedx_and_the_same_environment_gives_the_same_bytes(written: str) -> None:
    assert sbom() == written
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(written) is None
    bill = json.loads(written)
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    licences = {each["name"]: each.get("licenses") for each in bill["components"]}
    assert licences["pydantic"] == [{"license": {"id": "MIT"}}]
    assert "timestamp" not in bill["metadata"]
