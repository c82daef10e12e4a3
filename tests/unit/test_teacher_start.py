"""What a teacher server does before it serves: configuration, cores, the orphan reaper of its processes, help."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fake_teacher import FakeScoringEngine
from tutelage.config import validate
from tutelage.data.signal_store import teacher_key
from tutelage.errors import ConfigurationError, DataError
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.config import TeacherConfig
from tutelage.teacher_server.engine.cpu_affinity import cores_of
from tutelage.teacher_server.model import loading
from tutelage.teacher_server.model.loading import describe, find_checkpoint, load_head, read_checkpoint
from tutelage.teacher_server.model.self_check import check_sequences


def config(**values) -> TeacherConfig:
    return validate(TeacherConfig, {"model": "somewhere/tiny"} | values)


def test_the_name_is_the_models_unless_given():
    assert config().served_name == "tiny"
    assert config(served_model_name="mine").served_name == "mine"


@pytest.mark.parametrize(
    "values", [{"roles": ["score", "score"]}, {"roles": []}, {"roles": ["sing"]}, {"frame_bytes": 1}, {"max_k": 0}]
)
def test_configurations_that_are_refused(values):
    with pytest.raises(ConfigurationError, match=next(iter(values))):
        config(**values)


@pytest.mark.parametrize(
    ("roles", "cores", "expected"),
    [
        (["score"], [0], {"score": [0]}),
        (["score"], [0, 1], {"score": [0]}),
        (["score"], [4, 5, 6], {"score": [4, 5]}),
        (["score", "write"], [0], {"score": [0], "write": [0]}),
        (["score", "write"], [0, 1], {"score": [0], "write": [1]}),
        (["write", "score"], [0, 1, 2, 3], {"write": [0, 1], "score": [2, 3]}),
    ],
)
def test_cores_of_the_engines(roles, cores, expected):
    assert {role: cores_of(role, config(roles=roles), cores) for role in roles} == expected


@pytest.mark.parametrize(("head_threads", "expected"), [(1, [0, 1, 2]), (2, [0, 1]), (4, [0]), (9, [0])])
def test_an_engine_leaves_the_head_a_core_a_thread(head_threads, expected):
    assert cores_of("score", config(head_threads=head_threads), range(4)) == expected


def test_cores_that_were_given():
    assert cores_of("score", config(score_cores="0-2,5"), range(8)) == [0, 1, 2, 5]


def test_the_servers_threads_stay_off_the_engines_cores():
    code = """
import os, threading
from tutelage.teacher_server.engine.cpu_affinity import keep_off

first, *others = cores = sorted(os.sched_getaffinity(0))
old, stop = [], threading.Event()
thread = threading.Thread(target=lambda: (stop.wait(), old.append(os.sched_getaffinity(0))))
thread.start()
keep_off(set(cores))
assert os.sched_getaffinity(0) == set(cores), "no core is left, so nothing moves"
keep_off({first})
stop.set()
thread.join()
new = []
thread = threading.Thread(target=lambda: new.append(os.sched_getaffinity(0)))
thread.start()
thread.join()
assert old == new == [set(others or cores)], (old, new)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


def test_cores_that_are_none():
    with pytest.raises(ConfigurationError, match="score_cores"):
        config(score_cores="0;1")
    with pytest.raises(ConfigurationError, match=r"score_cores: given 1-2, allowed: of \[0, 1\]"):
        cores_of("score", config(score_cores="1-2"), [0, 1])


def test_a_model_that_is_nowhere():
    with pytest.raises(ConfigurationError, match="no directory"):
        find_checkpoint("no/such/model/anywhere", None)


def test_a_model_that_is_too_short(tiny_model):
    with pytest.raises(ConfigurationError, match="the model's 512"):
        read_checkpoint(tiny_model, config(max_model_len=513))


def test_the_longest_sequence_is_the_models_unless_a_cpu_is_to_write(tiny_model, tmp_path):
    assert read_checkpoint(tiny_model, config()).max_model_len == 512
    assert read_checkpoint(tiny_model, config(max_model_len=100)).max_model_len == 100
    long = json.loads((tiny_model / "config.json").read_text()) | {"max_position_embeddings": 10**6}
    assert read_checkpoint(with_config(tmp_path, tiny_model, long), config()).max_model_len == 10**6
    assert read_checkpoint(tmp_path, config(roles=["score", "write"])).max_model_len == 2048


def with_config(folder: Path, model: Path, content: dict) -> Path:
    """The model's files with another config.json."""
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "gpt2", "n_embd": 96, "n_positions": 300},
        {"model_type": "gemma3", "text_config": {"hidden_size": 96, "max_position_embeddings": 300}},
        {"model_type": "llama", "hidden_size": 96, "max_position_embeddings": 300},
    ],
    ids=lambda content: content["model_type"],
)
def test_sizes_are_read_whatever_a_model_calls_them(content, tiny_model, tmp_path):
    checkpoint = read_checkpoint(with_config(tmp_path, tiny_model, content), config())
    assert (checkpoint.hidden_size, checkpoint.max_model_len) == (96, 300)
    with pytest.raises(ConfigurationError, match="the model's 300"):
        read_checkpoint(tmp_path, config(max_model_len=301))


@pytest.mark.parametrize("content", [{}, {"model_type": "never-heard-of"}, {"model_type": 3}, [], "no"])
def test_a_configuration_that_says_nothing_is_refused(content, tiny_model, tmp_path):
    with pytest.raises(DataError, match=r"config\.json"):
        read_checkpoint(with_config(tmp_path, tiny_model, content), config())


def test_the_description_of_a_teacher(tiny_model):
    settings = config(model=str(tiny_model))
    checkpoint = read_checkpoint(tiny_model, settings)
    info = describe(checkpoint, settings, load_head(checkpoint, settings))
    assert (info.vocabulary_size, info.hidden_size, info.limits.max_k) == (512, 128, 512)
    assert (info.unembedding.rows, info.unembedding.columns) == (512, 128)
    assert info.unembedding.dtype == pb.DTYPE_BFLOAT16
    assert list(info.roles) == [pb.TEACHER_ROLE_SCORE]


def test_a_loaded_teacher_keeps_its_states_under_its_own_name(tiny_model, tmp_path, monkeypatch, caplog):
    engine = FakeScoringEngine()
    monkeypatch.setattr(loading.vllm_engine, "start_engines", lambda folder, _, longest: {"score": engine})
    monkeypatch.setattr(loading.vllm_engine, "version", lambda: "vllm 0")
    monkeypatch.setattr(loading.vllm_engine, "prepare_environment", lambda _: None)
    monkeypatch.setattr(loading, "use_bfloat16_products", lambda: None)  # both are for a process of its own
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    settings = config(model=str(tiny_model), store={"path": str(tmp_path), "bytes": 1000}, head_threads=2)
    engine.max_model_len = 300  # what its cache holds
    teacher = loading.load_teacher(settings, "instance", 1.0)
    try:
        assert teacher.limits.max_sequence_tokens == 300
        assert "at most 300 tokens: the key-value cache holds no more, the model would take 512" in caplog.text
        key = teacher_key(teacher.info.weights_digest, "bfloat16", "vllm 0")
        assert [folder.name for folder in tmp_path.iterdir()] == [key[:32]]
    finally:
        teacher.shutdown()
    assert engine.dead


def test_the_same_files_in_another_precision_are_another_teacher(tiny_model):
    plain = read_checkpoint(tiny_model, config()).weights_digest
    assert read_checkpoint(tiny_model, config(tensor_parallel_size=2)).weights_digest == plain
    others = [{"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}, {"hf_overrides": {"rope_theta": 1.0}}]
    assert len({plain, *(read_checkpoint(tiny_model, config(**each)).weights_digest for each in others)}) == 4


def test_an_engine_whose_destructor_fails_ends_quietly(monkeypatch):
    class Engine:
        def __del__(self):
            raise TypeError("'NoneType' object is not callable")

    noise = []
    monkeypatch.setattr(sys, "unraisablehook", noise.append)
    Engine()
    assert len(noise) == 1
    quiet = loading.vllm_engine.without_destructor(Engine)
    assert isinstance(quiet(), Engine)
    gc.collect()
    assert len(noise) == 1


def test_check_sequences_fit_the_model(tiny_model):
    sequences = check_sequences(tiny_model, longest=30)
    assert [len(sequence) for sequence in sequences] == [8, 24, 30, 30]
    assert len(check_sequences(tiny_model, longest=8)[0]) > 4  # makes shorter ones safe on a CPU with AMX


def test_help_is_quick_because_it_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from tutelage.teacher_server.cli import main\n"
        "for arguments in (['--help'], ['serve', '--help-all'], ['info', '--help'], ['usage', '--help']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'vllm', 'transformers', 'grpc', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--score-cores" in done.stdout


def _wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_orphan_reaper_kills_what_a_dead_server_leaves(number):
    # An engine stands in its own session here, so that nothing but the mark connects it to the server; and it
    # renames itself, as vLLM's do.
    engine_program = "import setproctitle, time; setproctitle.setproctitle('engine'); print(flush=True); time.sleep(99)"
    program = (
        "import subprocess, sys, time\n"
        "from tutelage.runtime import orphan_reaper\n"
        "bystander = subprocess.Popen(['sleep', '300'], start_new_session=True)\n"
        "keeper = orphan_reaper.start('test-' + sys.argv[1])\n"
        f"engine = subprocess.Popen([sys.executable, '-c', {engine_program!r}], start_new_session=True,\n"
        "    stdout=subprocess.PIPE)\n"
        "engine.stdout.readline()\n"
        "print(bystander.pid, keeper.pid, engine.pid, flush=True)\n"
        "time.sleep(300)\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", program, str(os.getpid())], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert server.stdout is not None
        bystander, keeper, engine = map(psutil.Process, map(int, server.stdout.readline().split()))
        os.kill(server.pid, number)
        server.wait(10)
        assert _wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 20)
        assert _wait_until(lambda: not keeper.is_running() or keeper.status() == psutil.STATUS_ZOMBIE, 20)
        assert bystander.is_running()
    finally:
        server.kill()
        for process in (bystander, engine):
            if process.is_running():
                process.kill()
        server.stdout.close()
