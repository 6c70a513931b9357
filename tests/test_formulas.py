"""How the formulas are put together: each test fails where a sign, a factor, a detach or a schedule is wrong.

Whole training steps are written out once more, without the scripts' parts, and must give the same weights."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import read_log
from torch.utils._python_dispatch import TorchDispatchMode

import train_transformer
import train_vq
from discriminator import Discriminator, discriminator_loss, generator_loss, r1_penalty
from lib import optim
from lib.data import open_data
from lib.files import rebuild
from lib.loader import training_batches
from lib.orders import halton_order
from lib.runtime import Machine, step_seed
from maskgit import MaskGIT, MaskGITConfig, drop_labels, mask_tokens, mvtm_loss
from vqgan import VQGAN, FiniteScalarQuantizer, VectorQuantizer, VQGANConfig, as_grid

ARGS = SimpleNamespace(**train_vq.PRESETS["shapes"])
SMALL = VQGANConfig(32, 4, 8, (1, 1, 1), 1, 1)
EVERY_STEP = ["--batch", 4, "--steps", 4, "--micro-batch", 2, "--log-every", 1, "--picture-every", 9, "--save-every", 9]


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    model = VQGAN(SMALL)
    torch.nn.init.normal_(model.quantizer.codebook)
    return model


@pytest.fixture
def exchanges(monkeypatch):
    """A list to which every micro-batch of a training adds whether ranks would exchange gradients in it."""
    told = []
    original = Machine.micro_batch

    def recording(machine, wrapped, last):
        told.append(last)
        return original(machine, wrapped, last)
    monkeypatch.setattr(Machine, "micro_batch", recording)
    return told


# ---- the terms of stage 1

def test_the_tokenizers_loss_is_the_weighted_sum_of_its_terms(tokenizer, images):
    def discriminator(x):
        return 3 * x.mean((1, 2, 3)) - 1

    def lpips(a, b):
        return (a - b).abs().mean((1, 2, 3))
    expected_output, _, of_quantizer = tokenizer(images)
    total, terms, restored = train_vq.tokenizer_loss(ARGS, tokenizer, discriminator, lpips, 0.3, images)
    assert torch.equal(restored, expected_output) and not restored.requires_grad
    assert min(abs(term.item()) for term in terms.values()) > 1e-4         # no term is too small to be missed
    expected = 20 * (expected_output - images).square().mean()
    expected = expected + of_quantizer["commitment"] + of_quantizer["codebook"] + of_quantizer["entropy"]
    expected = expected + 0.1 * lpips(expected_output, images).mean()
    expected = expected + 0.3 * F.softplus(-discriminator(expected_output)).mean()      # low where it says "real"
    torch.testing.assert_close(total, expected)
    total, terms, _ = train_vq.tokenizer_loss(ARGS, tokenizer, None, None, 0, images)
    assert "generator" not in terms and "perceptual" not in terms


def test_commitment_moves_features_and_codebook_loss_moves_codes():
    """Each term's gradient reaches one side only (van den Oord et al. 2017, Eq. 3), the commitment scaled by beta."""
    quantizer = VectorQuantizer(SMALL)
    torch.nn.init.normal_(quantizer.codebook, generator=torch.Generator().manual_seed(0))
    features = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    _, indices, losses = quantizer(features)
    both = [features, quantizer.codebook]
    to_features, to_codes = torch.autograd.grad(losses["commitment"], both, allow_unused=True)
    difference = (features - quantizer.decode(indices)).detach()
    torch.testing.assert_close(to_features, 0.25 * 2 * difference / features.numel())
    assert to_codes is None
    to_features, to_codes = torch.autograd.grad(losses["codebook"], both, allow_unused=True)
    assert to_features is None
    expected = torch.zeros_like(quantizer.codebook)
    expected.index_add_(0, indices.flatten(), -2 * difference.permute(0, 2, 3, 1).reshape(-1, 4) / features.numel())
    torch.testing.assert_close(to_codes, expected)


def test_the_discriminator_sees_centred_images_if_it_is_asked_to(images):
    torch.manual_seed(0)
    plain = Discriminator(32, 4, 32)
    centred = Discriminator(32, 4, 32, centred=True)
    centred.load_state_dict(plain.state_dict())
    assert torch.equal(centred(images), plain(images * 2 - 1))


def test_the_penalty_takes_few_operations():
    """A blur by a convolution of each channel alone would take 4,020 convolutions and 12,288 operations. Views cost nothing."""
    counts = {"all": 0, "convolutions": 0}

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            is_view = any(value.alias_info is not None for value in function._schema.returns)
            counts["all"] += not is_view
            counts["convolutions"] += "convolution" in str(function)
            return function(*args, **kwargs or {})
    with torch.device("meta"):
        disc = Discriminator(256)
        real = torch.empty(1, 3, 256, 256)
    with Counter():
        r1_penalty(disc, real).backward()
    assert counts["convolutions"] <= 100 and counts["all"] < 1000, counts


def test_the_codebook_starts_near_features(images):
    """Also where there are fewer features than entries: then several start near one, but no two alike."""
    torch.manual_seed(0)
    tokenizer = VQGAN(SMALL)
    with torch.no_grad():
        features = tokenizer.encoder(images[:1, :, :8, :8])                                         # 2 x 2 of them
    tokenizer.quantizer.start_from(features, torch.Generator().manual_seed(0))
    codebook = tokenizer.quantizer.codebook.detach()
    features = features.permute(0, 2, 3, 1).flatten(0, 2)
    distances = torch.cdist(codebook, features)
    assert distances.min(1).values.max() < 0.5 * features.std(0).norm()
    assert torch.bincount(distances.argmin(1)).tolist() == [8] * 4
    assert len(torch.unique(codebook, dim=0)) == 32


def test_the_codebook_starts_by_micro_batches(images):
    """A whole batch in float32 may be more than a GPU holds."""
    torch.manual_seed(0)
    model = VQGAN(SMALL)
    sizes = []
    codebooks = []
    model.encoder.register_forward_hook(lambda encoder, inputs, features: sizes.append(len(features)))
    for count in (1, 2):
        parts = optim.micro_batches(len(images), count)
        train_vq.start_quantizer(model, images, parts, torch.Generator().manual_seed(0))
        codebooks.append(model.quantizer.codebook.detach().clone())
    assert sizes == [4, 2, 2]
    torch.testing.assert_close(*codebooks)


# ---- finite scalar quantization

LEVELS = [(8, 5, 5), (3, 4, 7)]


def make_fsq(levels):
    return FiniteScalarQuantizer(VQGANConfig(math.prod(levels), len(levels), quantizer="fsq", levels=levels))


def test_what_would_go_wrong_silently_is_refused():
    """NaN from two levels; another loss than the one that is named; images made of the tokens of others."""
    with pytest.raises(ValueError, match="at least 3"):
        make_fsq((8, 2))
    logits = torch.zeros(2)
    for loss in (lambda: generator_loss(logits, "wasserstein"), lambda: discriminator_loss(logits, logits, "wasserstein")):
        with pytest.raises(ValueError, match="wasserstein is no adversarial loss"):
            loss()
    with pytest.raises(RuntimeError, match="shape"):
        as_grid(torch.zeros(2, 8))


@pytest.mark.parametrize("levels", LEVELS)
def test_each_code_of_fsq_is_decoded_to_numbers_that_are_encoded_as_it(levels):
    quantizer = make_fsq(levels)
    codes = torch.arange(math.prod(levels)).view(1, -1, 1)
    numbers = quantizer.decode(codes)                                                # (1, D, n, 1), in [-1, 1]
    assert numbers.shape == (1, len(levels), math.prod(levels), 1) and numbers.abs().max() == 1
    assert len(torch.unique(numbers[0, :, :, 0], dim=1)[0]) == math.prod(levels)     # no two are the same
    L = torch.tensor(levels).view(-1, 1, 1)
    half_range = (L - 1) * 0.999 / 2                                                 # the inverse of bound()
    offset = 0.5 * (L % 2 == 0)
    features = ((numbers * (L // 2) + offset) / half_range).clamp(-1 + 1e-6, 1 - 1e-6).atanh() \
        - (offset / half_range).atanh()
    assert torch.equal(quantizer.encode(features), codes)


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_rounds_each_number_to_its_nearest_level(levels):
    quantizer = make_fsq(levels)
    features = 2 * torch.randn(2, len(levels), 16, 16, generator=torch.Generator().manual_seed(0))
    quantized, indices, losses = quantizer(features)
    assert losses == {} and torch.equal(indices, quantizer.encode(features))
    torch.testing.assert_close(quantized, quantizer.decode(indices))
    bounded = quantizer.bound(features)
    for place, level in enumerate(levels):
        allowed = torch.arange(level) - level // 2                                 # L integers, from -(L // 2) upwards
        nearest = (bounded[:, place, ..., None] - allowed).abs().min(-1)
        torch.testing.assert_close(quantized[:, place] * (level // 2), allowed[nearest.indices].float())
        assert nearest.values.max() <= 0.5
        assert set(nearest.indices.flatten().tolist()) == set(range(level))


@pytest.mark.parametrize("levels", LEVELS)
def test_the_gradient_of_fsq_is_that_of_the_bounded_numbers(levels):
    quantizer = make_fsq(levels)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, len(levels), 4, 4, generator=generator).requires_grad_(True)
    weight = torch.randn(features.shape, generator=generator)
    gradient, = torch.autograd.grad((quantizer(features)[0] * weight).sum(), features)
    half_levels = torch.tensor(levels).view(-1, 1, 1) // 2
    expected, = torch.autograd.grad((quantizer.bound(features) / half_levels * weight).sum(), features)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().min() > 0


# ---- the parts of both stages

def test_the_learning_rate_warms_up_and_decays():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 6.0}, {"params": [torch.zeros(1)]}], lr=2.0)

    def rate(step, decay_until):
        optim.set_learning_rate(optimizer, step, 10, decay_until)
        own, common = [group["lr"] for group in optimizer.param_groups]
        assert own == pytest.approx(3 * common)
        return common
    rates = [rate(step, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2 and rates[60] == pytest.approx(2 * (0.01 + 0.99 / 2)) and rates[-1] < 0.03
    assert rate(100_000, None) == 2


def test_averaged_weights_lag_behind():
    """At step t by (1 + t) / (10 + t), at most by the decay asked for."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0)
    ema = optim.averaged(model)
    model.weight.data.fill_(1)
    optim.update_average(ema, model, 0.9, 0)
    assert ema.weight.item() == pytest.approx(0.9)                   # 1 - 1/10 of the way
    optim.update_average(ema, model, 0.9, 10_000)
    assert ema.weight.item() == pytest.approx(0.9 + 0.1 * 0.1)
    assert not ema.weight.requires_grad


def test_micro_batches_are_equal_parts_of_the_batch():
    assert optim.count_micro_batches(16, None, 2) == 1
    assert optim.count_micro_batches(16, 2, 2) == 4
    assert optim.count_micro_batches(16, 100, 2) == 1
    assert optim.micro_batches(8, 4) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    with pytest.raises(ValueError, match="--micro-batch"):
        optim.count_micro_batches(16, 3, 1)
    for batch, devices in ((5, 2), (1, 2), (128, 2 * 3)):
        with pytest.raises(ValueError, match=f"--batch that is a multiple of {devices}"):
            optim.count_micro_batches(batch, None, devices)


def test_muon_is_the_formula_in_float64():
    """Against Jordan et al. 2024, written out, and torch's own: wide and tall matrices, two of them of one shape."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16)]
    matrices = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    copies = [torch.nn.Parameter(matrix.detach().clone()) for matrix in matrices]
    expected = [matrix.detach().double() for matrix in matrices]
    momenta = [0] * 4
    muon = optim.Muon(matrices, 0.02, 0.1, torch.float32)
    theirs = torch.optim.Muon(copies, lr=0.02, weight_decay=0.1, momentum=0.95)
    for _ in range(2):
        for i, matrix in enumerate(matrices):
            matrix.grad = torch.randn(matrix.shape, generator=generator)
            copies[i].grad = matrix.grad.clone()
            gradient = matrix.grad.double()
            momenta[i] = 0.95 * momenta[i] + gradient
            x = gradient + 0.95 * momenta[i]
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.mT
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            scale = max(1, x.shape[0] / x.shape[1]) ** 0.5
            expected[i] = (1 - 0.02 * 0.1) * expected[i] - 0.02 * scale * x
        muon.step()
        theirs.step()
    for matrix, value, other in zip(matrices, expected, copies, strict=True):
        torch.testing.assert_close(matrix.detach().double(), value, rtol=0, atol=1e-6)
        assert (matrix - other).abs().max() < 0.05 * 0.02                          # theirs iterates in bfloat16


def test_muon_moves_the_matrices_of_the_blocks_and_weight_decay_all_matrices():
    model = MaskGIT(MaskGITConfig(24, 3, 16, 32, 1, 4, 64))
    optimizers = optim.transformer_optimizers(model, "muon", 0.004, 0.02, 0.045, Machine("cpu"))
    muon, = optimizers["muon"].param_groups
    assert muon["lr"] == 0.02 and muon["weight_decay"] == 0.045
    assert sorted(tuple(matrix.shape) for matrix in muon["params"]) == [(32, 32)] * 4 + [(32, 64), (64, 32)]
    matrices, vectors = optimizers["adamw"].param_groups
    assert matrices["weight_decay"] == 0.045 and vectors["weight_decay"] == 0
    assert {parameter.ndim for parameter in matrices["params"]} == {2}
    assert {parameter.ndim for parameter in vectors["params"]} == {1}
    optimizers = optim.transformer_optimizers(model, "adamw", 0.004, 0.02, 0.045, Machine("cpu"))
    assert list(optimizers) == ["adamw"]
    assert sum(len(group["params"]) for group in optimizers["adamw"].param_groups) == len(list(model.parameters()))


def test_gelu_is_the_tanh_form():
    """As released. It differs from the exact form by up to 5e-4, most where activations are about 2."""
    model = MaskGIT(MaskGITConfig(24, 3, 16, 32, 1, 4, 64))
    x = torch.linspace(-4, 4, 101)
    tanh_form = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x ** 3)))
    assert (tanh_form - F.gelu(x)).abs().max() > 3e-4
    for gelu in (model.blocks[0].mlp[1], model.head[1]):
        torch.testing.assert_close(gelu(x), tanh_form, atol=1e-6, rtol=0)


def test_halton_points_are_of_base_2_down_and_3_across():
    """Point i, mirrored in base 2, gives the row: 1/2, 1/4, 3/4, ...; in base 3 the column: 1/3, 2/3, 1/9, ..."""
    expected = [(2, 1), (1, 2), (3, 0), (0, 1), (2, 3), (1, 0), (3, 2)]
    assert [divmod(place, 4) for place in halton_order(16)[:7].tolist()] == expected


# ---- masked training

def test_masks_are_random_and_as_many_as_the_schedule_says():
    """Eq. 1's mask: ceil(γ(r)·N) for uniform r, so on average the mean of the cosine, 2/π; at random places."""
    tokens = torch.zeros(4000, 64, dtype=torch.long)
    visible, mask = mask_tokens(tokens, "cosine", 99, torch.Generator().manual_seed(0))
    assert torch.equal(visible == 99, mask)
    assert mask.sum(1).min() >= 1 and mask.sum(1).max() == 64
    assert abs(mask.float().mean().item() - 2 / math.pi - 0.5 / 64) < 0.01
    assert mask.float().mean(0).std() < 0.02


def test_a_fraction_of_the_labels_is_dropped():
    labels = torch.arange(3).repeat(1000)
    dropped = drop_labels(labels, 0.2, 4, torch.Generator().manual_seed(0))
    assert (dropped == 4).float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert torch.equal(dropped[dropped != 4], labels[dropped != 4])


def test_only_masked_tokens_count_and_all_images_count_alike():
    logits = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    mask = torch.tensor([[True, False, False, False], [True, True, True, False]])
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 4)
    expected = (losses[0, 0] + losses[1, :3].mean()) / 2
    torch.testing.assert_close(mvtm_loss(logits, targets, mask, label_smoothing=0.0), expected)


# ---- whole steps, written out

def rate_at(step):
    """Returns the learning rate in units of the base: warm-up in 2 steps, then cosine decay to 1% at step 4."""
    return [0.5, 1, 1, 0.01 + 0.99 / 2][step]


def clip(gradients):
    """Scales gradients so that they are at most 1 long together. Returns their length before."""
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    for gradient in gradients:
        gradient.mul_(1 / max(1, norm))
    return norm.item()


def average(ema, model, step):
    """Moves `ema` as --ema 0.2 does: by 0.9, 9/11 and then 0.8 of the way."""
    decay = [1 / 10, 2 / 11, 0.2, 0.2][step]
    for old, new in zip(ema.parameters(), model.parameters(), strict=True):
        old.data = decay * old.data + (1 - decay) * new.data


def assert_same_state(saved, models, optimizers):
    """Compares a resume file with models and optimizers by name: weights and moments."""
    for name, model in models.items():
        for parameter, value in model.state_dict().items():
            torch.testing.assert_close(saved[name][parameter], value, atol=2e-5, rtol=1e-3, msg=f"{name} {parameter}")
    for name, optimizer in optimizers.items():
        for number, moments in optimizer.state_dict()["state"].items():
            for moment in ("exp_avg", "exp_avg_sq"):
                ours = saved[name]["state"][number][moment]
                tolerance = 1e-3 * moments[moment].abs().max().item()
                tolerance += 1e-7 if moment == "exp_avg" else 1e-14        # the gradient of key biases is but rounding
                torch.testing.assert_close(ours, moments[moment], atol=tolerance, rtol=1e-3,
                                           msg=f"{name} {number} {moment}")


def test_stage_1_is_four_steps_written_out(call_main, exchanges, tmp_path):
    """The discriminator joins in at the second step, its weight grows over two, and R1 is due at the third."""
    call_main(train_vq, tmp_path, "--run", "run", *EVERY_STEP, "--filters", 8, "--codebook-size", 32,
              "--codebook-dim", 4, "--disc-width", 2, "--disc-max-width", 8, "--lr", 1e-3, "--codebook-lr", 1,
              "--disc-lr", 2e-3, "--beta1", 0.5, "--warmup", 2, "--decay", "yes", "--ema", 0.2,
              "--reconstruction", 20, "--entropy", 0.1, "--adversarial", 8, "--gan-start", 0.25, "--gan-ramp", 2,
              "--r1", 5, "--r1-every", 2)
    rows = read_log(tmp_path / "run" / "vqgan.log.csv")

    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(32, 4, 8, (1, 1, 1), 1, 1))
    disc = Discriminator(32, 2, 8, centred=True)
    ema = copy.deepcopy(model)
    parameters = [*model.encoder.parameters(), *model.decoder.parameters(), *model.quantizer.parameters()]
    adam = torch.optim.Adam(parameters, betas=(0.5, 0.99))
    disc_adam = torch.optim.Adam(disc.parameters(), betas=(0.5, 0.99))
    stream = training_batches(open_data("shapes", 32)[0], 4, 0, 0, 4)
    for step, (images, _) in enumerate(stream):
        halves = (images / 255).chunk(2)
        adversarial = [0, 4, 8, 8][step]
        loss = 0
        restored = []
        for half in halves:
            output, _, terms = model(half)
            restored.append(output)
            loss = loss + 20 * (output - half).square().mean() / 2
            loss = loss + (terms["commitment"] + terms["codebook"] + terms["entropy"]) / 2
            loss = loss + adversarial * F.softplus(-disc(output)).mean() / 2
        gradients = torch.autograd.grad(loss, parameters)
        norm = clip(gradients)
        assert float(rows[step]["gradient"]) == pytest.approx(norm, rel=1e-3) and norm > 1.1
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        adam.param_groups[0]["lr"] = 1e-3 * rate_at(step)
        adam.step()
        average(ema, model, step)
        if step >= 1:
            images = torch.cat(halves)
            fakes = torch.cat(restored).detach()
            loss = F.softplus(-disc(images)).mean() + F.softplus(disc(fakes)).mean()
            assert float(rows[step]["discriminator"]) == pytest.approx(loss.item(), rel=1e-3)
            if step == 2:
                loss = loss + 2 * 5 * r1_penalty(disc, images)
            disc_adam.zero_grad()
            loss.backward()
            disc_adam.param_groups[0]["lr"] = [1e-3, 2e-3, 2e-3][step - 1]
            disc_adam.step()

    saved = torch.load(tmp_path / "run" / "vqgan.resume.pt", weights_only=True)
    optimizers = {"optimizer": adam, "disc_optimizer": disc_adam}
    assert_same_state(saved, {"model": model, "ema": ema, "disc": disc}, optimizers)
    # Ranks exchange gradients in the last micro-batch only: of the tokenizer, then of the discriminator.
    assert exchanges == [False, True] + 3 * [False, True, False, True]


def test_the_codebook_has_a_learning_rate_of_its_own_and_starts_from_the_first_images(call_main, tmp_path):
    """At a rate of 0 nothing moves from where it started."""
    call_main(train_vq, tmp_path, "--run", "run", *EVERY_STEP, "--steps", 1, "--filters", 8, "--codebook-size", 32,
              "--codebook-dim", 4, "--adversarial", 0, "--lr", 0, "--codebook-lr", 3)
    saved = torch.load(tmp_path / "run" / "vqgan.resume.pt", weights_only=True)
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(32, 4, 8, (1, 1, 1), 1, 1))
    (images, _), = training_batches(open_data("shapes", 32)[0], 4, 0, 0, 1)
    with torch.no_grad():
        features = model.encoder(images / 255)
    model.quantizer.start_from(features, torch.Generator().manual_seed(step_seed(0, 0)))
    torch.testing.assert_close(saved["model"]["quantizer.codebook"], model.quantizer.codebook.detach())
    optimizer = train_vq.tokenizer_optimizer(SimpleNamespace(lr=0.5, codebook_lr=3, beta1=0.9), model, Machine("cpu"))
    others, codebook = optimizer.param_groups
    assert others["lr"] == 0.5 and codebook["lr"] == 1.5
    assert codebook["params"][0] is model.quantizer.codebook


def test_stage_2_is_four_steps_written_out(untrained, call_main, exchanges, tmp_path):
    """Dropped labels, masks, Eq. 1 and AdamW, in two micro-batches."""
    call_main(train_transformer, tmp_path, "--run", "run", "--vqgan", untrained / "vqgan.pt", *EVERY_STEP,
              "--cache-tokens", 0, "--dim", 32, "--depth", 1, "--heads", 2, "--dropout", 0, "--optimizer", "adamw",
              "--label-smoothing", 0.1, "--class-dropout", 0.5, "--lr", 1e-3, "--weight-decay", 3, "--warmup", 2,
              "--decay", "yes", "--ema", 0.2)
    rows = read_log(tmp_path / "run" / "transformer.log.csv")

    tokenizer, _ = rebuild(untrained / "vqgan.pt", "vqgan", VQGAN)
    torch.manual_seed(0)
    model = MaskGIT(MaskGITConfig(32, 10, 64, 32, 1, 2, 128, dropout=0.0, null_class=True))
    ema = copy.deepcopy(model)
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    vectors = [parameter for parameter in parameters if parameter.ndim == 1]
    adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": 3}, {"params": vectors, "weight_decay": 0}],
                              betas=(0.9, 0.96))
    dropped = 0
    for step, (images, labels) in enumerate(training_batches(open_data("shapes", 32)[0], 4, 0, 0, 4)):
        tokens = tokenizer.encode(images / 255).flatten(1)                                   # (4, 64)
        generator = torch.Generator().manual_seed(step_seed(0, step))
        without_class = torch.rand(4, generator=generator) < 0.5
        dropped += without_class.sum().item()
        labels = torch.where(without_class, 11, labels)
        r = torch.rand(4, 1, generator=generator)
        noise = torch.rand(4, 64, generator=generator)
        count = (torch.cos(r * torch.pi / 2) * 64).ceil().long()
        mask = noise <= noise.sort(1).values.gather(1, count - 1)                             # the `count` smallest
        logits = model(torch.where(mask, 32 + 10, tokens), labels)
        smooth = 0.9 * F.one_hot(tokens, 32) + 0.1 / 32
        losses = -(smooth * logits.log_softmax(-1)).sum(-1)
        loss = torch.stack([row[own].mean() for row, own in zip(losses, mask, strict=True)]).mean()
        right = (logits.argmax(-1) == tokens) & mask
        accuracies = [right[half].sum() / mask[half].sum() for half in (slice(0, 2), slice(2, 4))]
        gradients = torch.autograd.grad(loss, parameters)
        norm = clip(gradients)
        assert float(rows[step]["gradient"]) == pytest.approx(norm, rel=1e-3) and norm > 1.1
        assert float(rows[step]["loss"]) == pytest.approx(loss.item(), rel=1e-4)
        assert float(rows[step]["accuracy"]) == pytest.approx(torch.stack(accuracies).mean().item(), abs=1e-4)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for group in adamw.param_groups:
            group["lr"] = 1e-3 * rate_at(step)
        adamw.step()
        average(ema, model, step)
    assert 0 < dropped < 16

    saved = torch.load(tmp_path / "run" / "transformer.resume.pt", weights_only=True)
    assert_same_state(saved, {"model": model, "ema": ema}, {"adamw": adamw})
    assert exchanges == 4 * [False, True]
