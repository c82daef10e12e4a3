"""Which weights a gradient reaches: a router's choice is no fault, a part that nothing passes through is one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from tutelage.errors import ConfigurationError
from tutelage.trainer.model.self_check import own_outputs, require_gradients
from tutelage.trainer.rollout import hf_sampler


class Routed(nn.Module):
    """Sends every token to its first expert; its tower is never called."""

    device = torch.device("cpu")
    config = LlamaConfig()

    def __init__(self, *, tower: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))
        self.head = nn.Linear(4, 50)
        self.tower = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) if tower else None

    def get_input_embeddings(self):
        return self.embed

    def seen_by_loss(self, ids_BT):
        return [self.experts[0](self.embed(ids_BT)), self.head.weight, self.head.bias]


def test_an_expert_that_no_token_was_sent_to_is_no_fault():
    model = Routed(tower=False)
    require_gradients(model, model.seen_by_loss, 50)


def test_a_part_that_nothing_passes_through_is_refused_by_name_unless_it_is_frozen():
    model = Routed(tower=True)
    with pytest.raises(
        ConfigurationError, match=r"reaches tower\.0\.weight, tower\.0\.bias, tower\.1\.weight and 1 more"
    ):
        require_gradients(model, model.seen_by_loss, 50)
    model.tower.requires_grad_(False)
    require_gradients(model, model.seen_by_loss, 50)


def test_a_weight_behind_a_detached_value_is_refused():
    model = Routed(tower=False)
    with pytest.raises(ConfigurationError, match=r"reaches embed\.weight"):
        require_gradients(
            model, lambda ids: [model.experts[0](model.embed(ids).detach()), *model.head.parameters()], 50
        )


def test_a_tokenizer_with_more_ids_than_the_model_and_a_model_of_few_positions_are_no_fault():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=8, n_layer=1, n_head=1))
    assert max(len(logits_TV) for logits_TV in own_outputs(model, 51).text_logits) == 32


def test_a_device_without_room_is_not_taken_for_a_model_that_cannot_decode(monkeypatch):
    def full(*_arguments, **_options):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(hf_sampler, "decode", full)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(torch.OutOfMemoryError):
        hf_sampler._require_plain_decoding(SimpleNamespace(model=model, vocabulary_size=50))


@pytest.mark.parametrize("positions", [16, 32, 64])
def test_a_model_of_few_positions_is_tried_with_prompts_that_it_has_room_for(positions):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=positions, n_embd=8, n_layer=1, n_head=1))
    hf_sampler._require_plain_decoding(SimpleNamespace(model=model, vocabulary_size=51))
