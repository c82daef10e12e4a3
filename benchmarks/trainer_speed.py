"""How long does an on-policy step take, against TRL's `DistillationTrainer`? Same work, same two cores, in one run.

    python benchmarks/trainer_speed.py [--rounds 8] [--trl-dtype bfloat16] [--profile]
    python benchmarks/trainer_speed.py --staleness 1 --writer-threads 1
    python benchmarks/trainer_speed.py --prompt-tokens 512 --completions 8 --new-tokens 128

Work: the packaged teacher (135M) and its 8-layer student (57M), every sequence written by the student, batch 8, 64 new
tokens, GKD with β = 0.5 over the whole vocabulary, full fine-tuning. Ours: the teacher in `tutelage teacher serve`,
asked for `hidden` over gRPC, and the student in this process: bfloat16 with float32 weights in the optimizer. TRL
1.16.0: both models in its process, bfloat16 throughout by default, which is its fastest (its own default, float32
weights, is `--trl-dtype float32`), without activation checkpointing. All processes are bound to the same cores, as many
as `--threads`, the teacher's included; the sides take steps in turn. Prompts are the same in the same order; with
`--completions` both sides continue each of them so often in a step.

With `--staleness` batches are written ahead, and with `--writer-threads` by a writer on a local Ray while the student
steps. The sides then take three steps in a row, and ours has taken them when all that it began ahead is written and
scored: nothing of it is done in the other's time.

Also prints the floor: what the arithmetic and the reading of weights of a step take at the rates that the same cores
reach on plain matrix products.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from trl_environment import trl  # noqa: E402

from tutelage.identity import tokenizer_digests, vocabulary_size  # noqa: E402
from tutelage.runtime.processes import running, wait_for_file  # noqa: E402
from tutelage.studies.prepare_models import prepare  # noqa: E402
from tutelage.trainer.cluster.supervisor import local_or_connected_ray  # noqa: E402
from tutelage.trainer.config.run import CohortConfig  # noqa: E402
from tutelage.trainer.config.student import StudentConfig  # noqa: E402
from tutelage.trainer.data.dataset import TokenizedExample, read_dataset  # noqa: E402
from tutelage.trainer.model.student import Student  # noqa: E402
from tutelage.trainer.teacher.grpc_client import TeacherClient  # noqa: E402
from tutelage.trainer.teacher.to_tensors import unembedding_of  # noqa: E402
from tutelage.trainer.training.batch_builder import BatchBuilder  # noqa: E402
from tutelage.trainer.training.step import TrainStep  # noqa: E402

BUILD = Path(os.environ.get("TUTELAGE_BUILD_DIR", ROOT / "build"))
TUTELAGE = (sys.executable, "-c", "import sys; from tutelage.cli import main; sys.exit(main())")
BATCH, NEW_TOKENS = 8, 64
PHASES = ("sampling", "scoring", "stepping")
WARM_UP_ROUNDS = 2
STEPS_IN_A_ROW = 3


def write_prompts(path: Path, count: int, *, more_tokens: int = 0, times: int = 1) -> Path:
    """Word problems of 40 to 60 tokens, with the chat template's, after so many more, each so many times."""
    names, things = ("Ann", "Bob", "Mona", "Samir"), ("apples", "stones", "marbles", "shells")
    rows = [
        f"{names[i % 4]} has {13 + i} {things[i // 4 % 4]} and gets {2 + i % 9} more from {names[(i + 1) % 4]}. "
        f"Half of them are lost on the way home. How many {things[i // 4 % 4]} are left?"
        for i in range(count)
    ]
    before = "She counts. " * (more_tokens // 3)  # of three tokens
    path.write_text("".join(f"{json.dumps({'prompt': before + row})}\n" * times for row in rows))
    return path


@contextmanager
def served_teacher(
    model: Path, folder: Path, *more: str, command: Sequence[str] = TUTELAGE
) -> Iterator[tuple[str, int]]:
    """The real server on a free port; gives its address and its process id."""
    address, log = folder / "address", folder / "teacher.log"
    options = ["--model", str(model), "--roles", "score", "--port", "0", *more]
    environment = {"PYTHONPATH": str(ROOT / "proto")}
    serve = [*command, "teacher", "serve", *options, "--address-file", str(address)]
    with running(serve, log=log, environment=environment) as process:
        yield wait_for_file(address, process, log=log, seconds=300), process.pid


class EndlessStudent(Student):
    """No token ends a sequence, so that every batch is of the same length."""

    @property
    def end_ids(self) -> frozenset[int]:
        """None."""
        return frozenset()


def config_of(options: argparse.Namespace, student: Path, prompts: Path, **changes: Any) -> StudentConfig:
    """Of a student that writes all of its sequences."""
    return StudentConfig.model_validate(
        {
            "id": "speed",
            "init": student,
            "data": {"path": prompts},
            "objective": {"name": "gkd", "beta": 0.5, "on_policy_fraction": 1.0, "signal": "hidden"},
            "sampling": {"max_new_tokens": NEW_TOKENS},
            "batch": {"sequences": BATCH, "micro_batch_sequences": BATCH, "max_tokens": 1024},
            "optimizer": {"learning_rate": 1e-6},
            "threads": options.student_threads,
            **changes,
        }
    )


class Ours:
    """A student of the served teacher, one step at a time.

    Args:
        options: of the command.
        student: its model.
        prompts: its data.
        address: the teacher's.
        kind: of student.
        changes: settings that differ.

    """

    def __init__(
        self,
        options: argparse.Namespace,
        student: Path,
        prompts: Path,
        address: str,
        kind: type[Student] = Student,
        **changes: Any,
    ) -> None:
        config = config_of(options, student, prompts, **changes)
        torch.set_num_threads(config.threads)
        size = vocabulary_size(student)
        self.student = kind(student, dtype=config.dtype, optimizer=config.optimizer, vocabulary_size=size)
        self.examples: list[TokenizedExample] = read_dataset(
            prompts, self.student.tokenizer, template="chat", max_tokens=config.batch.max_tokens
        ).examples
        digests = tokenizer_digests(student)
        self.teacher = TeacherClient(address, student_id="speed", wait_seconds=60, tokenizer_digests=digests)
        unembedding = unembedding_of(self.teacher.unembedding(), self.student.device)
        self.batches = BatchBuilder(config, self.student, self.teacher, {None: unembedding})
        self.batches.take_weights(0)
        self._train_step = TrainStep(config, self.student, self.batches)
        self._steps, self._size = 0, config.prompts_per_step

    def steps(self, count: int) -> dict[str, float]:
        """The mean of so many steps, in whose `seconds` all that they began ahead was done."""
        started = time.perf_counter()
        taken = [self.step() for _ in range(count)]
        for pending in self.batches._pending.values():
            pending.of_own.result().result()
        seconds = (time.perf_counter() - started) / count
        return {name: statistics.fmean(each[name] for each in taken) for name in taken[0]} | {"seconds": seconds}

    def step(self) -> dict[str, float]:
        """One optimizer step: its metrics, and `seconds` of wall clock."""
        started = time.perf_counter()
        metrics = self._train_step.train_step(self._steps, self._examples_of, lambda _phase: None)
        self._steps += 1
        return metrics | {"seconds": time.perf_counter() - started}

    def _examples_of(self, step: int) -> list[TokenizedExample]:
        start = step * self._size % len(self.examples)
        return self.examples[start : start + self._size]


def best_seconds(rounds: int, work: object) -> float:
    """Shortest of some calls."""
    assert callable(work)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@torch.no_grad()
def floor_seconds(ours: Ours, teacher_layers: int, options: argparse.Namespace) -> dict[str, float]:
    """What a step's matrix products take at the best rates seen on plain ones, by phase."""
    torch.set_num_threads(options.threads)
    left, right = torch.randn(1024, 1536).bfloat16(), torch.randn(1536, 1536).bfloat16()
    flops_a_second = 2 * 1024 * 1536 * 1536 / best_seconds(20, lambda: left @ right)
    weights, few = torch.randn(64 * 2**20 // 1024, 1024).bfloat16(), torch.randn(1024, BATCH).bfloat16()
    bytes_a_second = weights.nbytes / best_seconds(10, lambda: weights @ few)
    config, head = ours.student.model.config, ours.student.head().matrix_VD.numel()
    layers = ours.student.parameters_count - head
    prompt_tokens = sum(len(example.prompt_ids) for example in ours.examples) / len(ours.examples)
    rows = BATCH * options.new_tokens
    tokens, scored = BATCH * prompt_tokens + rows, BATCH / options.completions * prompt_tokens + rows
    teacher = layers / config.num_hidden_layers * teacher_layers
    print(f"\nrates: {flops_a_second / 1e9:.0f} GFLOP/s, weights read at {bytes_a_second / 1e9:.1f} GB/s")
    return {
        "sampling": options.new_tokens * 2 * (layers + head) / bytes_a_second,
        "scoring": 2 * teacher * scored / flops_a_second,
        # Forward once and backward twice through the layers; four products with a head: the student's logits, the
        # teacher's, and two gradients.
        "stepping": (6 * layers * tokens + 4 * 2 * head * rows) / flops_a_second,
    }


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Steps in turn, then the table."""
    teacher, student = prepare(BUILD / "models")
    teacher_layers = json.loads((teacher / "config.json").read_text())["num_hidden_layers"]
    more = max(0, options.prompt_tokens - 55)
    prompts = write_prompts(folder / "prompts.jsonl", BATCH * 64, more_tokens=more)
    repeated = write_prompts(folder / "repeated.jsonl", BATCH * 64, more_tokens=more, times=options.completions)
    cores = sorted(os.sched_getaffinity(0))[: options.teacher_threads]
    engines = ("--score-cores", ",".join(map(str, cores)), "--score-engines", str(options.teacher_engines))
    flags = ["--teacher", str(teacher), "--student", str(student), "--prompts", str(repeated), "--dtype"]
    flags += [options.trl_dtype, "--new-tokens", str(options.new_tokens), "--batch", str(BATCH)]
    sampling: dict[str, Any] = {
        "max_new_tokens": options.new_tokens,
        "completions": options.completions,
        "max_staleness": options.staleness,
    }
    with ExitStack() as stack:
        if options.writer_threads:
            sampling |= {"writers": {"threads": options.writer_threads}}
            students = (config_of(options, student, prompts, sampling=sampling),)
            stack.enter_context(local_or_connected_ray(CohortConfig(output=folder, students=students)))
        theirs = stack.enter_context(trl(*flags, threads=options.threads))
        address, _ = stack.enter_context(served_teacher(teacher, folder, *engines))
        ours = Ours(options, student, prompts, address, sampling=sampling)
        stack.callback(ours.batches.close)
        rounds, in_a_row = [], STEPS_IN_A_ROW if options.staleness else 1
        for number in range(WARM_UP_ROUNDS + options.rounds):
            their_seconds = statistics.fmean(theirs.step()["seconds"] for _ in range(in_a_row))
            mine = ours.steps(in_a_row)
            warm_up = number < WARM_UP_ROUNDS
            phases = ", ".join(f"{phase} {mine[f'seconds/{phase}']:.2f}" for phase in PHASES)
            tokens = f"{mine['train/tokens']:.0f} tokens"
            print(
                f"{'warm-up' if warm_up else 'round'}: TRL {their_seconds:.2f} s, ours {mine['seconds']:.2f} s "
                f"({phases}; {tokens})",
                flush=True,
            )
            if not warm_up:
                rounds.append((their_seconds, mine))
        if options.profile:
            profile(ours)
        report(rounds, floor_seconds(ours, teacher_layers, options))


def report(rounds: list[tuple[float, dict[str, float]]], floor: dict[str, float]) -> None:
    """Medians, the ratio, and how far from the floor each phase is."""
    theirs = statistics.median(seconds for seconds, _ in rounds)
    ours = statistics.median(mine["seconds"] for _, mine in rounds)
    print("\n| | seconds a step (median) | floor |\n|---|---|---|")
    print(f"| TRL 1.16.0 | {theirs:.2f} | |")
    print(f"| ours | {ours:.2f} | {sum(floor.values()):.2f} |")
    for phase in PHASES:
        median = statistics.median(mine[f"seconds/{phase}"] for _, mine in rounds)
        print(f"| ours: {phase} | {median:.2f} | {floor[phase]:.2f} |")
    print(f"\nours / TRL: {ours / theirs:.2f}")


def profile(ours: Ours) -> None:
    """Where the time of one of our steps goes, in this process."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CPU]) as profiled:
        ours.step()
    print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=24, max_name_column_width=50))


def main() -> None:
    """Prints seconds a step of both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=55, help="about how long a prompt is, at least 40")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--completions", type=int, default=1, help="of each prompt in a batch of 8")
    parser.add_argument("--threads", type=int, default=2, help="cores that everything runs on, and TRL's threads")
    parser.add_argument("--student-threads", type=int, default=2, help="ours; the teacher is idle when it works")
    parser.add_argument("--teacher-threads", type=int, default=2, help="ours; the student is idle when it works")
    parser.add_argument("--teacher-engines", type=int, default=2, help="ours; they share those threads")
    parser.add_argument("--staleness", type=int, default=0, help="ours: sampling.max_staleness")
    parser.add_argument(
        "--writer-threads", type=int, default=0, help="ours: of a writer on Ray; 0 writes in the process"
    )
    parser.add_argument("--trl-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--profile", action="store_true", help="also where the time of one of our steps goes")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


if __name__ == "__main__":
    main()
