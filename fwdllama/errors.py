"""What can go wrong, as a tree; the command line turns each into one line and an exit code.

    FwdllamaError          exit 1
    |-- UsageError         exit 2: an option's value cannot work, whatever the files say
    |-- ModelError         the base model cannot be used
    |-- AdapterError       the adapter cannot be used, or not with this model or scope
    |-- DataError          the training or evaluation data cannot be used
    |-- EngineError        llama.cpp refused, or the installed build lacks something
    |-- NoiseError         the loss differences asked for are below what the model's arithmetic can resolve
    |-- ResourceError      memory, disk or permission is missing; found before work begins where possible
    |-- RunError           a run directory is busy, damaged, or belongs to another model or configuration
    `-- FederationError    an aggregator and a device cannot work together
        |-- Unreachable    no answer, or none that counts: the same may succeed later
        |-- Refused        the aggregator said no, and would again
        `-- Stopped        the user asked to stop while something was waited for

Messages say what was wrong, the value, where, and what would be right, in one sentence or two. Files are checked by
`gguf_tools`, whose own `gguf_tools.errors.FileError` is a leaf of the same kind (exit 1).
"""


class FwdllamaError(Exception):
    """Base of everything this package raises on purpose."""

    exit_code = 1


class UsageError(FwdllamaError):
    """An option or a combination of options cannot work."""

    exit_code = 2


class ModelError(FwdllamaError):
    """The base model is missing, damaged or of a kind that cannot be trained."""


class AdapterError(FwdllamaError):
    """The adapter cannot be read, or does not fit this model or scope."""


class DataError(FwdllamaError):
    """The data is missing, malformed, empty or too long."""


class EngineError(FwdllamaError):
    """llama.cpp refused a call, or the installed build is not the one this package was written for."""


class NoiseError(FwdllamaError):
    """A finite difference would drown in the arithmetic noise of the quantised model."""


class ResourceError(FwdllamaError):
    """Not enough memory or disk, or a path that cannot be written."""


class RunError(FwdllamaError):
    """A run directory cannot be used or continued."""


class FederationError(FwdllamaError):
    """An aggregator and a device cannot work together."""


class Unreachable(FederationError):
    """No answer came, or one that says "later"; `retry_after_s` is when, where it was told."""

    def __init__(self, sentence: str, retry_after_s: float | None = None) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class Refused(FederationError):
    """The aggregator refused a request with an HTTP `status` below 500."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


class Stopped(FederationError):
    """The user asked to stop while something was waited for."""
