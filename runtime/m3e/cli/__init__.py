"""The command ``m3e``: a file for each command, ``main`` to find them, ``guard`` for errors and exit codes."""
