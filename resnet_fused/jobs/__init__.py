# SPDX-License-Identifier: BSD-3-Clause
"""Resumable jobs: a folder of result parts that any number of processes can work on, no engine.

    job = jobs.plan(["photos"], "results", predictor)  # writes the manifest, or reads and checks it
    for unit in job.missing():                         # numbers of the units that have no part yet
        part = job.do(unit, predictor)                 # writes results/part-00042.parquet

A unit is N images that follow each other in the manifest. Its part depends on the manifest and the
fingerprint only: not on who makes it, when, or beside which other units. So an engine may hand the
units out as it likes, do one twice, or stop at any moment: a part is there as a whole or not at
all. A ``Job`` is small and can be pickled (folder and header, not the images); ``do`` checks that
the predictor it is given has the job's fingerprint.

- ``manifest``: which images, in which units, predicted by what.
- ``parts``: one part: its columns, its metadata, how it appears.
- ``job``: ``plan``, ``open_job`` and ``Job``.
- ``local``: the loop for one process, or one of several (``RANK``, ``WORLD_SIZE``).
"""

try:
    import pyarrow  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "jobs with a folder of results need pyarrow: pip install 'resnet_fused[parquet]'"
    ) from error

from resnet_fused.jobs.job import Job, open_job, plan
from resnet_fused.jobs.parts import Part

__all__ = ["Job", "Part", "open_job", "plan"]
