"""Hugging Face folders: weights, configuration and tokenizer files, in and out."""
