"""Safe files: what is written is whole or not there, and nothing that is loaded can run code."""
import hashlib
import os
import socket
import zipfile
from pathlib import Path

import torch

from lib.devices import add_flags, count, positive, whole


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
        raise OSError(f"cannot write {path}: {reason}; free some space or choose another folder "
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
        raise FileNotFoundError(f"{path} does not exist: train it first, or name another run") from None
    except OSError:
        raise
    except Exception as error:                           # a damaged archive can raise nearly anything
        raise ValueError(f"{path} is not a checkpoint of this project, or is damaged; restore it or train it "
                         f"again") from error
    if found != kind:
        raise ValueError(f"{path} holds a {found}, where a {kind} is needed")
    return checkpoint


def load_tensors(path):
    """The tensors of a PyTorch state dict, by name. Raises OSError, or ValueError where the file is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: value for name, value in state.items() if torch.is_tensor(value)}
    except OSError:
        raise
    except Exception as error:                           # a damaged archive can raise nearly anything
        raise ValueError(f"{path} is no PyTorch state dict, or is damaged; fetch it again") from error


def load_weights(model, weights, path):
    """load_state_dict with a one-line ValueError that names the first parameter which does not fit. Returns the model.

    The weights may be float16, as in example/: each becomes of its parameter's type."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        found, expected = (f"of shape {tuple(state[name].shape)}" if name in state else "missing"
                           for state in (weights, own))
        if found != expected:
            raise ValueError(f"{path} does not fit its own configuration: parameter {name} is {found}, and should be "
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
        raise ValueError(f"{path} has a configuration that this version does not know ({error}); "
                         f"train it again") from error
    return load_weights(model, checkpoint["model"], path).eval().requires_grad_(False), checkpoint


def fingerprint(model):
    """A short hash of all weights: two tokenizers with the same fingerprint give the same tokens."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


STAGES = {"parallel": "transformer", "autoregressive": "autoregressive"}       # by decoder: the name of its file


def add_run_flags(parser):
    """The flags that say which run to use, for every script that draws with one."""
    add_flags(parser, {
        "run": (str, None, "the run's folder (default: the newest in runs/ that holds a transformer)"),
        "vqgan": (str, None, "tokenizer file (default: vqgan.pt in the run's folder)"),
        "decoder": (list(STAGES), None, "which transformer of the run (default: parallel, where it is there)")})


def add_sampler_flags(parser, schedules, orders):
    """The arguments of maskgit.decode() as flags, for every script that draws; sampler_options() reads them."""
    add_flags(parser, {
        "steps": (count, None, "T, decoding steps (default: 8, and 12 for 32 x 32 tokens, as in the paper)"),
        "schedule": (schedules, "cosine", "mask schedule"),
        "choice_temperature": (positive, 4.5, "noise in the choice of what to keep"),
        "temperature": (positive, 1.0, "of the token samples; 0 takes the likeliest"),
        "top_k": (count, None, "sample among so many likeliest tokens (default: all)"),
        "cfg": (positive, None, "weight of classifier-free guidance (default: 1 where a run can, see --class-dropout)"),
        "order": (orders, "confidence", "what is revealed first"),
        "seed": (whole, 0, "of every random draw")})


def sampler_options(args, config):
    """What those flags give to decode(), or, for a causal transformer, to decode_sequential()."""
    options = {"temperature": args.temperature, "top_k": args.top_k}
    if config.causal:
        return options
    cfg = float(config.null_class) if args.cfg is None else args.cfg
    return options | {"steps": args.steps or config.default_steps, "schedule": args.schedule,
                      "choice_temperature": args.choice_temperature, "cfg": cfg, "order": args.order}


def load_run(folder, machine, tokenizer_class, transformer_class, vqgan=None, decoder=None):
    """Both models of a run, on the machine -> (folder, tokenizer, transformer, its checkpoint).

    folder: None: the one in runs/ whose transformer was written last, or the example, where none holds one.
    vqgan: another tokenizer file. decoder: one of STAGES; None: parallel, but in a run that holds only the other.
    Raises FileNotFoundError, or ValueError where the two do not belong together: another codebook, or a
    tokenizer that was trained again after the transformer."""
    if not folder:
        files = [path for stage in STAGES.values() for path in Path("runs").glob(f"*/{stage}.pt")]
        example = Path(__file__).parent.parent / "example" / "transformer.pt"
        folder = max(files, key=lambda path: path.stat().st_mtime, default=example).parent
    folder = Path(folder)
    path = Path(vqgan or folder / "vqgan.pt")
    only_sequential = not (folder / "transformer.pt").exists() and (folder / "autoregressive.pt").exists()
    stage = STAGES[decoder or ("autoregressive" if only_sequential else "parallel")]
    transformer, checkpoint = rebuild(folder / f"{stage}.pt", stage, transformer_class)
    tokenizer, _ = rebuild(path, "vqgan", tokenizer_class)
    ours, theirs = tokenizer.config.codebook_size, transformer.config.codebook_size
    if ours != theirs:
        raise ValueError(f"{folder}/{stage}.pt was made for a codebook of {theirs}, but {path} has {ours} entries")
    if fingerprint(tokenizer) != checkpoint["tokenizer"]:
        raise ValueError(f"{path} is not the tokenizer that {folder}/{stage}.pt was trained with (it was trained again "
                         f"later?): run train_transformer.py again, or name the right file with --vqgan")
    models = [machine.freeze(model.to(machine.device)) for model in (tokenizer, transformer)]
    return folder, *models, checkpoint
