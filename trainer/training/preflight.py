"""What a training tries before its first step, so that it does not fail after many."""

from __future__ import annotations

import shutil
from pathlib import Path

from tutelage.errors import ConfigurationError
from tutelage.files import reporting_disk_errors
from tutelage.manifest import commit, verify
from tutelage.trainer.model.student import Student


def check_saving(student: Student, init: Path, folder: Path) -> None:
    """Saves everything of a checkpoint but its tensors, and removes it again.

    Args:
        student: as it is before training.
        init: where it comes from, for messages.
        folder: the student's; a kill may leave `.saving` in it, which the next start removes.

    Raises:
        ConfigurationError: a file of `init` could be read but cannot be written: transformers reads a
            `generation_config.json` with a temperature but without sampling, and refuses to save it.
        CheckpointError: the file system refused.

    """
    scratch = folder / ".saving"
    with reporting_disk_errors(scratch):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            student.save_without_weights(scratch)
            commit(scratch)
            verify(scratch)
        except OSError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"a student of {init} could not be saved: {error} Change that in the folder's generation_config.json, "
                "config.json or tokenizer, whichever it is of",
                "students.init",
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
