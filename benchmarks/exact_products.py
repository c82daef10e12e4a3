"""What do float32 sums of bfloat16 factors cost a step, and what of the gradient? Before and after, in turn.

    python benchmarks/exact_products.py [--rounds 8] [--dtype bfloat16 float32]

Before: logits of the teacher's hidden states (and of a bfloat16 student's) were products in bfloat16, which rounds one
of 40 by up to 0.125. The gradient: the packaged teacher (135M) in bfloat16, a student that is the same model in float32
with noise on its weights, at a mean KL of 0.012 nats; its relative error at the student's hidden states and head
against float64 from the same states. The step: that of `trainer_speed.py` (served teacher, 8-layer student,
`hidden`, on-policy GKD, batch 8, 64 new tokens), on two cores; medians of the ratio of each two steps in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from trainer_speed import BATCH, BUILD, Ours, served_teacher, write_prompts  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from tutelage.studies.prepare_models import prepare  # noqa: E402
from tutelage.trainer.losses.losses import token_divergence  # noqa: E402
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution  # noqa: E402
from tutelage.trainer.teacher.rows import HiddenRows, Unembedding  # noqa: E402

KL = 0.012
OBJECTIVES = ("forward_kl", "reverse_kl", "gkd")
TEXT = "The sun rises in the east, and a train that leaves at noon with {} people stops after {} minutes. Then "


@contextmanager
def rounded_products() -> Iterator[None]:
    """Products as they were: in the matrix's dtype."""
    product, finish = Unembedding.product, Unembedding.finish
    Unembedding.product = lambda self, hidden_ND: hidden_ND.to(self.matrix_VD.dtype) @ self.matrix_VD.T  # type: ignore[method-assign]
    Unembedding.finish = lambda self, product_NV: finish(self, product_NV.float())  # type: ignore[method-assign]
    try:
        yield
    finally:
        Unembedding.product, Unembedding.finish = product, finish  # type: ignore[method-assign]


class NearStudent:
    """A teacher's rows, and the same model in float32 with noise on its weights on the same text."""

    def __init__(self, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer.encode(TEXT.format(7 + i, 3 * i), return_tensors="pt") for i in range(8)]
        teacher: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.student: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            states_ND = torch.cat([teacher.model(each).last_hidden_state[0] for each in ids])
        rows = torch.arange(len(states_ND))
        self.teacher = HiddenRows(states_ND, rows, rows, Unembedding(teacher.lm_head.weight.detach()))
        self._ids = ids
        self.hidden_ND, self.kl = self._at_kl()

    @torch.no_grad()
    def _at_kl(self) -> tuple[Tensor, float]:
        """Hidden states with the noise that brings the mean forward KL to `KL`, by bisection."""
        weights = [p for p in self.student.model.layers.parameters() if p.ndim == 2]
        originals = [weight.clone() for weight in weights]
        generator = torch.Generator().manual_seed(0)
        noises = [torch.randn(weight.shape, generator=generator) * weight.std() for weight in weights]
        low, high = 0.0, 0.2
        for _ in range(12):
            size = (low + high) / 2
            for weight, original, noise in zip(weights, originals, noises, strict=True):
                weight.copy_(original).add_(noise, alpha=size)
            hidden_ND = torch.cat([self.student.model(each).last_hidden_state[0] for each in self._ids])
            kl = float(value_of(hidden_ND, self.head(torch.float32), self.teacher, "forward_kl").mean())
            low, high = (size, high) if kl < KL else (low, size)
        return hidden_ND, kl

    def head(self, dtype: torch.dtype) -> Unembedding:
        """The student's, of its own."""
        return Unembedding(self.student.lm_head.weight.detach().to(dtype, copy=True))

    def gradients(self, objective: str, dtype: torch.dtype) -> list[Tensor]:
        """Of the mean at hidden states and head, in float64."""
        teacher = self.teacher
        if dtype == torch.float64:
            exact_head = Unembedding(teacher.unembedding.matrix_VD.double())
            teacher = HiddenRows(teacher.hidden_ND.double(), teacher.sequence_digest_N, teacher.position_N, exact_head)
        hidden_ND, head = self.hidden_ND.to(dtype, copy=True).requires_grad_(), self.head(dtype)
        head.matrix_VD.requires_grad_()
        value_N = value_of(hidden_ND, head, teacher, objective)
        return [each.double() for each in torch.autograd.grad(value_N.mean(), [hidden_ND, head.matrix_VD])]


def value_of(hidden_ND: Tensor, head: Unembedding, teacher: HiddenRows, objective: str) -> Tensor:
    """The divergence per row."""
    return token_divergence(hidden_ND, head, teacher, objective=objective, distribution=TeacherDistribution())


def gradient_errors(model: Path) -> None:
    """Prints the errors before and after."""
    near = NearStudent(model)
    largest = float(near.teacher.unembedding.logits(near.teacher.hidden_ND).abs().max())
    print(f"{len(near.hidden_ND)} rows, logits up to {largest:.0f}, mean KL {near.kl:.4f} nats, float32 student\n")
    print("| objective | gradient at | error before | after |\n|---|---|---|---|", flush=True)
    for objective in OBJECTIVES:
        exact = near.gradients(objective, torch.float64)
        with rounded_products():
            before = near.gradients(objective, torch.float32)
        after = near.gradients(objective, torch.float32)
        for place, right, *found in zip(("hidden states", "head"), exact, before, after, strict=True):
            errors = [float((each - right).norm() / right.norm()) for each in found]
            print(f"| {objective} | {place} | {errors[0]:.2%} | {errors[1]:.4%} |", flush=True)


def product_times(rounds: int = 7) -> None:
    """Prints the median time and the largest error of one product, of a head of this size and random states."""
    rows, width, ids = 512, 576, 49_152
    generator = torch.Generator().manual_seed(0)
    hidden_ND = (3 * torch.randn(rows, width, generator=generator)).to(torch.bfloat16)
    matrix_VD = (0.15 * torch.randn(ids, width, generator=generator)).to(torch.bfloat16)
    widened_VD, exact_NV = matrix_VD.float(), hidden_ND.double() @ matrix_VD.double().T

    def and_what_it_lacks() -> Tensor:
        rounded_NV = hidden_ND @ matrix_VD.T
        return rounded_NV.float() + torch.addmm(rounded_NV.neg(), hidden_ND, matrix_VD.T)

    ways: dict[str, Callable[[], Tensor]] = {
        "rounded": lambda: hidden_ND @ matrix_VD.T,
        "a tile widened at a time (used)": lambda: Unembedding(matrix_VD).product(hidden_ND),
        "factors widened before": lambda: hidden_ND.float() @ widened_VD.T,
        "rounded, and a second product of what it lacks": and_what_it_lacks,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, product in ways.items():
            began = time.perf_counter()
            product()
            seconds[way].append(time.perf_counter() - began)
    print(f"\n| {rows} rows x {width} x {ids:,} ids | seconds | largest error |\n|---|---|---|")
    for way, product in ways.items():
        error = float((product().double() - exact_NV).abs().max())
        print(f"| {way} | {statistics.median(seconds[way]):.3f} | {error:.1e} |", flush=True)


def step_times(model: Path, student: Path, options: argparse.Namespace, folder: Path) -> None:
    """Prints the median ratio of steps in turn, for each dtype of the student."""
    prompts = write_prompts(folder / "prompts.jsonl", BATCH * 64)
    threads = types.SimpleNamespace(student_threads=2)
    with served_teacher(model, folder, "--score-cores", "0,1") as (address, _):
        for dtype in options.dtype:
            ours = Ours(threads, student, prompts, address, dtype=dtype)  # type: ignore[arg-type]
            rounds: list[tuple[dict[str, float], dict[str, float]]] = []
            for number in range(options.rounds + 2):
                # Which of the two is first changes from round to round.
                sides: dict[str, Callable[[], Any]] = {"before": rounded_products, "after": _as_it_is}
                found = {}
                for side in list(sides)[:: 1 if number % 2 else -1]:
                    with sides[side]():
                        found[side] = ours.step()
                if number >= 2:
                    rounds.append((found["before"], found["after"]))
            for name in ("seconds", "seconds/stepping"):
                before, after = (statistics.median(pair[i][name] for pair in rounds) for i in (0, 1))
                ratio = statistics.median(new[name] / old[name] for old, new in rounds)
                print(f"{dtype} student, {name}: before {before:.2f}, after {after:.2f}, ratio {ratio:.3f}", flush=True)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--only-gradients", action="store_true", help="start no teacher")
    options = parser.parse_args()
    torch.set_num_threads(2)
    teacher, student = prepare(BUILD / "models")
    gradient_errors(teacher)
    product_times()
    if not options.only_gradients:
        with tempfile.TemporaryDirectory() as folder:
            step_times(teacher, student, options, Path(folder))


if __name__ == "__main__":
    main()
