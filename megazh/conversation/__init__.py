"""Conversations for supervised fine-tuning: the rows of data sets in every common form, read as turns."""
