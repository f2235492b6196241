"""Whose an error is: what comes from the user's files, packages, code and machine is one line; our own fault is a traceback to report."""

from __future__ import annotations

import errno
import platform
import sys
import sysconfig
import traceback
from argparse import ArgumentError
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

from skillsd import __version__
from skillsd.config_errors import parser_error
from skillsd.errors import ConfigError, causes, chain, redacted

OURS = ("skillsd", "skillsd_sokoban", "skillsd_appworld")
ADVICE = {
    errno.ENOSPC: "make room, or name another folder (of a run: trainer.default_root_dir)",
    errno.EDQUOT: "make room, or name another folder (of a run: trainer.default_root_dir)",
    errno.EFBIG: "the file system, or a limit of the shell (ulimit -f), allows no larger file",
    errno.EIO: "check the disk, or what connects it",
    errno.EACCES: "give this user the permission, or name another place (of a run: trainer.default_root_dir)",
    errno.EPERM: "give this user the permission, or name another place (of a run: trainer.default_root_dir)",
    errno.EROFS: "name a place that can be written to (of a run: trainer.default_root_dir)",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENAMETOOLONG: "give a shorter name",
}
_FAULTS_OF_KERNELS = ("device-side assert", "illegal memory access", "misaligned", "invalid argument", "invalid config", "illegal instr")
"""What CUDA says when a program has asked for something wrong."""
_MACHINE = ("CUDA error", "CUDA driver", "CUDA unknown error", "NVIDIA driver", "Torch not compiled with CUDA")
_LIBRARIES = tuple(str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


class Place(NamedTuple):
    """Where an error was raised: by `user`'s code, by `package` while it was imported, or neither."""

    user: str = ""
    package: str = ""


def explain(error: BaseException) -> str | None:
    """The one line of an error that is the user's business; None for our own fault."""
    if isinstance(error, ArgumentError):
        return parser_error(str(error))
    if isinstance(error, ConfigError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in ADVICE:
        return f"{_what(error)}: {ADVICE[error.errno]}."
    if said := _out_of_memory(error) or _cuda(error):
        return said
    place = where(error)
    if place.user:
        return blame(error)
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] not in OURS:
        cure = "install it" if isinstance(error, ModuleNotFoundError) else "see whether it fits the others"
        return f"a package cannot be imported ({causes(error)}): {cure} (`skillsd doctor` shows what is there)."
    if place.package:
        return f"the package {place.package} cannot be imported ({causes(error)}): install it anew."
    if isinstance(error, OSError):
        return f"{_what(error)} (SKILLSD_DEBUG=1 shows where)." if error.errno is not None else " ".join(str(error).split())
    if type(error).__name__ == "MisconfigurationException":  # Lightning's, for what it does not take
        return f"trainer: {' '.join(str(error).split())}"
    return None


def blame(error: BaseException) -> str:
    """The line of an error that the user's code raised, or that has such a one among its causes; "" if there is none."""
    for e in chain(error):
        if isinstance(e, SyntaxError) and e.filename and not _is_library(e.filename):
            said = f"{e.filename}:{e.lineno}: {e.msg}"
        elif place := where(e).user:
            said = f"{place} raised {causes(e)}"
        else:
            continue
        return f"{said}: mend it, or leave it out (SKILLSD_DEBUG=1 shows the whole traceback)."
    return ""


def where(error: BaseException) -> Place:
    """Whose code raised it: that of the innermost frame which is no library's. While a library is imported it may be broken itself."""
    package = ""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        code, name = frame.f_code, str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] in OURS:
            return Place(package=package)
        if not _is_library(code.co_filename):
            return Place(user=f"{_name(frame)} ({code.co_filename}:{line})")
        if code.co_name == "<module>" and "-packages/" in code.co_filename:
            package = name.partition(".")[0]
    return Place(package=package)


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The interpreter's hook: a traceback without secrets, and how to report it if it is our own fault."""
    text = redacted("".join(traceback.format_exception(kind, error, trace)))
    if isinstance(error, Exception) and explain(error) is None:
        torch = getattr(sys.modules.get("torch"), "__version__", "not imported")
        text += (
            f"this is a bug in skillsd: please report it with the above at the project's issue tracker (skillsd {__version__}, "
            f"Python {platform.python_version()}, torch {torch}, {platform.platform()})\n"
        )
    print(text, end="", file=sys.stderr)


def _is_library(filename: str) -> bool:
    generated = filename.startswith(("<frozen", "<string>", "<__array_function__"))
    compiled = not filename.startswith("<") and not Path(filename).is_absolute()  # Cython's: pandas/_libs/lib.pyx
    return generated or compiled or "-packages/" in filename or str(Path(filename).resolve()).startswith(_LIBRARIES)


def _name(frame: FrameType) -> str:
    """The function, with the class of its object: the one that was configured, not the base that defines the method."""
    me, name = frame.f_locals.get("self"), frame.f_code.co_name
    if name == "<module>":
        return f"the import of {frame.f_globals.get('__name__', 'a module')}"
    return f"{type(me).__name__}.{name}" if me is not None and hasattr(type(me), name) else frame.f_code.co_qualname


def _what(error: OSError) -> str:
    names = " -> ".join(str(n) for n in (error.filename, error.filename2) if n)
    return f"{error.strerror or type(error).__name__}{': ' * bool(names)}{names}"


def _out_of_memory(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in text:
        return f"the GPU's memory is full ({text[:200]}): set a smaller model, batch or context, or end what else uses it."
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        said = f" ({text[:200]})" if text else ""
        return f"the machine's memory is full{said}: set a smaller model, batch or context, or end what else uses it."
    return ""


def _cuda(error: BaseException) -> str:
    """The line of an error of the driver or the GPU; none for what a program does wrong."""
    text = " ".join(str(error).split())
    said = isinstance(error, RuntimeError | AssertionError) and any(m in text for m in _MACHINE)
    if not said or any(m in text for m in _FAULTS_OF_KERNELS):
        return ""
    return f"trainer.accelerator: the GPU cannot be used ({text[:200]}): see nvidia-smi, or set it to cpu."
