"""What `tutelage up` can be told."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from tutelage.config import Config
from tutelage.errors import ConfigurationError
from tutelage.names import check_name

Flags = dict[str, str | int | float | bool]
Positive = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]


class TeacherService(Config):
    """One teacher that is served."""

    model: str
    """Directory of a Hugging Face checkpoint, or its name on the hub."""
    serve: Flags = Field(default_factory=dict)
    """Other flags of `tutelage teacher serve`; without `port` it has a free one of loopback."""

    @field_validator("serve")
    @classmethod
    def _check_flags(cls, value: Flags) -> Flags:
        return _without("teachers.serve", value, "model", "address_file")


class EvaluatorService(Config):
    """The evaluator."""

    serve: Flags = Field(default_factory=dict)
    """Flags of `tutelage evaluate serve`; without `port` it has a free one of loopback, and without `frames` and
    `queue` it writes to the folders of these names in `output`."""

    @field_validator("serve")
    @classmethod
    def _check_flags(cls, value: Flags) -> Flags:
        return _without("evaluator.serve", value, "address_file")


class RayService(Config):
    """Ray's head node with its dashboard, on loopback; who asks it needs the token in `ray.token` of `output`."""

    cpus: Positive | None = None
    """CPUs that students may have; none means all of the machine."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs that students may have; none means all. A teacher's is not for them: leave it out here."""
    dashboard_port: Port = 0
    """Port of the dashboard; 0 chooses a free one."""
    object_store_bytes: Positive = 2**28
    """Shared memory for the weights that students hand to their writers."""


class UpConfig(Config):
    """Starts teachers, evaluator, Ray and Prometheus on this machine, and ends them together."""

    COMMON: ClassVar[tuple[str, ...]] = ("output", "teachers", "evaluator", "ray", "prometheus")

    output: Path = Path("runs/up")
    """Folder of logs, addresses, tokens, frames."""
    teachers: dict[str, TeacherService] = Field(default_factory=dict)
    """Teachers by name."""
    evaluator: EvaluatorService | None = EvaluatorService()
    """The evaluator; none (null) starts none."""
    ray: RayService | None = RayService()
    """Ray; none (null) starts none, and each `tutelage train` has a local one."""
    prometheus: bool | None = None
    """Whether Prometheus scrapes all of them; by default if it is installed."""
    prometheus_rules: Path | None = None
    """File of Prometheus' rules, for example `deploy/monitoring/rules.yaml`; none means none."""
    ready_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """How long a service may take until it is ready; a large teacher is read from disk and hashed first."""

    @field_validator("teachers")
    @classmethod
    def _check_names(cls, value: dict[str, TeacherService]) -> dict[str, TeacherService]:
        for name in value:
            check_name(name, "teachers")
        return value

    @model_validator(mode="after")
    def _check(self) -> UpConfig:
        if not (self.teachers or self.evaluator or self.ray):
            raise ConfigurationError("nothing is to be started; name a teacher, the evaluator or Ray", "teachers")
        if self.prometheus and shutil.which("prometheus") is None:
            raise ConfigurationError("it is not on the PATH; install it, or leave it out", "prometheus")
        if self.prometheus_rules and not self.prometheus_rules.is_file():
            raise ConfigurationError(f"there is no file {self.prometheus_rules}", "prometheus_rules")
        if self.ray and find_spec("ray") is None:
            raise ConfigurationError("it is not installed here; `ray: null` leaves it out", "ray")
        return self

    @property
    def with_prometheus(self) -> bool:
        """Whether it is started."""
        return shutil.which("prometheus") is not None if self.prometheus is None else self.prometheus


def _without(field: str, flags: Flags, *ours: str) -> dict[str, Any]:
    named = next((name for name in flags if name.replace("-", "_") in ours), None)
    if named is not None:
        raise ConfigurationError(f"{named} is not for you to give: it follows from what stands beside it", field)
    return flags
