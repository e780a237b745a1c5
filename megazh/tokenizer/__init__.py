"""Tokenizers: one class in front of Hugging Face, Qwen and SentencePiece files, and the encoders behind it."""

from megazh.tokenizer.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
