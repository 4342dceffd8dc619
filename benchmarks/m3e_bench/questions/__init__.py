"""One file for each question; every file has ``ask(run, model)``."""
