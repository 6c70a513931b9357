"""Safe files: what is written is whole or not there, nothing that is loaded can run code, and what is fetched is fetched once."""
import hashlib
import os
import socket
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import torch

from lib.flags import UserError


def write_atomically(path, write):
    """Calls write(file) on a temporary file beside `path`, then renames it. Raises OSError, `path` being as it was."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")   # hosts may share a disk
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:               # torch.save reports a full disk as the latter
        reason = getattr(error, "strerror", None) or "the file could not be written (disk full?)"
        raise UserError(f"cannot write {path}: {reason}; free some space or choose another folder "
                      f"with --run or --out") from error
    finally:
        if temporary.exists():                             # it was not renamed
            temporary.unlink()


def on_cpu(value, before=None):
    """A copy on the CPU of nested dicts and lists of tensors and plain values. before: an earlier copy, into whose
    tensors this one is written: to get new memory takes longer than to copy."""
    if isinstance(value, dict):
        return {key: on_cpu(item, before.get(key) if before else None) for key, item in value.items()}
    if isinstance(value, list):
        return [on_cpu(item, old) for item, old in zip(value, before or [None] * len(value), strict=True)]
    if not torch.is_tensor(value):
        return value
    if before is None:                                   # empty_like() of torch-xla's tensors is none that can be saved
        before = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, pin_memory=value.is_cuda)
    return before.copy_(value)


def save_checkpoint(path, checkpoint):
    """Writes a dict of plain values and tensors of the CPU, atomically. Raises OSError."""
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def load_checkpoint(path, kind):
    """Reads what save_checkpoint wrote. kind: what its "kind" must say, such as vqgan or transformer.

    Raises FileNotFoundError, or ValueError for a file that is truncated, not a checkpoint, or of another kind."""
    try:
        with zipfile.ZipFile(path):                      # what torch.save writes; anything else is not even unpickled
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint["kind"]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: train it first, or name another run") from None
    except OSError:
        raise
    except Exception as error:                           # a damaged archive can raise nearly anything
        raise UserError(f"{path} is not a checkpoint of this project, or is damaged; restore it or train it "
                         f"again") from error
    if found != kind:
        raise UserError(f"{path} holds a {found}, where a {kind} is needed")
    return checkpoint


def load_tensors(path):
    """The tensors of a PyTorch state dict, by name. Raises OSError, or ValueError where the file is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: value for name, value in state.items() if torch.is_tensor(value)}
    except OSError:
        raise
    except Exception as error:                           # a damaged archive can raise nearly anything
        raise UserError(f"{path} is no PyTorch state dict, or is damaged; fetch it again") from error


def load_weights(model, weights, path):
    """load_state_dict with a one-line ValueError that names the first parameter which does not fit. Returns the model.

    The weights may be float16, as in example/: each becomes of its parameter's type."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        found, expected = (f"of shape {tuple(state[name].shape)}" if name in state else "missing"
                           for state in (weights, own))
        if found != expected:
            raise UserError(f"{path} does not fit its own configuration: parameter {name} is {found}, and should be "
                             f"{expected}")
    model.load_state_dict({name: value.to(own[name].dtype) for name, value in weights.items()}, assign=True)
    return model


def rebuild(path, kind, model_class):
    """A model from its file alone -> (model in eval mode, checkpoint). model_class(model_class.Config(...)) makes it.

    Raises FileNotFoundError, or ValueError for a damaged file or one whose configuration is not known."""
    checkpoint = load_checkpoint(path, kind)
    try:
        with torch.device("meta"):                       # no time for a random start, which is replaced at once
            model = model_class(model_class.Config(**checkpoint["config"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} has a configuration that this version does not know ({error}); "
                         f"train it again") from error
    return load_weights(model, checkpoint["model"], path).eval().requires_grad_(False), checkpoint


def fingerprint(model):
    """A short hash of all weights: two tokenizers with the same fingerprint give the same tokens."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Returns the folder of fetched files: MASKGIT_CACHE, by default ~/.cache/maskgit."""
    if os.environ.get("MASKGIT_CACHE"):
        return Path(os.environ["MASKGIT_CACHE"])
    return Path("~/.cache/maskgit").expanduser()


def download(url: str, name: str, sha256: str | None = None, offline: bool = False, folder: Path | None = None) -> Path:
    """Returns the path of a file in `folder` (None: the cache folder), and fetches it first if it is not there.

    sha256: its checksum or the first digits of it. offline: never use the network. Only a whole file gets its final
    name. Raises UserError if the file cannot be had, cannot be written, or has a wrong checksum."""
    path = (folder or cache_folder()) / name
    if path.exists():
        return path
    if offline:
        raise UserError(f"{path} is missing, and --offline forbids the network: fetch {url} elsewhere and put it there")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        torch.hub.download_url_to_file(url, str(part), hash_prefix=sha256)
        # torch.hub does not notice a connection that breaks off.
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as response:
            expected = int(response.headers.get("Content-Length", part.stat().st_size))
        received = part.stat().st_size
        if received != expected:
            part.unlink()
            raise UserError(f"{url} broke off after {received} of {expected} bytes: run this again")
        part.replace(path)
    except urllib.error.URLError as error:               # before OSError, of which it is one
        raise UserError(f"cannot fetch {url} ({error}): check the network, or put the file at {path} yourself") from error
    except RuntimeError as error:                        # torch.hub's word for a wrong checksum
        raise UserError(f"{url} has a wrong checksum ({error}): run this again, or put the right file at {path}") from error
    except OSError as error:
        raise UserError(f"cannot fetch {url} to {path} ({error}): check the network and the disk, or put the file there "
                        f"yourself") from error
    return path
