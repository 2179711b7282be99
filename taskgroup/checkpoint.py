"""Checkpoints that are written completely or not at all, and that are certain to load again.

A training run that may be killed at any moment saves one from time to time, and resumes from it::

    tg.checkpoint.save(path, {"model": model.state_dict(), "groups": groups.state_dict(), ...})
    state = tg.checkpoint.load(path)
"""

from __future__ import annotations

import enum
import io
import json
import os
import re
import socket
import warnings
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from taskgroup._arguments import listed

__all__ = ["load", "save", "write_atomically"]


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a checkpoint with ``torch.save``; a crash while writing keeps the previous file.

    Values that :func:`load` could not read are refused before anything is written. In distributed
    training, one rank writes the states that are the same on all ranks. The states of random
    generators differ between ranks; gather them first (``torch.distributed.gather_object``).

    Args:
        path: the file; its folder is created if it is missing.
        state: the state to save. It may hold what loads under ``weights_only=True``: tensors,
            numbers, strings and None, in any nesting of dicts, lists, tuples and sets, as
            ``state_dict()`` returns them.

    Raises:
        TypeError: if a value has a type that does not load; the message names the key and says what
            to write instead.
        ValueError: if a value does not load although its type does, such as two tensors that view
            the same memory as different dtypes.
        OSError: if the file cannot be written; the message says why. The previous file is kept.

    Warns:
        UserWarning: if a tensor is a small view of a large tensor, all of which is written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run" / "checkpoint.pt"
        >>> save(path, {"batch": 7})
        >>> load(path)
        {'batch': 7}
        >>> save(path, {"best": {"score": np.float64(0.5)}})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        TypeError: state["best"]["score"] is of type numpy.float64 and ... write float(x) in its ...
    """
    if type(state) not in _MAPPINGS:
        raise TypeError(
            f"A checkpoint is a dict, got a {_named(state)}: write "
            f"{'dict(state)' if isinstance(state, Mapping) else '{name: state}'}. Nothing was "
            "saved."
        )
    try:
        _Check().check(state)
        write_atomically(Path(path), lambda file: torch.save(state, file))
    except RecursionError:
        raise ValueError(
            "The state is nested too deeply to be saved: leave out the chain of containers in it. "
            "Nothing was saved."
        ) from None


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint to the CPU, without running any code in it (``weights_only=True``).

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file cannot be read; the message says why.
    """
    path = Path(path)
    try:
        state = _loaded(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no checkpoint {path}; start without one.") from None
    except Exception as error:  # torch, zipfile and pickle may raise anything for a damaged file
        if unsafe := _unsafe_globals(path):
            raise ValueError(
                f"{path} cannot be read as a checkpoint (it holds {listed(unsafe)}, which "
                "weights_only=True refuses); resume from another one. If you trust this one, "
                "read it with torch.load(path, weights_only=False) and write it again with "
                "tg.checkpoint.save(), which says what to change."
            ) from error
        raise ValueError(
            f"{path} cannot be read as a checkpoint: {_fault(path, error)}. Resume from another "
            "one, or start again."
        ) from error
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} holds a {type(state).__name__}, not the dict that tg.checkpoint.save() wrote; "
            "resume from another one, or start again."
        )
    return state


def write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file next to ``path`` and move it there; a crash keeps the previous file.

    Args:
        path: the file; its folder is created if it is missing.
        write: a function that writes to the open binary file that it is given.

    Raises:
        OSError: if the file cannot be written; the message says why. The previous file is kept.
    """
    path = path.resolve()  # the target of a link
    # Other processes may write the same file at the same time, on this machine or another.
    partial = path.with_name(f"{path.name}.{_HOST}-{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        # torch.save raises a RuntimeError when the disk is full.
        if not isinstance(error, OSError | RuntimeError) or isinstance(error, RecursionError):
            raise
        raise OSError(
            f"{path} could not be written ({_short(error)}); the previous file is kept. Make "
            "room if the disk is full, or write to another place."
        ) from error


_HOST = socket.gethostname()


def _remove_abandoned(path: Path) -> None:
    """Remove the partial files of processes of this machine that were killed while writing."""
    if os.name != "posix":  # other systems have no signal 0
        return
    left = re.compile(rf"{re.escape(f'{path.name}.{_HOST}-')}(\d+)\.partial")
    for partial in path.parent.iterdir():
        found = left.fullmatch(partial.name)
        if found is None:
            continue
        try:
            os.kill(int(found[1]), 0)  # sends no signal; an error says if the process is gone
        except ProcessLookupError:
            partial.unlink(missing_ok=True)
        except (OSError, OverflowError):
            pass  # the process may be alive


def _fault(path: Path, error: Exception) -> str:
    """Why a file is no checkpoint that can be read, in a few words."""
    if path.is_dir():
        return "it is a folder"
    try:
        with path.open("rb") as file:
            begin = file.read(len(_ZIP))
    except OSError as refused:
        return f"the system says {_short(refused)!r}"
    if not begin:
        return "it is empty, as after a copy or a download that did not begin"
    if not begin.startswith(_ZIP[: len(begin)]):
        return "it is not a file that tg.checkpoint.save() wrote"
    if not zipfile.is_zipfile(path):  # the list of contents stands at the end
        return "it is cut short or damaged, as after a copy that was stopped"
    with zipfile.ZipFile(path) as archive:
        names = [PurePath(name).name for name in archive.namelist()]
    if "data.pkl" not in names:
        return "it is a zip archive of something else"
    try:
        with zipfile.ZipFile(path) as archive:
            whole = archive.testzip() is None
    except Exception:  # zipfile may raise anything for a damaged file
        whole = False
    return f"torch does not load what it holds ({_short(error)})" if whole else "it is damaged"


_ZIP = b"PK\x03\x04"  # the first bytes of what torch.save writes


def _short(error: BaseException) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch prints parts in bold
    return " ".join(text.split())[:200] or type(error).__name__


# The types of which torch.load(weights_only=True) reads every value. To find out about a value of
# another type, it is written to memory and read again.
_PLAIN = {type(None), bool, float, complex, str, bytearray, torch.dtype, torch.device, torch.Size}
_MAPPINGS = (dict, OrderedDict)
_SEQUENCES = (list, tuple, set)
_TENSORS = (Tensor, nn.Parameter)
_DEVICES = {"cpu", "cuda", "mps", "xpu", "meta"}  # of tensors that load as they are
_INTEGERS = {getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}
_LONGEST_INT = 2000  # bits; integers of more than 255 bytes do not load
_LONGEST_NAME = 60  # characters of a key
_MOST_UNUSED = 2**20  # bytes that are written although no tensor in the state views them

_Step = tuple[str, object]  # a step of a path: its format, and the key, index or element


class _Check:
    """A walk over a state that checks whether :func:`load` would return all of it."""

    def __init__(self) -> None:
        self._path: list[_Step] = []  # to the current value
        # The ids of the containers and tensors met so far, and of those on the current path. The
        # state keeps the objects alive.
        self._met: set[int] = set()
        self._open: set[int] = set()
        # By the address of a storage: a tensor in it, the path to that tensor, the bytes in use.
        self._storages: dict[int, tuple[Tensor, tuple[_Step, ...], int]] = {}

    def check(self, state: dict[Any, Any]) -> None:
        """Raise an error if something does not load; warn about small views of large tensors."""
        self._look(state, "state", None)
        for tensor, path, used in self._storages.values():
            whole = tensor.untyped_storage().nbytes()
            if whole > 2 * used and whole - used > _MOST_UNUSED:
                place = _written(path)
                warnings.warn(
                    f"{place} views {used:,} bytes of a larger tensor, and all {whole:,} bytes of "
                    f"that tensor are written; save {place}.clone() instead.",
                    stacklevel=3,  # the call of save()
                )

    def _look(self, value: Any, form: str, of: object) -> None:
        kind = type(value)
        if kind in _PLAIN:
            return
        self._path.append((form, of))
        if kind in _MAPPINGS or kind in _SEQUENCES or kind in _TENSORS:
            if id(value) not in self._met:
                self._met.add(id(value))
                self._open.add(id(value))
                if kind in _TENSORS:
                    self._look_at_tensor(value)
                for part in _parts(value):
                    self._look(*part)
                self._open.discard(id(value))
            elif id(value) in self._open and kind is not list and kind not in _MAPPINGS:
                raise ValueError(
                    f"{_written(self._path)} is a {kind.__name__} that holds itself, which does "
                    "not load; only a list or a dict may. Nothing was saved."
                )
        elif not _is_small(value) and not _loads(value):
            raise TypeError(
                f"{_written(self._path)} is of type {_named(value)} and does not load under "
                f"weights_only=True: {_advice(value)}. Nothing was saved."
            )
        self._path.pop()

    def _look_at_tensor(self, tensor: Tensor) -> None:
        dtype = tensor.dtype
        usual = dtype.is_floating_point or dtype.is_complex or dtype in _INTEGERS
        usual = usual or dtype is torch.bool
        if not usual or tensor.layout is not torch.strided or tensor.device.type not in _DEVICES:
            if not _loads(tensor):
                raise ValueError(
                    f"{_written(self._path)} is a tensor of {dtype} and {tensor.layout} on "
                    f"{tensor.device}, which does not load: write a dense one of another dtype in "
                    "its place. Nothing was saved."
                )
            return
        storage = tensor.untyped_storage().data_ptr()
        if storage == 0:  # empty, or on meta
            return
        used = tensor.numel() * tensor.itemsize
        other, path, others = self._storages.get(storage, (tensor, tuple(self._path), 0))
        if other.dtype != dtype and not _loads([other, tensor]):
            raise ValueError(
                f"{_written(path)} and {_written(self._path)} view the same memory as "
                f"{other.dtype} and {dtype}, which torch.save does not write: save one of them, or "
                "a .clone() of one. Nothing was saved."
            )
        self._storages[storage] = other, path, others + used


def _parts(value: Any) -> Iterator[tuple[Any, str, object]]:
    """The parts of a container or a tensor, each with the next step of the path."""
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                yield key, ", key {}", key
            if type(item) not in _PLAIN:  # most items are plain
                yield item, "[{}]", key
    elif not isinstance(value, Tensor):
        for place, item in enumerate(value):
            if type(item) not in _PLAIN:
                yield (item, ", element {}", item) if type(value) is set else (item, "[{}]", place)
    for name, item in getattr(value, "__dict__", {}).items():
        yield item, f".{name}", None


def _is_small(value: Any) -> bool:
    """Whether a value is an integer or bytes of a size that loads; empty bytes do not load."""
    if type(value) is int:
        return value.bit_length() <= _LONGEST_INT
    return type(value) is bytes and len(value) > 0


def _loads(value: object) -> bool:
    """Whether a value that is written to memory and read again has the same type."""
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # save() itself will issue them
            torch.save(value, file)
            file.seek(0)
            return type(_loaded(file)) is type(value)
    except RecursionError:
        raise
    except Exception:  # the code of the type may raise anything
        return False


def _loaded(file: Path | io.BytesIO) -> Any:
    with torch.device("cpu"):  # otherwise sparse tensors are made on the default device
        return torch.load(file, map_location="cpu", weights_only=True)


def _written(path: Iterable[_Step]) -> str:
    """The path as a Python expression: ``state["optimizer"]["best"]``."""
    return "".join(form.format(_quoted(of)) for form, of in path)


def _quoted(value: object) -> str:
    """A key or an element, on one line."""
    if type(value) is str:
        return json.dumps(value, ensure_ascii=False)
    try:
        text = " ".join(repr(value).split())
    except Exception:  # the code of the type may raise anything
        text = ""
    return text if 0 < len(text) <= _LONGEST_NAME else f"of type {_named(value)}"


def _named(value: object) -> str:
    kind = type(value)
    module = "" if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"


_METHODS = ("state_dict", "get_state", "full_tensor", "isoformat", "_asdict")
_CONVERSIONS: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("int", (int,)),
    ("float", (float,)),
    ("complex", (complex,)),
    ("str", (str, PurePath)),
    ("bytearray", (bytes,)),
    ("dict", (Mapping,)),
    ("set", (Set,)),
    ("tuple", (tuple,)),
    ("list", (Sequence, deque)),
)


def _advice(value: Any) -> str:
    """Advice on a value x that does not load."""
    if is_lazy(value):
        return "run the module on one batch first, which gives it a shape"
    if isinstance(value, np.ndarray | np.generic):
        if isinstance(value, np.generic) and type(value.item()) in {*_PLAIN, int}:
            return f"write {type(value.item()).__name__}(x) in its place"
        numeric = value.dtype.kind in "biufc"
        return f"write {'torch.from_numpy(x)' if numeric else 'x.tolist()'} in its place"
    if isinstance(value, enum.Enum):
        return "write x.name in its place"
    if type(value) is int:
        return "write str(x) in its place"
    if not isinstance(value, type):
        for method in _METHODS:
            if callable(getattr(value, method, None)):
                return f"write x.{method}() in its place"
        for conversion, kinds in _CONVERSIONS:
            if isinstance(value, kinds):
                return f"write {conversion}(x) in its place"
        if isinstance(value, Tensor):
            return "write x.as_subclass(torch.Tensor) in its place"
        if getattr(value, "__dict__", None) and not callable(value):
            return "write vars(x) in its place"
    return "leave it out, or save tensors, numbers and strings that it can be made from"


def _unsafe_globals(path: Path) -> list[str]:
    """The globals in a file that ``weights_only=True`` refuses; none if the file is damaged."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # torch, zipfile and pickle may raise anything
        return []
