"""Writes docs/params.md, cli.md and architecture.md from the code; with --check only tells whether they are current."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def params_page() -> str:
    """Every key of params.yaml: type, range, meaning, default."""
    from tasks.orchestration.params import Params

    schema = Params.model_json_schema()
    lines = [
        "# params.yaml",
        "",
        "Written by `make docs` from `tasks/orchestration/params.py`. A file states what differs from the defaults.",
        "`temper run --set KEY=VALUE` changes one; `temper params` prints what each is, and where that comes from.",
    ]
    shown: list[tuple[str, dict[str, Any]]] = []  # alternatives of a section may hold the same one
    for section in schema["properties"]:
        for path, body in _tables(section, schema["properties"][section], schema["$defs"]):
            if (path, body) in shown:
                continue
            shown.append((path, body))
            lines += ["", f"## {path}{_choice(body)}", "", body["description"], ""]
            lines += ["| key | value | meaning | default |", "|---|---|---|---|"]
            for key, field in body["properties"].items():
                if not _sections(field, schema["$defs"]) and "description" in field:
                    meaning = " ".join(field["description"].split())  # a row of a table is one line
                    lines.append(f"| `{key}` | {_kind(field)} | {meaning} | {_default(key, body)} |")
    return "\n".join(lines) + "\n"


def _tables(path: str, field: dict[str, Any], defs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every section at or below a field, with its dotted path; NAME is chosen by the user, ITEM is in a list."""
    several = ".NAME" if _named(field) else ".ITEM" if "items" in field else ""
    for body in [*_sections(field, defs), *(each for one in field.get("anyOf", []) for each in _sections(one, defs))]:
        here = path + several
        if any("description" in each and not _sections(each, defs) for each in body["properties"].values()):
            yield here, body
        for key, inner in body["properties"].items():
            yield from _tables(f"{here}.{key}", inner, defs)


def _sections(field: dict[str, Any], defs: dict[str, Any]) -> list[dict[str, Any]]:
    field = _named(field) or field.get("items") or field
    references = [each["$ref"] for each in [field, *field.get("oneOf", [])] if "$ref" in each]
    return [defs[reference.rsplit("/", 1)[1]] for reference in references]


def _named(field: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of the values of a mapping whose keys the user chooses."""
    return next(iter(field.get("patternProperties", {}).values()), {})


def _choice(body: dict[str, Any]) -> str:
    """Name which alternative of a section this is, as a heading has it."""
    key = next((key for key in ("kind", "name") if key in body["properties"]), None)
    return f" ({key}: {_kind(body['properties'][key]).replace('`', '')})" if key else ""


def _kind(field: dict[str, Any]) -> str:
    """Describe the type and range of a field in words."""
    if "anyOf" in field:
        return " or ".join(_kind(each) for each in field["anyOf"])
    if "$ref" in field or "oneOf" in field:
        return "mapping"
    if "const" in field or "enum" in field:
        return ", ".join(f"`{each}`" for each in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return f"list of {_kind(field['items'])}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[name]}" for name, sign in bounds.items() if name in field]
    return " ".join([{"string": "text"}.get(field["type"], field["type"]), ", ".join(limits)]).strip()


def _default(key: str, body: dict[str, Any]) -> str:
    if key in body.get("required", []):
        return "must be given"
    value = body["properties"][key].get("default")
    return "as its meaning says" if value is None else f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def cli_page() -> str:
    """Render the help of every command, as a terminal of 100 columns shows it."""
    import typer

    from flows.cli.main import app

    group = typer.main.get_command(app)
    context = group.make_context("temper", ["run"], resilient_parsing=True, terminal_width=100, max_content_width=100)
    lines = [
        "# temper",
        "",
        "Written by `make docs` from `flows/cli/main.py`.",
        "",
        "```",
        group.get_help(context),
        "```",
    ]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = type(context)(command, parent=context, info_name=name, terminal_width=100, max_content_width=100)
        lines += ["", f"## temper {name}", "", "```", command.get_help(inner), "```"]
    return "\n".join(line.rstrip() for line in "\n".join(lines).split("\n")) + "\n"


# The way of a row: the type that it has in each room, by the module that defines it.
ROW = (
    (
        "a file, a line, a cell",
        "tasks/readers/text_files.py",
        "FileRow",
        "what a file holds, with its place: file and row",
    ),
    ("ingest", "tasks/core/records.py", "Record", "a chat, a preference pair, a labelled reply, a text, or a pair"),
    (
        "validate",
        "tasks/validate/decide.py",
        "ValidationResult",
        "kept, repaired, dropped as a duplicate, or quarantined",
    ),
    ("render", "tasks/tokenization/chat_template.py", "Rendered", "token ids, the loss mask, where the prompt ends"),
    ("train", "tasks/inference/rows.py", "TokenRow", "one sequence of a step, made when the step asks for it"),
    ("a forward pass", "tasks/inference/prefix_sharing.py", "PackedBatch", "sequences without padding; prompts shared"),
    ("evaluate", "tasks/reports/items.py", "Item", "an answer and its score, with the log-probability of the target"),
)


def architecture_page() -> str:
    """Render the rooms with what is in each, the drawing of their layers, and the way of a row."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if each["type"] == "layers")
    lines = [
        "# Architecture",
        "",
        "Written by `make docs` from the packages' docstrings and the layers in pyproject.toml. `make check` holds all",
        "imports to them: what stands above may import what stands below; rooms of one layer do not know each other.",
        "",
        "```mermaid",
        "flowchart TB",
    ]
    for number, layer in enumerate(layers):
        rooms = [name.strip() for name in layer.split("|")]
        lines.append(f'  subgraph layer{number}[" "]')
        lines += [f'    {room.replace(".", "_")}["{room.removeprefix("tasks.")}"]' for room in rooms]
        lines.append("  end")
    lines += [f"  layer{number} --> layer{number + 1}" for number in range(len(layers) - 1)]
    lines += ["```", "", "| room | what is in it |", "|---|---|"]
    lines += [f"| `{room}` | {_said(room)} |" for layer in layers for room in map(str.strip, layer.split("|"))]
    lines += [
        "",
        "`temper/` stands beside them: the Python API, which nothing imports.",
        "",
        "## The way of a row",
        "",
        "| where | it is | in | |",
        "|---|---|---|---|",
    ]
    lines += [f"| {where} | `{name}` | `{file}` | {what} |" for where, file, name, what in ROW]
    return "\n".join(lines) + "\n"


def _said(room: str) -> str:
    """Return the docstring of a package, on one line."""
    tree = ast.parse((ROOT / room.replace(".", "/") / "__init__.py").read_text())
    return " ".join((ast.get_docstring(tree) or "").split())


def main() -> int:
    """Write the pages, or compare them."""
    stale = []
    pages = (("params.md", params_page()), ("cli.md", cli_page()), ("architecture.md", architecture_page()))
    for name, text in pages:
        path = ROOT / "docs" / name
        if not path.is_file() or path.read_text() != text:
            stale.append(name)
        if "--check" not in sys.argv:
            path.write_text(text)
    if "--check" in sys.argv and stale:
        print(f"{', '.join(stale)} in docs/ no longer say what the code does; run: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
