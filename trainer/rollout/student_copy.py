"""A student's weights on their way to a process that writes in its place, and the model there that takes them.

What a step changes is all that travels, as arrays in Ray's object store: processes of one node read the same memory,
and Ray brings them to other nodes. Every version comes with what the student says after a fixed text, its canary; the
first one with a digest of all weights, those that no step changes among them.

Shapes: the legend in docs/architecture.md.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tutelage.data.hub import local_model
from tutelage.errors import IdentityMismatch
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.model.cpu_attention import use_fast_attention
from tutelage.trainer.model.lora import add_adapters
from tutelage.trainer.model.self_check import largest_probed_id
from tutelage.trainer.model.student import Student

CANARY_TOKENS = 8
"""Also the first that a vLLM computes: on CPUs with AMX a text of fewer than five tokens would kill the process."""
CANARY_TOLERANCE_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Of a copy that the same code computes: 0 on the same kind of processor; another one adds up in another order."""


@dataclass(frozen=True)
class StudentWeights:
    """What a step changes of a student, as it was after some steps."""

    version: int
    """Steps that they have seen."""
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...], npt.NDArray[np.uint8]]]
    """By name in the model: dtype, shape, and the bytes, which nobody may write to."""
    canary_V: npt.NDArray[np.float32]
    """The student's log-probabilities after a fixed text, nats."""

    @classmethod
    def of(cls, student: Student, version: int) -> StudentWeights:
        """A student's present ones; of a student on a CPU they are its own memory, until they are copied."""
        tensors = {
            name: (tensor.dtype, tuple(tensor.shape), _bytes_of(tensor)) for name, tensor in student.trained.items()
        }
        return cls(version, tensors, canary(student.model, student.vocabulary_size))


def _bytes_of(tensor: Tensor) -> npt.NDArray[np.uint8]:
    # NumPy has no bfloat16.
    array: npt.NDArray[np.uint8] = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return array


def canary_ids(model: Any, vocabulary_size: int) -> list[int]:
    """The fixed text."""
    return [number % (largest_probed_id(model, vocabulary_size) + 1) for number in range(CANARY_TOKENS)]


@torch.inference_mode()
def canary(model: Any, vocabulary_size: int) -> npt.NDArray[np.float32]:
    """A model's log-probabilities after a fixed text, float32 [V], nats."""
    was_training = model.training
    model.eval()
    ids_1T = torch.tensor([canary_ids(model, vocabulary_size)], device=model.device)
    logits_V = model(input_ids=ids_1T, use_cache=False).logits[0, -1]
    model.train(was_training)
    array: npt.NDArray[np.float32] = logits_V.float().log_softmax(-1).cpu().numpy()
    return array


def digest_of(model: Any) -> str:
    """SHA-256, hex, of all of a model's weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(_bytes_of(tensor).data)
    return digest.hexdigest()


class StudentCopy:
    """A student's model in another process: as much of a `Student` as samplers need.

    Args:
        config: the student's.
        end_ids: as `Student.end_ids`.
        vocabulary_size: as `Student.vocabulary_size`.

    """

    def __init__(self, config: StudentConfig, *, end_ids: frozenset[int], vocabulary_size: int) -> None:
        from transformers import AutoModelForCausalLM

        self.end_ids, self.vocabulary_size = end_ids, vocabulary_size
        # vLLM's own copy is where it computes; this one is what that is filled from.
        on_gpu = torch.cuda.is_available() and config.sampling.written_by != "vllm"
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            local_model(config.start, "init").resolve(), dtype=getattr(torch, config.dtype), use_safetensors=True
        )
        if config.lora is not None:
            add_adapters(self.model, config.lora, seed=0)  # The first weights that it is given say what they are.
        self.model.to(self.device)
        use_fast_attention(self.model)

    def unsharded(self) -> AbstractContextManager[None]:
        """Its weights are all there."""
        return nullcontext()

    def take(self, weights: StudentWeights) -> None:
        """Has the student's weights; on a CPU their very memory.

        Raises:
            IdentityMismatch: they are of another model.

        """
        parameters = {name: each for name, each in self.model.named_parameters() if name in weights.tensors}
        if parameters.keys() != weights.tensors.keys():
            raise IdentityMismatch("the student's weights are of another model than its copy", "sampling.writers")
        for name, (dtype, shape, array) in weights.tensors.items():
            with warnings.catch_warnings():
                # PyTorch warns that it could write to memory that is read-only. Nothing here is trained.
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                tensor = torch.from_numpy(array)
            parameters[name].data = tensor.view(dtype).view(shape).to(self.device)

    def require_same(self, canary_V: npt.NDArray[np.float32]) -> None:
        """Refuses a copy that says otherwise than its student.

        Raises:
            IdentityMismatch: says by how much, and how much is allowed.

        """
        found = float(np.abs(canary(self.model, self.vocabulary_size) - canary_V).max())
        allowed = CANARY_TOLERANCE_NATS[self.model.dtype]
        if not found <= allowed:
            raise IdentityMismatch(
                f"its log-probabilities of a fixed text are {found:.2g} nats from the student's, allowed is {allowed}",
                "sampling.writers",
            )
