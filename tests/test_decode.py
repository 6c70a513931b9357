"""The parallel decoder: its invariants, and equality with a naive loop."""
import math

import pytest
import torch

from maskgit import ORDERS, SCHEDULES, MaskGIT, MaskGITConfig, decode, gamma, halton_order, mask_counts


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = MaskGIT(MaskGITConfig(codebook_size=24, num_classes=3, num_tokens=16, dim=32, depth=2, heads=4, mlp_dim=64,
                                  null_class=True)).eval()
    for parameter in model.parameters():       # far from the tiny initial weights, so that predictions differ
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


LABELS = torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_reveals_the_scheduled_counts_and_keeps_what_is_revealed(model, schedule, order):
    for steps in (1, 5, 16):
        tokens, history = decode(model, LABELS, steps, schedule, order=order, return_steps=True)
        assert [mask.sum(1).tolist() for _, mask, _ in history] == [[n] * 4 for n in mask_counts(schedule, steps, 16)]
        assert tokens.min() >= 0 and tokens.max() < 24
        for predicted, mask, _ in history:
            assert torch.equal(predicted[~mask], tokens[~mask])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("order", ORDERS)
def test_known_tokens_stay(model, order, schedule):
    known = torch.randint(0, 24, (4, 16))
    known[0, 3:], known[1, ::2], known[2, 5] = model.mask_id, model.mask_id, model.mask_id   # 13, 8, 1 and 0 unknown
    was = known.clone()
    tokens, history = decode(model, LABELS, 6, schedule, known=known, order=order, return_steps=True)
    given = was != model.mask_id
    assert torch.equal(known, was) and torch.equal(tokens[given], was[given])
    assert tokens.max() < 24
    counts = torch.stack([mask.sum(1) for _, mask, _ in history])
    for row, unknown in enumerate((13, 8, 1, 0)):
        assert counts[:, row].tolist() == mask_counts(schedule, 6, unknown)


def test_equals_a_naive_loop_at_temperature_0(model):
    """§3.3 written once more, one token at a time, without noise."""
    tokens = decode(model, LABELS, steps=7, schedule="cosine", choice_temperature=0, temperature=0)
    for row, label in enumerate(LABELS.tolist()):
        state, masked = [model.mask_id] * 16, 16
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


def test_guidance(model):
    """Weight W pushes towards the class: at T = 1 the logits are c + W(c - u)."""
    null = torch.full_like(LABELS, model.null_label)
    masks = torch.full((4, 16), model.mask_id)
    with torch.no_grad():
        conditional, unconditional = model(masks, LABELS), model(masks, null)
    assert not torch.allclose(conditional, unconditional, atol=0.01)
    expected = (conditional + 3 * (conditional - unconditional)).argmax(-1)
    assert torch.equal(decode(model, LABELS, 1, cfg=3.0, temperature=0), expected)


def test_top_k_and_temperature(model):
    masks = torch.full((200, 16), model.mask_id)
    labels = torch.zeros(200, dtype=torch.long)
    with torch.no_grad():
        best = model(masks[:1], labels[:1]).topk(2).indices[0]                              # (16, 2)
    tokens = decode(model, labels, 1, top_k=2)
    assert (tokens[..., None] == best).any(-1).all()
    assert (tokens == best[:, 0]).float().mean() < 0.98      # the second likeliest is drawn as well
    assert torch.equal(decode(model, labels, 1, top_k=1)[0], best[:, 0])


def test_sampling_follows_the_probabilities(model):
    masks, labels = torch.full((1, 16), model.mask_id), torch.zeros(4000, dtype=torch.long)
    with torch.no_grad():
        probs = model(masks, labels[:1]).softmax(-1)[0, 0]
    drawn = torch.bincount(decode(model, labels, 1)[:, 0], minlength=24) / 4000
    assert (drawn - probs).abs().max() < 0.04


def test_same_generator_same_tokens(model):
    first, second, other = (decode(model, LABELS, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_halton_order():
    order = halton_order(64)
    assert sorted(order.tolist()) == list(range(64))
    for quarter in order.view(4, 16):      # evenly spread: every 16 tokens touch each quadrant about equally
        quadrant = (quarter // 8 // 4) * 2 + (quarter % 8) // 4
        assert torch.bincount(quadrant, minlength=4).min() >= 3


def test_schedules_fall_from_one_to_zero():
    r = torch.linspace(0.01, 1, 50)
    for schedule in SCHEDULES:
        value = gamma(r, schedule, 256)
        assert value.max() <= 1 and value.min() > 0 and value[-1] < 1e-5 and (value.diff() <= 0).all()
        # §3.4: concave functions lie above the linear one, convex ones below.
        above = value[5:-5] > gamma(r, "linear", 256)[5:-5]
        assert above.all() if schedule in ("cosine", "square", "cubic", "exponential") else not above.any()


def test_bad_arguments(model):
    for arguments, word in (((0,), "steps"), ((17,), "steps"), ((4, "quartic"), "quartic")):
        with pytest.raises(ValueError, match=word):
            decode(model, LABELS, *arguments)
    with pytest.raises(ValueError, match="spiral"):
        decode(model, LABELS, 4, order="spiral")
    plain = MaskGIT(MaskGITConfig(codebook_size=8, num_classes=3, num_tokens=16, dim=16, depth=1, heads=2, mlp_dim=16))
    with pytest.raises(ValueError, match="class-dropout"):
        decode(plain, LABELS, cfg=1.0)
