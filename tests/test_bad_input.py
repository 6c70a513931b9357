"""A hundred bad inputs: each ends in one line on stderr that names the thing, with status 2, and changes no file."""
import shutil

import pytest
from conftest import TINY_TRANSFORMER, TINY_VQ
from PIL import Image

import bench
import edit
import evaluate
import pretrained
import sample
import train_transformer
import train_vq

# Script, its arguments, a word of the line that they must end in. RUN: a finished toy run; NEW: a folder that is not
# there; PHOTO, TEXT, TRUNCATED, EMPTY, ODD: see the fixture.
NUMBERS = {
    train_vq: ("--steps 0", "--steps -3", "--steps 1.5", "--steps many", "--batch 0", "--batch -1", "--filters 0",
               "--groups 0", "--res-blocks 0", "--codebook-size 0", "--codebook-dim 0", "--disc-width 0",
               "--disc-max-width 0", "--micro-batch 0", "--image-size 0", "--lr -1", "--lr nan", "--lr inf",
               "--disc-lr -0.1", "--beta1 2", "--warmup -1", "--ema 1.5", "--ema -0.1", "--gan-start 2",
               "--gan-ramp 0", "--r1 -1", "--r1-every 0", "--entropy -1", "--adversarial -1", "--reconstruction nan",
               "--perceptual-weight -1", "--codebook-lr -1", "--save-every 0", "--picture-every 0", "--log-every 0",
               "--workers -1", "--seed -1", "--seed x", "--max-pixels 0", "--dry-run 0", "--multipliers 0"),
    train_transformer: ("--steps 0", "--batch 0", "--dim 0", "--depth 0", "--heads 0", "--dropout 1.5", "--dropout -1",
                        "--class-dropout 7", "--label-smoothing 2", "--muon-lr -1", "--weight-decay -1",
                        "--cache-tokens -1", "--save-every 0", "--evaluate-every -1", "--evaluate-num 0",
                        "--log-every 0", "--ema 7"),
    sample: ("--num 0", "--num -2", "--num 1e3", "--steps 0", "--temperature -1", "--choice-temperature nan",
             "--top-k 0", "--cfg -1", "--seed -1"),
    evaluate: ("--num -1", "--batch 0", "--seeds 0", "--ablate-steps 0", "--classifier-steps -1", "--steps 0"),
    bench: ("--batch 0", "--repeats 0"),
    edit: ("--num 0", "--extrapolate 0", "--feather -1", "--start-step -1"),
}
OTHERS = [
    (train_vq, "--run NEW --gan-loss wasserstein", "hinge"), (train_vq, "--run NEW --bf16 maybe", "yes or no"),
    (train_vq, "--run NEW --device abacus", "cpu"), (train_vq, "--run NEW --data nowhere", "nowhere"),
    (train_vq, "--run NEW --data EMPTY", "no images"), (train_vq, "--run NEW --data TEXT", "TEXT"),
    (train_vq, "--run NEW --image-size 64", "32 pixels"), (train_vq, "--run NEW --multipliers 1 1 1 1 1 1 1", "stride"),
    (train_vq, "--run NEW --filters 8 --groups 3", "groups"),
    (train_vq, "--run NEW --batch 8 --micro-batch 3", "--batch 8"),
    (train_vq, "--run NEW --init NEW", "does not exist"), (train_vq, "--run NEW --preset huge", "shapes"),
    (train_vq, "--run RUN", "--overwrite"), (train_vq, "--run TEXT", "cannot write"),
    (train_transformer, "--run NEW", "does not exist"), (train_transformer, "--run RUN", "--overwrite"),
    (train_transformer, "--run NEW --vqgan TEXT", "not a checkpoint"),
    (train_transformer, "--run NEW --vqgan RUN/vqgan.pt --dim 10 --heads 3", "heads"),
    (train_transformer, "--run NEW --vqgan RUN/transformer.pt", "vqgan is needed"),
    (train_transformer, "--run NEW --vqgan RUN/vqgan.pt --schedule quartic", "cosine"),
    (train_transformer, "--run NEW --vqgan RUN/vqgan.pt --image-size 33", "divisible"),
    (sample, "--run NEW", "does not exist"), (sample, "--run RUN --class 99", "0 to 9"),
    (sample, "--run RUN --class unicorn", "unicorn"), (sample, "--run RUN --steps 65", "64"),
    (sample, "--run RUN --top-k 33", "32"), (sample, "--run RUN --cfg 2", "--class-dropout"),
    (sample, "--run RUN --num 100000000", "GB"), (sample, "--run RUN --out NEW/x.txt", ".png"),
    (sample, "--run RUN --schedule quartic", "cosine"), (sample, "--run RUN --order alphabetic", "halton"),
    (sample, "--run RUN --decoder autoregressive", "does not exist"),
    (sample, "--run RUN --vqgan TEXT", "not a checkpoint"),
    (edit, "PHOTO --run RUN", "one of the arguments"), (edit, "NEW/photo.png --run RUN --inpaint centre", "photo.png"),
    (edit, "TRUNCATED --run RUN --inpaint centre", "not a readable image"),
    (edit, "TEXT --run RUN --inpaint centre", "not a readable image"),
    (edit, "PHOTO --run RUN --box 1,2,3", "TOP,LEFT"),
    (edit, "PHOTO --run RUN --box 0,0,999,999", "outside"), (edit, "PHOTO --run RUN --mask ODD", "same size"),
    (edit, "PHOTO --run RUN --outpaint right=2", "fraction"), (edit, "PHOTO --run RUN --extrapolate 20", "wider"),
    (edit, "PHOTO --run RUN --inpaint centre --class unicorn", "unicorn"),
    (edit, "PHOTO --run RUN --inpaint edges", "centre"),
    (evaluate, "--run RUN --num 2", "images"), (evaluate, "--run NEW", "does not exist"),
    (evaluate, "--run RUN --classifier-steps 0", "--features inception"),
    (evaluate, "--run RUN --sweep nothing", "cfg"),
    (bench, "--preset gigantic", "imagenet256"), (bench, "--rows everything", "decode"),
    (pretrained, "imagenet1024", "imagenet256"), (pretrained, "", "no model"),
    (pretrained, "--half RUN RUN", "already there"),
]


@pytest.fixture(scope="module")
def places(trained, tmp_path_factory):
    """What the capital words stand for."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(trained, folder / "RUN")
    (folder / "EMPTY").mkdir()
    (folder / "TEXT").write_text("this is no picture")
    Image.linear_gradient("L").convert("RGB").resize((40, 40)).save(folder / "PHOTO", format="png")
    Image.new("L", (10, 10), 255).save(folder / "ODD", format="png")
    (folder / "TRUNCATED").write_bytes((folder / "PHOTO").read_bytes()[:80])
    return folder


def state_of(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_hundred_bad_inputs(places, monkeypatch, capsys):
    needed = {train_vq: "--run NEW", train_transformer: "--run NEW --vqgan RUN/vqgan.pt", bench: "--preset shapes",
              edit: "PHOTO --run RUN --inpaint centre"}
    tried = [(script, f"{needed.get(script, '--run RUN')} {arguments}", arguments.split()[0])
             for script, several in NUMBERS.items() for arguments in several] + OTHERS
    small = {train_vq: TINY_VQ, train_transformer: TINY_TRANSFORMER}
    monkeypatch.chdir(places)
    before, wrong = state_of(places), []
    for script, arguments, word in tried:
        flags = [*map(str, small.get(script, [])), *arguments.split()]
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *flags])
        status, problem = 0, ""
        try:
            flags.command_line(script.main)
        except SystemExit as end:
            status = end.code
        except Exception as error:                                            # noqa: BLE001 would be a traceback
            problem = f"{type(error).__name__}: {error}"
        *_, last = capsys.readouterr().err.strip().splitlines() or [""]
        if problem or status != 2 or "error: " not in last or word not in last:
            wrong.append(f"{script.__name__} {arguments}: status {status}, {problem or last}")
    assert not wrong, "\n".join(wrong)
    assert len(tried) >= 100 and state_of(places) == before
