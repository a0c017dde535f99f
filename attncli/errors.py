"""Everything that can go wrong for a user, in three parts: what was being read, what was found, what to try.

One base class. The parts stay attributes, so that a caller can show them in its own way.
A bug in attncli itself is never one of these: it keeps its traceback.
"""


class AttncliError(Exception):
    """A message a user can act on. `str()` joins the three parts in one sentence each.

    `subject`: what was being read or done, usually a path. `problem`: what was found and what was
    expected. `remedy`: what to try next.
    """

    def __init__(self, subject: str, problem: str, remedy: str) -> None:
        self.subject = subject
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{subject}: {problem} {remedy}")


class CheckpointError(AttncliError):
    """A file or folder that cannot be read as a checkpoint: damaged, hostile, missing or empty."""


class UnsupportedFormatError(CheckpointError):
    """A file that is recognised by name, but that attncli does not read. `remedy` says what to do instead."""


class UsageError(AttncliError):
    """Options that contradict each other or that do not fit the input."""


class ModelError(AttncliError):
    """A model that cannot be loaded or run, or a batch that cannot be made for it."""


class BareCheckpointError(ModelError):
    """Weights alone, where a model is needed: nothing says what to build from them."""
