"""A real Prometheus asks the three services, and every expression of deploy/monitoring has an answer, or a reason.

A teacher (vLLM), a student on Ray and an evaluator that scores its checkpoints are scraped while the student trains.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
import yaml

from local_ray import local_ray
from monitoring import FOLDER, metric_of, panel_expressions, rule_expressions, rules, selectors
from teacher_process import TeacherProcess
from trainer_cases import write_rows
from trainer_cohorts import free_port
from tutelage.evaluator.config import ServeConfig
from tutelage.evaluator.service.server import Service
from tutelage.trainer.cluster.supervisor import supervise
from tutelage.trainer.config.run import CohortConfig

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="Prometheus is not installed (Debian: prometheus)"
)

UNANSWERED = {
    "ray_node_gpus_utilization": "no GPU",
    "ray_node_gram_used": "no GPU",
    "ray_node_gram_available": "no GPU",
    "tutelage_teacher_disk_free_bytes": "the shared teacher has no store",
    "tutelage_teacher_disk_size_bytes": "the shared teacher has no store",
    "tutelage_teacher_max_stored_bytes": "the shared teacher has no store",
}
"""Metrics that have no value in this set-up; an expression of which they are all has none either."""
SHORT_WINDOWS = {"$__rate_interval": "4s", "[10m]": "[4s]", "[1h]": "[4s]", "offset 1h": "offset 4s"}
"""What Grafana fills in, and the rules' hours: the test takes a minute."""


def filled_in(text: str) -> str:
    for written, put in SHORT_WINDOWS.items():
        text = text.replace(written, put)
    for variable in ("$instance", "$run", "$student", "$task"):
        text = text.replace(variable, ".*")
    return text


@contextmanager
def evaluator(folder: Path, metrics_port: int) -> Iterator[str]:
    """The real service in a thread of this process, which has imported torch already; gives its address."""
    config = ServeConfig(
        port=0,
        frames=folder / "frames",
        queue=folder / "queue",
        engine="transformers",
        prompt="chat",
        batch_size=2,
        metrics_port=metrics_port,
    )
    started, stop, service = Event(), asyncio.Event(), Service(config)
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        await service.start()
        started.set()
        await stop.wait()
        await service.stop()

    thread = Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield f"127.0.0.1:{service.port}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)


@contextmanager
def prometheus(folder: Path, ports: dict[str, int]) -> Iterator[str]:
    """Scrapes each job's port once a second, by the committed configuration's jobs and rules; gives its address."""
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text(encoding="utf-8"))
    assert {job["job_name"] for job in config["scrape_configs"]} == ports.keys()
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / "rules.yaml")]
    config["scrape_configs"] = [
        {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]} for job, port in ports.items()
    ]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    options = (f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}")
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            ["prometheus", *options, f"--web.listen-address={address}"], stdout=log, stderr=log, env=os.environ
        )
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str, expression: str) -> bool:
    """Whether an expression had a value at any second of the last three minutes."""
    query = urllib.parse.urlencode({"query": f"max_over_time(({expression})[3m:1s])"})
    with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=30) as answer:
        content = json.load(answer)
    return any(not math.isnan(float(series["value"][1])) for series in content["data"]["result"])


def write_student(folder: Path, teacher: Path) -> Path:
    """One layer of width 32 with the teacher's vocabulary."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.save_pretrained(folder)
    size = json.loads((teacher / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def cohort(folder: Path, teacher: str, evaluator: str, init: Path) -> CohortConfig:
    return CohortConfig.model_validate(
        {
            "run": f"seen-{os.getpid()}",
            "output": str(folder / "run"),
            "teacher": {"address": teacher},
            "evaluator": {
                "address": evaluator,
                "every_steps": 8,
                "tasks": [{"task": "arithmetic", "protocol": "loglik", "limit": 100}],
            },
            "defaults": {
                "init": str(init),
                "data": {"path": str(write_rows(folder / "rows.jsonl"))},
                "objective": {"name": "forward_kl", "signal": "topk", "k": 8},
                "batch": {"sequences": 2, "max_tokens": 64},
                "held_out": {"sequences": 2, "every_steps": 4},
                "sampling": {"max_new_tokens": 4},
                "steps": 24,
                "save_every_steps": 8,
            },
            "students": [{"id": "ann"}],
        }
    )


def test_every_panel_and_every_rule_has_an_answer(
    teacher_server: TeacherProcess,
    metrics_port: int,
    packaged_models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    init = write_student(tmp_path / "init", packaged_models[0])
    evaluator_metrics = free_port()
    with local_ray(tmp_path), evaluator(tmp_path, evaluator_metrics) as evaluator_address:
        import ray

        ray_metrics = ray.nodes()[0]["MetricsExportPort"]
        ports = {"tutelage-teacher": metrics_port, "tutelage-evaluator": evaluator_metrics, "ray": ray_metrics}
        with prometheus(tmp_path, ports) as url:
            config = cohort(tmp_path, teacher_server.address, evaluator_address, init)
            (student,) = supervise(config, lambda _status: None)
            assert student.state == "finished"
            sent = (config.folder("ann") / "evaluations.jsonl").read_text(encoding="utf-8")
            assert all(json.loads(line)["submitted"] for line in sent.splitlines()), sent
            asked = [(each.where, filled_in(each.text)) for each in panel_expressions()]
            # An alert has an answer when something is wrong; what it compares has one always.
            asked += [(each.where, filled_in(s)) for each in rule_expressions() for s in selectors(each.text)]
            asked += [(rule["record"], rule["expr"]) for rule in rules() if "record" in rule]
            deadline = time.monotonic() + 60
            silent = asked
            while (silent := [each for each in silent if not answers(url, each[1])]) and time.monotonic() < deadline:
                if all(is_explained(text) for _, text in silent):
                    break
                time.sleep(1)
    unexplained = [f"{where}: {text}" for where, text in silent if not is_explained(text)]
    assert not unexplained, "no answer:\n" + "\n".join(unexplained)
    if not torch.cuda.is_available():  # what is explained is still asked for, and still has no answer
        without = {metric_of(selector) for _, text in silent for selector in selectors(text)}
        assert without == UNANSWERED.keys()


def is_explained(text: str) -> bool:
    return {metric_of(selector) for selector in selectors(text)} <= UNANSWERED.keys()
