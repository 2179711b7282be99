"""The ops: one file each, with its docstring, its reference and its choice of backend."""

from taskgroup.ops._backend import backends, use_backend
from taskgroup.ops.affinity_propagation import affinity_propagation
from taskgroup.ops.affinity_update import affinity_update_

__all__ = ["affinity_propagation", "affinity_update_", "backends", "use_backend"]
