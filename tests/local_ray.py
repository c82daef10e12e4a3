"""A local Ray in the test's own process, on loopback, gone at the end of the block."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def local_ray(temporary: Path, cpus: int = 4) -> Iterator[None]:
    """Actors import what this process can import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        import ray
        import ray._private.ray_constants as constants

        # Else Ray makes of 127.0.0.1 an address that other machines reach; read already, where Ray is imported.
        patch.setenv(constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0")
        patch.setattr(constants, "ENABLE_RAY_CLUSTER", False)
        ray.init(
            "local",  # Whatever other Ray runs on this machine.
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            namespace="test",
            log_to_driver=False,
            logging_level="error",
            _node_ip_address="127.0.0.1",
        )
        try:
            yield
        finally:
            ray.shutdown()
