"""Joint methods to compare with: each steps on all tasks at once.

Those that use the gradients of single tasks are adapters over TorchJD's solvers (``pip install
'taskgroup[compare]'``) that never build TorchJD's matrix of all gradients. TorchJD is imported when
such a method is created. All methods take the arguments ``shared`` and ``tasks`` of
:class:`JointMethod`, and raise its errors::

    method = tg.methods.find("cagrad")(model.encoder, tasks)
    ...
    method.backward(losses)  # where loss.backward() would stand
"""

from __future__ import annotations

import difflib

from taskgroup.methods.dtp import DTP
from taskgroup.methods.dwa import DWA
from taskgroup.methods.famo import FAMO
from taskgroup.methods.graddrop import GradDrop
from taskgroup.methods.gradient_space import NoWeightsError
from taskgroup.methods.gradvac import GradVac
from taskgroup.methods.gram import IMTLG, MGDA, AlignedMTL, CAGrad, FairGrad, PCGrad, UPGrad
from taskgroup.methods.learned import IMTLL, UW
from taskgroup.methods.loss_space import GD, SI, WeighingMethod
from taskgroup.methods.method import JointMethod
from taskgroup.methods.nash_mtl import NashMTL
from taskgroup.methods.rlw import RLW

__all__ = [
    "DTP",
    "DWA",
    "FAMO",
    "GD",
    "IMTLG",
    "IMTLL",
    "METHODS",
    "MGDA",
    "RLW",
    "SI",
    "UW",
    "AlignedMTL",
    "CAGrad",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "JointMethod",
    "NashMTL",
    "NoWeightsError",
    "PCGrad",
    "UPGrad",
    "WeighingMethod",
    "find",
]

#: The class of each method, by the name that :func:`find` takes.
METHODS: dict[str, type[JointMethod]] = {
    "gd": GD,
    "si": SI,
    "rlw": RLW,
    "uw": UW,
    "dtp": DTP,
    "dwa": DWA,
    "famo": FAMO,
    "imtl-l": IMTLL,
    "mgda": MGDA,
    "pcgrad": PCGrad,
    "cagrad": CAGrad,
    "graddrop": GradDrop,
    "imtl-g": IMTLG,
    "aligned-mtl": AlignedMTL,
    "nash-mtl": NashMTL,
    "upgrad": UPGrad,
    "fairgrad": FairGrad,
    "gradvac": GradVac,
}


def find(name: str) -> type[JointMethod]:
    """Find the class of a joint method by its name.

    Args:
        name: a key of ``METHODS``.

    Returns:
        The class; call it with the shared parameters and the tasks to create the method.

    Raises:
        ValueError: if there is no method with this name. The message lists the known names, the
            most similar first.

    Example:
        >>> find("pcgrad")
        <class 'taskgroup.methods.gram.PCGrad'>
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(str(name).lower(), METHODS, n=len(METHODS), cutoff=0)
    raise ValueError(f"There is no method {name!r}. The methods, the most similar first: {near}.")
