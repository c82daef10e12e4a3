"""Does the trainer do on this machine's GPU what it promises? One command, under 8 minutes, without vLLM and Ray.

    python benchmarks/gpu_check.py [--tiny] [--steps 20] [--output DIR]

Needs PyTorch, transformers, gRPC and the trainer (`pip install '.[trainer]'`). Prints, with the device's name and the
rates that it reaches on plain products:

- the chunked losses against plain ones that hold all logits, over 152k ids, float32 and bfloat16: values, gradients,
  seconds, and the most memory that was allocated;
- a student of 0.5B random weights that writes all of its sequences and learns from a teacher of that size in the same
  process: seconds by phase, tokens a second, and the share of the roofline (reading weights when it writes, products
  when it steps);
- the same training stopped in its middle and gone on with, against the undisturbed one: equal bit for bit, or which
  tensors differ, since which step, and whether two undisturbed ones do as well.

`--tiny`, and without a GPU in any case, is the same with a model of 0.1M over 600 ids.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto")]

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

from tutelage.identity import vocabulary_size, weights_digest  # noqa: E402
from tutelage.trainer.config.student import StudentConfig  # noqa: E402
from tutelage.trainer.data.sequences import TokenSequence  # noqa: E402
from tutelage.trainer.losses.losses import divergence_named, token_divergence  # noqa: E402
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution  # noqa: E402
from tutelage.trainer.metrics.progress import Progress  # noqa: E402
from tutelage.trainer.teacher.base import SignalArrays, SignalSpec, TeacherIdentity, UnembeddingArrays  # noqa: E402
from tutelage.trainer.teacher.rows import HiddenRows, Unembedding  # noqa: E402
from tutelage.trainer.training.control import Control  # noqa: E402
from tutelage.trainer.training.loop import train  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PHASES = ("sampling", "scoring", "stepping")


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    loss_rows: int
    sequences: int
    new_tokens: int


FULL = Size(151_936, 896, 4864, 24, 14, 2, loss_rows=2048, sequences=8, new_tokens=64)  # Qwen2.5-0.5B's shape
TINY = Size(600, 64, 128, 2, 4, 2, loss_rows=96, sequences=2, new_tokens=8)


def wait_for_device() -> None:
    """Kernels are started and not waited for."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def measured(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, its seconds, and the most GiB that were allocated beyond what was before (0 on a CPU)."""
    wait_for_device()
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = work()
    wait_for_device()
    seconds = time.perf_counter() - started
    most = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    return result, seconds, (most - before) / 2**30


# --- losses -----------------------------------------------------------------------------------------------------------


def check_losses(size: Size) -> None:
    """Prints a row for each objective and dtype."""
    print(f"\nlosses: {size.loss_rows} rows, {size.vocabulary} ids, width {size.width}")
    print("| objective | dtype | loss, plain | chunked, relative | gradients | seconds, plain and chunked | GiB |")
    print("|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for objective, parameters in (("gkd", {"beta": 0.5}), ("forward_kl", {}), ("reverse_kl", {})):
            row = compare_losses(size, dtype, objective, parameters)
            print(f"| {objective} | {str(dtype).removeprefix('torch.')} | {row} |", flush=True)


def compare_losses(size: Size, dtype: torch.dtype, objective: str, parameters: dict[str, Any]) -> str:
    """The rest of a row: the same mean and its gradients both ways, each tried once before it is timed."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    hidden_ND, head_VD = normal(size.loss_rows, size.width), normal(size.vocabulary, size.width) / size.width**0.5
    zeros_N = torch.zeros(size.loss_rows, dtype=torch.long, device=DEVICE)
    own = Unembedding(normal(size.vocabulary, size.width) / size.width**0.5)
    teacher = HiddenRows(normal(size.loss_rows, size.width), zeros_N, zeros_N, own)
    divergence = divergence_named(objective, parameters)

    def plain(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
        student_NV = (hidden_ND.float() @ head_VD.float().T).log_softmax(-1)
        return divergence(own.logits(teacher.hidden_ND).log_softmax(-1), student_NV).mean()

    def chunked(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
        distribution = TeacherDistribution()
        head = Unembedding(head_VD)
        value_N = token_divergence(
            hidden_ND, head, teacher, objective=objective, parameters=parameters, distribution=distribution
        )
        return value_N.mean()

    def with_gradients(loss_of: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden_ND, head_VD)]
        loss = loss_of(*leaves)
        loss.backward()
        return [loss.detach(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)]

    found = {}
    for name, loss_of in (("plain", plain), ("chunked", chunked)):
        try:
            with_gradients(loss_of)
            found[name] = measured(lambda loss_of=loss_of: with_gradients(loss_of))  # type: ignore[misc]
        except torch.OutOfMemoryError:
            return f"{name} has no room | | | | "
    (expected, *seconds), (got, *others) = found["plain"], found["chunked"]
    apart = [float((one - other).norm() / other.norm()) for one, other in zip(got, expected, strict=True)]
    return (
        f"{float(expected[0]):.6f} | {apart[0]:.1e} | {max(apart[1:]):.1e} | {seconds[0]:.3f}, {others[0]:.3f} | "
        f"{seconds[1]:.2f}, {others[1]:.2f}"
    )


# --- training ---------------------------------------------------------------------------------------------------------


def write_model(folder: Path, size: Size, seed: int) -> Path:
    """Random weights, and a tokenizer whose words are the ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<end>": 0, "<begin>": 1} | {f"w{number}": number for number in range(2, size.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<begin>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<begin>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=0,
    )
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


class InProcessTeacher:
    """A `Teacher` on the same device, each sequence by itself."""

    waited_seconds = 0.0

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE).eval()
        self._matrix_VD = self._model.lm_head.weight.detach()
        self.identity = TeacherIdentity(
            folder.name, weights_digest(folder), vocabulary_size(folder), self._matrix_VD.shape[1], 0.0
        )

    def unembedding(self) -> UnembeddingArrays:
        """As `Teacher.unembedding`."""
        return UnembeddingArrays(self._matrix_VD.cpu().view(torch.uint16).numpy(), None, 1.0, 0.0)

    @torch.inference_mode()
    def score(self, sequences: Sequence[TokenSequence], spec: SignalSpec) -> list[SignalArrays]:
        """As `Teacher.score`, for `hidden`."""
        assert spec.kind == "hidden"
        answers: list[SignalArrays] = []
        for sequence in sequences:
            ids_1T = torch.from_numpy(sequence.ids.astype("int64"))[None].to(DEVICE)
            hidden_TD = self._model.model(ids_1T).last_hidden_state[0, sequence.start : sequence.end]
            answers.append({"hidden_RD": hidden_TD.to(torch.bfloat16).cpu().view(torch.uint16).numpy()})
        return answers


def student_config(init: Path, size: Size, steps: int) -> StudentConfig:
    """On-policy GKD; the data is prompts of random words."""
    data = init.parent / "prompts.jsonl"
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, size.vocabulary, (size.sequences * steps, 48), generator=generator).tolist()
    data.write_text("".join(json.dumps({"prompt": " ".join(f"w{word}" for word in row)}) + "\n" for row in rows))
    return StudentConfig.model_validate(
        {
            "id": "check",
            "init": init,
            "data": {"path": data, "template": "plain"},
            "objective": {"name": "gkd", "beta": 0.5, "on_policy_fraction": 1.0, "signal": "hidden"},
            "sampling": {"max_new_tokens": size.new_tokens},
            "batch": {"sequences": size.sequences, "micro_batch_sequences": size.sequences, "max_tokens": 256},
            "held_out": {"sequences": 0},
            "optimizer": {"learning_rate": 1e-4},
            "steps": steps,
            "save_every_steps": steps,
            "threads": torch.get_num_threads(),
        }
    )


def check_training(size: Size, steps: int, folder: Path) -> None:
    """Prints seconds by phase, their floors, and what a resume is like."""
    teacher = InProcessTeacher(write_model(folder / "teacher", size, seed=1))
    config = student_config(write_model(folder / "student", size, seed=2), size, steps)
    whole = train(config, folder=folder / "whole", teacher=teacher).checkpoint
    rows = metric_rows(folder / "whole")
    report_speed(size, rows[2:])  # Without what was before training, and the step that warms up.
    control = Control()

    def stop_in_the_middle(progress: Progress) -> None:
        if progress.step >= steps // 2:
            control.stop()

    train(config, folder=folder / "parts", teacher=teacher, report=stop_in_the_middle, control=control)
    parts = train(config, folder=folder / "parts", teacher=teacher).checkpoint
    assert whole is not None
    assert parts is not None
    differing = differences(whole, parts)
    print(f"\nresumed at step {steps // 2}: ", end="")
    if not differing:
        print("weights and optimizer are those of the undisturbed training, bit for bit")
        return
    print(f"{len(differing)} tensors differ, the most {differing[0]}; {first_step_apart(rows, folder / 'parts')}")
    again = train(config, folder=folder / "again", teacher=teacher).checkpoint
    assert again is not None
    same = not differences(whole, again)
    print(f"two undisturbed trainings are {'equal: the resume loses something' if same else 'not equal, either'}")


def metric_rows(folder: Path) -> list[dict[str, Any]]:
    """What a training measured, a row a step; the first is before it."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def differences(one: Path, other: Path) -> list[tuple[float, str]]:
    """Tensors of two checkpoints that are not equal, with the largest difference, the most different first."""
    found = []
    for file in ("model.safetensors", "trainer_state.st"):
        left, right = load_file(one / file), load_file(other / file)
        for name, tensor in left.items():
            if not torch.equal(tensor, right[name]):
                found.append((float((tensor.float() - right[name].float()).abs().max()), f"{file}: {name}"))
    return sorted(found, reverse=True)


def first_step_apart(rows: list[dict[str, Any]], parts: Path) -> str:
    """The first step whose metrics are not the same in two trainings."""
    for row, other in zip(rows, metric_rows(parts), strict=True):
        if any(row[name] != other[name] for name in row if name.startswith("train/")):
            return f"metrics differ from step {row['step']} on"
    return "all metrics are the same"


def report_speed(size: Size, rows: list[dict[str, Any]]) -> None:
    """Medians of the phases, tokens a second, and the share of what the device's rates allow."""
    layers = size.layers * size.width * (3 * size.inner + 2 * size.width * (1 + size.key_value_heads / size.heads))
    head, prompt = size.vocabulary * size.width, 48
    tokens, scored = size.sequences * (prompt + size.new_tokens), size.sequences * size.new_tokens
    flops, bandwidth = rates()
    floor = {
        "sampling": size.new_tokens * 2 * (layers + head) / bandwidth,
        "scoring": 2 * layers * tokens / flops,
        # Forward once and backward twice through the layers; the student's logits, the teacher's, and two gradients.
        "stepping": (6 * layers * tokens + 4 * 2 * head * scored) / flops,
    }
    print(
        f"\nsteps: {(layers + head) / 1e6:.1f}M parameters, {size.sequences} sequences of {size.new_tokens} new tokens"
    )
    print(f"products {flops / 1e12:.2f} TFLOP/s, memory {bandwidth / 1e9:.0f} GB/s; medians of {len(rows)} steps")
    print("| phase | seconds | roofline's | share |\n|---|---|---|---|")
    total = 0.0
    for phase in PHASES:
        seconds = statistics.median(row[f"seconds/{phase}"] for row in rows)
        total += seconds
        print(f"| {phase} | {seconds:.4f} | {floor[phase]:.4f} | {floor[phase] / seconds:.1%} |")
    print(f"| step | {total:.4f} | {sum(floor.values()):.4f} | {sum(floor.values()) / total:.1%} |")
    gauge = statistics.mean(row["train/sampler_kl"] for row in rows)
    print(f"\n{scored / total:.0f} new tokens a second, {tokens / total:.0f} with their prompts")
    print(f"KL between the sampler and the learner: {gauge:.1e} nats a token")


def rates() -> tuple[float, float]:
    """Operations a second of bfloat16 products, and bytes a second that reading weights reaches."""
    side = 8192 if DEVICE.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=DEVICE).bfloat16() for _ in range(2))
    weights, few = torch.randn(side, side, device=DEVICE).bfloat16(), torch.randn(side, 8, device=DEVICE).bfloat16()
    products = min(measured(lambda: left @ right)[1] for _ in range(10))
    reading = min(measured(lambda: weights @ few)[1] for _ in range(20))
    return 2 * side**3 / products, weights.nbytes / reading


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small enough for a CPU, which is given that in any case")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, help="folder to keep; default: a temporary one, of about 30 GB")
    options = parser.parse_args(arguments)
    size, started = TINY if options.tiny or DEVICE.type == "cpu" else FULL, time.perf_counter()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; PyTorch {torch.__version__}")
    check_losses(size)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        check_training(size, options.steps, folder)
    loaded = [module for module in ("vllm", "ray") if module in sys.modules]
    print(f"\n{time.perf_counter() - started:.0f} s; imported of vLLM and Ray: {', '.join(loaded) or 'neither'}")


if __name__ == "__main__":
    main()
