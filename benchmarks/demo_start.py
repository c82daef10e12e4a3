"""How long the demonstration takes until its services are healthy: this code against that of another commit, in turn.

    python benchmarks/demo_start.py [--before COMMIT] [--teacher MODEL] [--pairs 3]

Without a commit it is the last one before `tutelage up`, when the demonstration started its services by itself.

Each start is ended with Ctrl-C as soon as it is said that students begin. Prints the seconds of each, also those of
processors in all of its processes, which other work on the machine moves less, and the medians of the ratios of the
pairs. What starts takes most of it: imports, vLLM, and the check of the teacher.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from packaged_models import PACKAGED, model_folder

ROOT = Path(__file__).resolve().parents[1]
BUILD = Path(os.environ.get("TUTELAGE_BUILD_DIR", ROOT / "build"))
GIT = ("git", "-C", str(ROOT))
HEALTHY = "training two students"


def seconds_until_healthy(tree: Path, teacher: Path, runs: Path) -> tuple[float, float]:
    """Of one demonstration, which is then interrupted: seconds, and those of processors.

    Raises:
        SystemExit: it ended before its services were healthy.

    """
    own = {"PYTHONPATH": str(tree / "proto"), "TUTELAGE_BUILD_DIR": str(BUILD), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tree / "deploy" / "demo.py"), "--teacher", str(teacher), "--runs", str(runs)]
    began = time.monotonic()
    demo = subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert demo.stdout is not None
    said = []
    for line in demo.stdout:
        said.append(line)
        if HEALTHY in line:
            seconds = time.monotonic() - began
            top = psutil.Process(demo.pid)
            # Of those that have ended too, once somebody has waited for them.
            worked = sum(sum(each.cpu_times()[:4]) for each in (top, *top.children(recursive=True)))
            demo.send_signal(signal.SIGINT)
            demo.communicate()
            return seconds, worked
    raise SystemExit("".join(said))


def main() -> None:
    """Prints the seconds of every start, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="a commit")
    parser.add_argument("--teacher", type=model_folder, default=PACKAGED)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    added = [*GIT, "log", "--diff-filter=A", "--format=%H^", "--", "proto/tutelage/up/cli.py"]
    before = options.before or subprocess.run(added, check=True, capture_output=True, text=True).stdout.split()[-1]
    with tempfile.TemporaryDirectory(prefix="tutelage-") as name:
        folder = Path(name)
        subprocess.run([*GIT, "worktree", "add", "--quiet", "--detach", str(folder / "before"), before], check=True)
        try:
            pairs = []
            for number in range(options.pairs):
                trees = {"before": folder / "before", "now": ROOT}
                order = list(trees) if number % 2 == 0 else list(reversed(trees))
                took = {each: seconds_until_healthy(trees[each], options.teacher, folder / "runs") for each in order}
                pairs.append([now / before for now, before in zip(took["now"], took["before"], strict=True)])
                for which, (seconds, worked) in took.items():
                    print(f"{which}: {seconds:.1f} s, {worked:.1f} s of processors", flush=True)
        finally:
            subprocess.run([*GIT, "worktree", "remove", "--force", str(folder / "before")], check=True)
    seconds, worked = map(statistics.median, zip(*pairs, strict=True))
    print(f"now / before, medians: {seconds:.3f}, of processors {worked:.3f}")


if __name__ == "__main__":
    main()
