"""A file or folder is there whole or not at all, and a manifest says what a checkpoint is."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import closing
from pathlib import Path

import pytest

from tutelage.errors import CheckpointError, ConfigurationError
from tutelage.files import make_directory_once, write_atomically, write_durably
from tutelage.manifest import MANIFEST, commit, is_committed, remove, verify
from tutelage.study.folder import Folder
from tutelage.teacher_server.signals.store import SignalStore
from tutelage.trainer.checkpoint.run_lock import folder_lock


@pytest.mark.parametrize("write", [write_durably, write_atomically])
def test_a_content_replaces_another_and_leaves_nothing_beside_it(write, tmp_path):
    path = tmp_path / "a.json"
    for content, stored in (("früher", "früher".encode()), (b"\xff later", b"\xff later")):
        write(path, content)
        assert path.read_bytes() == stored
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("write", [write_durably, write_atomically])
@pytest.mark.parametrize("where", ["open", "replace"])
def test_a_full_disk_says_what_to_do_and_leaves_what_was_there(write, where, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write(path, "old")

    def full(*_arguments, **_keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, where, full)
        with pytest.raises(CheckpointError, match=r"a\.json: .*No space left.*untouched, make room and start again"):
            write(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_is_not_there_needs_no_room(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone/a: No such file or directory; .* mend that and start again"):
        write_durably(tmp_path / "gone" / "a", "new")


def test_threads_that_write_one_file_leave_one_of_their_contents(tmp_path):
    path = tmp_path / "a"
    contents = [f"{number}" * 10_000 for number in range(8)]
    threads = [threading.Thread(target=write_durably, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in contents
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_made_once_and_not_at_all_if_making_it_fails(tmp_path):
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "below").mkdir()
        (folder / "below" / "file").write_text("x")

    for _ in range(2):
        assert make_directory_once(tmp_path / "models" / "tiny", make) == tmp_path / "models" / "tiny"
    assert len(made) == 1
    assert (tmp_path / "models" / "tiny" / "below" / "file").read_text() == "x"

    def fail(folder: Path) -> None:
        make(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_directory_once(tmp_path / "models" / "other", fail)
    assert [entry.name for entry in (tmp_path / "models").iterdir()] == ["tiny"]


def test_who_makes_a_folder_second_uses_the_first_ones(tmp_path):
    folder = tmp_path / "a"

    def slower(temporary: Path) -> None:
        make_directory_once(folder, lambda other: (other / "file").write_text("first"))
        (temporary / "file").write_text("second")

    make_directory_once(folder, slower)
    assert (folder / "file").read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint with a folder in it, as a tokenizer with several chat templates saves one."""
    folder = tmp_path / "checkpoint"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_bytes(b"weights")
    commit(folder)
    return folder


def test_a_manifest_names_what_lies_in_folders_too(checkpoint):
    verify(checkpoint)
    (checkpoint / "additional_chat_templates" / "tool_use.jinja").write_text("{{ Messages }}")
    with pytest.raises(CheckpointError, match=r"additional_chat_templates/tool_use\.jinja has other content"):
        verify(checkpoint)


def test_every_difference_from_a_manifest_is_named(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"weight")
    (checkpoint / "additional_chat_templates" / "tool_use.jinja").unlink()
    with pytest.raises(CheckpointError) as refused:
        verify(checkpoint)
    assert "tool_use.jinja is missing; model.safetensors has 6 bytes instead of 7" in str(refused.value)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"files": []}', '{"files": {"model.safetensors": 7}}'])
def test_what_is_no_manifest_is_refused(content, checkpoint):
    (checkpoint / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match="is not a manifest"):
        verify(checkpoint)
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is missing"):
        verify(checkpoint)


def test_a_checkpoint_is_none_before_it_is_gone(checkpoint, monkeypatch):
    seen = []
    monkeypatch.setattr("tutelage.manifest.shutil.rmtree", lambda folder: seen.append(is_committed(folder)))
    remove(checkpoint)
    assert seen == [False]


def test_a_checkpoint_with_folders_in_it_is_pinned_whole(checkpoint, tmp_path):
    from tutelage.evaluator.runner.checkpoint import pin

    place = pin(checkpoint, tmp_path / "parts" / "pinned")
    verify(place)
    assert (place / "model.safetensors").samefile(checkpoint / "model.safetensors")
    assert pin(checkpoint, place) == place


LOCKED = {
    "student": lambda folder: folder_lock(folder, advice="", field="output"),
    "store": lambda folder: closing(SignalStore(folder, "teacher", 1000)),
    "study": lambda folder: Folder(folder).driven(),
}


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("who", LOCKED)
def test_a_file_system_without_locks_is_refused_by_what_it_lacks(who, number, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    refusal = pytest.raises(ConfigurationError, match=rf"the file system of {tmp_path}.* has no locks .*another one")
    with refusal, LOCKED[who](tmp_path):
        pass
