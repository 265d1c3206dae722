"""Datasets: the folder's format and what commands share (dataset.py), the tokenizer (tokenizer.py),
and the command that writes datasets (prepare.py)."""
