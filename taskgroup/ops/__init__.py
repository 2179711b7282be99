"""The ops: one module each, with docstring, reference implementation and choice of backend.

The functions are public as ``tg.task_gram``, ``tg.combine`` and so on; ``taskgroup.ops.task_gram``
is the module.
"""

from taskgroup.ops._backend import backends, use_backend

__all__ = ["backends", "use_backend"]
