"""Preference data: rows of prompt, chosen and rejected answer, for DPO and its kin."""
