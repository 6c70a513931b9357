"""What every script that draws needs: the flags that name a run and set the sampler, and the models of that run."""
from pathlib import Path

from lib.files import fingerprint, rebuild
from lib.flags import UserError, add_flags, count, positive, whole

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
        raise UserError(f"{folder}/{stage}.pt was made for a codebook of {theirs}, but {path} has {ours} entries")
    if fingerprint(tokenizer) != checkpoint["tokenizer"]:
        raise UserError(f"{path} is not the tokenizer that {folder}/{stage}.pt was trained with (it was trained again "
                         f"later?): run train_transformer.py again, or name the right file with --vqgan")
    models = [machine.freeze(model.to(machine.device)) for model in (tokenizer, transformer)]
    return folder, *models, checkpoint
