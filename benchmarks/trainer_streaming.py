"""What does it bring that the teacher scores while the student writes? Seconds a step with and without.

    python benchmarks/trainer_streaming.py [--rounds 6] [--sequences 4] [--new-tokens 384] [--shared]

The packaged 8-layer student writes all of its sequences and learns with GKD, strictly on-policy. Its teacher, served by
the real server, is made as slow as the writing (`slow_teacher.py`): so many seconds for each token that it computes,
one sequence after the other, that a batch which is asked for when it is written takes as long as the writing did. That
costs no processor time, as if the teacher were elsewhere; the student has all cores but the one of the engine.

Two students that differ in their seed alone take steps in turn, one with `sampling.stream: true`, one with `false`; of
one seed, the second would ask for what the first has left in the teacher's cache. No sequence ends early. `scoring` is
how long a step stood still for the teacher after the last token was written. Before that, the same two are compared
with the teacher at its own speed; with `--shared` only so, teacher and student both on all cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from trainer_speed import BUILD, PHASES, EndlessStudent, Ours, prepare, served_teacher, write_prompts

SLOW_TEACHER = (sys.executable, str(Path(__file__).with_name("slow_teacher.py")))
SIDES = {"afterwards": False, "meanwhile": True}
Steps = dict[str, list[dict[str, float]]]


def take_steps(sides: dict[str, Ours], rounds: int) -> Steps:
    """Steps in turn; the first round warms up and does not count."""
    steps: Steps = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            step = side.step()
            phases = ", ".join(f"{phase} {step[f'seconds/{phase}']:.2f}" for phase in PHASES)
            print(f"{name}: {step['seconds']:.2f} s ({phases}; loss {step['train/loss']:.5f})", flush=True)
            if number:
                steps[name].append(step)
    return steps


def compare(options: argparse.Namespace, folder: Path) -> None:
    """At the teacher's own speed, then at the writing's."""
    teacher, student = prepare(BUILD / "models")
    prompts = write_prompts(folder / "prompts.jsonl", options.sequences * 32)
    slow = folder / "seconds-a-token"
    slow.write_text("0")
    os.environ["SECONDS_A_TOKEN_FILE"] = str(slow)
    cores = sorted(os.sched_getaffinity(0))
    engines = ",".join(map(str, cores if options.shared else cores[:1]))
    with served_teacher(teacher, folder, "--score-cores", engines, command=SLOW_TEACHER) as (address, _):
        os.sched_setaffinity(0, cores if options.shared else cores[1:])
        batch = {"sequences": options.sequences, "micro_batch_sequences": options.sequences, "max_tokens": 1024}
        sides = {}
        for seed, (name, stream) in enumerate(SIDES.items()):
            own = {"sampling": {"max_new_tokens": options.new_tokens, "stream": stream}, "seed": seed}
            sides[name] = Ours(options, student, prompts, address, EndlessStudent, batch=batch, **own)
        quick = take_steps(sides, options.rounds if options.shared else 1)
        report("the teacher's own speed", quick)
        if options.shared:
            return
        writing = statistics.median(step["seconds/sampling"] for step in quick["afterwards"])
        tokens = sum(len(example.prompt_ids) for example in sides["afterwards"].examples[: options.sequences])
        slow.write_text(repr(writing / (tokens + options.sequences * options.new_tokens)))
        report("as slow as the writing", take_steps(sides, options.rounds))


def report(title: str, steps: Steps) -> None:
    """Medians by phase, and the ratio."""
    print(f"\n| {title}: scored | seconds a step (median) | sampling | scoring | stepping |\n|---|---|---|---|---|")
    for name, each in steps.items():
        columns = ["seconds", *(f"seconds/{phase}" for phase in PHASES)]
        medians = [statistics.median(step[column] for step in each) for column in columns]
        print(f"| {name} | " + " | ".join(f"{median:.2f}" for median in medians) + " |")
    slower = [step["seconds/scoring"] / step["seconds/sampling"] for step in steps["afterwards"]]
    print(f"\nscoring afterwards takes {statistics.median(slower):.2f} of the time that the writing takes")
    both = zip(steps["meanwhile"], steps["afterwards"], strict=True)
    ratios = [one["seconds"] / other["seconds"] for one, other in both]
    print(f"meanwhile / afterwards: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})\n")


def main() -> None:
    """Prints seconds a step of both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--sequences", type=int, default=4, help="of a batch")
    parser.add_argument("--new-tokens", type=int, default=384)
    parser.add_argument("--student-threads", type=int, default=1)
    parser.add_argument("--shared", action="store_true", help="teacher and student on the same cores")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


if __name__ == "__main__":
    main()
