"""Tokens on disk: the index and its builder, the mixture of several, and the samples packed from them."""
