"""The project's own configurations, looked at as before a run: none of the findings is raised by any of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from tutelage.config import load
from tutelage.identity import end_token_ids
from tutelage.studies import demo_inputs, micro_inputs, smollm_inputs
from tutelage.study.config import StudyConfig
from tutelage.study.resolution import Study, cohort, resolve
from tutelage.trainer.cluster.task_items import findings_of_cohort
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.training.findings import findings_of
from tutelage.trainer.training.sources import read_data

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
MICRO = [
    pytest.param(file, id=file.stem, marks=[] if file.stem == "micro_on_policy" else pytest.mark.long)
    for file in sorted((DEPLOY / "studies").glob("micro*.yaml"))
]
BASE_ROWS = 500
"""Of the 80,000 from which base models learn to count."""


def raised(config: CohortConfig, tokenizer, ends: list[int]) -> list[str]:
    """Everything but what is fine, of students with different data or settings."""
    found = [each for findings in findings_of_cohort(config).values() for each in findings]
    looked_at = set()
    for student in config.students:
        what = student.model_dump_json(include={"data", "held_out", "objective", "sampling", "batch"})
        if what not in looked_at:
            looked_at.add(what)
            found += findings_of(student, tokenizer, read_data(student, tokenizer), ends)
    assert len({each.topic for each in found}) == 6
    return [f"{each.topic}: {each.text}" for each in found if each.state != "ok"]


def cohort_of(study: Study) -> CohortConfig:
    """All trainings of a study at once, the written answers of its teachers being the data's."""
    cells = [cell for cell in study.cells if cell.settings]
    asked = {"teacher": {"address": "127.0.0.1:1"}}
    config = CohortConfig.model_validate(cohort(study.config, cells, {cell.id: Path() for cell in cells}, asked))
    for student in config.students:
        for source in student.sources:
            if not source.path.exists():
                source.path.parent.mkdir(parents=True)
                shutil.copy(study.config.data, source.path)
    return config


@pytest.fixture(scope="module")
def micro(tmp_path_factory) -> Iterator[Path]:
    """What micro_inputs.py makes, in `build/micro` of the present folder."""
    folder, before = tmp_path_factory.mktemp("micro"), Path.cwd()
    build = folder / "build" / "micro"
    build.mkdir(parents=True)
    micro_inputs.write_data(build)
    base = (build / "base.jsonl").read_text().splitlines(keepends=True)
    (build / "base.jsonl").write_text("".join(base[:BASE_ROWS]))
    micro_inputs.write_models(build / "models")
    os.chdir(folder)
    yield build
    os.chdir(before)


@pytest.mark.parametrize("file", MICRO)
def test_the_micro_studies(file, micro):
    config = cohort_of(resolve(StudyConfig.model_validate(yaml.safe_load(file.read_text()))))
    model = micro / "models" / "l"
    assert raised(config, AutoTokenizer.from_pretrained(model), end_token_ids(model)) == []


def test_the_demonstration(packaged_models, tmp_path):
    teacher = packaged_models[0]
    demo_inputs.write_inputs(tmp_path)
    tasks = json.dumps([{"task": str(tmp_path / "numbers.yaml")}])
    given = ["--config", str(DEPLOY / "demo.yaml"), "--output", str(tmp_path), "--teacher.address", "127.0.0.1:1"]
    given += ["--evaluator.address", "127.0.0.1:1", "--evaluator.tasks", tasks, "--defaults.init", str(tmp_path)]
    given += ["--defaults.data.path", str(tmp_path / "train.jsonl")]
    config = load(CohortConfig, given, program="tutelage train", environment_prefix="TUTELAGE_TRAIN_")
    assert raised(config, AutoTokenizer.from_pretrained(teacher), end_token_ids(teacher)) == []


@pytest.mark.data
def test_the_real_model_study(packaged_models, data_dir, tmp_path, monkeypatch):
    teacher = packaged_models[0]
    monkeypatch.setenv("TUTELAGE_DATA_DIR", str(data_dir))
    monkeypatch.chdir(tmp_path)
    build = tmp_path / "build" / "smollm" / "data"
    build.mkdir(parents=True)
    smollm_inputs.write_data(data_dir / "train" / "mawps" / "mawps_clean_no_test_overlap.json", build)
    content = yaml.safe_load((DEPLOY / "studies" / "smollm.yaml").read_text())
    for model in content["models"].values():
        model["path"] = str(teacher)
    config = cohort_of(resolve(StudyConfig.model_validate(content)))
    assert raised(config, AutoTokenizer.from_pretrained(teacher), end_token_ids(teacher)) == []
