"""A picture of Ray's dashboard when a node has joined a run that waited for room, as docs/ray.md shows it.

    python benchmarks/dashboard_joined_node.py [--out build/pictures]

Hosts are network namespaces, so it runs as root: a teacher, Ray's head, and a node with room for two of four students.
When two wait, a node joins; when all train, Chromium (`chromium` on the PATH) takes the picture on the head's host.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto"), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from sites import DASHBOARD_PORT, Site, site  # noqa: E402
from tiny import write_tiny_model  # noqa: E402
from tutelage.files import make_directory_once  # noqa: E402
from tutelage.runtime.programs import tutelage  # noqa: E402

BUILD = Path(os.environ.get("TUTELAGE_BUILD_DIR", ROOT / "build"))
STUDENTS = ("ann", "bob", "cid", "dan")
DASHBOARD = f"http://127.0.0.1:{DASHBOARD_PORT}"
# Cookies are a host's, not a port's: this page leaves the dashboard's token in the browser and sends it on.
ENTRANCE = """
import http.server, sys
class Entrance(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(302)
        self.send_header("Set-Cookie", f"ray-authentication-token={open(sys.argv[1]).read().strip()}; Path=/")
        self.send_header("Location", sys.argv[2])
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", 8000), Entrance).serve_forever()
"""


def take(here: Site, page: str, path: Path, height: int) -> None:
    """A picture of one of the dashboard's pages."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--window-size=1400,{height}", "--virtual-time-budget=20000", f"--screenshot={path}"]
    chromium = here.start("head", "chromium", [*command, f"http://127.0.0.1:8000/{page}"])
    here.wait_until(f"{path}", lambda: chromium.poll() is not None, 120)


def main() -> None:
    """Takes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BUILD / "pictures")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    model = make_directory_once(BUILD / "models" / "tiny", write_tiny_model)
    with (
        tempfile.TemporaryDirectory(prefix="tutelage-") as name,
        site(Path(name), model, "teacher", "head", "first", "joined") as here,
    ):
        serves = here.start_teacher("teacher")
        here.start_ray("head")
        here.start_ray("first", cpus=2)
        here.wait_until("the teacher", serves, 300)
        cohort = here.cohort(STUDENTS, ("teacher",), 100_000)
        flags = ["--submit", DASHBOARD, "--submit-token", str(here.folder / "ray.token")]
        here.start("head", "submit", tutelage("train", "--config", str(cohort), *flags))
        here.wait_until("two train", lambda: sum(step >= 5 for step in here.steps_done(STUDENTS)) == 2, 120)
        here.start("head", "entrance", [sys.executable, "-c", ENTRANCE, str(here.folder / "ray.token"), DASHBOARD])
        here.start_ray("joined", cpus=2)
        here.wait_until("all train", lambda: min(here.steps_done(STUDENTS)) >= 5, 120)
        take(here, "#/actors", out / "dashboard-joined-actors.png", 860)
        take(here, "#/cluster", out / "dashboard-joined-nodes.png", 640)


if __name__ == "__main__":
    main()
