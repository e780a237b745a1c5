"""Tokenizers: one class for Hugging Face, Qwen and SentencePiece files, and the encoders that it uses."""

from megazh.tokenizer.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
