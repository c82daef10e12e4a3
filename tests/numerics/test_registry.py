"""The table of objectives refuses what it must, with a way out, and needs no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from numerics.cases import DIVERGENCES, make_case
from tutelage.errors import ConfigurationError
from tutelage.trainer.config.presets import PRESETS
from tutelage.trainer.losses.losses import divergence_named, token_divergence
from tutelage.trainer.losses.registry import OBJECTIVES, as_markdown, check_signal, objective_named, resolve_parameters
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution
from tutelage.trainer.teacher.rows import Unembedding

DESIGNED = {
    *("sft", "seq_kd", "forward_kl", "reverse_kl", "gkd", "jsd"),
    *("skew_kl", "skew_reverse_kl", "tvd", "adaptive_kl", "policy_gradient_kl"),
}


def test_every_objective_of_the_design_is_there_and_every_divergence_has_a_definition():
    assert set(OBJECTIVES) >= DESIGNED
    for name in DIVERGENCES:
        divergence_named(name, resolve_parameters(name, {}))
    assert not OBJECTIVES["sft"].needs_teacher
    assert OBJECTIVES["sft"].default_kind is None
    assert OBJECTIVES["gkd"].default_kind == "hidden"


def test_table_and_presets_import_no_torch():
    modules = "tutelage.trainer.losses.registry, tutelage.trainer.config.presets"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


@pytest.mark.parametrize(
    ("name", "kind", "settings", "words"),
    [
        ("reverse_kl", "topk", {}, "1/e of the teacher's mass; use hidden or candidates"),
        ("reverse_kl", "topk", {"approximate": True}, "1/e of the teacher's mass"),
        ("gkd", "topk", {"parameters": {"beta": 1.0}}, "different objective"),
        ("skew_reverse_kl", "topk", {}, "different objective"),
        ("adaptive_kl", "candidates", {}, "use hidden"),
        ("forward_kl", "candidates", {}, "say approximate: true"),
        ("gkd", "candidates", {"parameters": {"beta": 0.0}}, "say approximate: true"),
        ("forward_kl", "topk", {"noise": 1.0}, "noise 1.0 is exact only with hidden"),
        ("policy_gradient_kl", "candidates", {"noise": 1.0}, "noise 1.0 is exact only with hidden"),
        ("reverse_kl", "hidden", {"truncates": True}, "infinite where a truncated teacher has probability 0"),
        ("gkd", "hidden", {"truncates": True, "parameters": {"beta": 1.0}}, "infinite"),
        ("forward_kl", "topk", {"truncates": True}, "a truncated teacher needs hidden"),
        ("sft", "topk", {}, "needs no teacher"),
        ("paper_code/gkd", "topk", {}, "use hidden"),
    ],
)
def test_refused(name, kind, settings, words):
    with pytest.raises(ConfigurationError, match=words):
        check_signal(name, kind, **{"parameters": {}, **settings})


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("forward_kl", "candidates", {"approximate": True}),
        ("forward_kl", "topk", {"approximate": True, "noise": 1.0}),
        ("forward_kl", "hidden", {"noise": 1.0, "truncates": True}),
        ("gkd", "topk", {"parameters": {"beta": 0.0}}),
        ("gkd", "candidates", {"parameters": {"beta": 1.0}}),
    ],
)
def test_accepted(name, kind, settings):
    check_signal(name, kind, **{"parameters": {}, **settings})


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ConfigurationError, match="did you mean reverse_kl"):
        objective_named("reversekl")
    with pytest.raises(ConfigurationError, match="it has beta, normalize_beta"):
        resolve_parameters("gkd", {"alpha": 0.5})
    with pytest.raises(ConfigurationError, match="no parameters"):
        resolve_parameters("tvd", {"alpha": 0.5})


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gkd", {"beta": -0.1}),
        ("gkd", {"beta": 1.1}),
        ("gkd", {"beta": float("nan")}),
        ("gkd", {"beta": True}),
        ("gkd", {"beta": "0.5"}),
        ("gkd", {"normalize_beta": 1.0}),
        ("skew_kl", {"alpha": 1.0}),
        ("adaptive_kl", {"head_mass": 0.0}),
        ("policy_gradient_kl", {"estimator": "k4"}),
    ],
)
def test_parameters_out_of_range_are_refused(name, parameters):
    with pytest.raises(ConfigurationError, match="is not in"):
        resolve_parameters(name, parameters)


def test_parameters_at_the_ends_of_their_ranges_are_allowed():
    assert resolve_parameters("gkd", {"beta": 1}) == {"beta": 1, "normalize_beta": False}
    assert resolve_parameters("skew_kl", {"alpha": 0.0}) == {"alpha": 0.0}


def test_the_loss_itself_refuses_what_the_table_refuses():
    case = make_case()
    with pytest.raises(ConfigurationError, match="use hidden or candidates"):
        token_divergence(
            case.hidden_ND, case.head, case.topk(5), objective="reverse_kl", distribution=TeacherDistribution()
        )
    with pytest.raises(ConfigurationError, match="compares no distributions"):
        token_divergence(case.hidden_ND, case.head, case.teacher, objective="sft", distribution=TeacherDistribution())
    smaller = Unembedding(torch.zeros(22, 5, dtype=torch.float64))
    with pytest.raises(ConfigurationError, match="22 rows, the teacher's 23"):
        token_divergence(case.hidden_ND, smaller, case.teacher, objective="gkd", distribution=TeacherDistribution())


def test_documentation_has_a_row_for_each_objective():
    text = as_markdown()
    assert len(text.splitlines()) == len(OBJECTIVES) + 2
    assert all(f"| `{name}` |" in text for name in OBJECTIVES)


def test_presets_name_objectives_that_hidden_serves():
    assert {name.split("/")[0] for name in PRESETS} == {"paper_code", "paper_text"}
    for settings in PRESETS.values():
        row = objective_named(str(settings["objective.name"]))
        given = {key: settings[f"objective.{key}"] for key in row.parameters if f"objective.{key}" in settings}
        resolve_parameters(row.name, given)
        assert row.default_kind in ("hidden", None)
