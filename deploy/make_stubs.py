"""Generates the Python stubs of `proto/`, or says with `--check` whether the committed ones are stale.

python deploy/make_stubs.py [--check]
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).resolve().parents[1] / "proto"


def generate(out: Path) -> list[Path]:
    """Writes the stubs of every .proto below `proto/` to `out` and returns their paths relative to it.

    Raises:
        SystemExit: protoc refused a file.

    """
    sources = sorted(str(path.relative_to(PROTO)) for path in PROTO.glob("tutelage/*/v1/*.proto"))
    # The plugins of mypy-protobuf lie beside the interpreter.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    flags = [
        f"--{kind}_out={'quiet:' if 'mypy' in kind else ''}{out}"
        for kind in ("python", "grpc_python", "mypy", "mypy_grpc")
    ]
    if protoc.main(["protoc", f"-I{PROTO}", *flags, *sources]) != 0:
        raise SystemExit("protoc failed")
    return sorted(path.relative_to(out) for path in out.rglob("*_pb2*.py*") if path.suffix in (".py", ".pyi"))


def stale_stubs() -> list[str]:
    """Names of committed stubs that differ from what the .proto files generate now."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
        return [
            str(name)
            for name in fresh
            if not (PROTO / name).exists() or (PROTO / name).read_text() != (Path(folder) / name).read_text()
        ]


def main() -> int:
    """0 if the stubs are written, or up to date; 1 if stale."""
    if "--check" not in sys.argv[1:]:
        generate(PROTO)
        return 0
    stale = stale_stubs()
    if stale:
        print(f"stale stubs, run `make stubs` and commit: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
