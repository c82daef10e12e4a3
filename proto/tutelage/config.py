"""One frozen pydantic model a command, filled from a YAML file, the environment and dotted flags.

Later wins: the model's defaults, `--config FILE`, `<PREFIX>SECTION__KEY` in the environment,
`--section.key VALUE`. Unknown keys are errors that suggest the nearest known one, and a key that has been renamed is
an error that names the new one. `--dry-run` prints the resolved file and does nothing else.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from tutelage.errors import ConfigurationError


class Config(BaseModel):
    """Base of every configuration: frozen, without unknown keys, its attributes' docstrings are its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    RENAMED: ClassVar[dict[str, str]] = {}
    """Keys that this model once had, each with what it is called now. An old one in a file, the environment or a flag
    is refused, never read as the new one: a rename often comes with another default or unit."""


ConfigT = TypeVar("ConfigT", bound=Config)


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


def load(model: type[ConfigT], arguments: list[str], *, program: str, environment_prefix: str) -> ConfigT:
    """A configuration from a command line; prints help or the resolved file and exits if asked to.

    Args:
        model: what to fill.
        arguments: the command line after the command's name.
        program: the command as people type it, for the help.
        environment_prefix: for example `TUTELAGE_TRAIN_`.

    Raises:
        ConfigurationError: as `validate`, and for a file that is missing or is no YAML mapping.

    """
    # Not fields of the model: a resolved file would then name itself, and a file could ask for a dry run.
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--config", type=Path)
    own.add_argument("--dry-run", action="store_true")
    known, rest = own.parse_known_args(arguments)
    _refuse_renamed_variables(model, environment_prefix)
    settings = _settings_class(model, known.config, program, environment_prefix)
    try:
        filled = CliApp.run(settings, cli_args=rest)
    except ValidationError as error:
        raise _configuration_error(model, error) from error
    except SettingsError as error:
        unknown = [word[2:].split("=")[0] for word in str(error).split() if word.startswith("--")]
        raise ConfigurationError(str(error) + "".join(_suggestion(model, key) for key in unknown)) from error
    # Once more as what was asked for, and not a subclass that reads the environment whenever it is made.
    config = validate(model, filled.model_dump())
    if known.dry_run:
        sys.stdout.write(to_yaml(config))
        raise SystemExit(0)
    return config


def _settings_class(
    model: type[Config], file: Path | None, program: str, environment_prefix: str
) -> type[BaseSettings]:
    if file is not None:
        read_mapping(file, "config")  # pydantic-settings would name neither the file nor what is wrong with it

    class Settings(model, BaseSettings):  # type: ignore[misc, valid-type]
        __doc__ = (model.__doc__ or "") + " Besides: --config FILE (YAML), --dry-run (print the resolved file)."
        model_config = SettingsConfigDict(
            env_prefix=environment_prefix,
            env_nested_delimiter="__",
            yaml_file=file,
            cli_prog_name=program,
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
            return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)

    return Settings


def read_mapping(file: Path, field: str) -> dict[str, Any]:
    """What a YAML file of keys and values says.

    Args:
        file: its path.
        field: what named the file, for the error.

    Raises:
        ConfigurationError: it cannot be read, is no YAML, or holds something else.

    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"cannot read {file}: {error}", field) from error
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


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a field's annotation, be it `Model`, `Model | None` or a collection of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for section in _sections(field.annotation):
            keys += _keys(section, f"{prefix}{name}.")
    return keys


def _new_name(model: type[BaseModel], path: Sequence[str | int]) -> str | None:
    """What a key, given by its path, is called now; None if it has not been renamed."""
    models: list[type[BaseModel]] = [model]
    for depth, part in enumerate(path):
        for each in models:
            if part in getattr(each, "RENAMED", {}):
                return ".".join(map(str, [*path[:depth], each.RENAMED[part], *path[depth + 1 :]]))  # type: ignore[attr-defined]
        fields = [each.model_fields[part] for each in models if isinstance(part, str) and part in each.model_fields]
        # An index, or the name of an entry in a mapping of models, leads no deeper.
        models = [section for field in fields for section in _sections(field.annotation)] or models
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
    path = key.replace("-", "_").split(".")
    new = _new_name(model, [int(part) if part.isdigit() else part for part in path])
    if new is not None:
        return f"; it is called {new} now"
    nearest = difflib.get_close_matches(".".join(path), _keys(model), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _configuration_error(model: type[BaseModel], error: ValidationError) -> ConfigurationError:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key} is not a key{_suggestion(model, key)}")
        else:
            given = "" if problem["type"] == "missing" else f" (given: {problem['input']!r})"
            lines.append(f"{key}: {problem['msg']}{given}" if key else f"{problem['msg']}")
    return ConfigurationError("; ".join(lines))
