"""Student and teacher that end or write texts differently: united or refused; a checkpoint ends as it was sampled."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig

from trainer_cases import student_config, write_rows
from trainer_doubles import InProcessTeacher
from tutelage.data.merging import whole_model
from tutelage.data.prompts import completion_end_id
from tutelage.errors import IdentityMismatch
from tutelage.evaluator.models.transformers_engine import TransformersEngine
from tutelage.identity import end_token_ids, require_tokenizer_as_its_file, tokenizer_digests
from tutelage.teacher_server.config import TeacherConfig
from tutelage.teacher_server.model.loading import describe, read_checkpoint
from tutelage.trainer.config.student import DataConfig, StudentConfig
from tutelage.trainer.model.layer_pruning import prune_layers
from tutelage.trainer.rollout import hf_sampler
from tutelage.trainer.training.loop import train

ENDOFTEXT, IM_END = 0, 2


def change(folder: Path, file: str, **values: object) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def student(tiny_model: Path, tmp_path: Path) -> Path:
    """A student for which <|endoftext|> ends a text, in its tokenizer and its generation configuration."""
    folder = tmp_path / "student"
    prune_layers(tiny_model, folder, layers=2)
    change(folder, "tokenizer_config.json", eos_token="<|endoftext|>")
    change(folder, "generation_config.json", eos_token_id=ENDOFTEXT)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def with_template(template: str, student: Path, data: Path, **changes: object) -> StudentConfig:
    config = student_config(student, data, **changes)
    return config.model_copy(update={"data": DataConfig(path=data, template=template)})


def saved_ends(checkpoint: Path) -> int | list[int]:
    return GenerationConfig.from_pretrained(checkpoint).eos_token_id


def test_end_tokens_of_a_checkpoint_are_its_tokenizers_and_its_generations(student, tiny_model):
    assert end_token_ids(tiny_model) == [IM_END]
    assert end_token_ids(student) == [ENDOFTEXT]
    change(student, "generation_config.json", eos_token_id=[5, IM_END])
    assert end_token_ids(student) == [ENDOFTEXT, IM_END, 5]
    change(student, "tokenizer_config.json", eos_token={"content": "<|im_end|>", "special": True})
    assert end_token_ids(student) == [IM_END, 5]


def test_a_teacher_announces_the_tokens_that_end_its_texts(student):
    config = TeacherConfig(model=str(student))
    assert describe(read_checkpoint(student, config), config, None).end_token_ids == [ENDOFTEXT]


@pytest.mark.parametrize("teachers", [(), (IM_END,)])
def test_a_students_samples_end_where_its_teachers_texts_do(teachers, student, data, tiny_model, tmp_path, monkeypatch):
    used = []

    original = hf_sampler.sample

    def watched(*arguments, **keywords):
        used.append(keywords["end_ids"])
        return original(*arguments, **keywords)

    monkeypatch.setattr(hf_sampler, "sample", watched)
    teacher = InProcessTeacher(tiny_model)
    teacher.identity = replace(teacher.identity, end_token_ids=teachers)
    objective = {"name": "gkd", "on_policy_fraction": 1.0}
    config = with_template("plain", student, data, objective=objective)
    done = train(config, folder=tmp_path / "run", teacher=teacher)
    expected = {ENDOFTEXT, *teachers}
    assert used
    assert all(ends == expected for ends in used)
    assert saved_ends(done.checkpoint) == (sorted(expected) if teachers else ENDOFTEXT)


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
def test_what_learned_to_close_turns_is_saved_to_end_with_them(lora, student, data, tmp_path):
    config = with_template("chat", student, data, objective={"name": "sft"}, lora=lora)
    done = train(config, folder=tmp_path / "run", teacher=None)
    assert completion_end_id("chat", AutoTokenizer.from_pretrained(done.checkpoint)) == IM_END
    assert saved_ends(done.checkpoint) == [ENDOFTEXT, IM_END]
    assert saved_ends(whole_model(done.checkpoint)) == [ENDOFTEXT, IM_END]
    engine = TransformersEngine(done.checkpoint, dtype="float32", batch_size=1)
    assert engine._end_ids == {ENDOFTEXT, IM_END}


@pytest.mark.parametrize(
    ("file", "values", "name"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizerFast"}, "LlamaTokenizer"),
        ("config.json", {"model_type": "qwen2"}, "Qwen2Tokenizer"),
    ],
)
def test_a_class_that_reads_the_tokenizer_otherwise_than_the_file_is_refused(
    file, values, name, student, data, tmp_path
):
    change(student, file, **values)
    if file == "config.json":
        change(student, "tokenizer_config.json", tokenizer_class=None)
    with pytest.raises(IdentityMismatch, match=f"{name}.*split .* into different tokens") as refused:
        train(student_config(student, data, objective={"name": "sft"}), folder=tmp_path / "run", teacher=None)
    assert refused.value.field == "tokenizer_class"


def test_what_the_refusal_of_a_tokenizer_class_advises_ends_it(student):
    change(student, "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    with pytest.raises(IdentityMismatch, match="Name the class that the file was made for"):
        require_tokenizer_as_its_file(AutoTokenizer.from_pretrained(student), student)
    change(student, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    require_tokenizer_as_its_file(AutoTokenizer.from_pretrained(student), student)
    change(student, "config.json", model_type="qwen2")  # whose own class is taken whatever is named
    with pytest.raises(IdentityMismatch, match=r"as qwen2.* save the tokenizer anew"):
        require_tokenizer_as_its_file(AutoTokenizer.from_pretrained(student), student)
    AutoTokenizer.from_pretrained(student).save_pretrained(student)
    require_tokenizer_as_its_file(AutoTokenizer.from_pretrained(student), student)


def write_old_llama_tokenizer(folder: Path) -> None:
    """As Llama 2's: its file puts a space before every text, which transformers' class does by another pipeline."""
    special = ["<unk>", "<s>", "</s>"]
    words = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    words.train_from_iterator(["Ann has 3 apples and buys 24 more, so she has 27 of them in all."] * 9, trainer)
    model = json.loads(words.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=model["vocab"], merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **named}))


def test_a_class_that_writes_another_tokenizer_than_it_reads_leaves_the_students_in_its_checkpoints(
    student, data, tmp_path
):
    write_old_llama_tokenizer(student)
    AutoTokenizer.from_pretrained(student).save_pretrained(tmp_path / "rewritten")
    assert tokenizer_digests(tmp_path / "rewritten") != tokenizer_digests(student)
    config = with_template("plain", student, data, objective={"name": "sft"})
    done = train(config, folder=tmp_path / "run", teacher=None)
    assert tokenizer_digests(done.checkpoint) == tokenizer_digests(student)


def test_a_checkpoints_tokenizer_is_the_students(student, data, tmp_path):
    done = train(student_config(student, data, objective={"name": "sft"}), folder=tmp_path / "run", teacher=None)
    assert tokenizer_digests(done.checkpoint) == tokenizer_digests(student)
    assert (done.checkpoint / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()


def test_a_token_that_only_the_configuration_adds_is_found(student, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(student, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    require_tokenizer_as_its_file(tokenizer, folder)
    tokenizer.add_tokens(["<|think|>"])
    with pytest.raises(IdentityMismatch, match="into different tokens"):
        require_tokenizer_as_its_file(tokenizer, folder)
