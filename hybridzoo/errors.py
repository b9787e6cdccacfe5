"""The errors that a user can cause; each is one sentence: where, what, the rule, the way out."""


class HybridzooError(Exception):
    """Base of every error that a user's input causes; the CLI prints it and exits with 2."""


class ConfigError(HybridzooError):
    """A pattern, a layer's hyperparameters, a recipe or an option cannot work as written."""


class BackendError(HybridzooError):
    """No backend, or not the one asked for, supports these tensors."""


class CheckpointError(HybridzooError):
    """A checkpoint's files, names, shapes or dtypes are not what its config says."""
