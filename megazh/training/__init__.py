"""Training: from samples to a language model, with what is needed to follow a run."""
