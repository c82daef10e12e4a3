"""A teacher that reads another prompt than its student: what it is asked, and whose rows those are."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoTokenizer

from trainer_cases import student_config
from trainer_doubles import InProcessTeacher
from tutelage.data.chat import Chat
from tutelage.data.dataset_files import stream_examples
from tutelage.errors import DataError
from tutelage.trainer.config.student import DataConfig
from tutelage.trainer.data.sequences import token_sequence
from tutelage.trainer.model.student import Student
from tutelage.trainer.teacher.base import SignalSpec
from tutelage.trainer.teacher.to_tensors import unembedding_of
from tutelage.trainer.training.batch_builder import BatchBuilder
from tutelage.trainer.training.loop import train


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def rows_at(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


SYSTEM = "<|im_start|>system\nAnn sums.<|im_end|>\n"
USER = "<|im_start|>user\nAnn buys 3.<|im_end|>\n"
ASSISTANT = "<|im_start|>assistant\n"
TOLD = {
    "a prompt": ({"teacher_prompt": "Ann buys 3. It is 3."}, None, f"{USER}{ASSISTANT}".replace("3.<", "3. It is 3.<")),
    "messages": (
        {"teacher_messages": [{"role": "system", "content": "Ann sums."}, {"role": "user", "content": "Ann buys 3."}]},
        None,
        f"{SYSTEM}{USER}{ASSISTANT}",
    ),
    "a system message for all": ({}, "Ann sums.", f"{SYSTEM}{USER}{ASSISTANT}"),
    "a row's own before it": (
        {"teacher_prompt": "Ann buys 3. It is 3."},
        "Ann sums.",
        f"{USER}{ASSISTANT}".replace("3.<", "3. It is 3.<"),
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_the_teachers_prompt_is_rendered_as_the_students_is(name, tokenizer, tmp_path):
    row, system, expected = TOLD[name]
    path = rows_at(tmp_path / "rows.jsonl", {"prompt": "Ann buys 3.", "completion": "Good."} | row)
    (example,) = stream_examples(path, tokenizer, template="chat", chat=Chat(teacher_system=system))
    assert tokenizer.decode(example.prompt_ids) == f"{USER}{ASSISTANT}"
    assert tokenizer.decode(example.teacher_prompt_ids) == expected


def test_a_system_message_of_the_conversation_follows_the_teachers(tokenizer, tmp_path):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Ann buys 3."},
        {"role": "assistant", "content": "Good."},
    ]
    path = rows_at(tmp_path / "rows.jsonl", {"messages": messages})
    (example,) = stream_examples(path, tokenizer, template="chat", chat=Chat(teacher_system="Ann sums."))
    assert "Ann sums.\n\nBe short.<|im_end|>" in tokenizer.decode(example.teacher_prompt_ids)
    (plain,) = stream_examples(path, tokenizer, template="chat")
    assert plain.teacher_prompt_ids is None


def test_rows_are_those_of_the_same_completion(tiny_model):
    teacher = InProcessTeacher(tiny_model)
    prompt, told, completion = (np.arange(*ends, dtype=np.int32) for ends in ((10, 14), (30, 41), (50, 56)))
    sequence = token_sequence(prompt, completion, loss_on_prompt=False, teacher_prompt_ids=told)
    asked = sequence.for_teacher
    assert asked.ids.tolist() == [*told, *completion]
    assert asked.targets.tolist() == sequence.targets.tolist() == completion.tolist()
    (found,) = teacher.score([asked], SignalSpec("hidden"))
    with torch.no_grad():
        ids = torch.tensor([[*told, *completion]]).long()
        states = teacher._model.model(ids).last_hidden_state[0, len(told) - 1 : -1].to(torch.bfloat16)
    assert torch.equal(torch.from_numpy(found["hidden_RD"]).view(torch.bfloat16), states)
    with_mask = token_sequence(
        prompt, completion, loss_on_prompt=False, teacher_prompt_ids=told,
        mask=np.array([0, 0, 0, 0, 0, 1, 0, 1, 1, 0], bool),
    )  # fmt: skip
    assert with_mask.for_teacher.targets.tolist() == with_mask.targets.tolist() == [51, 53, 54]


def test_a_batch_asks_the_teacher_with_its_own_prompts(tiny_model, tokenizer, tmp_path):
    rows = [{"prompt": "Ann buys 3.", "completion": "Good.", "teacher_prompt": f"Bob has {i}."} for i in range(4)]
    path = rows_at(tmp_path / "rows.jsonl", *rows)
    asked = []

    class Noting(InProcessTeacher):
        def score(self, sequences, spec):
            asked.extend(sequences)
            return super().score(sequences, spec)

    teacher = Noting(tiny_model)
    config = student_config(tiny_model, path, objective={"name": "gkd"}, sampling={"max_new_tokens": 4})
    student = Student(tiny_model, dtype=config.dtype, optimizer=config.optimizer, vocabulary_size=512)
    batches = BatchBuilder(config, student, teacher, {None: unembedding_of(teacher.unembedding(), student.device)})
    examples = list(stream_examples(path, tokenizer, template="chat"))
    batches.prefetch(0, lambda _step: examples)
    sequences = [sequence for batch in batches.take(0) for sequence in batch.sequences]
    batches.close()
    assert all(tokenizer.decode(each.ids).startswith(USER) for each in sequences)
    assert all("Bob has" in tokenizer.decode(each.ids) for each in asked)
    completions = sorted(each.ids[each.prompt_tokens :].tolist() for each in sequences)
    assert completions == sorted(each.ids[each.prompt_tokens :].tolist() for each in asked)


def test_a_training_measures_and_learns_with_the_teachers_prompt(tiny_model, tmp_path):
    """Told the same as the student, a teacher that is the student itself is no distance away; told more, it is."""
    rows = [{"prompt": f"Ann buys {i}.", "completion": "Good."} for i in range(12)]
    path = rows_at(tmp_path / "rows.jsonl", *rows)
    found = {}
    for system in (None, "Ann sums."):
        config = student_config(
            tiny_model,
            path,
            objective={"name": "forward_kl"},
            dtype="float32",
            steps=1,
            held_out={"sequences": 4, "every_steps": 1},
        )
        data = config.data.model_copy(update={"teacher_system": system})
        config = config.model_copy(update={"data": data})
        folder = tmp_path / str(system)
        train(config, folder=folder, teacher=InProcessTeacher(tiny_model))
        found[system] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["heldout/forward_kl"]
    assert found[None] < 0.01 < 0.1 < found["Ann sums."]


REFUSED = {
    "both": (
        {"teacher_prompt": "Why?", "teacher_messages": [{"role": "user", "content": "Why?"}]},
        "has teacher_prompt and teacher_messages; give one",
    ),
    "an empty one": ({"teacher_prompt": " "}, "expected a string that is not empty"),
    "no messages": ({"teacher_messages": []}, "expected a list that is not empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_say_no_prompt_are_refused_by_line(name, tokenizer, tmp_path):
    row, problem = REFUSED[name]
    path = rows_at(tmp_path / "rows.jsonl", {"prompt": "Ann buys 3.", "completion": "Good."} | row)
    with pytest.raises(DataError, match=rf"rows\.jsonl.*1.*{problem}"):
        list(stream_examples(path, tokenizer, template="chat"))


def test_a_completion_whose_tokens_would_be_others_is_refused(tokenizer, tmp_path):
    """Ann's `apples` is one token after the space that belongs to it, and others after a space that is the prompt's."""
    row = {"prompt": "Ann has 3", "completion": "0 apples.", "teacher_prompt": "Ann has 1"}
    joint = tokenizer.encode("Ann has 10 apples.", add_special_tokens=False)
    apart = tokenizer.encode("Ann has 1") + tokenizer.encode("0 apples.")
    assert joint != apart
    path = rows_at(tmp_path / "rows.jsonl", row)
    with pytest.raises(DataError, match="the completion's tokens would be others"):
        list(stream_examples(path, tokenizer, template="plain"))


def test_several_answers_are_refused_and_the_last_is_not(tokenizer, tmp_path):
    said = [("user", "Hi."), ("assistant", "Hello."), ("user", "Ann buys 3."), ("assistant", "Good.")]
    messages = [{"role": role, "content": content} for role, content in said]
    path = rows_at(tmp_path / "rows.jsonl", {"messages": messages, "teacher_prompt": "Ann buys 3."})
    with pytest.raises(DataError, match=r"several of its answers are learned from.*data\.turns: last"):
        list(stream_examples(path, tokenizer, template="chat"))
    (example,) = stream_examples(path, tokenizer, template="chat", turns="last")
    assert tokenizer.decode(example.teacher_prompt_ids) == f"{USER}{ASSISTANT}"


def test_loss_on_the_prompt_and_a_template_without_a_system_are_refused(tiny_model, tmp_path):
    prompt, told = np.arange(4, dtype=np.int32), np.arange(4, 10, dtype=np.int32)
    with pytest.raises(DataError, match="loss_on_prompt: false"):
        token_sequence(prompt, prompt, loss_on_prompt=True, teacher_prompt_ids=told)
    with pytest.raises(ValidationError, match="plain is no chat template"):
        DataConfig.model_validate({"path": tmp_path, "template": "plain", "teacher_system": "Be kind."})


def test_all_answers_are_learned_from_where_only_a_system_message_is_added(tokenizer, tmp_path):
    said = [("user", "Hi."), ("assistant", "Hello."), ("user", "Ann buys 3."), ("assistant", "Good.")]
    path = rows_at(tmp_path / "rows.jsonl", {"messages": [{"role": role, "content": text} for role, text in said]})
    (example,) = stream_examples(path, tokenizer, template="chat", chat=Chat(teacher_system="Ann sums."))
    sequence = token_sequence(
        example.prompt_ids,
        example.completion_ids,
        loss_on_prompt=False,
        mask=example.mask,
        teacher_prompt_ids=example.teacher_prompt_ids,
    )
    assert "Hello." in tokenizer.decode(sequence.targets)
    asked = sequence.for_teacher
    assert asked.targets.tolist() == sequence.targets.tolist()
    assert tokenizer.decode(asked.ids) == SYSTEM + tokenizer.decode(sequence.ids)
