"""What a sequence costs that begins like one that was scored before, and what a long one costs its neighbours.

    python benchmarks/teacher_prefix.py [--rounds 5] [--block-size 64] [--only completions,chat,pieces,long]

Through one server on the teacher of the demonstration, `topk` with k = 64, in turn, with tokens drawn anew each time:

- completions: 8 of 40 tokens of one prompt of 600, against 8 sequences as long that share nothing; with a prompt that
  nobody has asked about yet, and with one that is known;
- chat: six turns of 40, 80, 160 or 320 tokens, five of eight scored, turn by turn as they are written, against all at
  once, and what engine and signal head take of either time;
- pieces: 512 tokens in pieces of 32, each sent when the rows of the one before it are there, against the whole;

and on a model of 4 layers with a context of 32,768 tokens:

- long: one sequence of that length; what it takes, what memory server and client take meanwhile, and how long a student
  with sequences of 64 tokens waits with and without it.

A figure is a median over the rounds. Exits with 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto"), str(ROOT / "tests")]

import grpc  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
from packaged_models import PACKAGED, model_folder, tiny_folder  # noqa: E402

from teacher_process import TeacherProcess, running  # noqa: E402
from tutelage.identity import tokenizer_digests, vocabulary_size  # noqa: E402
from tutelage.rpc.v1 import teacher_pb2 as pb  # noqa: E402
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc  # noqa: E402
from tutelage.trainer.data.sequences import TokenSequence  # noqa: E402
from tutelage.trainer.teacher.base import SignalSpec  # noqa: E402
from tutelage.trainer.teacher.grpc_client import TeacherClient  # noqa: E402

SPEC = SignalSpec("topk", k=64, temperatures=(1.0,))
PROMPT, COMPLETIONS, COMPLETION = 600, 8, 40
TURNS, TURN_TOKENS = 6, (40, 80, 160, 320)
PIECE, WHOLE = 32, 512
LONG, SHORT = 32_768, 64
broken: list[str] = []


def report(what: str, value: float, unit: str, kept: bool | None = None, promise: str = "") -> None:
    """Prints a figure beside what is promised, if something is, and remembers a broken promise."""
    verdict = "" if kept is None else "ok" if kept else "NO"
    print(f"{what:<72}{value:10.3f} {unit:<4} {verdict:<3}{promise}", flush=True)
    if kept is False:
        broken.append(what)


class Asker:
    """A student of the server, and tokens that nobody has asked about yet."""

    def __init__(self, server: TeacherProcess, model: Path, student: str) -> None:
        digests = tokenizer_digests(model)
        self.client = TeacherClient(server.address, student_id=student, wait_seconds=600, tokenizer_digests=digests)
        self._channel = grpc.insecure_channel(server.address)
        self._stub = pb_grpc.TeacherServiceStub(self._channel)
        self._vocabulary, self._generator = vocabulary_size(model), np.random.default_rng()

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self.client.close()  # gRPC does not survive that the next server is started by a fork

    def tokens(self, count: int) -> list[int]:
        """Ids at random."""
        return self._generator.integers(3, self._vocabulary, count).tolist()

    def times(self, *sequences: tuple[list[int], int, int]) -> tuple[float, float, float, float]:
        """Seconds of these one after the other; for how many of them engine and head were busy; tokens computed."""
        before = self._usage()
        seconds = sum(map(self.seconds, sequences))
        return seconds, *(after - earlier for after, earlier in zip(self._usage(), before, strict=True))

    def _usage(self) -> tuple[float, float, float]:
        usage = self._stub.GetTeacherUsage(pb.GetTeacherUsageRequest())
        computed = sum(student.computed_tokens for student in usage.students)
        return usage.engine_busy_seconds, usage.head_busy_seconds, computed

    def seconds(self, *sequences: tuple[list[int], int, int]) -> float:
        """How long it takes until the rows [start, end) of all of them are here."""
        asked = [TokenSequence(np.array(ids, dtype=np.int32), start, end) for ids, start, end in sequences]
        started = time.perf_counter()
        answers = self.client.score(asked, SPEC)
        taken = time.perf_counter() - started
        assert [len(answer["logits_RK"]) for answer in answers] == [each.rows for each in asked]
        return taken


def completion(prompt: list[int], end: list[int]) -> tuple[list[int], int, int]:
    """A prompt and a completion of it that is scored as a trainer has it scored."""
    return [*prompt, *end], len(prompt) - 1, len(prompt) + len(end) - 1


def completions(asker: Asker, rounds: int) -> None:
    """Completions of one prompt against sequences that share nothing."""
    taken: dict[str, list[float]] = {"shared, prompt new": [], "shared, prompt known": [], "nothing shared": []}
    for _ in range(rounds):
        prompt = asker.tokens(PROMPT)
        for name in ("shared, prompt new", "shared, prompt known"):
            ends = [asker.tokens(COMPLETION) for _ in range(COMPLETIONS)]
            taken[name].append(asker.seconds(*(completion(prompt, end) for end in ends)))
        apart = [completion(asker.tokens(PROMPT), asker.tokens(COMPLETION)) for _ in range(COMPLETIONS)]
        taken["nothing shared"].append(asker.seconds(*apart))
    title = f"{COMPLETIONS} x {COMPLETION} tokens after {PROMPT}"
    for name, seconds in taken.items():
        report(f"{title}: {name}", statistics.median(seconds), "s")
    for name, promise in (("shared, prompt new", None), ("shared, prompt known", 4.0)):
        ratio = statistics.median(np.divide(taken["nothing shared"], taken[name]))
        kept = None if promise is None else ratio >= promise
        report(f"{title}: times as fast, {name}", ratio, "", kept, "" if promise is None else f">= {promise}")


def chat(asker: Asker, rounds: int) -> None:
    """Conversations scored turn by turn against the same length scored once."""
    for tokens in TURN_TOKENS:
        by_turns, once, length, scored = [], [], TURNS * tokens, tokens * 5 // 8
        for _ in range(rounds):
            ids, other = asker.tokens(length), asker.tokens(length)
            turns = [(ids[:end], end - scored - 1, end - 1) for end in range(tokens, length + 1, tokens)]
            by_turns.append(asker.times(*turns))
            once.append(asker.times((other, tokens - scored - 1, length - 1)))
        for name, times in ((f"{TURNS} turns of {tokens} tokens, turn by turn", by_turns), ("at once", once)):
            for part, values in zip(
                ("", ", engine", ", head", ", computed tokens"), zip(*times, strict=True), strict=True
            ):
                report(f"a chat: {name}{part}", statistics.median(values), "" if "tokens" in part else "s")
        ratio = statistics.median(np.divide([each[0] for each in by_turns], [each[0] for each in once]))
        report(f"{TURNS} turns of {tokens} tokens: turn by turn / at once", ratio, "", ratio <= 1.3, "<= 1.3")


def pieces(asker: Asker, rounds: int) -> None:
    """A sequence scored while it is written: how long after its last piece its last rows are there."""
    lasts, piece_seconds, wholes = [], [], []
    for _ in range(rounds):
        ids, other, scored, taken = asker.tokens(WHOLE), asker.tokens(WHOLE), 0, []
        for length in range(PIECE, WHOLE + 1, PIECE):
            taken.append(asker.seconds((ids[:length], scored, length - 1)))
            scored = length - 1
        lasts.append(taken[-1])
        piece_seconds.append(statistics.median(taken[:-1]))
        wholes.append(asker.seconds((other, 0, WHOLE - 1)))
    report(f"{WHOLE} tokens in pieces of {PIECE}: a piece", statistics.median(piece_seconds), "s")
    report("its last rows after its last piece", statistics.median(lasts), "s")
    report("all rows after its last token, asked for at once", statistics.median(wholes), "s")
    ratio = statistics.median(np.divide(lasts, piece_seconds))
    report("last rows / a piece's time", ratio, "", ratio <= 1.5, "<= 1.5")


@contextmanager
def highest_resident(process: psutil.Process) -> Iterator[list[float]]:
    """The most MiB above the beginning that a process and its children have in memory meanwhile, in a list of one."""
    processes, done, highest = [process, *process.children(recursive=True)], threading.Event(), [0.0]

    def resident() -> float:
        return sum(each.memory_info().rss for each in processes) / 2**20

    before = resident()

    def watch() -> None:
        while not done.wait(0.02):
            highest[0] = max(highest[0], resident() - before)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield highest
    finally:
        done.set()
        watching.join()


def waits(asker: Asker, until: Callable[[], bool]) -> list[float]:
    """How long a student with short sequences waits for each, one after the other."""
    taken = []
    while not until():
        taken.append(1000 * asker.seconds((asker.tokens(SHORT), 0, SHORT - 1)))
    return taken


def long(server: TeacherProcess, student: Asker, neighbour: Asker, rounds: int) -> None:
    """A long sequence, and a short one's wait beside it."""
    waits(neighbour, iter([False] * 20 + [True]).__next__)
    seconds, server_mib, client_mib, alone, beside = [], [], [], [], []
    for _ in range(rounds):
        ids = student.tokens(LONG)
        with (
            highest_resident(psutil.Process(server.process.pid)) as server_highest,
            highest_resident(psutil.Process()) as own,
        ):
            seconds.append(student.seconds((ids, 0, LONG - 1)))
        server_mib.append(server_highest[0])
        client_mib.append(own[0])
        end = time.monotonic() + 3
        alone += waits(neighbour, lambda end=end: time.monotonic() > end)
        asking = threading.Thread(target=student.seconds, args=((student.tokens(LONG), 0, LONG - 1),))
        asking.start()
        beside += waits(neighbour, lambda asking=asking: not asking.is_alive())
        asking.join()
    report(f"a sequence of {LONG:,} tokens, scored whole", statistics.median(seconds), "s")
    report("server: highest resident memory above its own before", max(server_mib), "MiB")
    report(f"client: the same, with its {LONG:,} rows of {8 + 6 * SPEC.k} bytes", max(client_mib), "MiB")
    for name, taken in (("alone", alone), ("beside the long one", beside)):
        report(f"a student with {SHORT} tokens, {name}: median wait", statistics.median(taken), "ms")
        report(f"a student with {SHORT} tokens, {name}: p95", float(np.percentile(taken, 95)), "ms")


def main() -> int:
    """Serves the models one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block-size", help="tokens of a block of the prefix cache")
    parser.add_argument("--only", default="completions,chat,pieces,long")
    options = parser.parse_args()
    model, wanted = model_folder(PACKAGED), options.only.split(",")
    block = ("--block-size", options.block_size) if options.block_size else ()
    with tempfile.TemporaryDirectory() as folder:
        if set(wanted) - {"long"}:
            with (
                running(Path(folder), model, "--max-model-len", "2048", *block) as server,
                Asker(server, model, "prefix") as asker,
            ):
                asker.seconds(*(completion(asker.tokens(100), asker.tokens(50)) for _ in range(8)))
                for name, measure in (("completions", completions), ("chat", chat), ("pieces", pieces)):
                    if name in wanted:
                        measure(asker, options.rounds)
        if "long" in wanted:
            wide = Path(folder) / "wide"
            shutil.copytree(tiny_folder(), wide)
            settings = json.loads((wide / "config.json").read_text())
            (wide / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": LONG}))
            with (
                running(Path(folder) / "long", wide, "--max-model-len", str(LONG), *block) as server,
                Asker(server, wide, "long") as student,
                Asker(server, wide, "short") as neighbour,
            ):
                long(server, student, neighbour, max(1, options.rounds // 2))
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
