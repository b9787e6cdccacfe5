"""Training spread over ranks: the recipe, the loss, the engines."""
