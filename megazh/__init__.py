"""megazh: from raw Chinese text to a chat model on the machines a small lab really has."""

__version__ = "0.1.0"
