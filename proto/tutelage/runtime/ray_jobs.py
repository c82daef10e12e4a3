"""Ray's job API, by which commands hand themselves to a cluster: HTTP of its dashboard, for which Ray is not needed."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import urllib.error
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any

from tutelage.config import user_path
from tutelage.errors import ConfigurationError, NotAuthenticated, TutelageError, Unreachable, one_line
from tutelage.runtime.programs import tutelage

_TIMEOUT_SECONDS = 60.0


def add_submit_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--submit` and `--submit-token`; `submit` takes what they say."""
    parser.add_argument("--submit", metavar="ADDRESS", help="of a Ray dashboard: run there, as one job")
    text = "file with the token that the dashboard asks for; by default what Ray's RAY_AUTH_TOKEN_PATH names"
    parser.add_argument("--submit-token", type=user_path, metavar="FILE", help=text)


def submit(address: str, token_file: Path | None, name: str, arguments: list[str]) -> str:
    """Runs a command of ours as one job of a cluster, in this folder and with these paths; gives the job's id.

    Args:
        address: of the dashboard, http://host:port; without a scheme it is http.
        token_file: as `ask`.
        name: what the job's id begins with.
        arguments: the command line after `tutelage`.

    Raises:
        TutelageError: as `ask`.

    """
    variables = {key: os.environ[key] for key in ("PYTHONPATH",) if key in os.environ}
    body = {
        "entrypoint": f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(tutelage(*arguments))}",
        "submission_id": f"{name}-{datetime.now():%Y%m%d-%H%M%S}",
        "runtime_env": {"env_vars": variables},
    }
    return str(ask(address, "/api/jobs/", token_file, body)["submission_id"])


def ask(address: str, path: str, token_file: Path | None = None, body: dict[str, Any] | None = None) -> Any:
    """What the dashboard answers.

    Args:
        address: as `submit`.
        path: of what is asked for.
        token_file: with the token; none means what RAY_AUTH_TOKEN_PATH names, Ray's own variable, or no token.
        body: is posted, as JSON; without one it is a GET.

    Raises:
        ConfigurationError: the token's file cannot be read, or the address is none.
        NotAuthenticated: the token is missing or wrong.
        Unreachable: nobody answers.
        TutelageError: the cluster refuses; its reason is in the message.

    """
    url = (address if "://" in address else f"http://{address}").rstrip("/") + path
    if not url.startswith(("http://", "https://")):
        raise ConfigurationError(f"{address!r} is no address of a dashboard; give http://HOST:PORT", "submit")
    named = token_file or os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        headers = {"Authorization": f"Bearer {Path(named).read_text().strip()}"} if named else {}
    except OSError as error:
        raise ConfigurationError(f"cannot read {named}: {error.strerror}", "submit_token") from error
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={**headers, "Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = one_line(error.read().decode(errors="replace"))
        if error.code in (401, 403):
            what = "another token is asked for" if named else "a token is asked for"
            raise NotAuthenticated(f"{address}: {what}; give its file by --submit-token", "submit_token") from error
        raise TutelageError(f"{address} refuses ({error.code}): {said}", "submit") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise Unreachable(f"no dashboard answers at {address}: {reason}; is Ray up there?", "submit") from error
