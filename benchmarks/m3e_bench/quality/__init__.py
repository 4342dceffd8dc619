"""MTEB: the tasks of M3E's own table, C-MTEB, and tasks from local data, every precision side by side."""
