"""The transformers engine against transformers called directly, one sequence at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.decoding import shared_length
from tutelage.errors import CheckpointError
from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.models.base import Sampling, ScoringGroup
from tutelage.evaluator.models.decoding import ATTENTION, decode
from tutelage.evaluator.models.registry import open_engine
from tutelage.evaluator.models.transformers_engine import TransformersEngine
from tutelage.evaluator.protocols import loglik
from tutelage.evaluator.results.frames import read
from tutelage.evaluator.runner.evaluation import evaluate
from tutelage.evaluator.runner.requests import Evaluation, Labels, TaskRequest
from tutelage.evaluator.tasks import TASKS

PROMPTS = ["Ann has 3 apples", "Ann has 12 apples and buys 50 more. She has", "buys", "She has 3 more and"]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine(tiny_model, dtype="float32", batch_size=8, pack_tokens=100)


def direct_logp(model: Any, context: tuple[int, ...], continuation: tuple[int, ...]) -> float:
    """Sum of log-probabilities by one plain forward pass."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.inference_mode():
        logp = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
    first = len(context)
    return sum(float(logp[first + index - 1, token]) for index, token in enumerate(continuation))


def test_packed_scores_are_those_of_plain_passes(engine: TransformersEngine) -> None:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 512, (count,), generator=generator).tolist())

    groups = [
        ScoringGroup(ids(context), tuple(ids(length) for length in lengths))
        for context, lengths in [(5, (1, 1)), (40, (3, 7, 1, 2)), (1, (4,)), (90, (30, 5)), (7, (2, 2, 2))]
    ]
    for group, scores in zip(groups, engine.loglikelihood(groups), strict=True):
        expected = [direct_logp(engine._model, group.context, one) for one in group.continuations]
        assert scores == pytest.approx(expected, abs=1e-4)


def test_greedy_answers_are_generates(engine: TransformersEngine) -> None:
    prompts = [engine.tokenizer.encode(text) for text in PROMPTS]
    completions = engine.generate(prompts, [0] * 4, Sampling(temperature=0, max_new_tokens=24))
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        generated = engine._model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0
        )
        expected = generated[0, len(prompt) :].tolist()
        assert completion.tokens == len(expected)
        assert completion.text == engine.tokenizer.decode(expected, skip_special_tokens=True)
        assert completion.finish_reason == ("stop" if expected[-1] == engine.tokenizer.eos_token_id else "length")


def test_a_shared_beginning_changes_no_answer(engine: TransformersEngine) -> None:
    header = "Ann has 3 apples and buys 7 more. Below she has 12 apples and buys 50 more. "
    prompts = [engine.tokenizer.encode(header + text) for text in PROMPTS]
    assert shared_length(prompts) > 20
    sampling = Sampling(temperature=0, max_new_tokens=80)  # more than the cache's first room
    together = engine.generate(prompts, [0] * 4, sampling)
    assert together == [engine.generate([prompt], [0], sampling)[0] for prompt in prompts]


def test_grouped_heads_attend_as_repeated_keys_do() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
    config = LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2, initializer_range=0.2)
    model = LlamaForCausalLM(config).eval()
    prompts, none = [list(range(3, 3 + length)) for length in (5, 30, 17)], frozenset[int]()
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        expected = [
            model.generate(torch.tensor([one]), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
            for one in prompts
        ]
        model.set_attn_implementation(ATTENTION)
        generators = [torch.Generator() for _ in prompts]
        written = decode(model, prompts, generators, temperature=0, max_new_tokens=12, end_ids=none)
    assert written == [ids[0, len(prompt) :].tolist() for ids, prompt in zip(expected, prompts, strict=True)]


def test_sharing_leaves_each_prompt_a_token() -> None:
    assert shared_length([list(range(20)), list(range(20))]) == 19
    assert shared_length([list(range(20)), [*range(10), 99, 98]]) == 10
    assert shared_length([list(range(20)), [*range(5), 99]]) == 0
    assert shared_length([list(range(20))]) == 0


def test_a_sample_is_its_seeds_whatever_batch_it_is_in(engine: TransformersEngine) -> None:
    prompts = [engine.tokenizer.encode(text) for text in PROMPTS]
    sampling = Sampling(temperature=1.0, max_new_tokens=16)
    together = engine.generate(prompts, [1, 2, 3, 4], sampling)
    alone = [engine.generate([prompt], [seed], sampling)[0] for seed, prompt in enumerate(prompts, start=1)]
    assert together == alone
    assert engine.generate(prompts[:1], [9], sampling) != together[:1]


def test_samples_follow_the_models_distribution(engine: TransformersEngine) -> None:
    prompt = engine.tokenizer.encode(PROMPTS[0])
    with torch.inference_mode():
        logits = engine._model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    expected = torch.softmax(logits / 0.7, dim=-1)
    count = 4000
    logits_BV = logits.float().expand(count, -1)
    from tutelage.evaluator.models.decoding import choose

    drawn = choose(logits_BV, 0.7, [torch.Generator().manual_seed(seed) for seed in range(count)])
    seen = torch.bincount(drawn, minlength=512) / count
    likely = expected > 0.01
    error = (expected * (1 - expected) / count).sqrt()
    assert ((seen - expected).abs()[likely] < 5 * error[likely]).all()


def test_rows_that_end_early_leave_the_others_alone(engine: TransformersEngine) -> None:
    prompts = [engine.tokenizer.encode(text) for text in PROMPTS]

    def decoded(end_ids: frozenset[int]) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3, 4)]
        with torch.inference_mode():
            return decode(engine._model, prompts, generators, temperature=1.0, max_new_tokens=20, end_ids=end_ids)

    whole = decoded(engine._end_ids)
    ending = frozenset([whole[0][3], whole[2][9]])  # tokens that some rows write early, made end tokens

    def cut(ids: list[int]) -> list[int]:
        ends = [index for index, token in enumerate(ids) if token in ending]
        return ids[: ends[0] + 1] if ends else ids

    assert decoded(ending) == [cut(ids) for ids in whole]


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not load"):
        open_engine("transformers", tmp_path, dtype="float32", batch_size=1)


def test_two_runs_give_the_same_rows(tiny_model: Path, tmp_path: Path) -> None:
    tasks = (TaskRequest("arithmetic", "paper", 12), TaskRequest("arithmetic", "loglik", 12))
    evaluation = Evaluation("one", tiny_model, Labels("r1", "tiny"), tasks)
    settings = EvaluationSettings(engine="transformers", prompt="chat", sampling_temperature=1.0, max_new_tokens=16)
    for name in ("a", "b"):
        evaluate(evaluation, settings, tmp_path / name)
    first, second = (read(tmp_path / name).collect().drop("seconds") for name in ("a", "b"))
    assert first.equals(second)
    assert set(first["error"]) == {""}


@pytest.mark.data
@pytest.mark.parametrize("name", ["ARC-Easy", "winogrande", "hellaswag", "piqa"])
def test_loglik_of_real_items_is_a_plain_computation(name: str, data_dir: Path, packaged_models: Any) -> None:
    """Encode context and continuation together, split at the context's length, sum: within 1e-3 in fp32."""
    student = packaged_models[1]
    engine = TransformersEngine(student, dtype="float32", batch_size=8)
    task = TASKS[name]
    questions = [loglik.prepare(task, item, engine, EvaluationSettings()) for item in task.items(data_dir, 6)]
    rows = loglik.answer(task, questions, engine, EvaluationSettings())
    for question, row in zip(questions, rows, strict=True):
        expected = []
        for context, continuation in zip(question.choices.contexts, question.choices.continuations, strict=True):
            kept = context.rstrip()
            whole = engine.tokenizer(kept + context[len(kept) :] + continuation)["input_ids"]
            split = len(engine.tokenizer(kept)["input_ids"])
            expected.append(direct_logp(engine._model, tuple(whole[:split]), tuple(whole[split:])))
        assert row["choices_logp"] == pytest.approx(expected, abs=1e-3)
        best = max(range(len(expected)), key=expected.__getitem__)
        assert row["score"] == float(best == question.choices.gold)
        normalized = [logp / len(text[1:]) for logp, text in zip(expected, question.choices.continuations, strict=True)]
        assert row["score_normalized"] == float(
            max(range(len(normalized)), key=normalized.__getitem__) == question.choices.gold
        )
