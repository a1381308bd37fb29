"""`params.yaml`, typed and whole: a section for each stage, each in its stage's folder.

A section is a frozen class; a key that is not a field is refused with the nearest known name. All errors of a file are
reported at once, each with its line and its dotted path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from tasks.base.params import AnyBase
from tasks.core.errors import BadParams, did_you_mean
from tasks.core.params import Name, Section
from tasks.core.params_file import line_of, read_yaml, validated, wrong_keys
from tasks.evaluate.params import Evaluate
from tasks.gate.params import Promote
from tasks.ingest.params import Ingest
from tasks.merge.params import Merge
from tasks.orchestration.params_migration import outdated
from tasks.register.params import Register
from tasks.registry.names import method_alias
from tasks.render.params import Render
from tasks.reports.items import HELD_OUT
from tasks.train.params import Method
from tasks.validate.params import Validate


def _method_name(name: str) -> str:
    if name == "base":
        raise ValueError('"base" names the untouched model in every report: call the method otherwise')
    return method_alias(name)


MethodName = Annotated[Name, AfterValidator(_method_name)]


class Params(Section):
    """The whole of params.yaml."""

    ingest: Ingest
    validate_: Annotated[Validate, Field(alias="validate")] = Validate()
    base: AnyBase
    render: Render = Render()
    train_defaults: dict[str, Any] = {}
    """What all methods share; a method's own value wins."""
    train: Annotated[dict[MethodName, Method], Field(min_length=1)]
    merge: Merge = Merge()
    evaluate: Evaluate = Evaluate()
    register_: Annotated[Register, Field(alias="register")] = Register()
    promote: Promote = Promote()

    def unasked_suites(self) -> list[tuple[str, ...]]:
        """List where `promote` names a suite that no model is evaluated on, as paths of keys; the last is the name."""
        asked = {HELD_OUT, *self.evaluate.suites}
        named = [("promote", "suite", self.promote.suite)]
        named += [("promote", "floors", suite) for suite in self.promote.floors]
        named += [("promote", "guarded", suite) for suite in self.promote.guarded]
        return [place for place in named if place[-1] not in asked]

    def unknown_sources(self) -> list[tuple[str, ...]]:
        """List where `validate.accepted` names what is no source, as paths of keys; the last is the name."""
        return [("validate", "accepted", each) for each in self.validate_.accepted if each not in self.ingest.sources]


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a params file, as editors read it: every key with its type, default and meaning."""
    schema = Params.model_json_schema()
    about = schema["properties"]["train_defaults"]["description"]
    schema["properties"]["train_defaults"] = {"$ref": "#/$defs/Method", "default": {}, "description": about}
    for key in schema["properties"].keys() - {"ingest", "base", "promote"}:  # DVC asks for these, if only as `{}`
        schema["required"] = sorted({*schema["required"], key})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def load_params(path: Path) -> Params:
    """Read and check a params file.

    Raises:
        BadParams: the file is missing or not YAML, or one or more keys are wrong; all of them are named.
    """
    return check(read_yaml(path), str(path))


def check(content: Mapping[str, Any], where: str) -> Params:
    """Check a file's content and return its typed form; `where` names the file in errors.

    Raises:
        BadParams: one or more keys are wrong; all of them are named, each with its line.
    """
    if old := outdated(content):
        raise BadParams(
            "is written in the words of an older temper",
            where=where,
            examples=[f"line {line_of(each.place, content)}: {each}" for each in old],
            fix="temper params --migrate rewrites it",
        )
    params: Params = validated(Params, content, where)
    suites, sources = [HELD_OUT, *params.evaluate.suites], list(params.ingest.sources)
    unknown = [_unknown(place, "no suite {} is asked", suites, content) for place in params.unasked_suites()]
    unknown += [_unknown(place, "there is no source {}", sources, content) for place in params.unknown_sources()]
    if unknown:
        raise wrong_keys(unknown, where)
    return params


def _unknown(place: tuple[str, ...], said: str, known: Sequence[str], content: Mapping[str, Any]) -> str:
    meant = did_you_mean(place[-1], known) or f"; there are: {', '.join(known)}"
    name = f'"{place[-1]}"'
    return f"line {line_of(place, content)}: {'.'.join(place[:2])}: {said.format(name)}{meant}"
