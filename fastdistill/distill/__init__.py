"""The main job, `fastdistill distill`: a teacher, its students, and a report on both.

Follow one run from `job.run`: `config` (the settings) -> `data` (the images) -> `engine` (the
training loop, with the losses of `objectives`) -> `results`, `plots` and `report`. What is on disk
between two runs is the business of `directory`, `store` and `snapshot`.

Importing this package imports neither torch nor any package of the extra `fastdistill[distill]`;
`fastdistill.distill.job` imports both.
"""

from fastdistill.distill.config import Config
from fastdistill.distill.errors import JobError

__all__ = ["Config", "JobError"]
