"""The HTTP service.

bytes -> `http` (deadlines, limits) -> `app` (keys, ids, metrics) -> `openai` or `tei` -> `models` -> `m3e.scheduler`
-> `worker` (a process of its own that runs the graph). `run` starts and ends all of it.
"""
