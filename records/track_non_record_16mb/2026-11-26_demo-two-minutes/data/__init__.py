"""Datasets: their file format (dataset.py), tokenizer (tokenizer.py), and the command that writes them (prepare.py)."""
