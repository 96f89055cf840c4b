import pytest

from pipeline.errors import ConfigError, WorkspaceError
from pipeline.stages.scaling_requests import forget_requests, request_rollout_workers, requested_rollout_workers
from pipeline.stages.workspace import Workspace


def test_a_request_reaches_the_job_that_holds_the_workspace(tmp_path):
    with Workspace.open(str(tmp_path), job="mine", needs_bytes=0) as workspace:
        assert requested_rollout_workers(workspace.uri) is None
        request_rollout_workers(str(tmp_path), 3)
        assert requested_rollout_workers(workspace.uri) == 3
        forget_requests(workspace.uri)
        assert requested_rollout_workers(workspace.uri) is None


def test_asking_nobody_is_refused_with_the_cure(tmp_path):
    with pytest.raises(WorkspaceError, match=r"no job runs in .*cluster\.rollout\.workers=3 instead"):
        request_rollout_workers(str(tmp_path), 3)


def test_a_pool_of_no_workers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="0 rollout workers cannot sample"):
        request_rollout_workers(str(tmp_path), 0)
