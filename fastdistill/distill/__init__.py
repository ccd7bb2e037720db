"""Whole trainings, on top of the losses: `Distiller` for yours, and the jobs of the command.

`Distiller`, `Hint` and `student_from_teacher` are for programs of your own.

Follow one run of `fastdistill distill` from `job.run`: `config` (the settings) -> `data` (the
images) -> `engine` (the training loop, with the losses of `objectives`) -> `results`, `plots` and
`report`. What is on disk between two runs is the business of `directory`, `store` and `snapshot`.

Importing this package imports no package of the extras `fastdistill[distill]` and
`fastdistill[text]`; `fastdistill.distill.job` imports the former.
"""

from fastdistill.distill.config import Config
from fastdistill.distill.distiller import Distilled, Distiller, Hint, Losses
from fastdistill.distill.errors import JobError
from fastdistill.distill.students import student_from_teacher

__all__ = [
    "Config",
    "Distilled",
    "Distiller",
    "Hint",
    "JobError",
    "Losses",
    "student_from_teacher",
]
