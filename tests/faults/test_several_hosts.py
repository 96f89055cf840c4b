"""Several hosts without a shared disk: the main job loses one of them, and ends well."""

import json
import os
import secrets
import uuid

import pytest

from tests.faults.several_hosts import NAMES
from tests.support.hosts import isolated, processes_with, reason_against_hosts, wait_for_none_with

REASON = reason_against_hosts()

pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


@pytest.fixture
def mark():
    """An environment variable, `NAME=value`, that all processes of a laboratory inherit. In the end none is left."""
    mark = f"VRM_LABORATORY={uuid.uuid4().hex}"
    yield mark
    assert wait_for_none_with(mark, timeout_s=30) == []


def environment(mark):
    name, value = mark.split("=")
    # The hosts answer nobody without the token, as docs/cluster.md says. Each sees the memory of the whole machine.
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_memory_monitor_refresh_ms": "0"}
    return {**os.environ, **ray, name: value}


@pytest.mark.parametrize("end", ["kill", "close its input"])
def test_no_process_of_a_laboratory_outlives_it(mark, end, tmp_path):
    laboratory = isolated("tests.faults.idle_hosts", str(tmp_path), environment=environment(mark))
    try:
        assert laboratory.stdout.readline() == "two hosts are idle\n"
        # Two programs `unshare` inside, two shells, two that sleep, the laboratory.
        assert len(processes_with(mark)) >= 7
        if end == "close its input":
            laboratory.communicate(timeout=30)
    finally:
        laboratory.kill()
    laboratory.communicate(timeout=30)


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(2400)
def test_the_main_job_on_three_hosts_loses_one_with_a_rank_and_ends_well(mark, tmp_path):
    laboratory = isolated("tests.faults.several_hosts", str(tmp_path), environment=environment(mark))
    with laboratory:
        try:
            output = laboratory.stdout.read()
            code = laboratory.wait()
        finally:
            laboratory.kill()
    notes = (tmp_path / NAMES[0] / "job.log").read_text()
    assert code == 0, notes[-4000:]
    found = json.loads(output)
    assert found["code"] == 0, notes[-4000:]
    assert notes.count("starts again from its last commit") == 1
    assert found["report"]
    assert found["owner"] is None
    assert sorted({row["step"] for row in found["rows"]}) == list(range(6))  # the last step is validated, too
    before = found["before"]
    assert sorted(host["ranks"] for host in before.values()) == [0, 1, 1]
    # Engines of a host fetch the weights once for all of them; those beside the rank that publishes fetch nothing.
    fetching = [host for host in before.values() if host["engines"] and not host["published"]]
    assert found["rows"][0]["rollout/workers"] == 2
    assert found["rows"][0]["weights/copies_fetched"] == len(fetching)
    # The job has removed what it published, from every host that is left.
    assert not any("vrm-weights" in path for files in found["shared memory"].values() for path in files)
