"""A checkpoint is there completely or not at all, whatever happened to its writer or its files."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from tutelage.errors import CheckpointError, Conflict
from tutelage.manifest import verify
from tutelage.trainer.checkpoint.run_lock import folder_lock
from tutelage.trainer.checkpoint.store import CheckpointStore
from tutelage.trainer.checkpoint.trainer_state import State, read_state
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
