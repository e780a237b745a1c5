"""The decoder: its shape, layers, attention that respects documents, loss, and generation."""
