"""What writers may be asked for, and what they cost a cluster."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from trainer_cases import student_config, write_rows
from tutelage.config import validate
from tutelage.errors import ConfigurationError
from tutelage.trainer.checkpoint.trainer_state import config_digest
from tutelage.trainer.cluster.resources import fits, object_store_bytes, processes_of, shortage
from tutelage.trainer.config.run import CohortConfig

OWN = {"name": "gkd", "on_policy_fraction": 1.0}


@pytest.fixture
def folders(tmp_path):
    """A student of two weights, one of which takes adapters, and its data."""
    weights = {
        "model.embed_tokens.weight": torch.zeros(16, 4),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(6, 4),
    }
    (tmp_path / "init").mkdir()
    save_file(weights, tmp_path / "init" / "model.safetensors")
    return tmp_path / "init", write_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"objective": {"name": "forward_kl"}}, "sampling.writers: the student writes nothing"),
        ({"sampling": {"engine": "vllm"}}, "say sampling.writers.engine in its place"),
        ({"workers": 2}, "writers take the weights of a student of one process, and this one has 2 workers"),
        ({"sampling": {"writers": {"count": 5}}}, "5 writers, but a batch has 4 sequences to share"),
        ({"sampling": {"writers": {"engine": "vllm"}, "temperature": 0.001}}, "sampling.temperature: 0.001 is below"),
    ],
)
def test_writers_that_could_not_write_are_refused_by_name(changes, problem, folders):
    sampling = {"writers": {}} | changes.get("sampling", {})
    with pytest.raises(ValidationError, match=problem):
        student_config(*folders, **({"objective": OWN} | changes | {"sampling": sampling}))


def test_a_student_that_has_a_writer_s_name_is_refused(folders):
    ann = student_config(*folders, objective=OWN, sampling={"writers": {"count": 2}}).model_dump()
    values = {"students": [ann, ann | {"id": "ann-writer-1"}]}
    with pytest.raises(ConfigurationError, match="ann-writer-1 is the name of a writer of ann"):
        validate(CohortConfig, values)


def test_writers_are_part_of_what_a_student_asks_for(folders):
    writers = {"count": 2, "threads": 3, "gpus": 1}
    student = student_config(*folders, objective=OWN, sampling={"writers": writers})
    assert processes_of(student) == [{"CPU": 1}, {"CPU": 3, "GPU": 1.0}, {"CPU": 3, "GPU": 1.0}]
    assert fits(student, [{"CPU": 6, "GPU": 2}, {"CPU": 1}])
    assert fits(student, [{"CPU": 3, "GPU": 1}, {"CPU": 4, "GPU": 1}])
    assert not fits(student, [{"CPU": 7, "GPU": 1}])
    assert not fits(student, [{"CPU": 6, "GPU": 2}])
    assert shortage(student, [{"CPU": 7.0}]).startswith(
        "ann asks for 1 CPU, and 1 GPU and 3 CPUs for each of 2 writers (gpus, threads, workers, sampling.writers), "
        "which the cluster has not: 7 CPUs;"
    )


@pytest.mark.parametrize(
    ("changes", "numbers", "size", "versions"),
    [
        ({"dtype": "float32"}, 16 * 4 + 6 * 4, 4, 3),
        ({"sampling": {"max_staleness": 3}}, 16 * 4 + 6 * 4, 2, 6),
        ({"lora": {"r": 2, "target_modules": ["q_proj"]}}, 2 * (6 + 4), 2, 3),
    ],
)
def test_the_object_store_has_room_for_the_weights_in_use_and_the_next(changes, numbers, size, versions, folders):
    sampling = {"writers": {}} | changes.get("sampling", {})
    student = student_config(*folders, objective=OWN, **(changes | {"sampling": sampling}))
    alone = student_config(*folders, objective=OWN)
    assert object_store_bytes([student, alone]) - object_store_bytes([alone]) == numbers * size * versions


def test_a_training_goes_on_with_more_or_fewer_writers_but_not_with_another_engine(folders):
    def digest(**writers):
        return config_digest(student_config(*folders, objective=OWN, sampling={"writers": writers}))

    assert digest() == digest(count=3, threads=2, gpus=1)
    assert digest() != digest(engine="vllm")
    assert digest() != config_digest(student_config(*folders, objective=OWN))
