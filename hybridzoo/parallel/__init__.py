"""Training spread over ranks: the groups, the recipe, the loss, the engines."""

from hybridzoo.parallel.engine import Engine, Outcome, initialize
from hybridzoo.parallel.groups import finish, init
from hybridzoo.parallel.recipe import DataRecipe, ParallelRecipe, Recipe
from hybridzoo.parallel.stages import stages

__all__ = [
    "DataRecipe",
    "Engine",
    "Outcome",
    "ParallelRecipe",
    "Recipe",
    "finish",
    "init",
    "initialize",
    "stages",
]
