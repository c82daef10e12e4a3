"""The one decoding loop: a continuation is its prompt's own, whatever shares its batch and whatever keeps its state."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tutelage import decoding
from tutelage.decoding import decode

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
KINDS = {
    "llama": SIZES,
    "mistral": {**SIZES, "sliding_window": 8, "head_dim": 8},
    "lfm2": {**SIZES, "full_attn_idxs": [1, 3]},
    "qwen3_next": {
        **SIZES,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 9, 8, 7, 6], [11]]
ROOM = [20, 4, 9]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **KINDS[request.param])).eval()


def decoded(model: Any, prompts: list[list[int]], seeds: Sequence[int], room: list[int], **options: Any) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def next_ids(logits_BV: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        assert len(logits_BV) == len(rows)
        own = [torch.rand(logits_BV.shape[1], generator=generators[row]) for row in rows]
        return (logits_BV - torch.log(-torch.log(torch.stack(own)))).argmax(-1)

    with torch.inference_mode():
        return decode(model, prompts, next_ids=next_ids, room=room, end_ids=frozenset({60, 61}), **options)


def test_a_continuation_is_its_prompts_and_seeds_own(model: Any) -> None:
    together = decoded(model, PROMPTS, [1, 2, 3], ROOM)
    alone = [decoded(model, [PROMPTS[row]], [row + 1], [ROOM[row]])[0] for row in range(3)]
    assert together == alone


def test_it_ends_at_an_end_token_or_when_there_is_no_more_room(model: Any) -> None:
    for seed in range(5):
        for continuation, room in zip(decoded(model, PROMPTS, [seed] * 3, ROOM), ROOM, strict=True):
            assert not {60, 61} & set(continuation[:-1])
            assert len(continuation) == room or continuation[-1] in (60, 61)


def test_a_cache_that_grows_in_place_changes_no_token(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    room = [90, 70, 80]  # more than the cache's first room
    growing = decoded(model, PROMPTS, [1, 2, 3], room)
    monkeypatch.setattr(decoding, "growing_cache", lambda model: DynamicCache(config=model.config))
    assert growing == decoded(model, PROMPTS, [1, 2, 3], room)


@pytest.mark.parametrize("share_prefix", [False, True])
def test_a_prompt_that_is_continued_several_times_is_computed_once(model: Any, share_prefix: bool) -> None:
    prompts, room = [PROMPTS[row] for row in (0, 1, 1, 0, 2, 1)], [12, 30, 5, 20, 9, 40]
    alone = [decoded(model, [prompts[row]], [row], [room[row]])[0] for row in range(6)]
    rows_of_passes = []
    plain = model.forward

    def counted(*, input_ids: torch.Tensor, **options: Any) -> Any:
        rows_of_passes.append(len(input_ids))
        return plain(input_ids=input_ids, **options)

    counted.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    model.forward = counted
    together = decoded(model, prompts, range(6), room, share_prefix=share_prefix)
    assert together == alone
    recurrent = model.config.model_type in ("lfm2", "qwen3_next")
    assert rows_of_passes[0] == (1 if recurrent else 3)
