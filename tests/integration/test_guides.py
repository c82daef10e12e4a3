"""Each guide of docs/guides, command by command, from the text of the page.

In the short form a tiny teacher stands at the guide's address, steps and items are few; `make test-long` runs every
guide as it stands, but for its ports. A new guide gets an entry of `SHORT`.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from guides import run, script_of
from trainer_cohorts import free_port
from trainer_doubles import FaultyServicer, InProcessTeacher, serving
from tutelage.evaluator.results.frames import read
from tutelage.trainer.model.layer_pruning import prune_layers

GUIDES = Path(__file__).resolve().parents[2] / "docs" / "guides"
MODELS = {"python deploy/studies/prepare_models.py build/models": "mkdir -p build && ln -s {models} build/models"}
TEACHER = {
    "tutelage teacher serve build/models/teacher --port 50051 &": "tutelage teacher info --address {teacher}",
    "127.0.0.1:50051": "{teacher}",
}
SHORT: dict[str, dict[str, str]] = {
    "own-data": {
        **{f"{made} --without 12 19": linked for made, linked in MODELS.items()},
        **TEACHER,
        "50052": "{evaluator_port}",
        "[:400]": "[:24]",
        "[:100]": "[:3]",
        "max_new_tokens: 24": "max_new_tokens: 8",
        "sequences: 8, max_tokens: 96": "sequences: 2, max_tokens: 128",
        "sequences: 16": "sequences: 2",
        "steps: 40": "steps: 2",
    },
    "own-task": {**MODELS, "--limit 20": "--limit 2 --max-new-tokens 8"},
    "operator": {
        **MODELS,
        "tutelage teacher serve build/models/teacher --port 50051 --token-file build/operator/tokens --store.path "
        "build/operator/store \\\n    --metrics-port 50053 --address-file build/operator/address &\n"
        "until test -s build/operator/address; do sleep 1; done": "sleep 600 &",
        "127.0.0.1:50051 && exit 1 || true": "127.0.0.1:1 && exit 1 || true",
        "127.0.0.1:50051": "{teacher}",
        "print(u.urlopen('http://127.0.0.1:50053/metrics').read().decode()[:400])": "",
    },
    "researcher": {
        **MODELS,
        **TEACHER,
        "--count 400": "--count 24",
        "steps: 60": "steps: 2",
        "--steps 60": "--steps 1 --dry-run",
        "step-00000060": "step-00000002",
        "sequences: 8, max_tokens: 160": "sequences: 2, max_tokens: 160",
        "max_new_tokens: 64": "max_new_tokens: 8",
        "sequences: 16": "sequences: 2",
        "--limit 40": "--limit 2 --max-new-tokens 4",
    },
}
"""By guide: texts of the page, and what stands there in the short form."""


def test_every_guide_has_a_short_form():
    assert {page.stem for page in GUIDES.glob("*.md")} == SHORT.keys()


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> Path:
    """The folder of the guides' models, each of them tiny."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "teacher").symlink_to(tiny_model)
    prune_layers(tiny_model, folder / "student-8-layers", layers=2)
    (folder / "teacher-without-12-to-19").symlink_to(folder / "student-8-layers")
    return folder


@pytest.mark.parametrize("guide", SHORT)
def test_a_guide_runs_as_it_says(guide, tiny_model, models, tmp_path):
    page = (GUIDES / f"{guide}.md").read_text()
    with serving(FaultyServicer(InProcessTeacher(tiny_model), tiny_model)) as address:
        places = {"models": str(models), "teacher": address, "evaluator_port": free_port()}
        instead = {old: new.format(**places) for old, new in SHORT[guide].items()}
        run(script_of(page, instead), tmp_path, 240, RAY_AUTH_MODE="disabled")


@pytest.mark.long
@pytest.mark.parametrize("guide", SHORT)
def test_a_guide_runs_word_for_word(guide, packaged_models, data_dir, tmp_path):
    page = (GUIDES / f"{guide}.md").read_text()
    for name in ("deploy", "docs", "README.md"):
        (tmp_path / name).symlink_to(GUIDES.parents[1] / name)
    (tmp_path / "build").mkdir()
    (tmp_path / "build/models").symlink_to(packaged_models[0].parent)
    instead = {port: str(free_port()) for port in ("50051", "50052", "50053") if port in page}
    run(script_of(page, instead), tmp_path, 1800, RAY_AUTH_MODE="disabled", TUTELAGE_DATA_DIR=str(data_dir))
    if guide == "own-data":  # who follows it sees a student that learned something
        rows = read(tmp_path / "build/own/frames").filter(student="forward-kl").collect()
        before, after = rows.group_by("step").agg(pl.col("score").mean()).sort("step")["score"]
        assert after - before > 0.3


def test_a_page_becomes_its_files_and_commands_in_order():
    page = (
        "# x\n```sh\necho one\n```\ntext\n```yaml a/b.yaml\nrun: x\n```\n```text\none\n```\n```sh\ncat a/b.yaml\n```\n"
    )
    file = "mkdir -p \"$(dirname 'a/b.yaml')\"\ncat > 'a/b.yaml' <<'END OF FILE'\nrun: x\nEND OF FILE\n"
    assert script_of(page, {"echo one": "echo two"}).endswith(f"echo two\n{file}cat a/b.yaml\n")
    with pytest.raises(AssertionError, match="does not say 'three' any more"):
        script_of(page, {"three": "four"})


def test_a_command_that_fails_fails_the_guide(tmp_path):
    assert "two\n" in run(script_of("```sh\nsleep 60 &\necho two\n```\n", {}), tmp_path, 20)
    with pytest.raises(AssertionError, match="here"):
        run(script_of("```sh\necho here\nfalse\necho there\n```\n", {}), tmp_path, 20)
