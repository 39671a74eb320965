"""Writes the generated parts of docs/ from the program: ``python tools/docs.py [--check]``.

A generated part stands between two comments::

    <!-- generated:commands -->
    ...
    <!-- /generated -->

`--check` writes nothing, and exits with 1 if a page differs from the program. The tables of results are
`dualfocus.bench.readme`'s.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from dualfocus.cli import app
from dualfocus.runtime import manifest

DOCS = Path(__file__).resolve().parent.parent / "docs"
PART = re.compile(r"(<!-- generated:(?P<name>\w+) -->\n).*?(<!-- /generated -->)", re.DOTALL)
MANIFEST = (
    manifest.Manifest,
    manifest.FileEntry,
    manifest.ImageSpec,
    manifest.DecoderSpec,
    manifest.TokenSpec,
    manifest.Prompts,
    manifest.BoxFormat,
)


def commands() -> str:
    """Every command of the command line, with its arguments and options."""
    return "\n".join(_commands("dualfocus", app))


def _commands(path: str, group: typer.Typer) -> Iterator[str]:
    for command in group.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
        yield from _command(f"{path} {name}", command.callback)
    for sub in group.registered_groups:
        assert sub.typer_instance is not None
        yield from _commands(f"{path} {sub.name}" if sub.name else path, sub.typer_instance)


def _command(path: str, callback: Callable[..., Any]) -> Iterator[str]:
    """Read from the signature, so that the page does not depend on how a version of typer words its help."""
    usage, rows = [path, "[OPTIONS]"], []
    hints = typing.get_type_hints(callback, include_extras=True)
    for name, parameter in inspect.signature(callback).parameters.items():
        kind, option = typing.get_args(hints[name])
        given, default = _values(kind), parameter.default
        required = default is inspect.Parameter.empty
        if isinstance(option, typer.models.ArgumentInfo):
            label = option.metavar or name.upper()
            many = "..." if typing.get_origin(kind) is list else ""
            usage.append(f"{label}{many}" if required else f"[{label}]{many}")
        else:
            label = ", ".join(_names(option) or [f"--{name.replace('_', '-')}"])
            if kind is not bool:
                label += f" {option.metavar or f'<{given}>'}"
        notes = [_range(option), "required" if required else _default(default, option)]
        noted = "; ".join(note for note in notes if note)
        rows.append(f"| `{label}` | {_cell(option.help or '')}{f' ({noted})' if noted else ''} |")
    yield f"### {path}\n"
    yield f"{_cell(inspect.getdoc(callback) or '')}\n"
    yield f"```\n{' '.join(usage)}\n```\n"
    yield "| | |\n|---|---|"
    yield from rows
    yield ""


def _names(option: Any) -> list[str]:
    """The names that are spelled out; within Annotated, typer takes the first one for the default."""
    return [name for name in (option.default, *(option.param_decls or ())) if isinstance(name, str)]


def _values(kind: Any) -> str:
    """The values of an option that takes one of several."""
    kinds = [kind, *typing.get_args(kind)]
    return "/".join(v for k in kinds if typing.get_origin(k) is typing.Literal for v in typing.get_args(k))


def _range(option: Any) -> str:
    if option.min is None:
        return ""
    return f"at least {option.min}" if option.max is None else f"{option.min} to {option.max}"


def _default(default: Any, option: Any) -> str:
    """Nothing where there is none, or where the help text has it."""
    if default is None or default is False:
        return ""
    if default is True:
        default = _names(option)[0].partition("/")[0]
    return f"default: {default}"


def schema() -> str:
    """The fields of `ask --json`, from its JSON Schema."""
    lines = ["| field | type | |", "|---|---|---|"]
    document = json.loads((DOCS / "ask.schema.json").read_text(encoding="utf-8"))
    lines += _fields(document, document["$defs"], "")
    return "\n".join(lines) + "\n"


def _fields(thing: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, field in thing["properties"].items():
        found = [field, *field.get("anyOf", [])]
        kinds = [kind for item in found for kind in _kinds(item, definitions)]
        yield f"| `{prefix}{name}` | {' or '.join(kinds)} | {_cell(field.get('description', ''))} |"
        for item in found:
            target = definitions[item["$ref"].rpartition("/")[2]] if "$ref" in item else item
            if "properties" in target:
                yield from _fields(target, definitions, f"{prefix}{name}.")


def _kinds(item: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    if "$ref" in item:
        return _kinds(definitions[item["$ref"].rpartition("/")[2]], definitions)
    if "const" in item:
        return [json.dumps(item["const"])]
    if "enum" in item:
        return [f"`{json.dumps(value)}`" for value in item["enum"]]
    if item.get("type") == "array":
        number = item.get("minItems", "list of")
        return [f"{number} {item['items']['type']}s"]
    kind = item.get("type", [])
    return [kind] if isinstance(kind, str) else list(kind)


def fields() -> str:
    """The fields of a bundle's manifest, from the dataclasses that read it."""
    lines = []
    for record in MANIFEST:
        lines += [f"### {record.__name__}\n", f"{_summary(record)}\n", "| field | type | |", "|---|---|---|"]
        hints, source = typing.get_type_hints(record), inspect.getsource(record)
        for field in dataclasses.fields(record):
            comment = re.search(rf"^    {field.name}: .*?  # (.*)$", source, re.MULTILINE)
            note = _cell(comment[1]) if comment else ""
            lines.append(f"| `{field.name}` | {_type(hints[field.name])} | {note} |")
        lines.append("")
    return "\n".join(lines)


def version() -> str:
    """The bundle format that this version reads and writes."""
    return f"This version of dualfocus reads and writes format **{manifest.FORMAT_VERSION}**.\n"


def _summary(record: type) -> str:
    return _cell((record.__doc__ or "").partition("\n\n")[0])


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    if hint is type(None):
        return "null"
    if origin is typing.Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_type, arguments))
    if origin is dict:
        return f"object of {_type(arguments[1])}"
    if origin is tuple:
        many = "list" if arguments[-1] is Ellipsis else f"list of {len(arguments)}"
        return f"{many}: {_type(arguments[0])}"
    return {int: "integer", float: "number", str: "text", bool: "true or false"}[hint]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "fields": fields,
    "schema": schema,
    "version": version,
}


def rewritten(text: str) -> str:
    """A page's text with its generated parts made anew."""
    return PART.sub(lambda part: f"{part[1]}\n{PARTS[part['name']]()}\n{part[3]}", text)


def main(arguments: Sequence[str]) -> int:
    """Rewrite or check all pages; returns the exit status."""
    if [*arguments] not in ([], ["--check"]):
        print("usage: python tools/docs.py [--check]", file=sys.stderr)
        return 2
    status = 0
    for page in sorted(DOCS.glob("**/*.md")):
        old = page.read_text(encoding="utf-8")
        new = rewritten(old)
        if new != old and arguments:
            print(f"{page} differs from the program: run python tools/docs.py", file=sys.stderr)
            status = 1
        elif new != old:
            page.write_text(new, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
