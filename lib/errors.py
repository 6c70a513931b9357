"""The user's mistakes, how every script starts and ends, and lack of memory."""
import contextlib
import math
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from lib.terminal import end_line

OUT_OF_MEMORY = ("out of memory: in training lower --micro-batch (a step still has --batch images) "
                 "or the model's sizes, otherwise the number of images at once (--num, --batch)")
CONTAINER_LIMITS = ["/sys/fs/cgroup/memory.max",                        # cgroup v2
                    "/sys/fs/cgroup/memory/memory.limit_in_bytes"]      # cgroup v1


class UserError(ValueError):
    """A mistake of the user. Its text is one line that names the input, what is wrong, and what
    to do."""


# ---- the entry point

def command_line(main: Callable[[], None], interrupted: str = "stopped by Ctrl-C"):
    """Runs a script's main() and ends the process if it fails.

    A UserError, a lack of memory, or the end of another rank becomes one line on stderr and exit
    status 2; with TRACEBACK=1 in the environment a UserError shows where it came from. Every other
    exception keeps its traceback. Ctrl-C prints the interrupt's own text or `interrupted`, and ends
    with status 130."""
    sys.stdout.reconfigure(errors="backslashreplace")       # of names that are not UTF-8
    try:
        main()
    except SystemExit:
        end_readers()
        raise
    except KeyboardInterrupt as interrupt:
        print(f"\n{str(interrupt) or interrupted}", file=sys.stderr)
        leave(130)
    except UserError as error:
        if os.environ.get("TRACEBACK"):
            crash(error)
        fail(str(error))
    except Exception as error:
        if out_of_memory(error):
            fail(OUT_OF_MEMORY)
        if lost_another_rank(error):
            fail("another process of this run has ended: its own message says why")
        crash(error)


def fail(message: str) -> NoReturn:
    """Ends this process with a line on stderr and status 2."""
    end_line()
    print("error:", " ".join(message.split()), file=sys.stderr)
    leave(2)


def crash(error: Exception) -> NoReturn:
    """Ends this process with the error's traceback and status 1."""
    end_readers()
    if not dist.is_initialized():
        raise error
    traceback.print_exception(error)
    leave(1)


def leave(status: int) -> NoReturn:
    """Ends this process after an error. Nothing that could wait for another process is cleaned up.

    The other ranks are in a collective and will not answer; torchrun sees this one end and stops
    them."""
    end_readers()
    if not dist.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_readers():
    """Kills the processes that read images ahead: they ignore SIGTERM, and Python would wait for
    them at exit."""
    readers = multiprocessing.active_children()
    if readers and hasattr(signal, "SIGCHLD"):              # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch's handler raises for each reader
    for reader in readers:
        reader.kill()


def lost_another_rank(error: Exception) -> bool:
    """Returns True for gloo's error in a collective that another rank has left."""
    return isinstance(error, RuntimeError) and "gloo" in str(error) and "by peer" in str(error)


# ---- memory

def out_of_memory(error: Exception) -> bool:
    """Returns True for an error that says that memory ran out, of a GPU or of the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):         # Python's, NumPy's; torch's
        return True
    return "allocate memory" in str(error)


def memory() -> float:
    """Returns the memory in bytes of this computer, or of the container if that may use less;
    infinity where Python cannot tell."""
    if not hasattr(os, "sysconf"):
        return math.inf
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):          # it is not there, or says "max"
            sizes.append(int(Path(limit).read_text()))
    return min(sizes)


def check_memory(size: float, flag: str, remedy: str = "ask for fewer images"):
    """Raises UserError if `size` bytes, which `flag` asks for, are more than memory()."""
    if size > memory():
        raise UserError(f"{flag} would take {size / 1e9:.4g} GB of memory, and there are "
                        f"{memory() / 1e9:.4g}: {remedy}")
