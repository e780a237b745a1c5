"""Evaluation of trained models beside the validation loss: a hidden passkey, and the loss by position."""
