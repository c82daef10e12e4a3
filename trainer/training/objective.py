"""What a configured objective means to the teacher that is asked and to the losses that are computed."""

from __future__ import annotations

from tutelage.trainer.config.objective import ObjectiveConfig
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution
from tutelage.trainer.teacher.base import SignalSpec


def signal_spec(objective: ObjectiveConfig) -> SignalSpec:
    """What the objective asks of the teacher; it must need one."""
    assert objective.signal is not None
    if objective.signal == "hidden":
        return SignalSpec("hidden")
    if objective.signal == "candidates":
        return SignalSpec("candidates", temperatures=(objective.temperature,))
    return SignalSpec("topk", objective.k, (objective.temperature,), objective.min_mass)


def teacher_distribution_of(objective: ObjectiveConfig, noise_seed: int) -> TeacherDistribution:
    """The teacher distribution that the objective compares with."""
    return TeacherDistribution(
        temperature=objective.temperature,
        student_temperature=objective.student_temperature,
        noise=objective.noise,
        noise_seed=noise_seed,
        scale_by_temperature_squared=objective.scale_by_temperature_squared,
        top_k=objective.teacher_top_k,
        top_p=objective.teacher_top_p,
    )
