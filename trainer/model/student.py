"""A student: its weights, its optimizer, and everything of them that a checkpoint keeps.

Forward and backward run in `dtype`; the optimizer steps float32 weights, which are copied back after each
step (mixed precision as Micikevicius et al. 2018, arXiv 1710.03740, without loss scaling, which bfloat16
does not need). With LoRA the trained weights are those of the adapters; all others are frozen and have
neither gradients nor float32 copies. Shared out over several workers (`model.fsdp`), a trained weight is
float32 only, and each worker has, steps and clears a part of it.

Shapes: the legend in docs/architecture.md; N scored rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tutelage.errors import CheckpointError
from tutelage.identity import require_tokenizer_as_its_file
from tutelage.trainer.config.student import LoraConfig, OptimizerConfig
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.model.cpu_attention import use_fast_attention
from tutelage.trainer.model.fsdp import full_tensor, part_of, shard, unsharded
from tutelage.trainer.model.lora import add_adapters
from tutelage.trainer.model.optimizer import adamw
from tutelage.trainer.model.process_group import Workers
from tutelage.trainer.model.self_check import (
    OwnOutputs,
    body_of,
    own_outputs,
    require_gradients,
    require_router_loss,
    require_same_logits,
    router_loss_of,
    texts_of,
)
from tutelage.trainer.teacher.rows import Unembedding

STATE_FILE = "trainer_state.st"
"""Safetensors by another suffix: engines take every `*.safetensors` of a folder for weights."""
# Steps are counted for each weight apart: AdamW leaves one alone that has no gradient in a step, such as an expert's.
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Student:
    """A causal language model under training.

    Args:
        folder: Hugging Face directory with safetensors weights.
        dtype: of forward and backward.
        optimizer: AdamW's settings.
        vocabulary_size: ids that the tokenizer can produce; later rows of the head are padding.
        lora: adapters to train instead of all weights.
        adapter_seed: of the adapters' first values.
        gradient_checkpointing: compute layers again in the backward pass instead of keeping their values.
        sharded: keep only this worker's part of it; the other workers of the process group make the same student.
        router_loss: whether `hidden_and_router_loss` will be asked for.

    Raises:
        ConfigurationError: as `add_adapters`; or the loss would not see what the model computes, or not reach what is
            trained (`self_check`).

    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        optimizer: OptimizerConfig,
        vocabulary_size: int,
        lora: LoraConfig | None = None,
        adapter_seed: int = 0,
        gradient_checkpointing: bool = False,
        sharded: bool = False,
        router_loss: bool = False,
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        require_tokenizer_as_its_file(self.tokenizer, folder)
        self._tokenizer_file = (folder / "tokenizer.json").read_bytes()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sharded = sharded
        # The full path, since an adapter's files name the model that it belongs to.
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder.resolve(), dtype=getattr(torch, dtype), use_safetensors=True
        )
        self._adapters = None if lora is None else add_adapters(self.model, lora, seed=adapter_seed)
        # Before FSDP2 changes the model: what a checkpoint is to hold, under the names that loaders expect.
        self._saved_names = list((self._adapters or self.model).state_dict())
        self.model.final_hidden = MethodType(_final_hidden, self.model)
        self.vocabulary_size = vocabulary_size
        if not sharded:
            self.model.to(self.device)
        if router_loss:
            require_router_loss(self.model)
        # With the model's own code as it is: before it is shared out or attends otherwise.
        own = own_outputs(self.model, vocabulary_size, router_loss=router_loss)
        require_gradients(self.model, self._seen_by_loss, vocabulary_size)
        if sharded:
            shard(self.model, dtype=getattr(torch, dtype), device=self.device, forward="final_hidden")
        use_fast_attention(self.model)
        # Reentrant checkpointing needs inputs with a gradient: behind frozen embeddings, LoRA would train nothing.
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._require_own_logits(own)
        self.model.train()
        self._settings = optimizer
        # Tied weights occur once in named_parameters.
        self._parameters: dict[str, Tensor] = {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }
        # In float32 the optimizer steps the model's own weights.
        self._masters = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float().requires_grad_()
            for name, parameter in self._parameters.items()
        }
        self._optimizer = adamw(self._masters, optimizer)

    def _seen_by_loss(self, ids_BT: Tensor) -> list[Tensor]:
        """What the loss is a function of."""
        head = self.head()
        return [self.model.final_hidden(ids_BT), head.matrix_VD, *([] if head.bias_V is None else [head.bias_V])]

    @torch.no_grad()
    def _require_own_logits(self, own: OwnOutputs) -> None:
        """Compares what the loss sees, padding and attention included, with what the model's own code makes."""
        texts = texts_of(self.model, self.vocabulary_size)
        self.model.eval()
        with self.unsharded():
            hidden_ND, head = self.hidden(texts), self.head()
            of_texts = head.logits(hidden_ND).cpu().split([text.rows for text in texts])
            of_states_RV = head.logits(own.states_RD.to(hidden_ND)).cpu()
        require_same_logits(own, of_texts, of_states_RV, hidden_ND.dtype, type(self.model).__name__)

    @property
    def trained(self) -> Mapping[str, Tensor]:
        """The weights that a step changes, as forward and backward have them, by their names in the model."""
        return self._parameters

    @property
    def parameters_count(self) -> int:
        """Trained numbers."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a sequence: the tokenizer's and the model's."""
        configured = self.model.generation_config.eos_token_id
        configured = [] if configured is None else configured
        return frozenset({self.tokenizer.eos_token_id, *([configured] if isinstance(configured, int) else configured)})

    def end_with(self, ids: Iterable[int]) -> None:
        """Adds tokens that end a sequence, for sampling and in what is saved.

        Who generates with a checkpoint, be it transformers or vLLM, stops at those of its generation_config.json.
        """
        ends = sorted(self.end_ids | {end for end in ids if end < self.vocabulary_size})
        self.model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends

    def unsharded(self) -> AbstractContextManager[None]:
        """In here, and when training after `hidden`, its weights are all there; all workers enter it at once.

        Whatever runs the model without gradients does so in here. None of that takes part in what the others do.
        """
        return unsharded(self.model)

    def head(self) -> Unembedding:
        """What turns its hidden states into logits, over the tokenizer's vocabulary; gradients reach it.

        To be asked for after `hidden`, which brings a sharded head together.
        """
        layer = self.model.get_output_embeddings()
        bias = getattr(layer, "bias", None)
        # A model of several modalities has its language model's settings in a part of its own.
        config = self.model.config.get_text_config()
        # A slice, be it of everything, costs the backward pass a matrix of zeros and a copy.
        padded = len(layer.weight) > self.vocabulary_size
        return Unembedding(
            layer.weight[: self.vocabulary_size] if padded else layer.weight,
            bias[: self.vocabulary_size] if padded and bias is not None else bias,
            # Cohere multiplies the logits by `logit_scale`, Granite divides them by `logits_scaling`.
            float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0),
            float(getattr(config, "final_logit_softcapping", None) or 0.0),
        )

    def hidden(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Final hidden states [N, D] of the scored positions of each sequence, one after the other."""
        # Padding is on the right, where causal attention never looks, so no mask is needed.
        # Not `model(...)`: its logits of all positions would be [B, T, V].
        hidden_BTD = self.model.final_hidden(_padded(sequences)[0].to(self.device))
        return self._scored(hidden_BTD, sequences)

    def hidden_and_router_loss(self, sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
        """As `hidden`, and the load-balancing loss of the model's experts over all tokens of the sequences, a scalar.

        It is the model's own (Fedus, Zoph, Shazeer, "Switch Transformers", JMLR 2022, eq. 4 to 6): the number of
        experts times Σ over them of the share of tokens that each is given and the mean probability of that.
        """
        ids_BT, mask_BT = (each.to(self.device) for each in _padded(sequences))
        output = body_of(self.model)(input_ids=ids_BT, use_cache=False, output_router_logits=True)
        loss = router_loss_of(self.model, output.router_logits, mask_BT)
        return self._scored(output.last_hidden_state, sequences), loss

    def _scored(self, hidden_BTD: Tensor, sequences: Sequence[TokenSequence]) -> Tensor:
        parts = [hidden_BTD[row, item.start : item.end] for row, item in enumerate(sequences)]
        for row, item in enumerate(sequences):
            if item.mask is not None:
                parts[row] = parts[row][torch.from_numpy(item.mask).to(self.device)]
        return torch.cat(parts)

    @torch.no_grad()
    def likeliest_ids(self, sequence: TokenSequence, k: int) -> npt.NDArray[np.int32]:
        """The k ids that it finds likeliest at each position from `start` to `end`, int32 [end - start, k]."""
        self.model.eval()
        hidden_ND = self.hidden([replace(sequence, mask=None)])
        self.model.train()
        logits_NV = self.head().logits(hidden_ND)
        ids_NK = logits_NV.topk(min(k, self.vocabulary_size), dim=-1).indices
        return ids_NK.to(torch.int32).cpu().numpy()

    def collect_gradients(self) -> None:
        """Adds the model's gradients to the float32 ones and clears them; after each backward."""
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            # A bfloat16 sum over micro-batches would lose what later ones add once it is 256 times as large.
            if parameter.grad is None or master is parameter:
                continue
            if master.grad is None:
                master.grad = parameter.grad.to(torch.float32, copy=True)
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def sum_gradients(self, workers: Workers) -> None:
        """Adds up what the workers collected of a step; backward passes of a sharded student have done so."""
        if not self.sharded:
            workers.sum_gradients(list(self._masters.values()))

    @torch.no_grad()
    def step(self, learning_rate: float) -> float:
        """Clips, steps, clears the gradients, and returns their norm before clipping."""
        largest = self._settings.max_grad_norm
        # A norm that is not finite must end the training: the step would write NaN into every weight.
        norm = torch.nn.utils.clip_grad_norm_(self._masters.values(), largest, error_if_nonfinite=True)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._publish()
        return float(full_tensor(norm))

    def save(self, folder: Path | None) -> None:
        """Writes the Hugging Face checkpoint (with LoRA, the adapter's) and `trainer_state.st`.

        All workers of a sharded student save at once: one gives a folder, the others None and write nothing.
        """
        state = self._full_state(keep=folder is not None)
        with self.unsharded():
            if folder is None:
                return
            self._save_pretrained(folder, self._weights())
        save_file(state, folder / STATE_FILE)

    def save_without_weights(self, folder: Path) -> None:
        """Writes what `save` writes but for the tensors: what any save of it will need. Asks no other worker."""
        self._save_pretrained(folder, {})

    def _save_pretrained(self, folder: Path, weights: dict[str, Tensor]) -> None:
        from transformers import GenerationConfig

        if self._adapters is None:
            self.model.save_pretrained(folder, state_dict=weights)
        else:
            self._adapters.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
            # PEFT saves none, and the base model's may end at fewer tokens; what else that says may be unfit to save.
            GenerationConfig(eos_token_id=self.model.generation_config.eos_token_id).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        # Some classes write another pipeline than they read (see `require_tokenizer_as_its_file`): a student begun from
        # this checkpoint would then have another tokenizer than its teacher.
        (folder / "tokenizer.json").write_bytes(self._tokenizer_file)

    def _full_state(self, *, keep: bool) -> dict[str, Tensor]:
        """The optimizer's weights and their moments, one brought together after the other; nothing unless kept."""
        tensors = {}
        for name, master in self._masters.items():
            moments = self._optimizer.state.get(master, {})
            parts = {"master": master.detach()} | {key: moments[key] for key in _MOMENTS if key in moments}
            for key, part in parts.items():
                tensor = full_tensor(part)
                if keep:
                    tensors[f"{key}.{name}"] = tensor
        return tensors

    def _weights(self) -> dict[str, Tensor]:
        """What `state_dict` would give: asked for it, a sharded model has only parts."""
        model = self._adapters or self.model
        tensors = {
            name: tensor.detach()
            for named in (model.named_parameters, model.named_buffers)
            for name, tensor in named(remove_duplicate=False)
        }
        return {name: tensors[name] for name in self._saved_names}

    @torch.no_grad()
    def load_state(self, folder: Path) -> None:
        """Takes weights and optimizer from a checkpoint of `save`.

        Raises:
            CheckpointError: its tensors are not this model's.

        """
        with safe_open(folder / STATE_FILE, framework="pt") as tensors:
            stored = set(tensors.keys())
            if {name for name in stored if name.startswith("master.")} != {f"master.{name}" for name in self._masters}:
                raise CheckpointError(f"{folder / STATE_FILE} is of another model; begin a new run in another folder")
            for name, master in self._masters.items():
                master.copy_(part_of(tensors.get_tensor(f"master.{name}"), master))
                if f"step.{name}" not in stored:  # A weight that never had a gradient has no moments.
                    continue
                moments = {key: tensors.get_tensor(f"{key}.{name}") for key in _MOMENTS}
                self._optimizer.state[master] = {
                    key: tensor.to(self.device) if key == "step" else part_of(tensor, master)
                    for key, tensor in moments.items()
                }
        self._publish()

    def _publish(self) -> None:
        """Copies the optimizer's weights into the model."""
        for name, parameter in self._parameters.items():
            if parameter is not self._masters[name]:
                parameter.data.copy_(self._masters[name])


def _padded(sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the right, and which are no padding, both int64 [B, T]."""
    ids_BT = torch.zeros(len(sequences), max(len(sequence.ids) for sequence in sequences), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence.ids)] = torch.from_numpy(sequence.ids)
        mask_BT[row, : len(sequence.ids)] = 1
    return ids_BT, mask_BT


def _final_hidden(model: Any, ids_BT: Tensor) -> Tensor:
    """Final hidden states [B, T, D]; a method that the model is given."""
    hidden_BTD: Tensor = body_of(model)(input_ids=ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD
