"""File, environment and flags fill one frozen model, in that order; mistakes are named with a suggestion."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
from pydantic import AfterValidator, Field

from tutelage.config import Config, load, overlay, to_yaml, validate
from tutelage.errors import ConfigurationError
from tutelage.names import check_name


class Optimizer(Config):
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    max_grad_norm: float = 1.0
    """Largest norm."""
    RENAMED: ClassVar[dict[str, str]] = {"clip": "max_grad_norm"}
    steps: int = 10
    """Steps."""


class Example(Config):
    """An example."""

    name: str
    """Name of the run."""
    optimizer: Optimizer = Optimizer()
    """Optimizer."""
    tasks: list[str] = ["a"]
    """Tasks."""
    others: tuple[Optimizer, ...] = ()
    """More of them."""
    named: dict[str, Optimizer] = Field(default_factory=dict)
    """And by name."""
    spare: Optimizer | None = None
    """One that may be missing."""
    folder: Path | None = None
    """A folder."""
    limit: int | float = 0
    """A number."""
    places: Annotated[str, AfterValidator(partial(check_name, field="places"))] = "here"
    """A name."""
    RENAMED: ClassVar[dict[str, str]] = {"sinks": "tasks", "optim": "optimizer"}
    ELSEWHERE: ClassVar[dict[str, str]] = {"lr": "optimizer.learning_rate", "clipping": "there is none of it"}
    COMMON: ClassVar[tuple[str, ...]] = ("name", "optimizer.steps")


def fill(*arguments: str) -> Example:
    return load(Example, list(arguments), program="tutelage example", environment_prefix="TUTELAGE_EXAMPLE_")


def test_flags_win_over_environment_over_file(tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    file.write_text("name: file\noptimizer: {learning_rate: 0.5, steps: 1}\ntasks: [x, y]\n")
    monkeypatch.setenv("TUTELAGE_EXAMPLE_OPTIMIZER__STEPS", "2")
    monkeypatch.setenv("TUTELAGE_EXAMPLE_OPTIMIZER__LEARNING_RATE", "0.25")
    config = fill("--config", str(file), "--optimizer.learning-rate", "0.125")
    assert config == Example(name="file", optimizer=Optimizer(learning_rate=0.125, steps=2), tasks=["x", "y"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--name", "a", "--optimizer.learning-rte", "1"], r"did you mean optimizer\.learning_rate\?"),
        (["--nam", "a"], "name"),
        (["--name", "a", "--optimizer.learning-rate", "abc"], r"optimizer\.learning_rate: .*'abc'"),
        (["--name", "a", "--optimizer.learning-rate", "0"], r"optimizer\.learning_rate: .*greater than 0"),
        (["--config", "/nowhere.yaml"], "cannot read"),
        ([], "^name: has to be given$"),
        (["--name", "a", "--limit", "x"], r"^limit: Input should be a valid integer, .*, or a valid number, .*'x'\)$"),
        (["--name", "a", "--optimizer", "3"], r"^optimizer: .* keys and values \(learning_rate, .* \(given: 3\)$"),
        (["--name", "a", "--named", "x"], r"^named: takes NAME=VALUE,\.\.\.$"),
        (["--name", "a", "--places", "../x"], "^places: '../x' is not a name"),
        (["--config", "a.yaml", "--config", "b.yaml"], r"there are 2, a\.yaml and b\.yaml; give one"),
        (["--config"], "expected one argument"),
        (["--name", "a", "--lr", "1"], r"; here that is optimizer\.learning_rate$"),
        (["--name", "a", "--clipping", "1"], "; there is none of it$"),
        (["--name", "a", "--learning-rate", "1"], r"; did you mean optimizer\.learning_rate\?$"),
        (["--name", "a", "--steps", "1"], r"; did you mean optimizer\.steps\?$"),
        (["--name", "a", "--zebra", "1"], "--zebra 1 is no setting of this command$"),
        (["--name", "a", "--folder", "~nobody-of-this-name/x"], "give the whole path"),
    ],
)
def test_mistakes_are_named(arguments, says):
    with pytest.raises(ConfigurationError, match=says):
        fill(*arguments)


def test_unknown_keys_of_a_file_are_errors_with_a_suggestion(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("name: a\noptimizer: {lerning_rate: 1}\n")
    with pytest.raises(ConfigurationError, match=r"lerning_rate is not a key; did you mean optimizer\.learning_rate"):
        fill("--config", str(file))
    file.write_text("name: a\ntasks: b\noptimizer: {steps: x}\nspare: {steps: x}\n")
    with pytest.raises(ConfigurationError, match=r"^optimizer\.steps, spare\.steps: .*; tasks: .* a list"):
        fill("--config", str(file))
    file.write_text("name: a\nfolder: 3\nnamed: {path: {steps: []}}\n")
    with pytest.raises(ConfigurationError) as refused:
        fill("--config", str(file))
    assert "folder: Input should be a path (given: 3)" in str(refused.value)
    assert "named.path.steps: Input should be a valid integer (given: [])" in str(refused.value)
    file.write_text("- a\n")
    with pytest.raises(ConfigurationError, match="expected keys and values"):
        fill("--config", str(file))


def test_dry_run_prints_what_config_reads_back(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        fill("--name", "a", "--tasks", "b", "--tasks", "c", "--dry-run")
    assert ended.value.code == 0
    file = tmp_path / "resolved.yaml"
    file.write_text(capsys.readouterr().out)
    assert fill("--config", str(file)) == Example(name="a", tasks=["b", "c"])


def shown(capsys, flag: str) -> str:
    with pytest.raises(SystemExit) as ended:
        fill(flag)
    assert not ended.value.code
    return capsys.readouterr().out


def test_help_shows_the_common_settings_and_help_all_every_one(capsys):
    for flag in ("--help", "-h"):
        text = shown(capsys, flag)
        assert re.findall(r"^  (--[a-z.-]+ \S+)", text, re.MULTILINE)[:2] == [
            "--name TEXT",
            "--optimizer.steps INTEGER",
        ]
        assert "      Name of the run. Required.\n" in text
        assert "      Steps. Default: 10.\n" in text
        assert "learning-rate" not in text
        assert "common settings (11 more: tutelage example --help-all):" in text
        assert "TUTELAGE_EXAMPLE_OPTIMIZER__STEPS" in text
    every = shown(capsys, "--help-all")
    assert "  --optimizer.learning-rate NUMBER\n      Peak learning rate. Default: 0.001.\n" in every
    assert "  --spare.steps INTEGER\n" in every
    assert "  --folder PATH\n      A folder.\n" in every
    assert max(map(len, every.splitlines())) <= 80


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("name: a\nname: b\n", "'name' stands there twice, in lines 1 and 2; keep one"),
        ("name: a\noptimizer:\n  steps: 1\n  steps: 1\n", "'steps' stands there twice, in lines 3 and 4"),
        ("name: a\nothers: [{steps: 1, steps: 2}]\n", "'steps' stands there twice"),
    ],
)
def test_a_key_that_stands_twice_in_a_file_is_refused(content, says, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match=says):
        fill("--config", str(file))


def test_a_merged_mapping_is_no_repetition_and_a_byte_order_mark_no_key(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("\ufeffname: a\noptimizer: &o {steps: 1}\nspare: {<<: *o, steps: 2}\n")
    config = fill("--config", str(file))
    assert (config.optimizer.steps, config.spare.steps) == (1, 2)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes("name: é".encode("latin1"))
    with pytest.raises(ConfigurationError, match=r"cannot read .*c\.yaml: it is not UTF-8"):
        fill("--config", str(file))


def test_a_home_is_found_in_files_and_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("name: '~/a'\nfolder: ~/there\n")
    config = fill("--config=~/c.yaml")
    assert (config.name, config.folder) == ("~/a", tmp_path / "there")
    assert fill("--name", "a", "--folder=~").folder == tmp_path


def test_the_check_comes_before_a_dry_run_and_not_before_a_printed_configuration(capsys):
    def check(config: Example) -> Example:
        if config.name == "gone":
            raise ConfigurationError("it is not there", "name")
        return config.model_copy(update={"name": "checked"})

    def run(*arguments: str) -> Example:
        return load(Example, list(arguments), program="x", environment_prefix="TUTELAGE_EXAMPLE_", check=check)

    assert run("--name", "a").name == "checked"
    with pytest.raises(ConfigurationError, match="it is not there"):
        run("--name", "gone", "--dry-run")
    for flag, name in (("--dry-run", "checked"), ("--print-config", "a")):
        with pytest.raises(SystemExit):
            run("--name", "a", flag)
        assert f"name: {name}\n" in capsys.readouterr().out


def test_configurations_are_frozen_and_round_trip():
    config = validate(Example, {"name": "a"})
    with pytest.raises(ValueError, match="frozen"):
        config.name = "b"
    assert "learning_rate: 0.001" in to_yaml(config)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("sinks: [a]", "sinks is not a key; it is called tasks now"),
        ("optim: {steps: 1}", "optim is not a key; it is called optimizer now"),
        ("optimizer: {clip: 1}", "optimizer.clip is not a key; it is called optimizer.max_grad_norm now"),
        ("others: [{}, {clip: 1}]", "others.1.clip is not a key; it is called others.1.max_grad_norm now"),
        ("named: {one: {clip: 1}}", "named.one.clip is not a key; it is called named.one.max_grad_norm now"),
        ("spare: {clip: 1}", "spare.clip is not a key; it is called spare.max_grad_norm now"),
    ],
)
def test_an_old_name_in_a_file_is_refused_with_the_new_one(content, says, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"name: a\n{content}\n")
    with pytest.raises(ConfigurationError) as refused:
        fill("--config", str(file))
    assert str(refused.value) == says


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--sinks", "it is called tasks now"),
        ("--optim.steps", "it is called optimizer.steps now"),
        ("--optimizer.clip", "it is called optimizer.max_grad_norm now"),
        ("--spare.clip", "it is called spare.max_grad_norm now"),
        ("--no-sinks", "it is called tasks now"),
        ("--no-spare.clip", "it is called spare.max_grad_norm now"),
    ],
)
def test_an_old_name_as_a_flag_is_refused_with_the_new_one(flag, says):
    for arguments in ([flag, "1"], [f"{flag}=1"]):
        with pytest.raises(ConfigurationError, match=says):
            fill("--name", "a", *arguments)


@pytest.mark.parametrize(
    ("variable", "now"),
    [
        ("TUTELAGE_EXAMPLE_SINKS", "TUTELAGE_EXAMPLE_TASKS"),
        ("TUTELAGE_EXAMPLE_OPTIM__STEPS", "TUTELAGE_EXAMPLE_OPTIMIZER__STEPS"),
        ("TUTELAGE_EXAMPLE_OPTIMIZER__CLIP", "TUTELAGE_EXAMPLE_OPTIMIZER__MAX_GRAD_NORM"),
    ],
)
def test_an_old_name_in_the_environment_is_refused_with_the_new_one(variable, now, monkeypatch):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigurationError, match=f"{variable} is called {now} now"):
        fill("--name", "a")


def test_settings_inherit_key_by_key_and_an_objective_of_another_name_replaces_the_whole():
    under = {"batch": {"sequences": 8, "max_tokens": 512}, "objective": {"name": "gkd", "beta": 0.1}, "lora": None}
    assert overlay(under, {"batch": {"sequences": 4}, "steps": 3}) == {
        "batch": {"sequences": 4, "max_tokens": 512},
        "objective": {"name": "gkd", "beta": 0.1},
        "lora": None,
        "steps": 3,
    }
    assert overlay(under, {"objective": {"temperature": 2}})["objective"] == {
        "name": "gkd",
        "beta": 0.1,
        "temperature": 2,
    }
    assert overlay(under, {"objective": {"name": "gkd", "beta": 0.5}})["objective"] == {"name": "gkd", "beta": 0.5}
    assert overlay(under, {"objective": {"name": "reverse_kl"}})["objective"] == {"name": "reverse_kl"}
    assert overlay(under, {"batch": None})["batch"] is None
    assert overlay(under, {"lora": {"rank": 8}})["lora"] == {"rank": 8}
    assert overlay(overlay({"epochs": 4}, {"epochs": None}), {"steps": 3}) == {"epochs": None, "steps": 3}
    assert under["objective"] == {"name": "gkd", "beta": 0.1}


class Writing(Config):
    """What is written, and who is asked."""

    out: Path = Path("x")
    """Where to."""
    token_file: Path | None = None
    """Token."""
    optimizer: Optimizer = Optimizer()
    """Optimizer."""


def test_a_command_takes_the_name_that_another_one_has_for_a_thing():
    def run(*arguments: str) -> Writing:
        return load(Writing, list(arguments), program="x", environment_prefix="TUTELAGE_EXAMPLE_")

    assert run("--output", "a") == run("--out=a") == run("--output=a") == Writing(out=Path("a"))
    assert run("--teacher.token-file", "a").token_file == Path("a")
    with pytest.raises(ConfigurationError, match=r"--address a is no setting of this command$"):
        run("--address", "a")
