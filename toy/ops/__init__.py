"""Op tables: the same functions on numpy (`reference`), on Cython kernels (`accelerated`) and on a ggml graph (`graph`).

Nothing is imported here, so that a table whose extension is not built costs nothing until it is asked for.
"""
