"""A guide of docs/guides as the shell script that its reader types: its files are written, its commands run, in order.

A fenced block of `sh` is commands. Any other block that has a name after its language (```yaml cohort.yaml) is a file
of that name. Blocks of `text` show what is printed. Whatever a command left in the background ends with the script.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEAD = "set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT\n"


def script_of(page: str, instead: Mapping[str, str]) -> str:
    """The page's script.

    Args:
        page: its Markdown.
        instead: texts of the page and what stands there in a short form; each must be there.

    """
    for old, new in instead.items():
        assert old in page, f"the page does not say {old!r} any more"
        page = page.replace(old, new)
    parts = []
    for language, name, content in _BLOCK.findall(page):
        if name:
            parts.append(f"mkdir -p \"$(dirname '{name}')\"\ncat > '{name}' <<'END OF FILE'\n{content}END OF FILE\n")
        elif language == "sh":
            parts.append(content)
    assert parts, "the page has neither commands nor files"
    return _HEAD + "".join(parts)


def section(page: str, title: str) -> str:
    """What stands below a heading, up to the next one of any level."""
    _, found, rest = page.partition(f"# {title}\n")
    assert found, f"the page has no section {title!r} any more"
    return rest.partition("\n#")[0]


def run(script: str, here: Path, seconds: float, **environment: str) -> str:
    """What the script printed; it must end with 0."""
    own = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-v", "-c", script],
        cwd=here,
        env=os.environ | own | {"PATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "Traceback" not in done.stdout
    return done.stdout
