"""The errors that a user can cause; each is one sentence: where, what, the rule, the way out."""

import re

_HEAD, _TAIL = 430, 160
# a pattern's own line and a caret below it, at the end
_EXCERPT = re.compile(r"\n  [^\n]{0,80}\n {2,80}\^\Z")


class HybridzooError(Exception):
    """Base of every error that a user's input causes; the CLI prints it and exits with 2.

    The message may hold names that a stranger wrote into a file: what a terminal would obey or
    cannot print is escaped, and a long middle is left out.
    """

    def __init__(self, message: str) -> None:
        found = _EXCERPT.search(message[-200:])
        excerpt = found[0] if found else ""
        sentence = message.removesuffix(excerpt)
        sentence = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence)
        if len(sentence) > _HEAD + _TAIL:
            sentence = f"{sentence[:_HEAD]}...{sentence[-_TAIL:]}"
        super().__init__(sentence + excerpt)


class ConfigError(HybridzooError):
    """A pattern, a layer's hyperparameters, a recipe or an option cannot work as written."""


class BackendError(HybridzooError):
    """No backend, or not the one asked for, supports these tensors."""


class CheckpointError(HybridzooError):
    """A checkpoint's files, names, shapes or dtypes are not what its config says."""


class HubError(HybridzooError):
    """The hub, or the way to it, did not give or take what was asked of it."""
