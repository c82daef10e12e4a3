"""The help of a command whose flags are the fields of a configuration, in plain words and 80 columns.

`--help` shows the settings that most people set, `--help-all` every one: name, kind of value, meaning, default.
"""

from __future__ import annotations

import inspect
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tutelage.config import Config

_WIDTH = 80
_KINDS: dict[Any, str] = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH", bool: "true|false"}


def help_text(model: type[Config], program: str, environment_prefix: str, *, everything: bool) -> str:
    """What `--help` (or, with `everything`, `--help-all`) prints.

    Args:
        model: the command's configuration.
        program: the command as people type it.
        environment_prefix: of its variables.
        everything: whether settings that few people set are shown too.

    """
    settings = {name: (field, required) for name, field, required in _settings(model)}
    common = list(model.COMMON or settings)
    shown = list(settings) if everything else common
    example = environment_prefix + max(common, key=lambda name: name.count(".")).replace(".", "__").upper()
    besides = [
        _entry("--config FILE", "Settings from a YAML file; environment and flags win over it."),
        _entry("--dry-run", "Look whether what it names is there, print the resolved file, do nothing else."),
        _entry("--print-config", "Print the resolved file, whether what it names is there or not."),
        _entry("--help, --help-all", "The common settings; all of them."),
    ]
    left_out = len(settings) - len(shown)
    parts = [
        f"usage: {program} [--config FILE] [--SETTING VALUE ...]",
        "\n\n".join(textwrap.fill(part, _WIDTH) for part in inspect.cleandoc(model.__doc__ or "").split("\n\n")),
        "settings:" if not left_out else f"common settings ({left_out} more: {program} --help-all):",
        "\n".join(_setting(name, *settings[name]) for name in shown),
        "besides:",
        "\n".join(besides),
        textwrap.fill(
            "Names take dashes or underscores. A setting may also stand in the environment, in capitals, with __ for "
            f"a dot: {example}. A flag wins over the environment, and that over the file.",
            _WIDTH,
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _settings(model: type[BaseModel], prefix: str = "", within: bool = True) -> Iterator[tuple[str, FieldInfo, bool]]:
    """Every setting that has a flag: its dotted name, its field, whether it must be given.

    A section's settings stand in its place; of one that may be left out none must be given.
    """
    for name, field in model.model_fields.items():
        section, required = _section(field.annotation), within and field.is_required()
        if section is None:
            yield prefix + name, field, required
        else:
            yield from _settings(section, f"{prefix}{name}.", required)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model of a field that is one, or one or none."""
    for kind in _alternatives(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The kinds of value that a field takes, without None."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(each for part in get_args(annotation) for each in _alternatives(part))
    return () if annotation is type(None) else (annotation,)


def form(model: type[BaseModel], name: str) -> str:
    """What the value of a setting looks like on a command line: `INTEGER`, `NAME=VALUE,...`."""
    return next(_form(field) for each, field, _ in _settings(model) if each == name)


def _form(field: FieldInfo) -> str:
    return "|".join(dict.fromkeys(map(_kind, _alternatives(field.annotation))))


def _setting(name: str, field: FieldInfo, required: bool) -> str:
    kinds = _form(field)
    flag, text = (
        f"--{name.replace('_', '-')}",
        f"{' '.join((field.description or '').split())} {_default(field, required)}",
    )
    if len(flag) + len(kinds) > _WIDTH - 4:
        return _entry(f"{flag} ONE", f"One of {kinds.replace('|', ', ')}. {text}")
    return _entry(f"{flag} {kinds}", text)


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (tuple, list):
        inner = [_kind(each) for part in arguments if part is not ... for each in _alternatives(part)]
        return f"{inner[0]},..." if len(set(inner)) == 1 else "JSON"
    if origin is dict:
        return "NAME=VALUE,..."
    return _KINDS.get(annotation, "JSON")


def _default(field: FieldInfo, required: bool) -> str:
    """In words; of a setting that is none by default its description says what that means."""
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if required or default is None or default in ((), {}, ""):
        return "Required." if required else ""
    words = ",".join(map(str, default)) if isinstance(default, tuple | list) else str(default)
    return f"Default: {words.lower() if isinstance(default, bool) else words}."


def _entry(flag: str, text: str) -> str:
    filled = textwrap.fill(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    return f"  {flag}\n{filled}"
