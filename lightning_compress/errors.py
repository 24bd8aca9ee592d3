"""The one exception of the project."""


class CompressionError(RuntimeError):
    """Something that was asked for cannot be done; the message says what was found, why, and the way out.

    Nothing has been changed when it is raised: the model, the optimizers and the files are as before.
    """
