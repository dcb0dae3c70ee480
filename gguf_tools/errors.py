"""The one error of this package: a file that is not what it should be, said in one sentence."""


class FileError(ValueError):
    """A GGUF file is missing, damaged or unfit; the message names the file, the place in it and what would be right."""

    exit_code = 1
