"""A study whose teacher and evaluator are served by somebody else, over TLS and for tokens; both are real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from study_cases import study_values
from tutelage.certificates import main as certificates
from tutelage.errors import TutelageError
from tutelage.runtime.programs import shared_machine
from tutelage.study import cli
from tutelage.up.services import serve_evaluator, serve_teacher

TOKENS = {"teacher": "info,score,write", "evaluator": "info,submit"}


def access(folder: Path, service: str) -> dict[str, Any]:
    """The two sides' settings: what the service is served with, and what who asks it is told."""
    own, key = folder / f"{service}.pem", folder / f"{service}.key"
    (folder / f"{service}.tokens").write_text(f"{service}-secret {TOKENS[service]}\n")
    (folder / f"{service}.token").write_text(f"{service}-secret\n")
    serve = {"tls.certificate": own, "tls.key": key, "tls.client_ca": folder / "ca.pem"}
    asked = {"ca": folder / "ca.pem", "certificate": folder / "study.pem", "key": folder / "study.key"}
    return {
        "serve": serve | {"token_file": folder / f"{service}.tokens"},
        "asked": {
            "tls": {name: str(path) for name, path in asked.items()},
            "token_file": str(folder / f"{service}.token"),
        },
    }


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_study_asks_servers_of_others_with_its_certificate_and_tokens(tiny_model, tmp_path):
    names = ["--server", "teacher=127.0.0.1", "--server", "evaluator=127.0.0.1", "--client", "study"]
    certificates(["--out", str(tmp_path), *names])
    teacher, evaluator = access(tmp_path, "teacher"), access(tmp_path, "evaluator")
    logs = tmp_path / "logs"
    logs.mkdir()
    wanted = {"model": tiny_model, "roles": "score,write", **teacher["serve"]}
    frames = {"frames": tmp_path / "their-frames", "queue": tmp_path / "their-queue"}
    scored = {"prompt": "chat", "engine": "transformers", **frames, **evaluator["serve"]}
    given: dict[str, Any] = {"environment": shared_machine()}
    servers = [serve_teacher("teacher", logs, wanted, **given), serve_evaluator(logs, scored, **given)]
    try:
        served = {"model": "tiny", "tuned": False, "address": servers[0].address, **teacher["asked"]}
        values = study_values(tmp_path, tiny_model, teachers={"big": served}, seeds=[0])
        values["evaluation"] = {
            "tasks": values["evaluation"]["tasks"],
            "address": servers[1].address,
            "frames": str(frames["frames"]),
            **evaluator["asked"],
        }
        values["methods"]["seq_kd"] = {"objective": {"name": "seq_kd"}, "data": "rationales"}
        values["rationales"] = {"max_new_tokens": 256, "temperature": 1.0}  # of random weights, a few end
        values["grid"] = [{"methods": ["kd", "seq_kd"]}]
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump(values))
        assert cli.main(["run", str(file)]) == 0

        without = values["teachers"]["big"] | {"token_file": evaluator["asked"]["token_file"]}
        file.write_text(yaml.safe_dump(values | {"teachers": {"big": without}, "output": str(tmp_path / "other")}))
        with pytest.raises(TutelageError, match="not one that this server knows"):
            cli.main(["run", str(file)])
    finally:
        for server in servers:
            server.close()
    rows = pl.read_parquet(frames["frames"] / "**" / "*.parquet", hive_partitioning=True)
    assert rows["objective"].unique().sort().to_list() == ["", "kd", "seq_kd"]  # the teacher's own, and two methods
    (usage,) = (json.loads(path.read_text()) for path in (tmp_path / "run" / "usage").glob("big-*.json"))
    assert usage["teacher"] == "big"
