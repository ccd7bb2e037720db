"""The job `fastdistill distill-text`: a sentence encoder into one of half its layers.

Follow one run from `job.run`: `config` (the settings) -> `sentences` (the text) -> `encoder` (the
teacher) -> `training` (the losses and the loop) -> `measures` -> `results`, `plots` and `report`.
Directory, checkpoints, resuming and the loop itself are those of `fastdistill distill`.
"""
