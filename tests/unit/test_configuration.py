"""File, environment and flags fill one frozen model, in that order; mistakes are named with a suggestion."""

from __future__ import annotations

import pytest
from pydantic import Field

from tutelage.config import Config, load, to_yaml, validate
from tutelage.errors import ConfigurationError


class Optimizer(Config):
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
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
        ([], "name: Field required"),
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


def test_help_says_what_each_key_means(capsys):
    with pytest.raises(SystemExit):
        fill("--help")
    text = capsys.readouterr().out
    assert "Peak learning rate." in text
    assert "--config" in text


def test_configurations_are_frozen_and_round_trip():
    config = validate(Example, {"name": "a"})
    with pytest.raises(ValueError, match="frozen"):
        config.name = "b"
    assert "learning_rate: 0.001" in to_yaml(config)
