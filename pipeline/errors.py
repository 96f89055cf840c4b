"""Every error the pipeline raises on purpose, drawn as one tree.

    PipelineError
    ├── ConfigError          a recipe or an override that cannot mean anything
    ├── DataError            a data file, a row or a field that cannot be used
    ├── ShapeError           tensors that do not fit each other
    ├── ResourceError        the plan asks for more than the cluster has
    ├── WorkspaceError       the place where results live
    │   ├── WorkspaceLocked      another job owns it
    │   └── CorruptManifest      a commit record that cannot be read
    ├── CheckpointError      weights that do not belong to this model
    ├── NumericsError        numbers that must not be trained on
    │   └── StaleEngineError     the rollout engine does not hold the learner's weights
    ├── WorkerError          a remote process that failed
    │   ├── WorkerDied           it is gone, and so is its retry budget
    │   ├── Overloaded           it has more to do than it may take on
    │   ├── DeadlineExceeded     it did not answer in time
    │   └── TransferFailed       weights did not reach the engines from GPU to GPU
    └── Preempted            asked to leave, and left behind a commit

Each error carries its message alone, so it survives pickling across a Ray boundary unchanged.
A message says what happened, with which values, and what to do next.
"""


class PipelineError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(PipelineError):
    """A recipe or an override cannot be turned into a configuration."""


class DataError(PipelineError):
    """A data file, a row or a field cannot be used; the message names file, line and field."""


class ShapeError(PipelineError):
    """Tensors whose shapes must agree do not."""


class ResourceError(PipelineError):
    """The resource plan does not fit the cluster; the message says what would fit."""


class WorkspaceError(PipelineError):
    """The workspace cannot be read or written."""


class WorkspaceLocked(WorkspaceError):
    """Another job owns the workspace; the message names it and says how to take over."""


class CorruptManifest(WorkspaceError):
    """A commit record exists but cannot be read."""


class CheckpointError(PipelineError):
    """A checkpoint does not belong to this model or configuration."""


class NumericsError(PipelineError):
    """A number that must not be trained on: not finite, or outside its tolerance."""


class StaleEngineError(NumericsError):
    """The rollout engine's log-probabilities differ from the learner's after a weight load."""


class WorkerError(PipelineError):
    """A remote process failed."""


class WorkerDied(WorkerError):
    """A remote process is gone and its retry budget is spent."""


class Overloaded(WorkerError):
    """A remote process refuses more work for now; the message says when to ask again."""


class DeadlineExceeded(WorkerError):
    """A remote call did not return in time; the message says which, and for how long it ran."""


class TransferFailed(WorkerError):
    """The engines did not take the weights from the learner's GPUs; the published file still holds them."""


class Preempted(PipelineError):
    """The process was asked to end and has committed what it had done; the same command resumes."""
