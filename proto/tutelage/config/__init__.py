"""One frozen pydantic model a command, filled from a YAML file, the environment and dotted flags.

Later wins: the model's defaults, `--config FILE`, `<PREFIX>SECTION__KEY` in the environment,
`--section.key VALUE`. Unknown keys are errors that suggest the nearest known one, a key that has been renamed is
an error that names the new one, and so is what another tool calls a key of ours. `--dry-run` looks whether what the
configuration names is there and prints the resolved file, `--print-config` only prints it; neither does anything else.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    CliApp,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from tutelage.errors import EXIT_DONE, ConfigurationError, TutelageError


class Config(BaseModel):
    """Base of every configuration: frozen, without unknown keys, its attributes' docstrings are its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    RENAMED: ClassVar[dict[str, str]] = {}
    """Keys that this model once had, each with what it is called now. An old one in a file, the environment or a flag
    is refused, never read as the new one: a rename often comes with another default or unit."""

    ELSEWHERE: ClassVar[dict[str, str]] = {}
    """What TRL, vLLM or lm-evaluation-harness call a setting, each with its dotted name from this model, or with a
    sentence (anything that has a space) where there is no such key. Refused too: the hint says what was meant."""

    COMMON: ClassVar[tuple[str, ...]] = ()
    """Dotted names of the settings that most people set: what `--help` shows of a command's. None means all."""

    @field_validator("*")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        return _expanded(value)


ConfigT = TypeVar("ConfigT", bound=Config)

SPELLINGS = (
    ("output", "out"),
    ("teacher.address", "address"),
    ("teacher.adapter", "adapter"),
    ("teacher.tls.ca", "tls.ca", "ca"),
    ("teacher.tls.certificate", "tls.certificate", "certificate"),
    ("teacher.tls.key", "tls.key", "key"),
    ("teacher.token_file", "token_file"),
)
"""What one thing is called by commands that have more or less beside it; as flags, each command takes all of them."""


def user_path(text: str) -> Path:
    """A path as a person writes it: `~` is their home. For argparse's `type`.

    Raises:
        ValueError: there is no such user.

    """
    return Path(_expanded(Path(text)))


def _expanded(value: Any) -> Any:
    if isinstance(value, Path) and value.parts[:1] and value.parts[0].startswith("~"):
        try:
            return value.expanduser()
        except RuntimeError as error:
            raise ValueError(f"{value.parts[0]} has no home here; give the whole path") from error
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    if isinstance(value, dict):
        return {key: _expanded(each) for key, each in value.items()}
    return value


def to_yaml(config: BaseModel) -> str:
    """The configuration as the YAML file that `--config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def validate(model: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """A configuration from plain values.

    Raises:
        ConfigurationError: names each offending key, and for an unknown one the nearest that exists.

    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _configuration_error(model, error) from error


def load(
    model: type[ConfigT],
    arguments: list[str],
    *,
    program: str,
    environment_prefix: str,
    check: Callable[[ConfigT], ConfigT | None] | None = None,
) -> ConfigT:
    """A configuration from a command line; prints help or the resolved file and exits if asked to.

    Args:
        model: what to fill.
        arguments: the command line after the command's name.
        program: the command as people type it, for the help.
        environment_prefix: for example `TUTELAGE_TRAIN_`.
        check: looks at what the configuration names (files, folders, models) before anything is started and before a
            dry run prints, and may return another configuration to take its place; not called for `--print-config`.

    Raises:
        ConfigurationError: as `validate`, and for a file that is missing or is no YAML mapping.
        TutelageError: as `check`.

    """
    # Not fields of the model: a resolved file would then name itself, and a file could ask for a dry run.
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--config", type=user_path, action="append", default=[])
    for flag in ("--dry-run", "--print-config", "--help-all"):
        own.add_argument(flag, action="store_true")
    own.add_argument("-h", "--help", action="store_true")
    try:
        known, rest = own.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigurationError(str(error)) from error
    if known.help or known.help_all:
        from tutelage.config.help import help_text

        sys.stdout.write(help_text(model, program, environment_prefix, everything=known.help_all))
        raise SystemExit(EXIT_DONE)
    if len(known.config) > 1:
        given = " and ".join(map(str, known.config))
        raise ConfigurationError(f"there are {len(known.config)}, {given}; give one, and the rest as flags", "config")
    _refuse_renamed_variables(model, environment_prefix)
    flags = [_spelled(model, word) for word in rest]
    config = _filled(model, known.config[0] if known.config else None, flags, environment_prefix)
    if check is not None and not known.print_config:
        config = check(config) or config
    if known.dry_run or known.print_config:
        sys.stdout.write(to_yaml(config))
        raise SystemExit(EXIT_DONE)
    return config


def _spelled(model: type[Config], word: str) -> str:
    """A flag by the name that this model has for what it names; any other word as it is."""
    name, equals, value = word.partition("=")
    key = name.removeprefix("--").replace("-", "_")
    if not word.startswith("--") or _has(model, key):
        return word
    same = next((names for names in SPELLINGS if key in names), ())
    own = next((each for each in same if _has(model, each)), None)
    return word if own is None else f"--{own.replace('_', '-')}{equals}{value}"


def _has(model: type[Config], key: str) -> bool:
    return any(prefix + name == key for prefix, each in _models(model) for name in each.model_fields)


def _filled(model: type[ConfigT], file: Path | None, flags: list[str], environment_prefix: str) -> ConfigT:
    settings = _settings_class(model, file, environment_prefix)
    try:
        filled = CliApp.run(settings, cli_args=flags)
    except ValidationError as error:
        raise _configuration_error(model, error) from error
    except SettingsError as error:
        _, found, arguments = str(error).partition("unrecognized arguments: ")
        unread = re.match(r"Parsing error encountered for (\S+): ", str(error))
        if unread:  # what follows is Python's
            from tutelage.config.help import form

            raise ConfigurationError(f"takes {form(model, unread[1])}", unread[1]) from error
        if not found:
            raise ConfigurationError(str(error).removeprefix("error parsing CLI: ")) from error
        words = [word[2:].split("=")[0] for word in flags if word.startswith("--") and word in arguments]
        unknown = [word.removeprefix("no-") for word in words]  # `--no-x` denies x
        hints = "".join(_suggestion(model, key) for key in unknown)
        raise ConfigurationError(f"{arguments} is no setting of this command{hints}") from error
    # Once more as what was asked for, and not a subclass that reads the environment whenever it is made.
    return validate(model, filled.model_dump())


def _settings_class(model: type[Config], file: Path | None, environment_prefix: str) -> type[BaseSettings]:
    content = {} if file is None else read_mapping(file, "config")

    class Settings(model, BaseSettings):  # type: ignore[misc, valid-type]
        model_config = SettingsConfigDict(
            env_prefix=environment_prefix,
            env_nested_delimiter="__",
            cli_kebab_case=True,
            cli_avoid_json=True,
            # argparse would print its own usage and end the process; ours names the nearest key, and has an exit code.
            cli_exit_on_error=False,
            cli_implicit_flags=True,
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            # The first wins; flags come before all. No .env file and no folder of secrets: what decides a run is seen.
            # Not pydantic-settings' own source of YAML, which takes the last of two equal keys.
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=content)

    return Settings


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which no key stands twice in one mapping, as its specification has it and PyYAML does not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<`, which is laid under the mapping's own keys
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands there twice, in lines {seen[key]} and {line}; keep one"
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


def read_mapping(file: Path, field: str) -> dict[str, Any]:
    """What a YAML file of keys and values says.

    Args:
        file: its path.
        field: what named the file, for the error.

    Raises:
        ConfigurationError: it cannot be read, is no YAML, has a key twice, or holds something else.

    """
    try:
        # S506 knows SafeLoader by name only; this is one.
        content = yaml.load(file.read_text(encoding="utf-8-sig"), _UniqueKeys)  # noqa: S506
    except (OSError, ValueError, yaml.YAMLError) as error:
        what = f"it is not UTF-8 ({error})" if isinstance(error, UnicodeDecodeError) else " ".join(str(error).split())
        raise ConfigurationError(f"cannot read {file}: {what}", field) from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{file} holds {type(content).__name__}, expected keys and values", field)
    return content


def overlay(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` laid over `defaults`, key by key and section by section: the one way in which settings inherit.

    Only an `objective` of another name replaces the one beneath it whole, since the parameters of one mean nothing to
    another. A null is a value like others: `epochs: null` over a preset's `epochs: 4` means none.
    """
    merged = dict(defaults)
    for key, value in own.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        replaces = key == "objective" and both and value.get("name") not in (None, merged[key].get("name"))
        merged[key] = overlay(merged[key], value) if both and not replaces else value
    return merged


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a field's annotation, be it `Model`, `Model | None` or a collection of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from sections(argument)


def _models(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """A model and those in it, each with the dotted name that leads to it."""
    yield prefix, model
    for name, field in model.model_fields.items():
        for section in sections(field.annotation):
            yield from _models(section, f"{prefix}{name}.")


def _new_name(model: type[BaseModel], path: Sequence[str | int]) -> str | None:
    """What a key, given by its path, is called now; None if it has not been renamed."""
    models: list[type[BaseModel]] = [model]
    for depth, part in enumerate(path):
        for each in models:
            if part in getattr(each, "RENAMED", {}):
                return ".".join(map(str, [*path[:depth], each.RENAMED[part], *path[depth + 1 :]]))  # type: ignore[attr-defined]
        fields = [each.model_fields[part] for each in models if isinstance(part, str) and part in each.model_fields]
        # An index, or the name of an entry in a mapping of models, leads no deeper.
        models = [section for field in fields for section in sections(field.annotation)] or models
    return None


def _refuse_renamed_variables(model: type[BaseModel], prefix: str) -> None:
    # pydantic-settings passes over variables that are no key of the model: an old name would change nothing, silently.
    for variable in os.environ:
        if variable.upper().startswith(prefix.upper()):
            path = variable[len(prefix) :].lower().split("__")
            new = _new_name(model, path)
            if new is not None:
                now = prefix + new.replace(".", "__").upper()
                raise ConfigurationError(f"the environment's {variable} is called {now} now; rename it", ".".join(path))


def _suggestion(model: type[BaseModel], key: str) -> str:
    """What may have been meant by a key that is none: a new name, another tool's, one elsewhere, the most similar."""
    path = key.replace("-", "_").split(".")
    new = _new_name(model, [int(part) if part.isdigit() else part for part in path])
    if new is not None:
        return f"; it is called {new} now"
    given, leaf = ".".join(part for part in path if not part.isdigit()), path[-1]

    def nearest(keys: list[str]) -> str:
        """Of several, the one that shares most sections with what was given."""
        return max(keys, key=lambda each: sum(a == b for a, b in zip(each.split("."), path, strict=False)))

    theirs = [
        ours if " " in ours else prefix + ours
        for prefix, each in _models(model)
        for name, ours in getattr(each, "ELSEWHERE", {}).items()
        if name == leaf
    ]
    if theirs:
        meant = nearest(theirs)
        return f"; {meant}" if " " in meant else f"; here that is {meant}"
    keys = [prefix + name for prefix, each in _models(model) for name in each.model_fields]
    same = [each for each in keys if each.split(".")[-1] == leaf]
    similar = difflib.get_close_matches(given, keys, n=1, cutoff=0.7)
    alike = difflib.get_close_matches(leaf, [each.split(".")[-1] for each in keys], n=1, cutoff=0.75)
    found = same or similar or [each for each in keys if each.split(".")[-1] in alike]
    return f"; did you mean {nearest(found)}?" if found else ""


def _configuration_error(model: type[BaseModel], error: ValidationError) -> ConfigurationError:
    said: dict[str, list[str]] = {}  # the keys that a text is said of
    kinds: dict[tuple[str, str], list[str]] = {}  # what might stand at a key in the place of what does
    for problem in error.errors():
        key, own = _key(model, problem["loc"]), problem.get("ctx", {}).get("error")
        if problem["type"] == "extra_forbidden":
            said.setdefault(f" is not a key{_suggestion(model, key)}", []).append(key)
        elif problem["type"] == "missing":
            said.setdefault(": has to be given", []).append(key)
        elif isinstance(own, ValueError):  # which says itself what was given; pydantic would begin with "Value error"
            named = isinstance(own, TutelageError) and key.endswith(own.field)
            said.setdefault(f": {own.args[0] if named else own}", []).append(key)
        else:
            kinds.setdefault((key, repr(problem["input"])), []).append(_expected(model, problem))
    for (key, given), expected in kinds.items():
        first, *others = expected
        besides = "".join(f", or {each.removeprefix(_INPUT)}" for each in others)
        said.setdefault(f": {first}{besides} (given: {given})", []).append(key)
    return ConfigurationError("; ".join(f"{', '.join(keys)}{text}".removeprefix(": ") for text, keys in said.items()))


_INPUT, _FEW = "Input should be ", 8


def _key(model: type[BaseModel], path: Sequence[str | int]) -> str:
    """The dotted key of a place, without what pydantic calls the kinds of value of a key that takes several."""
    kinds = {"bool", "int", "float", "str", *(each.__name__ for _, each in _models(model))}
    return ".".join(str(part) for part in path if part not in kinds and "[" not in str(part))


def _expected(model: type[BaseModel], problem: ErrorDetails) -> str:
    """What a value should be, in the words of YAML where pydantic has Python's."""
    if problem["type"] in ("list_type", "tuple_type"):
        return f"{_INPUT}a list"
    if problem["type"] == "path_type":
        return f"{_INPUT}a path"
    if problem["type"] in ("dict_type", "model_type"):
        name = problem.get("ctx", {}).get("class_name")
        keys = next((list(each.model_fields) for _, each in _models(model) if each.__name__ == name), [])
        return f"{_INPUT}keys and values" + (f" ({', '.join(keys)})" if 0 < len(keys) <= _FEW else "")
    return problem["msg"]
