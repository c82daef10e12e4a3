"""Four students with two writers each on a Ray cluster of two nodes: one of them has a writer on the other node."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

import pytest
import yaml

from trainer_cohorts import assert_finished, running, wait_until, write_cohort
from trainer_doubles import FaultyServicer, InProcessTeacher, serving

STEPS, STUDENTS = 60, ("ann", "bob", "cid", "dan")
# Three processes a student: one student and a part of another on the first node, the rest on the second.
NODES_CPUS = (4, 8)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Two nodes on loopback; gives the cluster's address, to which this process is connected."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster()
    try:
        for number, cpus in enumerate(NODES_CPUS, 2):
            # Not 127.0.0.1, which Ray replaces by an address that others reach when it connects.
            nodes.add_node(
                num_cpus=cpus,
                node_ip_address=f"127.0.0.{number}",
                object_store_memory=80 * 2**20,
                include_dashboard=False,
            )
        ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
        yield str(nodes.address)
        ray.shutdown()
    finally:
        nodes.shutdown()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_four_students_with_two_writers_each_finish_on_two_nodes(cluster, tiny_model, tmp_path):
    import ray

    log = tmp_path / "log"
    with serving(FaultyServicer(InProcessTeacher(tiny_model), tiny_model)) as address:
        cohort = write_cohort(tmp_path, tiny_model, address, STEPS)
        values = yaml.safe_load(cohort.read_text())
        values |= {"ray": {"address": cluster}, "students": [{"id": name} for name in STUDENTS]}
        values["defaults"] |= {
            "objective": {"name": "gkd", "on_policy_fraction": 1.0},
            "sampling": {"max_new_tokens": 12, "max_staleness": 1, "writers": {"count": 2}},
        }
        cohort.write_text(yaml.safe_dump(values))
        expected = {f"student-{name}{part}" for name in STUDENTS for part in ("", "-writer-0", "-writer-1")}
        seen: dict[str, str] = {}

        def all_are_there() -> bool:
            named = {each["name"] for each in ray.util.list_named_actors(all_namespaces=True)}
            if expected <= named:
                actors = {name: ray.get_actor(name, namespace=values["run"]) for name in expected}
                state = ray._private.state.actors()
                seen.update({name: state[each._actor_id.hex()]["Address"]["NodeID"] for name, each in actors.items()})
            return bool(seen)

        with running(["train", "--config", str(cohort)], log) as train:
            wait_until(all_are_there, 400, log, train)
            assert train.wait(400) == 0, log.read_text()[-3000:]
    assert_finished(tmp_path, STEPS, STUDENTS)
    nodes = {name: {seen[each] for each in expected if each.startswith(f"student-{name}")} for name in STUDENTS}
    print({name: len(of) for name, of in nodes.items()})
    assert len(set(seen.values())) == 2
    assert any(len(of) == 2 for of in nodes.values()), "nobody's weights went to another node"
    end = time.monotonic() + 30
    while any(each["name"] in expected for each in ray.util.list_named_actors(all_namespaces=True)):
        assert time.monotonic() < end, "actors are left"
        time.sleep(0.5)
