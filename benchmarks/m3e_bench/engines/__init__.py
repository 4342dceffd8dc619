"""One file for each kind of engine; every file has a class ``Engine`` and runs in a process of its own.

An engine file is loaded by worker.py in an environment that has the engine's packages and none of ours. Its class::

    PACKAGES                             names of the packages whose versions the record gives
    prepare(checkpoint, folder, ...)     static; converts a checkpoint into ``folder``, once, not timed
    __init__(checkpoint, folder, ...)    opens the model with a number of threads
    encode(texts)                        vectors of texts, in order: float32 (n, dim)
"""
