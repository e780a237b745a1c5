"""The optimizers that a recipe can name, each with the state and the update of a shard."""
