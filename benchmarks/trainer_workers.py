"""How much faster does a student step with two workers than with one, and what does each hold? All have the same cores.

    python benchmarks/trainer_workers.py [--steps 4]

The 57M student learns targets of 128 tokens, 16 sequences a step, in bfloat16, on two cores each time: by one worker
with two threads, by two workers with one thread each, and by two that share its weights out. No Ray, no teacher: what
is compared is the step, and by how much the training raises each worker's largest resident set. The first worker's has
its checkpoint in it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as multiprocessing  # noqa: E402
from trainer_speed import BUILD  # noqa: E402

from tutelage.studies.prepare_models import prepare  # noqa: E402
from tutelage.trainer.config.student import StudentConfig  # noqa: E402
from tutelage.trainer.model.process_group import workers_of_process_group  # noqa: E402
from tutelage.trainer.training.loop import train  # noqa: E402

WARM_UP_STEPS, SEQUENCES, TOKENS, CORES = 2, 16, 128, 2


def write_rows(path: Path) -> Path:
    """Texts of at least `TOKENS` tokens."""
    rows = [{"prompt": f"Count on from {i}:", "completion": " ".join(map(str, range(i, i + 100)))} for i in range(64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def student(init: Path, data: Path, steps: int, workers: int, sharding: str) -> StudentConfig:
    """A student that takes no checkpoints but its last."""
    return StudentConfig.model_validate(
        {
            "id": f"workers-{workers}-{sharding}",
            "init": init,
            "data": {"path": data, "template": "plain"},
            "objective": {"name": "sft"},
            "batch": {"sequences": SEQUENCES, "micro_batch_sequences": 8, "max_tokens": TOKENS},
            "held_out": {"sequences": 0},
            "steps": WARM_UP_STEPS + steps,
            "save_every_steps": 1000,
            "workers": workers,
            "sharding": sharding,
            "threads": CORES // workers,
        }
    )


def work(rank: int, config: StudentConfig, folder: Path) -> None:
    """One worker's training."""
    rendezvous = f"file://{folder}-rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=config.workers)
    before = largest_resident_mib()
    train(config, folder=folder, teacher=None, workers=workers_of_process_group())
    Path(f"{folder}-mib-{rank}").write_text(str(largest_resident_mib() - before))
    dist.destroy_process_group()


def largest_resident_mib() -> float:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds_a_step(config: StudentConfig, folder: Path) -> float:
    """Median of the steps after the first ones."""
    multiprocessing.spawn(work, (config, folder), nprocs=config.workers)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["seconds/stepping"] for row in rows[1 + WARM_UP_STEPS :])


def main() -> None:
    """Prints one line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=4, help="steps of which the median counts (default 4)")
    options = parser.parse_args()
    _, init = prepare(BUILD / "models")
    with tempfile.TemporaryDirectory() as temporary:
        data = write_rows(Path(temporary) / "rows.jsonl")
        for workers, sharding in ((1, "none"), (2, "none"), (2, "full")):
            config = student(init, data, options.steps, workers, sharding)
            folder = Path(temporary) / config.id
            seconds = seconds_a_step(config, folder)
            mib = [float(Path(f"{folder}-mib-{rank}").read_text()) for rank in range(workers)]
            print(
                f"{workers} workers × {config.threads} threads, sharding {sharding}: {seconds:.2f} s a step of "
                f"{SEQUENCES}×{TOKENS} tokens, {', '.join(f'{value:.0f}' for value in mib)} MiB"
            )


if __name__ == "__main__":
    main()
