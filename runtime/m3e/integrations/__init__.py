"""M3E in other people's tools: a file for each, which alone imports it."""
