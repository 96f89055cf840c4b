"""Stage 5: report.html and the table of results.

    python jobs/write_report.py --recipe tiny

Runs the stages before it when their results are not in the workspace.
"""

from __future__ import annotations

from jobs.full_pipeline import run_pipeline
from jobs.run_job import run_job

if __name__ == "__main__":
    run_job(__doc__, run_pipeline)
