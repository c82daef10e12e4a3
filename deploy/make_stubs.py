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
# Where the stubs are imported from. The .proto files have a folder of their own: their packages are named
# tutelage.teacher.v1 and tutelage.evaluator.v1, and `tutelage.evaluator` is the service's import name.
STUBS = "tutelage/rpc/v1"


def generate(out: Path) -> list[Path]:
    """Writes the stubs of every .proto below `proto/` to `out` and returns their paths relative to it.

    Raises:
        SystemExit: protoc refused a file.

    """
    schemas = sorted((PROTO / "schema").glob("tutelage/*/v1/*.proto"))
    # The plugins of mypy-protobuf lie beside the interpreter.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    flags = [
        f"--{kind}_out={'quiet:' if 'mypy' in kind else ''}{out}"
        for kind in ("python", "grpc_python", "mypy", "mypy_grpc")
    ]
    # NAME=FOLDER: the files of FOLDER count as lying under NAME, which is what the stubs import each other by.
    include = [f"-I{STUBS}={schema.parent}" for schema in schemas]
    if protoc.main(["protoc", *include, *flags, *(f"{STUBS}/{schema.name}" for schema in schemas)]) != 0:
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
