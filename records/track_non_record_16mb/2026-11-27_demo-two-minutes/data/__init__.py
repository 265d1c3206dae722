"""Datasets: their file format (dataset.py), tokenizer (tokenizer.py), and the command that writes them (prepare.py).
What training and scoring stand on: processes and run folders (runs.py), a child for code of others (confine.py)."""
