"""The teacher and the evaluator that a cohort's configuration names, connected to for one student."""

from __future__ import annotations

from contextlib import ExitStack

from tutelage.data.hub import local_model
from tutelage.identity import chat_template_digest, tokenizer_digests
from tutelage.names import name_in_run
from tutelage.trainer.cluster.evaluator_client import EvaluatorClient
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.config.services import TeacherConfig
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.teacher.base import Teacher
from tutelage.trainer.teacher.grpc_client import TeacherClient, Waiting
from tutelage.trainer.teacher.several import Name, SeveralTeachers
from tutelage.trainer.teacher.stored import StoredTeacher


def open_teacher(config: CohortConfig, student: StudentConfig, waiting: Waiting, stack: ExitStack) -> Teacher | None:
    """Who scores for this student, for as long as the stack is open; None if the configuration names nobody.

    Several connections of one student count as one to the teacher: they share its part of the capacity.

    Raises:
        TutelageError: as `StoredTeacher` and `TeacherClient`.

    """
    init = local_model(student.start, "init")
    digests = tokenizer_digests(init)
    compares = any(source.template == "chat" and source.chat_template == "same" for source in student.sources)
    template = chat_template_digest(init) if compares else ""
    # First: with stored signals no teacher is asked, though the configuration has an address by default.
    if config.signals_from is not None:
        return StoredTeacher(config.signals_from, tokenizer_digests=digests, chat_template_digest=template)
    named: list[tuple[Name, TeacherConfig]] = [*config.teachers.items()]
    if config.teacher is not None:
        named.append((None, config.teacher))
    clients = {
        name: stack.enter_context(
            TeacherClient(
                teacher.address,
                student_id=name_in_run(config.run, student.id),
                wait_seconds=teacher.wait_seconds,
                tokenizer_digests=digests,
                chat_template_digest=template,
                adapter=teacher.adapter,
                waiting=waiting,
                tls=teacher.tls,
                token_file=teacher.token_file,
            )
        )
        for name, teacher in named
    }
    return SeveralTeachers(clients) if config.teachers else clients.get(None)


def open_evaluator(
    config: CohortConfig, student: StudentConfig, teacher: Teacher | None, stack: ExitStack
) -> EvaluatorClient | None:
    """Where this student's checkpoints go, for as long as the stack is open; None means nowhere."""
    if config.evaluator is None or config.evaluator.address is None:
        return None
    client = EvaluatorClient(
        config.evaluator,
        run=config.run,
        student=student,
        teacher=teacher.identity.model_name if teacher else "",
        folder=config.folder(student.id),
    )
    return stack.enter_context(client)
