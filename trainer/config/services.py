"""What a run's students are connected to: their teacher, the evaluator, the cluster."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from tutelage.config import Config
from tutelage.names import check_address
from tutelage.rpc.tls import ClientAccess
from tutelage.tasks import TaskConfig
from tutelage.trainer.config.objective import NotNegative, Positive


class TeacherConfig(ClientAccess):
    """Where the teacher is."""

    address: str | Annotated[tuple[str, ...], Field(min_length=1)] = "127.0.0.1:50051"
    """host:port of the teacher server; several of them in a list, or dns:///name:port, are one teacher."""
    adapter: str | None = None
    """Name of the LoRA adapter to learn from; none means the base model."""
    wait_seconds: Annotated[float, Field(gt=0)] = 600.0
    """How long to wait for a teacher that does not answer before giving up."""

    @field_validator("address")
    @classmethod
    def _check_addresses(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for address in [value] if isinstance(value, str) else value:
            check_address(address)
        return value


class EvaluatorConfig(ClientAccess):
    """Where the evaluator is and what it is asked for."""

    address: Annotated[str, AfterValidator(check_address)] | None = "127.0.0.1:50052"
    """host:port of the evaluator; none means that others have checkpoints scored, as a study does, and the tasks' items
    are only looked for in the rows."""
    tasks: tuple[TaskConfig, ...]
    """Tasks for each evaluated checkpoint, for example `[gsm8k:paper]`."""
    every_steps: NotNegative = 0
    """Evaluate every so many steps besides before and after training; must be saved steps; 0 means not."""


class RayConfig(Config):
    """The cluster that the students run on."""

    address: str | None = None
    """Address of a running cluster; none starts a local one and stops it afterwards."""
    cpus: Positive | None = None
    """CPUs of the local cluster; none means what the students that run at once ask for."""
    dashboard: bool = False
    """Whether the local cluster serves the Ray dashboard (on loopback)."""
    object_store_bytes: Positive | None = None
    """Shared memory of the local cluster; none means 80 MiB, and what the weights take that students hand to their
    writers."""
    wait_seconds: Annotated[float, Field(ge=0)] = 600.0
    """How long a student waits for CPUs or GPUs that a running cluster has not, and that an autoscaler may bring; in a
    local one, to which no node comes, it ends at once."""
    max_restarts: NotNegative = 10
    """How often Ray restarts a student whose process died."""
