"""Inputs that a person may give and that cannot be right: what each ends with, and what is said.

To add one: an entry of `WRONG`, and its files in `prepare` if it needs any. Arguments are formatted with `{here}`, the
folder that `prepare` fills; commands run in it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from study_cases import write_study
from tutelage.errors import EXIT_DATA, EXIT_UNREACHABLE, EXIT_USAGE


@dataclass(frozen=True)
class Wrong:
    """One wrong input."""

    command: str
    """What follows `tutelage`."""
    code: int
    says: str
    """Part of the one line."""


TRAIN = "train --config cohort.yaml"
WRITE = "teacher write --data rows.jsonl --tokenizer cut --out o.jsonl"
EVALUATE = "evaluate --checkpoint no-config"
WRONG = [
    # The command line itself.
    Wrong("trian", EXIT_USAGE, "did you mean train?"),
    Wrong("train", EXIT_USAGE, "there are none; list at least one"),
    Wrong(f"{TRAIN} --config cohort.yaml", EXIT_USAGE, "there are 2, cohort.yaml and cohort.yaml; give one"),
    Wrong("train --config nowhere.yaml", EXIT_USAGE, "cannot read nowhere.yaml"),
    Wrong("train --config latin1.yaml", EXIT_USAGE, "cannot read latin1.yaml: it is not UTF-8"),
    Wrong("train --config twice.yaml", EXIT_USAGE, "'run' stands there twice, in lines 1 and 2"),
    Wrong("train --config list.yaml", EXIT_USAGE, "holds list, expected keys and values"),
    Wrong("train --config broken.yaml", EXIT_USAGE, "cannot read broken.yaml"),
    Wrong(f"{TRAIN} --output ~nobody-of-this-name/x", EXIT_USAGE, "give the whole path"),
    # Other tools' names for our settings.
    Wrong(f"{TRAIN} --lmbda 0.5", EXIT_USAGE, "here that is defaults.objective.on_policy_fraction"),
    Wrong(f"{TRAIN} --report_to wandb", EXIT_USAGE, "did you mean defaults.report_to?"),
    Wrong(f"{TRAIN} --num_train_epochs 3", EXIT_USAGE, "here that is defaults.epochs"),
    Wrong(f"{TRAIN} --per_device_train_batch_size 8", EXIT_USAGE, "a step has batch.sequences"),
    Wrong(f"{TRAIN} --max_length 512", EXIT_USAGE, "here that is defaults.batch.max_tokens"),
    Wrong(f"{TRAIN} --learning_rate 1e-4", EXIT_USAGE, "did you mean defaults.optimizer.learning_rate?"),
    Wrong(f"{TRAIN} --output_dir x", EXIT_USAGE, "here that is output"),
    Wrong(f"{TRAIN} --resume_from_checkpoint x", EXIT_USAGE, "the same command goes on"),
    Wrong(f"{TRAIN} --lr fast", EXIT_USAGE, "invalid float value: 'fast'"),
    Wrong(f"{TRAIN} --steps 0", EXIT_USAGE, "steps: Input should be greater than or equal to 1"),
    Wrong(f"{TRAIN} --students nobody", EXIT_USAGE, "'nobody' is none of ['ann']"),
    # A student's model.
    Wrong(f"{TRAIN} --defaults.init nowhere", EXIT_DATA, "init: nowhere is no folder"),
    Wrong(f"{TRAIN} --defaults.init owner/nothing", EXIT_DATA, "owner/nothing is no folder here, and the hub"),
    Wrong(f"{TRAIN} --defaults.init rows.jsonl", EXIT_DATA, "rows.jsonl is no folder"),
    Wrong(f"{TRAIN} --defaults.init no-config", EXIT_DATA, "has no config.json"),
    Wrong(f"{TRAIN} --defaults.init no-tokenizer", EXIT_DATA, "has no tokenizer.json"),
    Wrong(f"{TRAIN} --defaults.init pickled", EXIT_DATA, "only safetensors are loaded, since a pickle can run code"),
    Wrong(f"{TRAIN} --defaults.init cut", EXIT_DATA, "it was cut off; fetch it again"),
    Wrong(f"{TRAIN} --defaults.init damaged", EXIT_DATA, "is no file of safetensors"),
    Wrong(f"{TRAIN} --defaults.init own-code", EXIT_USAGE, "needs code of its own ('homemade'"),
    # Its data.
    Wrong(f"{TRAIN} --defaults.data.path nowhere.jsonl", EXIT_DATA, "nowhere.jsonl is not a file"),
    Wrong(f"{TRAIN} --defaults.data.path latin1.jsonl", EXIT_DATA, "latin1.jsonl, line 1: is not UTF-8"),
    Wrong(f"{TRAIN} --defaults.data.path rows.csv", EXIT_DATA, "rows.csv is none of"),
    Wrong(f"{TRAIN} --defaults.data.path empty.jsonl", EXIT_DATA, "empty.jsonl holds no rows"),
    Wrong(f"{TRAIN} --defaults.data.path other.jsonl", EXIT_DATA, "other.jsonl, line 1"),
    Wrong(f"{TRAIN} --defaults.data.path broken.jsonl", EXIT_DATA, "broken.jsonl, line 2: is not JSON"),
    Wrong(f"{TRAIN} --defaults.data.path damaged.parquet", EXIT_DATA, "is not readable as Parquet"),
    # Where it is written, whom it asks.
    Wrong(f"{TRAIN} --output rows.jsonl", EXIT_USAGE, "rows.jsonl is a file; name another one"),
    Wrong(f"{TRAIN} --output rows.jsonl/run", EXIT_USAGE, "rows.jsonl is a file; name another one"),
    Wrong(f"{TRAIN} --teacher.address 127.0.0.1:99999", EXIT_USAGE, "teacher.address: '127.0.0.1:99999' is no address"),
    Wrong(f"{TRAIN} --teacher.address somewhere", EXIT_USAGE, "'somewhere' is no address"),
    Wrong(f"{TRAIN} --teacher.token-file nowhere", EXIT_USAGE, "teacher.token_file: cannot read nowhere"),
    Wrong(f"{TRAIN} --teacher.tls.ca nowhere", EXIT_USAGE, "teacher.tls.ca: cannot read nowhere"),
    Wrong(f"{TRAIN} --signals-from nowhere", EXIT_DATA, "signals_from: nowhere is no folder"),
    # Asking and steering.
    Wrong("students list --output nowhere", EXIT_USAGE, "nowhere is not the folder of a run"),
    Wrong("students scale 0 --output nowhere", EXIT_USAGE, "0 students at once is none"),
    Wrong("teacher info --address 127.0.0.1:99999", EXIT_USAGE, "'127.0.0.1:99999' is no address"),
    Wrong("teacher info --address 127.0.0.1:1", EXIT_UNREACHABLE, "127.0.0.1:1"),
    # A teacher's model, and what it is to read.
    Wrong("teacher serve nowhere", EXIT_DATA, "model: nowhere is no folder"),
    Wrong("teacher serve --model pickled", EXIT_DATA, "model: pickled has no model.safetensors; only safetensors"),
    Wrong("teacher serve --model cut", EXIT_DATA, "it was cut off; fetch it again"),
    Wrong("teacher serve --model own-code", EXIT_USAGE, "model: own-code needs code of its own"),
    Wrong("teacher serve no-config --dry-run --host 0.0.0.0", EXIT_USAGE, "or pass --insecure"),
    Wrong("teacher serve no-config --dry-run --token-file nowhere", EXIT_USAGE, "token_file: cannot read nowhere"),
    Wrong(
        "teacher serve no-config --dry-run --tls.certificate nowhere --tls.key x", EXIT_USAGE, "tls.key: cannot read"
    ),
    Wrong("teacher serve no-config --dry-run --address-file rows.jsonl/a", EXIT_USAGE, "address_file: rows.jsonl"),
    Wrong("teacher serve no-config --dry-run --store.path rows.jsonl", EXIT_USAGE, "store.path: rows.jsonl"),
    Wrong("teacher serve no-config --lora-modules a", EXIT_USAGE, "lora_modules: takes NAME=VALUE"),
    Wrong("teacher precompute --model no-config --data rows.jsonl --store.path s", EXIT_DATA, "has no config.json"),
    Wrong("teacher write --data latin1.jsonl --tokenizer cut --out o.jsonl", EXIT_DATA, "line 1: is not UTF-8"),
    Wrong("teacher write --data rows.jsonl --tokenizer cut --out o.csv", EXIT_DATA, "out: o.csv is none of .jsonl"),
    Wrong("teacher write --data rows.jsonl --tokenizer cut --out rows.jsonl/o.json", EXIT_USAGE, "is a file"),
    Wrong("teacher write --data rows.jsonl --tokenizer nowhere --out o.jsonl", EXIT_DATA, "tokenizer: nowhere is no"),
    Wrong(f"{WRITE} --template plain --teacher-system short", EXIT_USAGE, "template: plain is no chat template"),
    Wrong(f"{WRITE} --chat-template nowhere.jinja", EXIT_USAGE, "chat_template: cannot read nowhere.jinja"),
    # Evaluating.
    Wrong(f"{EVALUATE} --tasks gsm9k", EXIT_USAGE, "'gsm9k' is not a task"),
    Wrong(f"{EVALUATE} --tasks gsm8k:loglik", EXIT_USAGE, "gsm8k has no protocol 'loglik'"),
    Wrong(f"{EVALUATE} --tasks nowhere.yaml", EXIT_USAGE, "cannot read nowhere.yaml"),
    Wrong(f"{EVALUATE} --tasks latin1.yaml", EXIT_USAGE, "cannot read latin1.yaml: it is not UTF-8"),
    Wrong(
        f"{EVALUATE} --tasks harness.yaml", EXIT_USAGE, "harness.yaml: name, question, answer: has to be given; task"
    ),
    Wrong(f"{EVALUATE} --tasks jinja.yaml", EXIT_USAGE, "'{{q}}' names no field of a record"),
    Wrong(f"{EVALUATE} --tasks list-by-name.yaml", EXIT_DATA, "does not fill '{options[place]}'"),
    Wrong(f"{EVALUATE} --tasks gsm8k --data-dir nowhere", EXIT_DATA, "looked in nowhere"),
    Wrong(f"{EVALUATE} --tasks arithmetic --limit 2.5", EXIT_USAGE, "a share below 1"),
    Wrong(f"{EVALUATE} --tasks arithmetic --out rows.jsonl", EXIT_USAGE, "rows.jsonl is a file"),
    Wrong(f"{EVALUATE} --tasks arithmetic --output_path rows.jsonl/x", EXIT_USAGE, "rows.jsonl is a file"),
    Wrong(f"{EVALUATE} --tasks arithmetic --temperature 1", EXIT_USAGE, "of sampling it is sampling_temperature"),
    Wrong(f"{EVALUATE} --tasks arithmetic --num_fewshot 5", EXIT_USAGE, "zero-shot"),
    Wrong("evaluate --model_args pretrained=tiny --tasks arithmetic", EXIT_USAGE, "name the model by --checkpoint"),
    Wrong("evaluate --checkpoint nowhere --tasks arithmetic", EXIT_DATA, "nowhere is no folder here, and the hub"),
    Wrong("evaluate --checkpoint no-tokenizer --tasks arithmetic", EXIT_DATA, "no-tokenizer"),
    Wrong("evaluate --checkpoint pickled --tasks arithmetic", EXIT_DATA, "pickle"),
    Wrong("evaluate --checkpoint cut --tasks arithmetic", EXIT_DATA, "cut off"),
    Wrong("evaluate --checkpoint damaged --tasks arithmetic", EXIT_DATA, "damaged"),
    Wrong("evaluate --checkpoint own-code --tasks arithmetic", EXIT_USAGE, "own"),
    Wrong("evaluate serve --engine transformers --address 127.0.0.1:5", EXIT_USAGE, "give --host and --port"),
    Wrong("evaluate serve --engine transformers --host 127.0.0.1:5", EXIT_USAGE, "is no host to listen on"),
    Wrong("evaluate serve --engine transformers --dry-run --host ::", EXIT_USAGE, "or pass --insecure"),
    Wrong("evaluate serve --engine transformers --token-file nowhere", EXIT_USAGE, "token_file: cannot read nowhere"),
    Wrong("evaluate serve --engine transformers --queue rows.jsonl", EXIT_USAGE, "queue: rows.jsonl"),
    Wrong("evaluate serve --engine transformers --address-file rows.jsonl/a", EXIT_USAGE, "address_file: rows.jsonl"),
    Wrong("evaluate watch --run-dir nowhere --tasks arithmetic", EXIT_USAGE, "name the folder of a run"),
    Wrong("evaluate export --frames nowhere", EXIT_DATA, "nowhere has no rows"),
    Wrong("evaluate wait some --address 127.0.0.1:1", EXIT_UNREACHABLE, "127.0.0.1:1"),
    Wrong("evaluate cancel some --address 127.0.0.1:1", EXIT_UNREACHABLE, "127.0.0.1:1"),
    Wrong("evaluate submit --checkpoint a/b/c --tasks arithmetic", EXIT_DATA, "checkpoint: a/b/c is no folder"),
    Wrong("evaluate submit --checkpoint cut --tasks arithmetic --address 127.0.0.1:1", EXIT_UNREACHABLE, "127.0.0.1:1"),
    Wrong("report --frames nowhere", EXIT_DATA, "nowhere has no rows"),
    Wrong("report --study nowhere", EXIT_DATA, "nowhere is not the folder of a study"),
    # Studies.
    Wrong("study plan nowhere.yaml", EXIT_USAGE, "there is no file nowhere.yaml, and the ready studies are"),
    Wrong("study plan latin1.yaml", EXIT_USAGE, "latin1.yaml"),
    Wrong("study plan twice.yaml", EXIT_USAGE, "'run' stands there twice"),
    Wrong("study run no-model.yaml", EXIT_DATA, "models.tiny.path: no-model is no folder here"),
    Wrong("study status list.yaml", EXIT_USAGE, "holds list, expected keys and values"),
]


def prepare(here: Path, tiny_model: Path) -> None:
    """Puts the files that the commands name into a folder."""
    row = json.dumps({"prompt": "Two and two?", "completion": "4"})
    texts = {
        "rows.jsonl": f"{row}\n" * 8,
        "rows.csv": "prompt,completion\n",
        "empty.jsonl": "\n",
        "other.jsonl": '{"source": "x", "target": "y"}\n',
        "broken.jsonl": f"{row}\n{{\n",
        "damaged.parquet": "PAR1",
        "twice.yaml": "run: a\nrun: b\n",
        "list.yaml": "- run\n",
        "options.jsonl": '{"q": "Which?", "options": ["a", "b"]}\n',
        "list-by-name.yaml": 'name: own\ndata: options.jsonl\nquestion: "{q}"\nanswer: "{options[place]}"\n',
        "harness.yaml": "task: own\ndata: options.jsonl\ndoc_to_text: '{{q}}'\n",
        "jinja.yaml": "name: own\ndata: options.jsonl\nquestion: '{{q}}'\nanswer: '{q}'\n",
        "broken.yaml": "run: [\n",
    }
    for name, text in texts.items():
        (here / name).write_text(text)
    (here / "latin1.yaml").write_bytes("run: é\n".encode("latin1"))
    (here / "latin1.jsonl").write_bytes('{"prompt": "é"}\n'.encode("latin1"))
    defaults = {"init": str(tiny_model), "data": {"path": "rows.jsonl"}, "objective": {"name": "sft"}}
    cohort = {"output": "run", "defaults": {**defaults, "held_out": {"sequences": 2}}, "students": [{"id": "ann"}]}
    (here / "cohort.yaml").write_text(yaml.safe_dump(cohort))
    model = {"path": "no-model", "parameters": 1, "hidden_size": 128}
    write_study(here, tiny_model, models={"tiny": model}, output=str(here / "study")).rename(here / "no-model.yaml")
    for name in ("no-config", "no-tokenizer", "pickled", "cut", "damaged", "own-code"):
        shutil.copytree(tiny_model, here / name)
    (here / "no-config/config.json").unlink()
    (here / "no-tokenizer/tokenizer.json").unlink()
    (here / "pickled/model.safetensors").rename(here / "pickled/pytorch_model.bin")
    weights = (here / "cut/model.safetensors").read_bytes()
    (here / "cut/model.safetensors").write_bytes(weights[: len(weights) // 2])
    (here / "damaged/model.safetensors").write_bytes(b"\x00" * 64)
    config = json.loads((here / "own-code/config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoModelForCausalLM": "modeling_homemade.Homemade"}}
    (here / "own-code/config.json").write_text(json.dumps(config))
