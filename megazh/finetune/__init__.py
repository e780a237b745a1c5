"""Fine-tuning: conversations become an index with a mask of trained tokens."""
