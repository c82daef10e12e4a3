"""Runs what is missing of a study, wave by wave: base models, teachers, students; scores every cell as it is trained.

    base models -> tuned teachers -> students without a teacher -> each teacher's students

A wave is one `tutelage train` with its own Ray, or on the cluster that RAY_ADDRESS names. Killed at any time, the next
run goes on: trained cells are found by their checkpoints, scored ones by their markers, half-trained ones resume.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from tutelage.config import read_mapping
from tutelage.data.hub import is_on_hub
from tutelage.data.merging import whole_model
from tutelage.errors import ConfigurationError, TutelageError
from tutelage.files import write_durably
from tutelage.runtime.processes import last_lines, start, stop
from tutelage.runtime.programs import flags, shared_machine, tutelage
from tutelage.study.cells import Cell
from tutelage.study.config import Settings, access_of
from tutelage.study.folder import Folder
from tutelage.study.models import local_folder
from tutelage.study.resolution import Study, check_inputs, cohort
from tutelage.study.services import Evaluator, note_usage, serve_teacher
from tutelage.up.services import Service

_POLL_SECONDS = 1.0
_USAGE_SECONDS = 15.0  # a killed teacher takes at most so much of its counting with it
Say = Callable[[str], None]


class Driver:
    """One run of a study.

    Args:
        study: with its cells.
        folder: its own, which this process drives.
        say: told what happens, a line each.
        watch: told after each look how many cells are done.

    """

    def __init__(self, study: Study, folder: Folder, say: Say, watch: Callable[[int], None]) -> None:
        self._study, self._config, self._folder = study, study.config, folder
        self._say, self._watch = say, watch
        self._submitted: set[str] = set()
        self._noted: set[str] = set()
        self._teachers: dict[str, Service] = {}
        self._usage_noted = time.monotonic()

    def run(self) -> None:
        """Does what is missing, and only that.

        Raises:
            TutelageError: a service or a cell failed; what is done stays done.

        """
        write_description(self._study, self._folder)
        write_durably(self._folder.path("plan.json"), json.dumps(self._study.to_json()) + "\n")
        if all(self._is_done(cell) for cell in self._study.cells):
            return
        check_inputs(self._study)
        with ExitStack() as stack:
            self._evaluator = Evaluator(self._config.evaluation, self._folder, self._config.name)
            stack.callback(self._evaluator.close)
            # Each wave starts from what the one before it trained.
            self._train("base", self._study.base, {})
            self._train("teachers", self._study.tuned, {})
            untrained = {cell.teacher for cell in self._study.students if not self._folder.is_trained(cell)}
            teachers = [name for name in self._config.teachers if name in untrained]
            # The first loads while others train; one more at a time would only slow them all down.
            ahead = self._serve_members(teachers[0], stack) if teachers else None
            self._train("no-teacher", self._study.students_of(""), {})
            for name in teachers:
                self._teach(name, ahead or self._serve_members(name, stack))
                ahead = None
            self._say("waiting for the last scores")
            while not all(self._is_done(cell) for cell in self._study.cells):
                self._look()
                time.sleep(_POLL_SECONDS)

    def _serve_members(self, name: str, stack: ExitStack) -> dict[str, Service]:
        return {member: self._serve(member, stack) for member in self._study.members(name)}

    def _serve(self, name: str, stack: ExitStack) -> Service:
        teacher = self._config.teachers[name]
        model = whole_model(local_folder(str(self._folder.checkpoint(self._study.teacher_cell(name)))))
        self._say(
            f"starting the teacher {name}" if not teacher.address else f"the teacher {name} is at {teacher.address}"
        )
        writes = any(cell.rationales for cell in self._study.students_of(name))
        service = serve_teacher(name, teacher, model, self._folder, writes=writes, store=self._config.store)
        stack.callback(service.close)
        return service

    def _teach(self, name: str, services: dict[str, Service]) -> None:
        """Every student of one teacher, which several services may be."""
        cells = self._study.students_of(name)
        # Several methods may learn from what one teacher writes, each after a template or data of its own.
        waiting = [cell for cell in cells if cell.rationales and not self._folder.is_trained(cell)]
        examples = {self._study.rationales_file(cell): cell for cell in waiting}
        for file, example in examples.items():
            self._write_rationales(name, services[name], example, self._folder.path("rationales", file))
        self._teachers = services
        asked = {
            member: {"address": service.address, **access_of(self._config.teachers[member])}
            for member, service in services.items()
        }
        self._train(
            name, cells, {"teachers": asked} if self._config.teachers[name].members else {"teacher": asked[name]}
        )
        self._note_usage(0.0)  # the last counts, before they end
        self._teachers = {}
        for service in services.values():
            service.close()

    def _write_rationales(self, name: str, service: Service, example: Cell, path: Path) -> None:
        if path.exists():
            return
        self._say(f"the teacher {name} writes its completions")
        data, writing, teacher = example.settings["data"], self._config.rationales, self._config.teachers[name]
        options = {
            "address": service.address,
            "data": data["path"],
            "template": data["template"],
            "tokenizer": self._start_of(example),
            "out": path,
            **writing.model_dump(),
            **{
                key: value if isinstance(value, str) else json.dumps(value) for key, value in access_of(teacher).items()
            },
        }
        self._command([*tutelage("teacher", "write"), *flags(options)], f"rationales-{name}")

    def _train(self, wave: str, cells: Sequence[Cell], asked: Mapping[str, Any]) -> None:
        """Trains those of a wave that are not trained yet, each after the cells that it needs."""
        missing = [cell for cell in cells if not self._folder.is_trained(cell)]
        part = 0
        while missing:
            waited_for = {cell.id for cell in missing}
            ready = [cell for cell in missing if not {cell.start, cell.as_long_as} & waited_for]
            missing = [cell for cell in missing if cell not in ready]
            part += 1
            name = wave if part == 1 and not missing else f"{wave}-{part}"
            self._say(f"{name}: {len(ready)} of {len(cells)} cells to train")
            self._train_at_once(name, ready, asked)
        self._look()

    def _train_at_once(self, name: str, cells: Sequence[Cell], asked: Mapping[str, Any]) -> None:
        """Trains cells that all can begin."""
        content = cohort(self._config, cells, {cell.id: self._start_of(cell) for cell in cells}, asked)
        for student, cell in zip(content["students"], cells, strict=True):
            if cell.rationales:
                file = self._folder.path("rationales", self._study.rationales_file(cell))
                student["data"] = {**student["data"], "path": str(file)}
            student["data"] = _absolute(student["data"])
            if cell.ends_by != "steps":
                tokens = self._tokens_of(cell)
                student |= {"budget": {cell.ends_by: tokens}, "steps": tokens}
        if "RAY_ADDRESS" in os.environ:  # this driver is a job of a cluster, and its students are that cluster's
            content["ray"] = {"address": os.environ["RAY_ADDRESS"]}
        path = self._folder.path("cohorts", f"{name}.yaml")
        write_durably(path, yaml.safe_dump(content, sort_keys=False))
        # One command for all: it starts one Ray, runs some students at once, and resumes each from its checkpoint. It
        # looks for the items of the tasks among the rows, and so has to find them where the evaluator does.
        where = self._config.evaluation.serve.get("data_dir")
        self._command(
            [*tutelage("train"), "--config", str(path)],
            f"train-{name}",
            {"TUTELAGE_EVALUATE_DATA_DIR": str(where)} if where else {},
        )

    def _tokens_of(self, cell: Cell) -> int:
        """Tokens that a cell which ends by them may spend itself.

        Raises:
            ConfigurationError: what it starts from has spent them all.

        """
        cells = {one.id: one for one in self._study.cells}
        if cell.as_long_as:
            return self._folder.spent(cells[cell.as_long_as], cell.ends_by)
        assert self._config.budget is not None
        left, start = self._config.budget.amount, cells.get(cell.start)
        while start is not None and start.role == "student":
            left, start = left - self._folder.spent(start, cell.ends_by), cells.get(start.start)
        if left < 1:
            raise ConfigurationError(
                f"what {cell.id} starts from spent the budget of {self._config.budget.amount} {cell.ends_by} and "
                f"{-left} more; give that one fewer steps, or raise the budget",
                f"budget.{cell.ends_by}",
            )
        return left

    def _start_of(self, cell: Cell) -> Path:
        """The folder that a cell starts from."""
        first = next((one for one in self._study.cells if one.id == cell.start), None)
        return local_folder(cell.start) if first is None else self._model(first)

    def _command(self, command: list[str], log_name: str, environment: Mapping[str, str] = {}) -> None:
        """Runs a command to its end, looking after the other services meanwhile.

        Raises:
            TutelageError: it failed; the end of its log is in the message.

        """
        log = self._folder.path("logs", f"{log_name}.log")
        process = start(command, log=log, environment={**shared_machine(), **environment})
        try:
            while process.poll() is None:
                self._look()
                time.sleep(_POLL_SECONDS)
        finally:
            code = stop(process)
        if code:
            raise TutelageError(
                f"{log_name} ended with {code}; what is done stays. The end of {log}:\n{last_lines(log)}"
            )

    def _look(self) -> None:
        """Hands over what is trained, marks what is scored, says what was noted, notes what teachers counted."""
        for noted in self._folder.noted(self._study.cells):
            if noted not in self._noted:
                self._say(noted)
                self._noted.add(noted)
        revived = [self._evaluator.revive(), *(service.revive() for service in self._teachers.values())]
        for said in filter(None, revived):
            self._say(said)
        for cell in self._study.cells:
            evaluation_id = self._study.evaluation_id(cell)
            if evaluation_id in self._submitted or self._is_done(cell) or not self._folder.is_trained(cell):
                continue
            # Handed over again after a restart: to the evaluator the same id is the same evaluation.
            self._evaluator.submit(cell, evaluation_id, self._model(cell), step=self._folder.last_step(cell))
            self._submitted.add(evaluation_id)
        waiting = {self._study.evaluation_id(cell): cell for cell in self._study.cells if not self._is_done(cell)}
        for status in self._evaluator.scored():
            scored = waiting.get(status.evaluation_id)
            if scored is not None:
                scores = {score.task: score.score for score in status.scores}
                note = {"id": scored.id, "evaluation_id": status.evaluation_id, "scores": scores}
                self._folder.finish(scored, note | {"finished_at_seconds": time.time()})
        self._note_usage(_USAGE_SECONDS)
        self._watch(sum(self._is_done(cell) for cell in self._study.cells))

    def _note_usage(self, seconds: float) -> None:
        if self._teachers and time.monotonic() - self._usage_noted >= seconds:
            for name, service in self._teachers.items():
                note_usage(name, service.address, self._config.teachers[name], self._folder)
            self._usage_noted = time.monotonic()

    def _model(self, cell: Cell) -> Path:
        """What a cell trained, as a whole model."""
        return whole_model(local_folder(str(self._folder.checkpoint(cell))))

    def _is_done(self, cell: Cell) -> bool:
        return self._folder.is_done(cell, self._study.evaluation_id(cell))


def _absolute(data: Settings) -> Settings:
    """A student's `data` with full paths: the trainer is started in another folder, perhaps."""
    # Not resolved: a link's target may have no suffix, by which the trainer knows the kind of a file.
    filled = {**data}
    if data.get("path"):
        path = Path(data["path"])
        filled["path"] = str(path if is_on_hub(path) else path.absolute())
    if data.get("sources"):
        filled["sources"] = [_absolute(source) for source in data["sources"]]
    return filled


def write_description(study: Study, folder: Folder) -> None:
    """Writes `study.json`: every cell with what it is, and what was declared, for the report."""
    config = study.config
    teachers = {
        # Nothing of a checkpoint is several teachers' answer, which a student's could be compared with.
        name: {"cell": "" if teacher.members else study.teacher_cell(name).id, "tuned": teacher.tuned}
        for name, teacher in config.teachers.items()
    }
    cells = [
        {
            "id": cell.id,
            "evaluation_id": study.evaluation_id(cell),
            "role": cell.role,
            "model": cell.model,
            "parameters": config.models[cell.model].parameters,
            "method": cell.method,
            "objective": cell.objective,
            "teacher": cell.teacher,
            "temperature": cell.temperature,
            "noise": cell.noise,
            "seed": cell.seed,
            "steps": folder.last_step(cell),
            "start": cell.start,
            "control_of": cell.control_of,
            "on_policy": bool(cell.settings) and cell.settings["objective"]["on_policy_fraction"] > 0,
        }
        for cell in study.cells
    ]
    content = {
        "name": config.name,
        "teachers": teachers,
        "cells": cells,
        "tasks": [task.model_dump() for task in config.evaluation.tasks],
        "comparisons": [
            comparison.model_dump() | {"tasks": [_name_of(task) for task in comparison.tasks]}
            for comparison in config.comparisons
        ],
        "claims": [claim.model_dump() for claim in config.claims],
    }
    write_durably(folder.path("study.json"), json.dumps(content, indent=1) + "\n")


def _name_of(task: str) -> str:
    """What rows call a task: a file of one says its name."""
    return str(read_mapping(Path(task), "tasks").get("name")) if task.endswith((".yaml", ".yml")) else task
