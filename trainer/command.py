"""`tutelage train --config cohort.yaml`: trains the students of a cohort and shows how they do."""

from __future__ import annotations

from tutelage.errors import EXIT_DONE, ConfigurationError

from trainer.config import CohortConfig


def main(arguments: list[str]) -> int:
    """Trains students of a served teacher."""
    from tutelage.configuration import load

    if arguments and arguments[0] == "rationales":
        return _rationales(arguments[1:])
    config = load(CohortConfig, arguments, program="tutelage train", environment_prefix="TUTELAGE_TRAIN_")
    if not config.students:
        raise ConfigurationError("there are none; list at least one, with id, init and data", "students")
    return _train(config)


def _rationales(arguments: list[str]) -> int:
    from tutelage.configuration import load

    from trainer.rationales import RationalesConfig, print_written

    program, prefix = "tutelage train rationales", "TUTELAGE_RATIONALES_"
    print_written(load(RationalesConfig, arguments, program=program, environment_prefix=prefix))
    return EXIT_DONE


def _train(config: CohortConfig) -> int:
    from rich.console import Console
    from tutelage.configuration import to_yaml

    from trainer.checkpoints import write_durably
    from trainer.display import Display
    from trainer.supervisor import local_or_connected_ray, supervise

    config.output.mkdir(parents=True, exist_ok=True)
    write_durably(config.output / "cohort.yaml", to_yaml(config).encode())
    console = Console()
    console.print(f"run {config.run}: {len(config.students)} students, results in {config.output}", highlight=False)
    with local_or_connected_ray(config), Display(console) as display:
        students = supervise(config, display.update)
    for student in students:
        if student.outcome and student.outcome.checkpoint:
            console.print(f"{student.config.id}: {student.outcome.checkpoint}", highlight=False, soft_wrap=True)
    failed = [student.error for student in students if student.error]
    if failed:
        raise failed[0]
    return EXIT_DONE
