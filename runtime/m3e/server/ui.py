"""The page at /ui, read once from the package."""

from __future__ import annotations

from importlib import resources

PAGE = resources.files("m3e.server").joinpath("ui.html").read_bytes()
