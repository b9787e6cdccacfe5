"""The errors that a user can cause; each is one sentence: where, what, the rule, the way out."""

_HEAD, _TAIL = 430, 160


class HybridzooError(Exception):
    """Base of every error that a user's input causes; the CLI prints it and exits with 2.

    The message may hold names that a stranger wrote into a file: what a terminal would obey or
    cannot print is escaped, and a long middle is left out.
    """

    def __init__(self, message: str) -> None:
        # a line break is the message's own only in front of a pattern and its caret
        first, *rest = message.split("\n  ")
        first = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in first)
        if len(first) > _HEAD + _TAIL:
            first = f"{first[:_HEAD]}...{first[-_TAIL:]}"
        super().__init__("\n  ".join([first, *rest]))


class ConfigError(HybridzooError):
    """A pattern, a layer's hyperparameters, a recipe or an option cannot work as written."""


class BackendError(HybridzooError):
    """No backend, or not the one asked for, supports these tensors."""


class CheckpointError(HybridzooError):
    """A checkpoint's files, names, shapes or dtypes are not what its config says."""
