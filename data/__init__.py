"""Datasets: the file format (dataset.py), the tokenizer (tokenizer.py) and the command that writes both (prepare.py)."""
