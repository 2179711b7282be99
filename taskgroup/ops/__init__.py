"""The ops: one module each, with its docstring, its reference and its choice of backend.

The functions themselves are public as ``tg.task_gram``, ``tg.combine`` and so on; here are the
modules of the same names, and what chooses their backend.
"""

from taskgroup.ops._backend import backends, use_backend

__all__ = ["backends", "use_backend"]
