# mypy: ignore-errors
# (what numba compiles is a language of its own, which type checkers cannot read)
"""C functions for teams of threads (`openmp.run`), compiled by numba once a machine.

Invariant: what is kept on disk is used only while the instructions in it are those of the files.
"""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

from numba import cfunc, from_dtype, types


def edition(*modules):
    """A number for the text of modules of instructions, to be named in a function that uses them: of what a function
    calls numba looks at its own file and its closure only."""
    return crc32(b"".join(Path(module.__file__).read_bytes() for module in modules))


def c_function(job, function):
    """`void function(JOB *)` for a record type; numba keeps it on disk."""
    signature = types.void(types.CPointer(from_dtype(job)))
    try:
        return cfunc(signature, cache=True, error_model="numpy")(function)
    except RuntimeError:  # no folder to keep it in: neither beside its file nor in the user's cache
        return cfunc(signature, error_model="numpy")(function)
