"""Safe files: a file is written whole or not at all, a file that is loaded cannot run code, and a
file from the network is fetched once."""
import contextlib
import functools
import hashlib
import http.client
import os
import socket
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lib.errors import UserError, out_of_memory


def write_atomically(path: Path | str, write: Callable[[BinaryIO], object]):
    """Calls write(file) on a temporary file beside `path`, then renames it.

    Raises UserError if the file cannot be written; `path` is then as it was."""
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # After an OSError, such as a full disk, torch.save raises a RuntimeError of its own.
        problem = error if isinstance(error, OSError) else error.__context__
        if not isinstance(problem, OSError):
            raise
        raise UserError(f"cannot write {path}: {problem.strerror or problem}; free some space, or "
                        f"write to another folder") from error
    finally:
        with contextlib.suppress(OSError):                  # it was renamed, or never made
            temporary.unlink()


def temporary_beside(path: Path) -> Path:
    """Returns the path of a hidden file beside `path` for this process: computers may share a disk.
    """
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


# ---- checkpoints

def on_cpu(value: object) -> object:
    """Returns nested dicts and lists of tensors and plain values with all tensors on the CPU."""
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [on_cpu(item) for item in value]
    if torch.is_tensor(value):
        return value.detach().cpu()
    return value


def save_checkpoint(path: Path | str, checkpoint: dict):
    """Writes a dict of plain values and CPU tensors. Raises UserError if that cannot be done."""
    write_atomically(path, functools.partial(torch.save, checkpoint))


def load_checkpoint(path: Path | str, kind: str) -> dict:
    """Reads what save_checkpoint() wrote. kind: what its "kind" must be, such as vqgan.

    Raises UserError if the file is missing, damaged, not a checkpoint, or of another kind."""
    problem = (f"{path} is not a checkpoint of this project, or it is damaged: only the .pt files "
               f"of train_vq.py, train_transformer.py and pretrained.py are read, not Lightning's "
               f".ckpt, not .safetensors and not weights alone")
    try:
        with zipfile.ZipFile(path):         # torch.save writes one; nothing else is even unpickled
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: train it first, or name another run") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:              # a damaged archive can raise nearly anything
        if out_of_memory(error):
            raise
        raise UserError(problem) from error
    if not isinstance(checkpoint, dict) or "kind" not in checkpoint:
        raise UserError(problem)
    if checkpoint["kind"] != kind:
        raise UserError(f"{path} holds a {checkpoint['kind']}, but a {kind} is needed: name "
                        f"another file or run")
    return checkpoint


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """Returns the tensors of a PyTorch state dict, by name.

    Raises UserError if the file cannot be read, or is no state dict."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: value for name, value in state.items() if torch.is_tensor(value)}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:              # a damaged archive can raise nearly anything
        if out_of_memory(error):
            raise
        raise UserError(f"{path} is not a PyTorch state dict, or it is damaged: name another file, "
                        f"or fetch it again if it was fetched") from error


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], path: Path | str, remedy: str = "train it again",
) -> nn.Module:
    """Loads weights of any precision into a model, and returns it.

    Raises UserError, which names the first parameter that does not fit. path, remedy: for that
    message."""
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        actual = shape_in_words(weights, name)
        needed = shape_in_words(expected, name)
        if actual != needed:
            raise UserError(f"{path} does not fit its own configuration: parameter {name} is "
                            f"{actual}, but should be {needed}: {remedy}")
    typed = {name: value.to(expected[name].dtype) for name, value in weights.items()}
    model.load_state_dict(typed, assign=True)
    return model


def shape_in_words(state: dict[str, Tensor], name: str) -> str:
    """Returns in words which shape a parameter has in a state dict."""
    return f"of shape {tuple(state[name].shape)}" if name in state else "not there"


class WithoutInitialization(TorchFunctionMode):
    """Makes models without their random initial weights, which a checkpoint's replace at once.

    On the meta device, torch.nn.init.normal_ would import torch._dynamo: 1.8 s of one core."""

    def __torch_function__(self, function, types, args=(), kwargs=None) -> object:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def rebuild(path: Path | str, kind: str, model_class: type[nn.Module]) -> tuple[nn.Module, dict]:
    """Makes a model from its checkpoint alone. Returns (the model in eval mode, the checkpoint).

    model_class(model_class.Config(...)) makes the model. Raises UserError if the file is damaged,
    or its configuration unknown."""
    checkpoint = load_checkpoint(path, kind)
    try:
        with torch.device("meta"), WithoutInitialization():
            model = model_class(model_class.Config(**checkpoint["config"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} has a configuration that this version does not know ({error}): "
                        f"train it again") from error
    load_weights(model, checkpoint["model"], path)
    return model.eval().requires_grad_(False), checkpoint


def fingerprint(model: nn.Module) -> str:
    """Returns a short hash of all weights. Tokenizers with the same one give the same tokens."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- files from the network

def cache_folder() -> Path:
    """Returns the folder of fetched files: MASKGIT_CACHE, by default ~/.cache/maskgit.

    Raises UserError if there is no home folder, as for a user that the computer does not know."""
    if os.environ.get("MASKGIT_CACHE"):
        return Path(os.environ["MASKGIT_CACHE"]).expanduser()
    try:
        return Path.home() / ".cache" / "maskgit"
    except RuntimeError as error:
        raise UserError("there is no home folder to keep files in: set HOME, or set "
                        "MASKGIT_CACHE to a folder") from error


def download(url: str, name: str, sha256: str | None = None, offline: bool = False,
             folder: Path | None = None) -> Path:
    """Returns the path of a file in `folder` (None: the cache folder), and fetches it if needed.

    sha256: its checksum or the first digits of it. offline: never use the network. Only a whole
    file gets its final name. Raises UserError if it cannot be fetched or written, or is wrong."""
    path = (folder or cache_folder()) / name
    if os.path.exists(path):
        return path
    if offline:
        raise UserError(f"{path} is missing, and --offline forbids the network: fetch {url} "
                        f"elsewhere and put it there")
    part = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(part), hash_prefix=sha256)
        # Without a checksum, torch.hub does not notice a connection that breaks off.
        expected = None if sha256 else size_of(url)
        received = part.stat().st_size
        if expected and received != int(expected):
            raise UserError(f"{url} broke off after {received} of {expected} bytes: run this again")
        part.replace(path)
    except RuntimeError as error:           # torch.hub raises it for a wrong checksum
        raise UserError(f"{url} has a wrong checksum ({error}): run this again, or put the right "
                        f"file at {path}") from error
    except (OSError, http.client.HTTPException) as error:       # also urllib's errors
        raise UserError(f"cannot fetch {url} to {path} ({error}): check the network and the disk, "
                        f"or put the file there yourself") from error
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or never made
            part.unlink()
    return path


def size_of(url: str) -> str | None:
    """Returns how many bytes a server says that a file has, None if it does not say."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.headers.get("Content-Length")
    except urllib.error.HTTPError:          # some servers answer GET alone
        return None
