"""What `tutelage teacher serve` can be told: vLLM's engine arguments under their names, and what is refused of them."""

from __future__ import annotations

import pytest

from tutelage.config import load, to_yaml, validate
from tutelage.errors import ConfigurationError
from tutelage.teacher_server.cli import main
from tutelage.teacher_server.config import REFUSED, TeacherConfig


def told(*arguments: str) -> TeacherConfig:
    return load(TeacherConfig, ["--model", "m", *arguments], program="serve", environment_prefix="TUTELAGE_TEACHER_")


@pytest.mark.parametrize(("old", "new"), TeacherConfig.RENAMED.items())
def test_an_old_name_is_refused_with_the_new_one_named(old, new):
    assert new in TeacherConfig.model_fields
    with pytest.raises(ConfigurationError, match=rf"{old}.*{new}"):
        validate(TeacherConfig, {"model": "m", old: 1})


def test_vllms_arguments_come_as_flags_from_a_file_and_from_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "teacher.yaml"
    file.write_text("quantization: fp8\nhf_overrides: {rope_theta: 1.0}\ntensor_parallel_size: 2\n")
    monkeypatch.setenv("TUTELAGE_TEACHER_KV_CACHE_DTYPE", "fp8")
    flags = ("--tensor-parallel-size", "8", "--enable-expert-parallel", "--no-enable-dbo")
    config = told("--config", str(file), *flags)
    assert config.engine_arguments == {
        "enable_dbo": False,
        "enable_expert_parallel": True,
        "hf_overrides": {"rope_theta": 1.0},
        "kv_cache_dtype": "fp8",
        "quantization": "fp8",
        "tensor_parallel_size": 8,
    }


def test_a_resolved_file_has_the_arguments_that_were_given_and_no_others():
    resolved = to_yaml(told("--tensor-parallel-size", "8"))
    assert "tensor_parallel_size: 8" in resolved
    assert "pipeline_parallel_size" not in resolved


def test_what_a_teacher_reads_itself_is_no_pass_through():
    assert told("--max-model-len", "64", "--dtype", "float32", "--max-num-seqs", "3").engine_arguments == {}


def test_an_argument_that_vllm_has_not_gets_a_suggestion():
    with pytest.raises(ConfigurationError, match="did you mean tensor_parallel_size"):
        told("--tensor-paralel-size", "8")


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_what_makes_it_a_teachers_engine_is_refused_with_the_reason(name, reason):
    with pytest.raises(ConfigurationError, match=f"{name} is not for you to say: {reason}"):
        validate(TeacherConfig, {"model": "m", name: "yes"})


def test_a_head_in_another_dtype_is_refused():
    with pytest.raises(ConfigurationError, match="head_dtype"):
        validate(TeacherConfig, {"model": "m", "hf_overrides": {"head_dtype": "float32"}})


@pytest.mark.parametrize(("theirs", "ours"), TeacherConfig.ELSEWHERE.items())
def test_what_vllm_serve_calls_a_setting_is_answered_with_our_name(theirs, ours):
    with pytest.raises(ConfigurationError, match=ours):
        told(f"--{theirs.replace('_', '-')}", "x")


@pytest.mark.parametrize(("given", "tokens"), [("32k", 32_000), ("32K", 32_768), ("1.5k", 1500), ("700", 700)])
def test_numbers_are_read_as_vllm_reads_them(given, tokens):
    assert told("--max-model-len", given).max_model_len == tokens


def test_the_model_comes_first_as_in_vllm_serve(capsys, tiny_model):
    with pytest.raises(SystemExit):
        main(["serve", str(tiny_model), "--port", "8000", "--dry-run"])
    assert f"model: {tiny_model}" in (printed := capsys.readouterr().out)
    assert "port: 8000" in printed


def test_a_port_in_the_host_is_refused():
    with pytest.raises(ConfigurationError, match="host"):
        told("--host", "0.0.0.0:8000")
