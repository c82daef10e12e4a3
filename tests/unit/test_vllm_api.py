"""What is known of vLLM without importing it: its version, what was tested, its engine arguments."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tutelage import doctor
from tutelage.errors import ConfigurationError
from tutelage.runtime import vllm_api


def test_the_installed_version_is_one_that_was_tested():
    assert vllm_api.installed_version().startswith(vllm_api.TESTED_VERSIONS)
    assert vllm_api.statement().endswith(", tested")


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("0.32.1", "0.32.1, tested"),
        ("0.33.0+cu130", "0.33.0+cu130, read but not run; tested is 0.32"),
        ("0.320.0", "0.320.0, unknown; tested is 0.32"),
        ("1.0", "1.0, unknown; tested is 0.32"),
    ],
)
def test_other_versions_are_told_apart(version, said, monkeypatch):
    monkeypatch.setattr(vllm_api, "installed_version", lambda: version)
    assert vllm_api.statement() == said


def test_the_doctor_says_which_vllm_and_whether_it_was_tested(monkeypatch):
    assert doctor.Finding("vllm", "ok", vllm_api.statement()) in doctor.installed_packages()
    monkeypatch.setattr(vllm_api, "installed_version", lambda: "0.40.0")
    assert doctor.Finding("vllm", "note", "0.40.0, unknown; tested is 0.32") in doctor.installed_packages()


def test_engine_arguments_are_read_without_importing_vllm():
    program = (
        "import sys\n"
        "from tutelage.runtime import vllm_api\n"
        "arguments = vllm_api.engine_arguments()\n"
        "assert arguments['tensor_parallel_size'] == 'int' and arguments['enable_expert_parallel'] == 'bool'\n"
        "assert 'vllm' not in sys.modules and 'torch' not in sys.modules\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)


def test_a_vllm_that_lacks_something_is_refused(monkeypatch):
    monkeypatch.setattr(vllm_api, "differences", lambda: ["LLM.enqueue takes no prompts"])
    with pytest.raises(ConfigurationError, match=r"LLM.enqueue takes no prompts. Tested: 0.32; read, not run: 0.33"):
        vllm_api.require_conforming()


def test_a_build_for_devices_that_are_not_here_is_refused(monkeypatch):
    """PyPI's build on a machine without a GPU."""
    from vllm import platforms

    monkeypatch.setattr(platforms, "_current_platform", platforms.interface.UnspecifiedPlatform())
    with pytest.raises(ConfigurationError, match=r"engine: .*finds no device .* the build for CPUs, or give another"):
        vllm_api.require_vllm("engine", "give another")


def test_a_name_that_is_not_used_is_not_given():
    with pytest.raises(AttributeError, match="uses no ModelConfig"):
        _ = vllm_api.ModelConfig


def test_where_vllm_is_not_installed_its_arguments_are_those_of_the_tested_version(monkeypatch):
    """So that a study for a cluster is planned on a machine without it."""
    installed = vllm_api.engine_arguments()
    monkeypatch.setattr(vllm_api, "find_spec", lambda _: None)
    known = vllm_api.engine_arguments.__wrapped__()
    plain = {"bool", "int", "float", "str"}
    kinds = {name: kind for name, annotation in installed.items() if (kind := annotation.removesuffix(" | None"))}
    assert known == {name: kind if kind in plain else "Any" for name, kind in kinds.items()}
