"""Environments of their own for the tools that we are compared with, each made once below `build/`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def python_of(name: str, *installs: tuple[str, ...]) -> Path:
    """The interpreter of an environment; each of `installs` is what one `pip install` gets. About two minutes once."""
    folder = ROOT / "build" / name
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.exists():
        print(f"installing {name} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for arguments in installs:
            pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
            subprocess.run([*pip, *arguments], check=True)
        stamp.touch()
    return python
