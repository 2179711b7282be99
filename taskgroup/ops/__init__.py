"""The ops: one module each, with docstring, reference implementation and choice of backend.

The functions are public as ``tg.task_gram``, ``tg.combine`` and so on; ``taskgroup.ops.task_gram``
is the module.
"""

from taskgroup.ops import _fakes as _fakes  # registers them
from taskgroup.ops._backend import backends, use_backend

# For what the lab computes on the host; not public.
from taskgroup.ops._backend import choose as choose
from taskgroup.ops._backend import native as native

__all__ = ["backends", "use_backend"]
