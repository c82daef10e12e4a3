"""The teacher's settings: vLLM's names, and what becomes of the old ones."""

import pytest

from tutelage.config import validate
from tutelage.errors import ConfigurationError
from tutelage.teacher_server.config import TeacherConfig


@pytest.mark.parametrize(("old", "new"), TeacherConfig.RENAMED.items())
def test_an_old_name_is_refused_with_the_new_one_named(old, new):
    assert new in TeacherConfig.model_fields
    with pytest.raises(ConfigurationError, match=rf"{old}.*{new}"):
        validate(TeacherConfig, {"model": "m", old: 1})
