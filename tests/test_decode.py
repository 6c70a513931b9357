"""The parallel decoder: its invariants, and equality with a naive loop."""
import math

import pytest
import torch
from conftest import rand_of

from lib.orders import ORDERS, halton_order, make_order
from maskgit import (
    SCHEDULES,
    MaskGIT,
    MaskGITConfig,
    by_confidence,
    decode,
    gamma,
    mask_counts,
    masked_after,
)

LABELS = torch.tensor([0, 1, 2, 1])
# Without noise: the likeliest token at each position, and the most confident of these first.
GREEDY = {"temperature": 0, "order": by_confidence(0)}


@pytest.fixture(scope="module")
def model():
    """An untrained transformer of 4 x 4 tokens, whose predictions differ."""
    torch.manual_seed(0)
    config = MaskGITConfig(codebook_size=24, num_classes=3, num_tokens=16, dim=32, depth=2, heads=4, mlp_dim=64,
                           null_class=True)
    model = MaskGIT(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def decode_by_steps(model, *arguments, **options):
    """Returns decode()'s tokens, and what it tells on_step: (t, sampled, masked, confidence) of every step."""
    history = []
    tokens = decode(model, *arguments, **options, on_step=lambda *step: history.append(step))
    return tokens, history


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_reveals_the_scheduled_counts_and_keeps_what_is_revealed(model, schedule, name):
    order = make_order(name, 16, 4.5, "cpu")
    for steps in (1, 5, 16):
        tokens, history = decode_by_steps(model, LABELS, steps, schedule, order=order)
        assert [t for t, *_ in history] == list(range(1, steps + 1))
        counts = [masked.sum(1).tolist() for _, _, masked, _ in history]
        assert counts == [[n] * 4 for n in mask_counts(schedule, steps, 16)]
        assert tokens.min() >= 0 and tokens.max() < 24
        for _, sampled, masked, _ in history:
            assert torch.equal(sampled[~masked], tokens[~masked])


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_known_tokens_stay(model, name, schedule):
    known = torch.randint(0, 24, (4, 16))
    known[0, 3:] = model.mask_id                                            # 13, 8, 1 and 0 tokens are unknown
    known[1, ::2] = model.mask_id
    known[2, 5] = model.mask_id
    before = known.clone()
    given = known != model.mask_id
    order = make_order(name, 16, 4.5, "cpu")
    tokens, history = decode_by_steps(model, LABELS, 6, schedule, known=known, order=order)
    assert torch.equal(known, before) and torch.equal(tokens[given], before[given])
    assert tokens.max() < 24
    counts = torch.stack([masked.sum(1) for _, _, masked, _ in history])                      # (steps, B)
    for row, unknown in enumerate((13, 8, 1, 0)):
        assert counts[:, row].tolist() == mask_counts(schedule, 6, unknown)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_of_no_tokens_none_is_masked_again_and_of_one_token_it_is_until_the_end(schedule):
    totals = torch.tensor([0, 1, 2])
    masked = totals
    for t in range(1, 4):
        masked = masked_after(t, 4, schedule, totals, masked)
        assert masked.tolist() == [0, 1, 1]
    assert masked_after(4, 4, schedule, totals, masked).tolist() == [0, 0, 0]


def test_equals_a_naive_loop_at_temperature_0(model):
    """§3.2 written once more, one token at a time, without noise."""
    tokens = decode(model, LABELS, steps=7, schedule="cosine", **GREEDY)
    for row, label in enumerate(LABELS.tolist()):
        state = [model.mask_id] * 16
        masked = 16
        for t in range(1, 8):
            with torch.no_grad():
                probs = model(torch.tensor([state]), torch.tensor([label]))[0].softmax(-1)
            guess = {i: int(probs[i].argmax()) for i in range(16) if state[i] == model.mask_id}
            confidence = {i: float(probs[i, token]) for i, token in guess.items()}
            scheduled = math.floor(math.cos(math.pi / 2 * t / 7) * 16)
            masked = 0 if t == 7 else max(1, min(scheduled, masked - 1))
            for i in sorted(guess, key=lambda i: -confidence[i])[:len(guess) - masked]:
                state[i] = guess[i]
        assert state == tokens[row].tolist()


def test_the_steps_of_a_start_in_the_middle_are_those_of_the_schedule(model):
    _, history = decode_by_steps(model, LABELS, 6, start_step=2)
    assert [t for t, *_ in history] == [3, 4, 5, 6]
    assert [masked[0].sum().item() for _, _, masked, _ in history] == mask_counts("cosine", 6, 16, start_step=2)


@pytest.mark.parametrize("cfg", [0, 0.6])
def test_every_step_tells_how_confident_it_is_under_a_guidance_that_grows(model, cfg):
    """Step t of T predicts by c + (W t / T)(c - u). The confidence is log p; it is infinite where a token was known."""
    null = torch.full_like(LABELS, model.null_label)
    masked = torch.ones(4, 16, dtype=torch.bool)
    tokens = torch.full((4, 16), model.mask_id)
    _, history = decode_by_steps(model, LABELS, 5, cfg=cfg, **GREEDY)
    for t, sampled, masked_again, confidence in history:
        with torch.no_grad():
            conditional = model(tokens, LABELS)
            logits = conditional + cfg * t / 5 * (conditional - model(tokens, null))
        log_p = logits.log_softmax(-1).max(-1)
        assert torch.equal(sampled[masked], log_p.indices[masked])
        torch.testing.assert_close(confidence[masked], log_p.values[masked])
        assert (confidence[~masked] == math.inf).all()
        masked = masked_again
        tokens = torch.where(masked, model.mask_id, sampled)
    assert not masked.any()


def test_the_noise_in_the_choice_is_gumbel_noise_that_fades_with_the_steps():
    """The confidence is log p + 4.5·(1 - t/T)·noise."""
    log_p = -torch.rand(100, 1000)

    def noise(progress):
        return by_confidence(4.5)(log_p, progress, rand_of(0)) - log_p
    assert noise(0).mean().item() == pytest.approx(4.5 * 0.5772, abs=0.1)            # Euler's constant
    assert noise(0).var().item() == pytest.approx(4.5 ** 2 * math.pi ** 2 / 6, rel=0.03)
    torch.testing.assert_close(noise(0.75), noise(0) / 4, atol=1e-4, rtol=1e-4)
    assert (noise(1) == 0).all()


def test_the_order_is_told_how_far_the_decoding_is(model):
    told = []

    def order(log_p, progress, rand):
        told.append(progress)
        return log_p
    decode(model, LABELS, 4, order=order)
    assert told == [0.25, 0.5, 0.75, 1]


def test_guidance_pushes_towards_the_class(model):
    """At T = 1 the logits are c + W(c - u)."""
    null = torch.full_like(LABELS, model.null_label)
    tokens = torch.full((4, 16), model.mask_id)
    with torch.no_grad():
        conditional = model(tokens, LABELS)
        unconditional = model(tokens, null)
    assert not torch.allclose(conditional, unconditional, atol=0.01)
    expected = (conditional + 3 * (conditional - unconditional)).argmax(-1)
    assert torch.equal(decode(model, LABELS, 1, cfg=3.0, temperature=0), expected)


def test_top_k_draws_among_the_k_likeliest(model):
    labels = torch.zeros(200, dtype=torch.long)
    with torch.no_grad():
        best = model(torch.full((1, 16), model.mask_id), labels[:1]).topk(2).indices[0]        # (16, 2)
    tokens = decode(model, labels, 1, top_k=2)
    assert (tokens[..., None] == best).any(-1).all()
    assert (tokens == best[:, 0]).float().mean() < 0.98                       # the second likeliest is drawn as well
    assert torch.equal(decode(model, labels, 1, top_k=1)[0], best[:, 0])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_follows_the_probabilities(model, temperature):
    labels = torch.zeros(4000, dtype=torch.long)
    with torch.no_grad():
        logits = model(torch.full((1, 16), model.mask_id), labels[:1])[0, 0]
    tokens = decode(model, labels, 1, temperature=temperature, rand=rand_of(0))
    frequencies = torch.bincount(tokens[:, 0], minlength=24) / 4000
    assert (frequencies - (logits / temperature).softmax(-1)).abs().max() < 0.04


def test_the_same_random_numbers_give_the_same_tokens(model):
    first = decode(model, LABELS, rand=rand_of(1))
    again = decode(model, LABELS, rand=rand_of(1))
    other = decode(model, LABELS, rand=rand_of(2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_halton_order_covers_the_image_evenly():
    order = halton_order(64)
    assert sorted(order.tolist()) == list(range(64))
    for quarter in order.view(4, 16):                   # every 16 tokens touch each quadrant of 8 x 8 about equally
        quadrants = (quarter // 8 // 4) * 2 + (quarter % 8) // 4
        assert torch.bincount(quadrants, minlength=4).min() >= 3


def test_the_halton_order_reveals_its_points_in_turn(model):
    """At 16 steps of the linear schedule one token is fixed in each."""
    _, history = decode_by_steps(model, LABELS, 16, "linear", order=make_order("halton", 16, 4.5, "cpu"))
    last_masked = torch.stack([masked for _, _, masked, _ in history]).sum(0)             # (B, N): in how many steps
    assert torch.equal(last_masked.argsort(1), halton_order(16).expand(4, 16))


def test_the_random_order_is_another_for_every_image(model):
    labels = torch.zeros(300, dtype=torch.long)
    _, history = decode_by_steps(model, labels, 2, "linear", order=make_order("random", 16, 4.5, "cpu"),
                                 rand=rand_of(0))
    first_half = ~history[0][2]
    assert (first_half.float().mean(0) - 0.5).abs().max() < 0.12              # every position is as likely to be first


def test_schedules_fall_from_one_to_zero():
    r = torch.linspace(0.01, 1, 50)
    for schedule in SCHEDULES:
        value = gamma(r, schedule, 256)
        assert value.max() <= 1 and value.min() > 0 and value[-1] < 1e-5 and (value.diff() <= 0).all()
        # §3.3: concave functions lie above the linear one, convex ones below.
        above = value[5:-5] > gamma(r, "linear", 256)[5:-5]
        assert not above.any() if schedule in ("linear", "sqrt", "logarithmic") else above.all()


@pytest.mark.parametrize("options, problem", [
    ({"steps": 0}, "steps must be from 1 to the number of tokens, 16, not 0"),
    ({"steps": 17}, "steps must be from 1 to the number of tokens, 16, not 17"),
    ({"steps": 4, "start_step": 4}, "from 0 to 3, not 4"),
    ({"schedule": "nonsense"}, "unknown schedule 'nonsense'"),
    ({"schedule": "nonsense", "steps": 1}, "unknown schedule 'nonsense'"),
])
def test_a_bad_argument_is_named(model, options, problem):
    with pytest.raises(ValueError, match=problem):
        decode(model, LABELS, **options)


def test_guidance_needs_a_null_class():
    model = MaskGIT(MaskGITConfig(codebook_size=8, num_classes=3, num_tokens=16, dim=16, depth=1, heads=2, mlp_dim=16))
    with pytest.raises(ValueError, match="class-dropout"):
        decode(model, LABELS, cfg=1.0)


def test_the_halton_order_needs_a_square():
    with pytest.raises(ValueError, match="not 12 tokens"):
        make_order("halton", 12, 4.5, "cpu")
