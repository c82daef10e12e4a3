"""A checkpoint is there completely or not at all, whatever happened to its writer or its files."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trainer_cases import student_config
from tutelage.config import to_yaml
from tutelage.errors import CheckpointError, Conflict
from tutelage.manifest import verify
from tutelage.trainer.checkpoint.best import Best
from tutelage.trainer.checkpoint.run_lock import folder_lock
from tutelage.trainer.checkpoint.store import CheckpointStore
from tutelage.trainer.checkpoint.trainer_state import Rollout, State, config_digest, differing_settings, read_state
from tutelage.trainer.data.sequences import Completion
from tutelage.trainer.metrics.log import MetricsLog


def write_files(content: bytes = b"weights"):
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(content)
        (folder / "state.json").write_bytes(b"{}")

    return write


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_the_newest_is_found_and_old_ones_go_unless_protected(store, tmp_path):
    assert store.latest() is None
    for step in (1, 2, 3, 4):
        store.save(step, write_files(), protected=[1])
    assert store.latest().step == 4
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (1, 3, 4)
    ]


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "MANIFEST.json"])
def test_a_damaged_one_is_skipped_for_the_one_before(damage, name, store, caplog):
    store.save(1, write_files())
    newest = store.save(2, write_files())
    damage(newest.path / name)
    with caplog.at_level(logging.WARNING):
        assert store.latest().step == 1
    assert "step-00000002" in caplog.text
    with pytest.raises(CheckpointError):
        verify(newest.path)


def test_a_step_can_be_saved_again_over_its_ruins(store):
    store.save(1, write_files())
    damage_flip(store.save(2, write_files()).path / "model.safetensors")
    store.save(2, write_files(b"again"))
    assert (store.latest().path / "model.safetensors").read_bytes() == b"again"


def test_other_things_in_the_folder_are_ignored(store, tmp_path):
    store.save(1, write_files())
    folder = tmp_path / "checkpoints"
    for name in ("step-00000009.tmp", "step-abc", "step-9", "step-00000008"):
        (folder / name).mkdir()
    (folder / "step-00000007").symlink_to(folder / "step-00000001")
    (folder / "step-00000006").write_text("a file")
    assert store.latest().step == 1


def test_every_prefix_of_a_save_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    """Stops the writer before each change it makes to the file system, in turn."""
    operations = ("rename", "fsync", "unlink", "rmdir", "mkdir", "open", "symlink")
    total = count_operations(tmp_path / "count", monkeypatch, operations, stop_at=None)
    assert total > 10
    for stop_at in range(total):
        folder = tmp_path / str(stop_at)
        with pytest.raises(_Killed):
            count_operations(folder, monkeypatch, operations, stop_at=stop_at)
        latest = CheckpointStore(folder, keep=1).latest()
        assert latest is not None
        assert latest.step in (1, 2), f"stopped before operation {stop_at}"
        verify((folder / "best").resolve())
        CheckpointStore(folder, keep=1).save(2, write_files(b"second"))
        assert CheckpointStore(folder, keep=1).latest().step == 2


class _Killed(BaseException):
    pass


def count_operations(folder: Path, monkeypatch, operations, stop_at: int | None) -> int:
    """Saves step 1, then step 2 with the writer stopped before its operation number `stop_at`."""
    store = CheckpointStore(folder, keep=1)
    store.save(1, write_files(b"first"), best=1)
    done = 0

    def counted(original):
        def call(*arguments, **keywords):
            nonlocal done
            if done == stop_at:
                raise _Killed
            done += 1
            return original(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        for name in operations:
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(Path, "replace", counted(Path.replace))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        store.save(2, write_files(b"second"), best=2)
    return done


def test_a_failing_file_system_leaves_earlier_ones_alone(store):
    store.save(1, write_files())

    def write(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="earlier checkpoints and files are untouched"):
        store.save(2, write)
    assert store.latest().step == 1


def test_metrics_are_cut_back_to_what_was_committed(tmp_path):
    with MetricsLog(tmp_path, offset_bytes=0) as metrics:
        metrics.append({"step": 1, "train/loss": 1.0})
        committed = metrics.commit()
        metrics.append({"step": 2, "train/loss": 2.0})
    with MetricsLog(tmp_path, offset_bytes=committed) as metrics:
        metrics.append({"step": 2, "train/loss": 3.0, "heldout/forward_kl": 0.5})
        metrics.commit()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 1.0), (2, 3.0)]
    import polars

    frame = polars.read_parquet(tmp_path / "metrics.parquet")
    assert frame["train/loss"].to_list() == [1.0, 3.0]
    assert frame["heldout/forward_kl"].to_list() == [None, 0.5]


def test_a_student_has_one_writer_and_its_death_frees_it(tmp_path):
    def lock():
        return folder_lock(tmp_path, advice="stop that one", field="students.id")

    with lock(), pytest.raises(Conflict, match=f"process {os.getpid()} on .*; stop that one"), lock():
        pass
    assert f"process {os.getpid()}" in (tmp_path / "lock").read_text()
    with lock():
        pass


def test_a_checkpoint_of_another_version_is_refused_and_not_read(tmp_path):
    State(3, 10, "", "", "").save(tmp_path)
    path = tmp_path / "state.json"
    path.write_text(path.read_text().replace('"rollouts"', '"written"'))
    with pytest.raises(CheckpointError, match="another version of tutelage wrote this checkpoint"):
        read_state(tmp_path)


WRITTEN = Completion(
    np.array([1, 2], np.int32), np.array([-0.1, -3e-8], np.float32), np.array([True, False]), np.array([3, 4], np.int32)
)
STATE = State(4, 100, "c", "d", "t", Best(2, 0.5, 1), (Rollout(4, 3, {0: WRITTEN}),))


def test_a_state_comes_back_as_it_was_saved(tmp_path):
    STATE.save(tmp_path)
    state = read_state(tmp_path)
    read = state.rollouts[0].completions[0]
    for name in ("ids", "logp", "mask", "versions"):
        np.testing.assert_array_equal(getattr(read, name), getattr(WRITTEN, name), strict=True)
    assert replace(state, rollouts=()) == replace(STATE, rollouts=())


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '"state"', "\udcff"])
def test_a_state_that_cannot_be_read_is_refused_with_what_to_do(damage, tmp_path):
    (tmp_path / "state.json").write_bytes(damage.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"state\.json is not the state of a training.*remove"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"best": None},
        {"best": {"steps": 1}},
        {"rollouts": [{"step": 1}]},
        {"rollouts": [{"step": 1, "weights_version": 0, "completions": {"one": [1]}}]},
        {"rollouts": [{"step": 1, "weights_version": 0, "completions": {"1": ["a"]}}]},
        {"rollouts": 5},
    ],
)
def test_a_state_with_damaged_parts_is_refused(change, tmp_path):
    STATE.save(tmp_path)
    values = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps(values | change))
    with pytest.raises(CheckpointError, match="is not the state of a training"):
        read_state(tmp_path)


def test_a_checkpoint_without_a_state_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not the state of a training"):
        read_state(tmp_path)


def logged(folder: Path, rows: int) -> int:
    with MetricsLog(folder, offset_bytes=0) as metrics:
        for step in range(rows):
            metrics.append({"step": step, "train/loss": 1.0 / (step + 1)})
        return metrics.commit()


@pytest.mark.parametrize("lost", [1, 2, 10, 10_000])
def test_metrics_that_were_cut_are_refused_instead_of_filled_with_zeros(lost, tmp_path):
    committed = logged(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-lost])
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match=rf"has {len(content)} bytes, and .* counts on {committed}"):
        MetricsLog(tmp_path, offset_bytes=committed)
    assert path.read_bytes() == content


def test_metrics_that_were_edited_are_refused_before_training_with_their_line(tmp_path):
    committed = logged(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"x" * (len(lines[1]) - 1) + b"\n", lines[2]]))
    with pytest.raises(CheckpointError, match="line 2 is not a row of metrics"):
        MetricsLog(tmp_path, offset_bytes=committed)
    with pytest.raises(CheckpointError, match="whole lines"):
        MetricsLog(tmp_path, offset_bytes=committed - 1)


def test_half_a_line_after_what_counts_is_cut_off(tmp_path):
    committed = logged(tmp_path, 3)
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": 3, "train/lo')
    with MetricsLog(tmp_path, offset_bytes=committed) as metrics:
        assert metrics.newest == {"train/loss": 1.0 / 3}
        metrics.append({"step": 3, "train/loss": 0.25})
        metrics.commit()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]


def test_a_folder_that_cannot_be_written_is_refused_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "ann"
    with pytest.raises(CheckpointError, match=f"cannot write {folder}"):
        MetricsLog(folder, offset_bytes=0)
    with pytest.raises(CheckpointError, match=f"cannot write {folder}"), folder_lock(folder, advice="", field=""):
        pass


def test_settings_that_change_no_number_may_change_wherever_they_stand(tmp_path):
    data = tmp_path / "rows.jsonl"
    begun = student_config(tmp_path, data, sampling={"stream": True})
    (tmp_path / "student.yaml").write_text(to_yaml(begun))
    now = student_config(tmp_path, data, sampling={"stream": False}, gpus=1)
    assert config_digest(now) == config_digest(begun)
    assert differing_settings(now, tmp_path) == []
    other = student_config(tmp_path, data, sampling={"stream": False, "top_p": 0.5})
    assert config_digest(other) != config_digest(begun)
    assert differing_settings(other, tmp_path) == ["sampling.top_p: 1.0, now 0.5"]
