import json
import os

from cluster.submission import JOB_CONFIG, is_submitted_job, job_id


def test_a_submitted_job_goes_by_its_submission_id(monkeypatch):
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"metadata": {"job_submission_id": "raysubmit_7"}, "runtime_env": {}}))
    assert is_submitted_job()
    assert job_id() == "raysubmit_7"


def test_a_job_run_directly_goes_by_its_process(monkeypatch):
    monkeypatch.delenv(JOB_CONFIG, raising=False)
    assert not is_submitted_job()
    assert job_id() == f"local-{os.getpid()}"
