"""How many students does a teacher feed? A small queueing model, fitted on this machine and checked on other loads.

    python benchmarks/scaling.py [--model DIR] [--rounds 3] [--seconds 6] [--times 1]
    python benchmarks/scaling.py --costs 0.05 0.0006 0.0004 --batch-tokens 512 --sequences 64 --tokens 512 --think 10

A student thinks (samples, steps) for so many seconds, asks for so many sequences at once, and thinks again when it has
all of their signals. A teacher computes in passes of up to `max_num_batched_tokens` tokens, a student after the other;
each pass takes `pass_seconds` and `token_seconds` a token. Behind the engine the signal head takes `row_seconds` a
scored position, while the engine computes the next pass. That is all that the model knows.

The first form starts `tutelage teacher serve`, finds the three costs from some loads (FITTED), predicts others
(CHECKED) that the fit has not seen, measures them too, and prints both; it exits with 1 if the tokens a second of one,
and with them the length of a step, are further off than 20 %. Students are threads of the trainer's own client that
sleep instead of thinking, so that they take no core.

The second form starts nothing: from three costs it prints what 1, 2, 4, … students get.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto"), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from packaged_models import PACKAGED, model_folder  # noqa: E402
from scipy.optimize import minimize  # noqa: E402

K = 64
PROMISED = 0.2
CYCLES, WARM_UP_CYCLES = 60, 5
"""Of each simulated student."""
JITTER = 0.2
"""Students think by so much longer or shorter: like clocks that go alike they would all ask at the same moment."""


@dataclass(frozen=True)
class Costs:
    """What a teacher takes; a head that computes on the engine's device has its time in the engine's."""

    pass_seconds: float
    token_seconds: float
    row_seconds: float

    def tokens_a_second(self, batch_tokens: int) -> float:
        """What full passes give when all tokens are scored: the floor of every step is its tokens by this."""
        engine = self.pass_seconds / batch_tokens + self.token_seconds
        return 1 / max(engine, self.row_seconds)


@dataclass(frozen=True)
class Load:
    """Students that are alike."""

    students: int
    sequences: int
    """That each asks for at once."""
    tokens: int
    """Of each sequence."""
    think_seconds: float
    scored: int | None = None
    """Positions that are scored of each sequence; all, unless given."""

    @property
    def rows(self) -> int:
        """Scored positions of a sequence."""
        return self.tokens if self.scored is None else self.scored

    def times(self, factor: int) -> Load:
        """So many times the sequences."""
        return replace(self, sequences=factor * self.sequences)


def thinks(load: Load, generator: np.random.Generator) -> float:
    """Seconds until a student asks again."""
    return load.think_seconds * float(generator.uniform(1 - JITTER, 1 + JITTER))


def begins(load: Load, generator: np.random.Generator) -> float:
    """Seconds until it asks first: anywhere in its thinking."""
    return load.think_seconds * float(generator.uniform())


FITTED = (Load(1, 1, 32, 0), Load(1, 1, 256, 0), Load(1, 8, 64, 0), Load(1, 8, 192, 0), Load(4, 4, 128, 0))
CHECKED = (
    Load(1, 16, 96, 0),
    Load(1, 4, 400, 0.3),
    Load(2, 8, 128, 1),
    Load(3, 8, 96, 0),
    Load(4, 2, 96, 1),
    Load(8, 2, 64, 0.5),
    Load(8, 4, 48, 2),
)


@dataclass
class Work:
    """One sequence on its way through a server."""

    student: int
    tokens_left: int
    rows: int


@dataclass
class Server:
    """One engine, and one head behind it."""

    waiting: dict[int, deque[Work]] = field(default_factory=dict)
    received: dict[int, float] = field(default_factory=dict)
    """Tokens that each student's sequences took so far: who has had least is next."""
    head: deque[Work] = field(default_factory=deque)
    engine_busy: bool = False
    head_busy: bool = False
    outstanding: int = 0
    """Tokens sent here and not yet answered."""


class Simulation:
    """Students and servers as events; times are seconds.

    Args:
        costs: of each server.
        load: what students do.
        batch_tokens: of a pass, at most.
        servers: how many there are, of the same weights.

    """

    def __init__(self, costs: Costs, load: Load, *, batch_tokens: int, servers: int = 1) -> None:
        self._costs, self._load, self._batch_tokens = costs, load, batch_tokens
        self._servers = [Server() for _ in range(servers)]
        self._events: list[tuple[float, int, object]] = []
        self._numbers, self._generator = itertools.count(), np.random.default_rng(0)
        self._open = [0] * load.students
        self._asked = [0.0] * load.students
        self.answered: list[list[tuple[float, float]]] = [[] for _ in range(load.students)]
        """Of each student, of each request of sequences: when it was answered, and how long that took."""

    def run(self) -> Simulation:
        """Until every student has gone round so often."""
        for student in range(self._load.students):
            self._at(begins(self._load, self._generator), lambda now, student=student: self._ask(now, student))
        while min(len(done) for done in self.answered) < CYCLES:
            now, _, happens = heapq.heappop(self._events)
            happens(now)  # type: ignore[operator]
        return self

    def _at(self, when: float, happens: object) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), happens))

    def _ask(self, now: float, student: int) -> None:
        load, self._asked[student], self._open[student] = self._load, now, self._load.sequences
        for _ in range(load.sequences):
            server = min(self._servers, key=lambda each: each.outstanding)
            server.outstanding += load.tokens
            if not server.waiting.get(student):  # what it did not use while it thought is not owed to it
                least = min((server.received[each] for each, queue in server.waiting.items() if queue), default=0.0)
                server.received[student] = max(server.received.get(student, 0.0), least)
            server.waiting.setdefault(student, deque()).append(Work(student, load.tokens, load.rows))
            # At once: the first sequence that comes to an idle engine is computed alone.
            self._start_pass(now, server)

    def _start_pass(self, now: float, server: Server) -> None:
        if server.engine_busy or not any(server.waiting.values()):
            return
        room, done = self._batch_tokens, []
        while room and any(server.waiting.values()):
            student = min((each for each, queue in server.waiting.items() if queue), key=lambda s: server.received[s])
            sequence = server.waiting[student][0]
            taken = min(room, sequence.tokens_left)
            room, sequence.tokens_left = room - taken, sequence.tokens_left - taken
            server.received[student] += taken
            if not sequence.tokens_left:
                done.append(server.waiting[student].popleft())
        server.engine_busy = True
        seconds = self._costs.pass_seconds + self._costs.token_seconds * (self._batch_tokens - room)
        self._at(now + seconds, lambda now: self._end_pass(now, server, done))

    def _end_pass(self, now: float, server: Server, done: Sequence[Work]) -> None:
        server.engine_busy = False
        server.head.extend(done)
        self._start_head(now, server)
        self._start_pass(now, server)

    def _start_head(self, now: float, server: Server) -> None:
        if server.head and not server.head_busy:
            server.head_busy, sequence = True, server.head.popleft()
            self._at(now + self._costs.row_seconds * sequence.rows, lambda now: self._answer(now, server, sequence))

    def _answer(self, now: float, server: Server, sequence: Work) -> None:
        server.head_busy, student = False, sequence.student
        server.outstanding -= self._load.tokens
        self._start_head(now, server)
        self._open[student] -= 1
        if not self._open[student]:
            self.answered[student].append((now, now - self._asked[student]))
            self._at(now + thinks(self._load, self._generator), lambda now: self._ask(now, student))


@dataclass(frozen=True)
class Seen:
    """What a load came to, simulated or measured."""

    tokens_a_second: float
    """Of all students together."""
    answer_seconds: float
    """Median, from asking to having all signals."""


def summary(load: Load, answered: list[list[tuple[float, float]]]) -> Seen:
    """Of the answers of each student (when, after how long), the first ones left out already."""
    tokens = load.sequences * load.tokens
    rates = [tokens * (len(done) - 1) / (done[-1][0] - done[0][0]) for done in answered]
    return Seen(sum(rates), statistics.median(seconds for done in answered for _, seconds in done))


def simulated(costs: Costs, load: Load, *, batch_tokens: int, servers: int = 1) -> Seen:
    """What the model says of a load."""
    answered = Simulation(costs, load, batch_tokens=batch_tokens, servers=servers).run().answered
    return summary(load, [done[WARM_UP_CYCLES:] for done in answered])


def fitted(points: Sequence[tuple[Load, Seen]], batch_tokens: int) -> Costs:
    """The three costs with which the model is nearest to what was measured, by squared logarithms of answer times."""

    def distance(logs: np.ndarray) -> float:
        costs = Costs(*np.exp(logs))
        said = [simulated(costs, load, batch_tokens=batch_tokens).answer_seconds for load, _ in points]
        return sum(math.log(each / seen.answer_seconds) ** 2 for each, (_, seen) in zip(said, points, strict=True))

    # From both sides: one sequence alone tells only the sum of its time in engine and head.
    starts = [np.log([0.02, *costs]) for costs in ((0.001, 0.0001), (0.0001, 0.001))]
    options = {"maxiter": 600, "xatol": 1e-3, "fatol": 1e-6}
    found = min(
        (minimize(distance, start, method="Nelder-Mead", options=options) for start in starts), key=lambda f: f.fun
    )
    return Costs(*(float(cost) for cost in np.exp(found.x)))


def measured(address: str, model: Path, load: Load, seconds: float) -> Seen:
    """What students get of a served teacher; sequences are random and new, so that nothing is cached or stored."""
    from tutelage.identity import tokenizer_digests, vocabulary_size
    from tutelage.trainer.data.sequences import TokenSequence
    from tutelage.trainer.teacher.base import SignalSpec
    from tutelage.trainer.teacher.grpc_client import TeacherClient

    spec = SignalSpec("topk", k=K, temperatures=(1.0,))
    digests, vocabulary = tokenizer_digests(model), vocabulary_size(model)
    answered: list[list[tuple[float, float]]] = [[] for _ in range(load.students)]
    begin = threading.Barrier(load.students)

    def student(number: int) -> None:
        generator, shape = np.random.default_rng(), (load.sequences, load.tokens)
        with TeacherClient(address, student_id=f"s.{number}", wait_seconds=120, tokenizer_digests=digests) as client:
            begin.wait()
            end = time.monotonic() + seconds
            time.sleep(begins(load, generator))
            while time.monotonic() < end or len(answered[number]) < 4:
                rows = generator.integers(3, vocabulary, shape).astype(np.int32)
                asked = time.monotonic()
                client.score([TokenSequence(ids, load.tokens - load.rows, load.tokens) for ids in rows], spec)
                answered[number].append((time.monotonic(), time.monotonic() - asked))
                time.sleep(thinks(load, generator))

    threads = [threading.Thread(target=student, args=(number,)) for number in range(load.students)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return summary(load, [done[1:] for done in answered])


def middle(rounds: Sequence[Seen]) -> Seen:
    """Medians of what rounds saw, so that what else the machine does for a while does not count."""
    return Seen(
        statistics.median(seen.tokens_a_second for seen in rounds),
        statistics.median(seen.answer_seconds for seen in rounds),
    )


def described(load: Load) -> str:
    """For a table."""
    return f"{load.students} × ({load.sequences} × {load.tokens}, thinks {load.think_seconds:g} s)"


def check(options: argparse.Namespace) -> bool:
    """Measures, fits, predicts; whether everything was within the promise."""
    from teacher_process import running

    fitting, checking = ([load.times(options.times) for load in loads] for loads in (FITTED, CHECKED))
    loads = [*fitting, *checking]
    with tempfile.TemporaryDirectory() as folder:
        at_once = str(max(32, *(load.sequences for load in loads)))
        flags = ("--max-model-len", "512", "--max-requests-in-flight", at_once)
        flags += ("--max-num-batched-tokens", str(options.batch_tokens))
        with running(Path(folder), options.model, *flags) as server:
            measured(server.address, options.model, FITTED[0], 1.0)  # warms up
            rounds = [
                {load: measured(server.address, options.model, load, options.seconds) for load in loads}
                for _ in range(options.rounds)
            ]
    seen = {load: middle([each[load] for each in rounds]) for load in loads}
    costs = fitted([(load, seen[load]) for load in fitting], options.batch_tokens)
    print(f"{1000 * costs.pass_seconds:.1f} ms a pass, {1000 * costs.token_seconds:.3f} ms a token, "
          f"{1000 * costs.row_seconds:.3f} ms a row; "
          f"at most {costs.tokens_a_second(options.batch_tokens):.0f} tokens a second"
          )  # fmt: skip
    print(f"{'load':<34}{'':<9}{'tokens a second':>26}{'seconds of an answer':>30}")
    worst = 0.0
    for load in loads:
        said, got = simulated(costs, load, batch_tokens=options.batch_tokens), seen[load]
        off = [said.tokens_a_second / got.tokens_a_second - 1, said.answer_seconds / got.answer_seconds - 1]
        if load in checking:
            worst = max(worst, abs(off[0]))
        print(f"{described(load):<34}{'checked' if load in checking else 'fitted':<9}"
              f"{said.tokens_a_second:10.0f}{got.tokens_a_second:8.0f} {100 * off[0]:+6.0f} %"
              f"{said.answer_seconds:13.3f}{got.answer_seconds:8.3f} {100 * off[1]:+6.0f} %")  # fmt: skip
    print(f"tokens a second, furthest of the checked: {100 * worst:.0f} %, promised {100 * PROMISED:.0f} %")
    return worst <= PROMISED


def plan(options: argparse.Namespace) -> None:
    """What students get of a teacher with these costs."""
    costs = Costs(*options.costs)
    ceiling = options.servers * costs.tokens_a_second(options.batch_tokens)
    print(f"at most {ceiling:,.0f} tokens a second")
    for students in (1, 2, 4, 8, 16, 32, 64):
        load = Load(students, options.sequences, options.tokens, options.think, options.scored)
        seen = simulated(costs, load, batch_tokens=options.batch_tokens, servers=options.servers)
        step = seen.answer_seconds + options.think
        print(f"{students:3} students: {seen.tokens_a_second:10,.0f} tokens a second, "
              f"{seen.tokens_a_second / ceiling:4.0%} of that; a step of {step:.2f} s, "
              f"{seen.answer_seconds / step:.0%} of it for the teacher")  # fmt: skip


def main() -> int:
    """Either of the two forms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_folder, default=PACKAGED)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="through all loads, of which medians are taken")
    parser.add_argument("--batch-tokens", type=int, default=512, help="max_num_batched_tokens (%(default)s)")
    parser.add_argument("--costs", type=float, nargs=3, metavar=("PASS", "TOKEN", "ROW"), help="seconds: only predicts")
    parser.add_argument("--times", type=int, default=1, help="so many times the sequences of each load: for a GPU")
    parser.add_argument("--servers", type=int, default=1, help="of the second form (%(default)s)")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--scored", type=int, help="positions of each sequence; all unless given")
    parser.add_argument("--think", type=float, default=10.0, help="seconds of sampling and stepping (%(default)s)")
    options = parser.parse_args()
    if options.costs:
        plan(options)
        return 0
    return not check(options)


if __name__ == "__main__":
    sys.exit(main())
