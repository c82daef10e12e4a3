"""The student's own parts: sampling from its present weights, gradients, learning rate, saving."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tutelage.trainer.config.student import OptimizerConfig
from tutelage.trainer.data.sequences import token_sequence
from tutelage.trainer.model.cpu_attention import use_fast_attention
from tutelage.trainer.model.optimizer import learning_rate_at
from tutelage.trainer.model.student import Student
from tutelage.trainer.rollout.hf_sampler import choose, sample


@pytest.fixture(scope="module")
def model(tiny_model: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


PROMPTS = [np.array(ids, np.int32) for ids in ([40, 41, 42, 43, 44], [50], [60, 61, 62])]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def write(model, prompts=PROMPTS, **changes):
    values = {
        "generators": generators(*range(len(prompts))),
        "max_new_tokens": 10,
        "max_tokens": 100,
        "temperature": 1.0,
        "top_p": 1.0,
        "end_ids": frozenset({2}),
        "vocabulary_size": 512,
    }
    return [written.ids for written in sample(model, prompts, **(values | changes))]


def test_nearly_greedy_samples_are_what_the_model_finds_likeliest(model):
    for prompt, completion in zip(PROMPTS, write(model, temperature=1e-4), strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
        with torch.no_grad():
            best = model(ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert completion.tolist() == best.tolist()


def test_padding_and_neighbours_change_nothing(model):
    together = write(model, temperature=1e-4)
    alone = [write(model, [prompt], temperature=1e-4)[0] for prompt in PROMPTS]
    assert [item.tolist() for item in together] == [item.tolist() for item in alone]


def test_a_sequence_ends_at_its_end_token_or_its_room(model):
    first = write(model, temperature=1e-4)
    end = int(first[0][3])
    stopped = write(model, temperature=1e-4, end_ids=frozenset({end}))
    for whole, cut in zip(first, stopped, strict=True):
        hits = np.flatnonzero(whole == end)
        assert cut.tolist() == whole[: hits[0] + 1 if len(hits) else None].tolist()
    assert [len(item) for item in write(model, max_tokens=7)] == [2, 6, 4]


def test_the_same_generators_give_the_same_samples_and_others_give_others(model):
    one, two = write(model), write(model)
    other = write(model, generators=generators(3, 4, 5))
    assert all(np.array_equal(left, right) for left, right in zip(one, two, strict=True))
    assert any(not np.array_equal(left, right) for left, right in zip(one, other, strict=True))


def test_it_does_not_matter_who_writes_a_sequence(model):
    together = write(model)
    shares = write(model, PROMPTS[::2], generators=generators(0, 2)) + write(
        model, PROMPTS[1:2], generators=generators(1)
    )
    assert [item.tolist() for item in together] == [shares[place].tolist() for place in (0, 2, 1)]


def test_padded_rows_of_the_head_are_never_written(model):
    assert max(int(item.max()) for item in write(model, vocabulary_size=45, max_new_tokens=40)) < 45


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_attention_changes_no_number(dtype):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).to(dtype)
    fast = copy.deepcopy(plain)
    use_fast_attention(fast)
    assert fast.config._attn_implementation != plain.config._attn_implementation == "sdpa"
    # float32: to its rounding; bfloat16: as close as two of its kernels are to each other.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    ids = torch.tensor([[40, 41, 42, 43], [50, 51, 52, 53]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    for rows, own_mask in ((ids, None), (ids, mask), (ids[:, :1], None)):
        with torch.no_grad():
            expected = plain(rows, attention_mask=own_mask).logits
            torch.testing.assert_close(fast(rows, attention_mask=own_mask).logits, expected, **tolerance)
    for model in (plain, fast):
        model(ids, labels=ids).loss.backward()
    for left, right in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, **tolerance)


def test_a_saved_student_does_not_name_its_attention(tiny_model, tmp_path):
    student = Student(tiny_model, dtype="float32", optimizer=OptimizerConfig(), vocabulary_size=512)
    student.save(tmp_path)
    assert "tutelage" not in (tmp_path / "config.json").read_text()


def test_choices_follow_the_distribution():
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, -torch.inf])
    draws = 40_000
    ids, _ = choose(logits.expand(draws, -1), generators(0) * draws, temperature=2.0, top_p=1.0)
    expected = (logits / 2.0).softmax(-1)
    frequency = torch.bincount(ids, minlength=5) / draws
    # Five standard errors of a frequency.
    assert (frequency - expected).abs().max() < 5 * (0.25 / draws) ** 0.5
    assert frequency[4] == 0


def test_the_nucleus_keeps_the_fewest_that_have_the_mass():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, -1)
    ids, _ = choose(logits, generators(0) * len(logits), temperature=1.0, top_p=0.7)
    assert set(ids.tolist()) == {0, 1}


def test_padding_does_not_reach_hidden_states(tiny_model):
    student = Student(tiny_model, dtype="float32", optimizer=OptimizerConfig(), vocabulary_size=512)
    sequences = [token_sequence(prompt, PROMPTS[0], loss_on_prompt=False) for prompt in PROMPTS]
    with torch.no_grad():
        together = student.hidden(sequences)
        alone = torch.cat([student.hidden([sequence]) for sequence in sequences])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_rows_and_targets_belong_together():
    sequence = token_sequence(np.array([7, 8, 9], np.int32), np.array([1, 2], np.int32), loss_on_prompt=False)
    assert (sequence.start, sequence.end, sequence.rows) == (2, 4, 2)
    assert sequence.targets.tolist() == [1, 2]
    whole = token_sequence(np.array([7, 8, 9], np.int32), np.array([1, 2], np.int32), loss_on_prompt=True)
    assert (whole.start, whole.end) == (0, 4)
    assert whole.targets.tolist() == [8, 9, 1, 2]


def test_steps_equal_plain_adamw_with_clipping(tiny_model):
    settings = OptimizerConfig(max_grad_norm=0.5, weight_decay=0.1)
    student = Student(tiny_model, dtype="float32", optimizer=settings, vocabulary_size=512)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    groups = [
        {"params": [p for p in reference.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in reference.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=settings.betas)
    ids = torch.arange(30, 50)[None]
    for _ in range(3):
        student.model(ids, labels=ids).loss.backward()
        student.collect_gradients()
        norm = student.step(1e-3)
        optimizer.zero_grad()
        reference(ids, labels=ids).loss.backward()
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
        assert norm == pytest.approx(float(expected), rel=1e-4)
    for left, right in zip(student.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_small_steps_are_not_lost_in_bfloat16(tiny_model):
    """A step that rounds to nothing in bfloat16 must add up in the float32 weights."""
    student = Student(tiny_model, dtype="bfloat16", optimizer=OptimizerConfig(), vocabulary_size=512)
    weight = student.model.model.norm.weight
    before = weight.detach().clone()
    for _ in range(40):
        weight.grad = torch.ones_like(weight)
        student.collect_gradients()
        student.step(1e-4)
    moved = before.float() - weight.detach().float()
    assert moved.mean().item() == pytest.approx(40 * 1e-4, rel=0.2)


def test_a_saved_student_loads_elsewhere_with_equal_logits(tiny_model, tmp_path):
    student = Student(tiny_model, dtype="bfloat16", optimizer=OptimizerConfig(), vocabulary_size=512)
    student.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    ids = torch.arange(30, 50)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, student.model(ids).logits)


def test_learning_rates():
    settings = OptimizerConfig(learning_rate=1.0, warmup_steps=3, lr_scheduler_type="linear")
    rates = [learning_rate_at(step, 7, settings) for step in range(7)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25])
    cosine = settings.model_copy(update={"lr_scheduler_type": "cosine"})
    assert learning_rate_at(5, 7, cosine) == pytest.approx(0.5)
    constant = settings.model_copy(update={"lr_scheduler_type": "constant_with_warmup"})
    assert learning_rate_at(6, 7, constant) == 1.0


@pytest.mark.parametrize("warmup_steps", [0, 2, 7, 30])
@pytest.mark.parametrize("kind", ["constant_with_warmup", "linear", "cosine"])
def test_each_learning_rate_is_that_of_the_formula(kind, warmup_steps):
    settings = OptimizerConfig(learning_rate=3e-4, warmup_steps=warmup_steps, lr_scheduler_type=kind)
    for step in range(20):
        progress = (step - warmup_steps) / max(1, 20 - warmup_steps)
        decayed = {"linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}.get(kind, 1.0)
        factor = (step + 1) / (warmup_steps + 1) if step < warmup_steps else decayed
        assert learning_rate_at(step, 20, settings) == pytest.approx(3e-4 * factor, rel=1e-14)


def test_a_weight_without_a_gradient_in_some_steps_resumes_bit_for_bit(tiny_model, tmp_path):
    """As that of an expert that no token of a step was sent to: AdamW counts its steps apart."""
    skipped = "model.layers.1.mlp.up_proj.weight"

    def step(student: Student, number: int) -> None:
        for name, master in student._masters.items():
            generator = torch.Generator().manual_seed(number)
            gradient = torch.randn(master.shape, generator=generator)
            master.grad = None if name == skipped and number in (0, 2) else gradient
        student.step(0.1)

    settings = {"dtype": "bfloat16", "optimizer": OptimizerConfig(), "vocabulary_size": 512}
    undisturbed = Student(tiny_model, **settings)
    for number in range(5):
        step(undisturbed, number)
    stopped = Student(tiny_model, **settings)
    for number in range(3):
        step(stopped, number)
    stopped.save(tmp_path)
    resumed = Student(tiny_model, **settings)
    resumed.load_state(tmp_path)
    for number in range(3, 5):
        step(resumed, number)
    for name, master in undisturbed._masters.items():
        assert torch.equal(master, resumed._masters[name]), name
