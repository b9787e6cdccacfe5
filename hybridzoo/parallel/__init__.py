"""Training spread over ranks: the groups, the recipe, the loss, the engines."""

from hybridzoo.parallel.groups import finish, init

__all__ = ["finish", "init"]
