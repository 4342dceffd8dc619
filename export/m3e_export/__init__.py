"""Checkpoint -> bundle. Build time only; the runtime never imports this."""
