"""The error that a user can fix."""


class JobError(Exception):
    """Something the user can put right: told as a title, its cause and the next step.

    The command line prints the three without a traceback and exits with code 2.

    Args:
        title: what could not be done, one sentence.
        cause: why, as found: names, what was expected and what came.
        next_step: what to do about it.
    """

    def __init__(self, title: str, cause: str, next_step: str) -> None:
        super().__init__(f"{title} {cause} {next_step}")
        self.title = title
        self.cause = cause
        self.next_step = next_step
