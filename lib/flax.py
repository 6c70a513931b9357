"""Reads and writes Flax's msgpack files, the format of the authors' released models.

Such a file holds nested dicts of arrays. Here they are tensors by name, such as
encoder/Conv_0/kernel. Nothing that is read can run code.
"""
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import torch
from torch import Tensor

from lib.errors import UserError
from lib.files import write_atomically

ARRAY = 1                       # Flax's number of the msgpack extension for arrays


def import_msgpack() -> ModuleType:
    """Returns the module msgpack. Raises UserError if it is not installed."""
    try:
        import msgpack
    except ImportError:
        raise UserError("the released files are in the msgpack format: "
                        "pip install msgpack") from None
    return msgpack


def read_arrays(path: Path | str) -> dict[str, Tensor]:
    """Returns the floating-point arrays of a file by name.

    A name is the path of keys below `params`. Raises UserError if the file cannot be read, is
    damaged, or holds a name twice."""
    msgpack = import_msgpack()

    def unpack_array(code: int, data: bytes) -> Tensor | None:
        if code != ARRAY:                               # the other extensions are single numbers
            return None
        shape, dtype, buffer = msgpack.unpackb(data, raw=True)
        values = torch.frombuffer(bytearray(buffer), dtype=getattr(torch, dtype.decode()))
        return values.reshape(shape)

    try:
        tree = msgpack.unpackb(Path(path).read_bytes(), ext_hook=unpack_array)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:                          # a damaged file can raise nearly anything
        raise UserError(f"{path} is not a whole Flax msgpack file ({type(error).__name__}: "
                        f"{error}): if it was fetched, delete it and run again") from error
    arrays = {}
    for name, array in flatten(tree):
        if name in arrays:
            raise UserError(f"{path} holds parameter {name} twice: leave one set of parameters in "
                            f"it")
        arrays[name] = array
    return arrays


def flatten(tree: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields (name, array) of everything in nested dicts. `name` is where `tree` was found."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            inner_name = "" if key == "params" else f"{name}/{key}".lstrip("/")
            yield from flatten(value, inner_name)
    elif torch.is_tensor(tree) and tree.is_floating_point():        # others are no parameters
        yield name, tree


def write_arrays(arrays: dict[str, Tensor], path: Path | str) -> None:
    """Writes arrays as a file. Raises UserError if it cannot be written."""
    msgpack = import_msgpack()
    tree = {}
    for name, array in arrays.items():
        *folders, last = f"params/{name}".split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array

    def pack_array(array: Tensor) -> object:
        array = array.contiguous().numpy()
        data = msgpack.packb((array.shape, array.dtype.name, array.tobytes()))
        return msgpack.ExtType(ARRAY, data)

    def write(file: BinaryIO) -> None:
        msgpack.pack(tree, file, default=pack_array)

    write_atomically(path, write)
