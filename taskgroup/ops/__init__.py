"""The ops: one file each, with its docstring, its reference and its choice of backend."""

from taskgroup.ops._backend import backends, use_backend
from taskgroup.ops.affinity_propagation import affinity_propagation
from taskgroup.ops.affinity_update import affinity_update_
from taskgroup.ops.combine import combine
from taskgroup.ops.gram_affinity_update import gram_affinity_update_
from taskgroup.ops.task_gram import task_gram

__all__ = [
    "affinity_propagation",
    "affinity_update_",
    "backends",
    "combine",
    "gram_affinity_update_",
    "task_gram",
    "use_backend",
]
