"""How the formulas are put together: each test fails where a sign, a factor, a detach or a schedule is wrong."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train_transformer
import train_vq
from lib import optim
from lib.runtime import Machine
from maskgit import MaskGIT, MaskGITConfig, decode, halton_order
from vqgan import VQGAN, Discriminator, VectorQuantizer, VQGANConfig, r1_penalty

ARGS = SimpleNamespace(**train_vq.PRESETS["shapes"], seed=0, parts=1)
SMALL = VQGANConfig(32, 4, 8, (1, 1, 1), 1, 1)


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    model = VQGAN(SMALL)
    torch.nn.init.normal_(model.quantizer.codebook)
    return model


# ---- stage 1

def test_the_tokenizers_loss_is_the_weighted_sum_of_its_terms(tokenizer, images):
    def discriminator(x):
        return 3 * x.mean((1, 2, 3)) - 1

    def lpips(a, b):
        return (a - b).abs().mean((1, 2, 3))
    restored, _, terms = tokenizer(images)
    reconstructions = []
    total, losses = train_vq.tokenizer_losses(ARGS, tokenizer, discriminator, lpips, 0.3, reconstructions, images)
    output, = reconstructions
    assert torch.equal(output, restored) and not output.requires_grad
    expected = (ARGS.reconstruction * (restored - images).square().mean() + terms["commitment"] + terms["codebook"]
                + terms["entropy"] + ARGS.perceptual_weight * lpips(restored, images).mean()
                + 0.3 * F.softplus(-discriminator(restored)).mean())       # low where the discriminator says "real"
    torch.testing.assert_close(total, expected)
    assert min(abs(losses[name].item()) for name in losses) > 1e-4         # no term is too small to be missed
    total, losses = train_vq.tokenizer_losses(ARGS, tokenizer, discriminator, None, 0, [], images)
    assert losses["generator"] == 0 and "perceptual" not in losses


def test_commitment_moves_features_and_codebook_loss_moves_codes():
    """Each term's gradient reaches one side only (van den Oord et al. 2017, Eq. 3), the commitment scaled by beta."""
    quantizer = VectorQuantizer(SMALL)
    torch.nn.init.normal_(quantizer.codebook, generator=torch.Generator().manual_seed(0))
    features = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    _, indices, losses = quantizer(features)
    both = [features, quantizer.codebook]
    to_features, to_codes = torch.autograd.grad(losses["commitment"], both, allow_unused=True)
    difference = features - quantizer.lookup(indices)
    torch.testing.assert_close(to_features, (SMALL.commitment * 2 * difference / features.numel()).detach())
    assert to_codes is None
    to_features, to_codes = torch.autograd.grad(losses["codebook"], both, allow_unused=True)
    assert to_features is None and to_codes.abs().max() > 0


def test_the_discriminators_loss_and_its_lazy_penalty(images):
    torch.manual_seed(0)
    disc = Discriminator(32, 4, 32)
    disc.dense2.weight.data *= 1000                                        # far from the tiny logits of the start
    restored = images.flip(0) * 0.9
    loss = F.softplus(-disc(images)).mean() + F.softplus(disc(restored)).mean()
    without, shown = train_vq.discriminator_losses(ARGS, disc, disc, False, images, restored)
    torch.testing.assert_close(without, loss)
    torch.testing.assert_close(shown, {"discriminator": loss})
    penalised, shown = train_vq.discriminator_losses(ARGS, disc, disc, True, images, restored)
    torch.testing.assert_close(shown, {"discriminator": loss})
    # Applied at every r1_every-th step only, it is r1_every times as strong.
    torch.testing.assert_close(penalised - loss, 16 * ARGS.r1 * r1_penalty(disc, images))
    assert ARGS.r1_every == 16 and penalised - loss > 1e-4
    centred = train_vq.CentredDiscriminator(32, 4, 32)
    centred.load_state_dict(disc.state_dict())
    assert torch.equal(centred(images), disc(images * 2 - 1))


def test_the_penalty_takes_few_operations():
    """A blur by a convolution of each channel alone would take 4,020 convolutions and 12,288 operations."""
    counts = {"all": 0, "convolutions": 0}

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts["all"] += 1
            counts["convolutions"] += "convolution" in str(function)
            return function(*args, **kwargs or {})
    with torch.device("meta"):
        disc, real = Discriminator(256), torch.empty(1, 3, 256, 256)
    with Counter():
        r1_penalty(disc, real).backward()
    assert counts["convolutions"] <= 100 and counts["all"] < 1000, counts


def test_a_step_trains_both_networks_and_only_its_own(images):
    """Before the discriminator sets in it stays as it is; afterwards both change; R1 is due at every 16th step."""
    machine = Machine("cpu")
    nets = train_vq.build(ARGS, SMALL, machine)
    torch.nn.init.normal_(nets.model.quantizer.codebook)
    begin = int(ARGS.gan_start * ARGS.steps)

    def weights(network):
        return torch.cat([parameter.detach().flatten().clone() for parameter in network.parameters()])
    model, disc = weights(nets.model), weights(nets.disc)
    losses = train_vq.train_step(nets, images, begin - 1, ARGS, machine)
    assert losses["generator"] == losses["discriminator"] == 0
    assert not torch.equal(weights(nets.model), model) and torch.equal(weights(nets.disc), disc)
    averaged = weights(nets.ema)
    assert not torch.equal(averaged, model) and not torch.equal(averaged, weights(nets.model))
    assert losses["gradient"] > 1 and gradient_norm(nets.model) == pytest.approx(1, abs=1e-4)              # clipped
    rest, codebook = nets.optimizer.param_groups
    assert codebook["params"][0] is nets.model.quantizer.codebook
    assert rest["base"] == 3e-3 and codebook["base"] == pytest.approx(9e-3)
    model = weights(nets.model)
    losses = train_vq.train_step(nets, images, begin, ARGS, machine)
    assert losses["generator"] > 0 and losses["discriminator"] > 0
    assert not torch.equal(weights(nets.model), model) and not torch.equal(weights(nets.disc), disc)
    # The generator's weight grows over gan_ramp steps: at half of them, half of it has been reached.
    seen = []

    def spy(args, model, discriminator, lpips, adversarial, reconstructions, images):
        seen.append(adversarial)
        return original(args, model, discriminator, lpips, adversarial, reconstructions, images)
    original, train_vq.tokenizer_losses = train_vq.tokenizer_losses, spy
    try:
        for step in (begin, begin + ARGS.gan_ramp // 2 - 1, begin + ARGS.gan_ramp + 7):
            train_vq.train_step(nets, images, step, ARGS, machine)
    finally:
        train_vq.tokenizer_losses = original
    assert seen == pytest.approx([ARGS.adversarial / ARGS.gan_ramp, ARGS.adversarial / 2, ARGS.adversarial])


def gradient_norm(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()
                      if parameter.grad is not None]).norm().item()


def test_the_codebook_starts_near_features(tokenizer, images):
    """Also where there are fewer features than entries: then several start near one, but no two alike."""
    tokenizer.start_codebook(images[:1, :, :8, :8], torch.Generator().manual_seed(0))              # 2 x 2 features
    codebook = tokenizer.quantizer.codebook.detach()
    features = tokenizer.encoder(images[:1, :, :8, :8]).detach().permute(0, 2, 3, 1).flatten(0, 2)
    distances = torch.cdist(codebook, features)
    assert distances.min(1).values.max() < 0.5 * features.std(0).norm()
    assert torch.bincount(distances.argmin(1)).tolist() == [8] * 4
    assert len(torch.unique(codebook, dim=0)) == 32


# ---- the frame of both stages

def test_the_learning_rate_warms_up_and_decays():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "base": 6.0}, {"params": [torch.zeros(1)]}], lr=1.0)

    def rate(step, decay):
        optim.set_learning_rate(optimizer, step, 2.0, 10, 110, decay)
        own, common = (group["lr"] for group in optimizer.param_groups)
        assert own == pytest.approx(3 * common)
        return common
    rates = [rate(step, decay=True) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2 and rates[60] == pytest.approx(2 * (0.01 + 0.99 / 2)) and rates[-1] < 0.03
    assert rate(100_000, decay=False) == 2


def test_averaged_weights_lag_behind():
    """At step t by (1 + t) / (10 + t), at most by the decay asked for."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0)
    ema = optim.averaged(model)
    model.weight.data.fill_(1)
    optim.average(ema, model, 0.9, 0)
    assert ema.weight.item() == pytest.approx(0.9)                   # 1 - 1/10 of the way
    optim.average(ema, model, 0.9, 10_000)
    assert ema.weight.item() == pytest.approx(0.9 + 0.1 * 0.1)
    assert not ema.weight.requires_grad


def test_micro_batches_are_means_of_the_batch():
    """Gradients and metrics of two parts are those of the whole; the whole is what the optimizer sees once."""
    model, x = torch.nn.Linear(3, 1), torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    found = {}
    for parts in (1, 2, 4):
        def loss_of(part):
            loss = model(part).square().mean()
            return loss, {"loss": loss}
        metrics = optim.accumulate(Machine("cpu"), model, loss_of, [x], parts)
        found[parts] = [metrics["loss"], *(parameter.grad.clone() for parameter in model.parameters())]
    for parts in (2, 4):
        for ours, theirs in zip(found[parts], found[1], strict=True):
            torch.testing.assert_close(ours, theirs)


# ---- stage 2

def test_a_step_of_stage_2_is_the_formula():
    """Masks, dropped labels, loss and its gradient, put together as in the paper, on a generator of a fixed seed."""
    args = SimpleNamespace(**train_transformer.PRESETS["shapes"] | {"class_dropout": 0.5, "label_smoothing": 0.1},
                           seed=0, parts=1)
    config = MaskGITConfig(24, 3, 16, 32, 1, 4, 64, dropout=0.0, null_class=True)
    machine = Machine("cpu")
    nets = train_transformer.build(args, config, machine)
    before = [parameter.detach().clone() for parameter in nets.model.parameters()]
    tokens, labels = torch.arange(64).view(4, 16) % 24, torch.tensor([0, 1, 2, 1])

    g = torch.Generator().manual_seed(7)
    seen_labels = torch.where(torch.rand(4, generator=g) < 0.5, config.num_classes + 1, labels)
    r, noise = torch.rand(4, 1, generator=g), torch.rand(4, 16, generator=g)
    count = (torch.cos(r * torch.pi / 2) * 16).ceil()
    mask = noise <= noise.sort(1).values.gather(1, count.long() - 1)                   # the `count` smallest
    assert 0 < (seen_labels == 4).sum() < 4
    logits = nets.model(torch.where(mask, nets.model.mask_id, tokens), seen_labels)
    smooth = 0.9 * F.one_hot(tokens, 24) + 0.1 / 24
    losses = -(smooth * logits.log_softmax(-1)).sum(-1)
    expected = torch.stack([row[m].mean() for row, m in zip(losses, mask, strict=True)]).mean()

    metrics = train_transformer.train_step(nets, tokens, labels, 50, args, machine, torch.Generator().manual_seed(7))
    torch.testing.assert_close(metrics["loss"], expected.detach())
    right = (logits.argmax(-1) == tokens)[mask].float().mean()
    assert metrics["accuracy"].item() == pytest.approx(right.item())
    gradient = metrics["gradient"].item()
    assert gradient > 0.5 and gradient_norm(nets.model) == pytest.approx(min(1, gradient), abs=1e-4), gradient
    averaged = list(nets.ema.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, averaged, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(nets.model.parameters(), averaged, strict=True))
    adamw, muon = nets.optimizers["adamw"], nets.optimizers["muon"]
    assert adamw.param_groups[0]["lr"] == pytest.approx(args.lr * 51 / 100)
    assert muon.param_groups[0]["lr"] == pytest.approx(args.muon_lr * 51 / 100)
    assert any(not torch.equal(a, b) for a, b in zip(before, nets.model.parameters(), strict=True))
    decays = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in adamw.param_groups}
    assert min(decays[args.weight_decay]) == 2 and max(decays[0.0]) == 1
    shapes = [sorted(tuple(p.shape) for p in group["params"]) for group in muon.param_groups]
    assert shapes == [[(96, 32)], [(32, 32), (32, 64), (64, 32)]]               # of the one block, and of nothing else


def test_muon_is_the_formula_in_float64():
    """Against Jordan et al. 2024, written out, and torch's own: two steps of a wide, a tall and a threefold matrix."""
    shapes, generator = {(8, 24): 1, (24, 8): 1, (24, 7): 3}, torch.Generator().manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in matrices]
    expected, momenta = [p.detach().double() for p in matrices], [0, 0, 0]
    groups = [{"params": [p], "parts": parts} for p, parts in zip(matrices, shapes.values(), strict=True)]
    muon = optim.Muon(groups, 0.02, 0.1, torch.float32)
    theirs = torch.optim.Muon(copies[:2], lr=0.02, weight_decay=0.1, momentum=0.95)
    for _ in range(2):
        for i, (p, parts) in enumerate(zip(matrices, shapes.values(), strict=True)):
            p.grad = torch.randn(p.shape, generator=generator)
            copies[i].grad, g = p.grad.clone(), p.grad.double()
            momenta[i] = 0.95 * momenta[i] + g
            expected[i] = (1 - 0.02 * 0.1) * expected[i]
            for x, target in zip((g + 0.95 * momenta[i]).chunk(parts), expected[i].chunk(parts), strict=True):
                x = x / x.norm()
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                target -= 0.02 * max(1, x.shape[0] / x.shape[1]) ** 0.5 * x
        muon.step()
        theirs.step()
    for p, value in zip(matrices, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), value, rtol=0, atol=1e-6)
    for p, other in zip(matrices, copies[:2], strict=False):
        assert (p - other).abs().max() < 0.05 * 0.02                           # theirs iterates in bfloat16


def test_gelu_is_the_tanh_form():
    """As released. It differs from the exact form by up to 5e-4, most where activations are about 2."""
    model = MaskGIT(MaskGITConfig(24, 3, 16, 32, 1, 4, 64))
    x = torch.linspace(-4, 4, 101)
    tanh_form = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x ** 3)))
    assert (tanh_form - F.gelu(x)).abs().max() > 3e-4
    for gelu in (model.blocks[0].mlp[1], model.head[1]):
        torch.testing.assert_close(gelu(x), tanh_form, atol=1e-6, rtol=0)


# ---- decoding

class Preferring(torch.nn.Module):
    """Stands for a transformer: its logits are given, with a class and without one."""
    config = MaskGITConfig(codebook_size=4, num_classes=1, num_tokens=16, null_class=True)
    mask_id, null_label = 5, 2

    def __init__(self, with_class, without):
        super().__init__()
        self.logits = torch.stack([with_class, with_class, without])

    def forward(self, tokens, labels):
        return self.logits[labels]


def test_the_choice_is_random_at_first_and_sure_in_the_end():
    """Confidence is log p + 4.5·(1 − t/T)·Gumbel noise: near T, the most confident tokens are kept.

    Position i has a sampled probability that grows with i. Where noise is strong, what is kept hardly depends on it."""
    logits = torch.zeros(16, 1000)
    logits[:, 0] = torch.linspace(0, 8, 16)
    model, labels = Preferring(logits, logits), torch.zeros(300, dtype=torch.long)

    def mean_place_of_what_is_kept(**options):
        """By step: the mean place of the tokens fixed in it among all still masked, 0 for the least confident."""
        _, history = decode(model, labels, 8, "linear", temperature=0, generator=torch.Generator().manual_seed(0),
                            return_steps=True, **options)
        masked, means = torch.ones(300, 16, dtype=torch.bool), []
        for _, after, _ in history[:-1]:
            place = (masked.cumsum(1) - 1) / (masked.sum(1, keepdim=True) - 1)
            means.append(place[masked & ~after].mean().item())
            masked = after
        return means
    usual, without, strong = (mean_place_of_what_is_kept(choice_temperature=c) for c in (4.5, 0, 1000))
    assert all(abs(mean - 0.5) < 0.06 for mean in strong)                  # any
    # Without noise the most confident two are kept in each step; with the usual one hardly so at first, nearly at last.
    assert min(without) > 0.8 and usual[0] < 0.75 * without[0] and usual[-1] > 0.87 * without[-1]


def test_guidance_grows_with_the_steps():
    """At step t of T the weight is W·t/T: seen in the step at which the guided token overtakes the other one."""
    with_class, without = torch.zeros(16, 4), torch.zeros(16, 4)
    with_class[:, 1], with_class[:, 2], without[:, 1] = 1.0, 0.7, 1.0    # token 1 is likelier; the class adds token 2
    _, history = decode(Preferring(with_class, without), torch.tensor([0]), 4, "linear", cfg=0.6, temperature=0,
                        choice_temperature=0, return_steps=True)
    chosen, masked = [], torch.ones(1, 16, dtype=torch.bool)
    for predicted, after, _ in history:
        chosen.append(set(predicted[masked].tolist()))
        masked = after
    # 0.7 + 0.7 w overtakes 1 at w = 3/7: with w = 0.15, 0.3, 0.45, 0.6 that is at the third step.
    assert chosen == [{1}, {1}, {2}, {2}]


def test_halton_points_are_of_base_2_down_and_3_across():
    """Point i, mirrored in base 2, gives the row: 1/2, 1/4, 3/4, ...; in base 3 the column: 1/3, 2/3, 1/9, ..."""
    expected = [(2, 1), (1, 2), (3, 0), (0, 1), (2, 3), (1, 0), (3, 2)]
    assert [divmod(place, 4) for place in halton_order(16)[:7].tolist()] == expected
