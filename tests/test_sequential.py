"""The autoregressive baseline: what a position sees, and that the cache changes nothing."""
import pytest
import torch
from conftest import rand_of

from maskgit import MaskGITConfig
from sequential import CausalTransformer, decode_sequential


@pytest.fixture(scope="module")
def model():
    """An untrained transformer of 4 x 4 tokens, whose logits are far from equal."""
    torch.manual_seed(0)
    config = MaskGITConfig(codebook_size=24, num_classes=3, num_tokens=16, dim=32, depth=2, heads=4, mlp_dim=64)
    model = CausalTransformer(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.double()


def test_a_position_sees_only_what_comes_before(model):
    tokens, labels = torch.randint(0, 24, (1, 16)), torch.tensor([1])
    before = model(tokens, labels)
    assert before.shape == (1, 16, 24)
    for i in (0, 7, 15):
        changed = tokens.clone()
        changed[0, i] = (changed[0, i] + 1) % 24
        differs = (model(changed, labels) != before).any(-1)[0]
        assert not differs[:i + 1].any() and differs[i + 1:].all()
    assert (model(tokens, torch.tensor([2])) != before).any(-1).all()


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 5}])
def test_the_cache_changes_no_token(model, options):
    labels = torch.tensor([0, 1, 2, 1])
    cached = decode_sequential(model, labels, rand=rand_of(1), **options)
    uncached = decode_sequential(model, labels, rand=rand_of(1), cached=False, **options)
    assert torch.equal(cached, uncached) and cached.max() < 24


def test_at_temperature_0_each_token_is_the_likeliest_after_those_before_it(model):
    labels = torch.tensor([0, 1, 2, 1])
    tokens = decode_sequential(model, labels, temperature=0)
    assert torch.equal(model(tokens, labels).argmax(-1), tokens)


def test_every_token_is_told_of(model):
    """on_step: the tokens so far, which are still to come, and how likely the new one was."""
    labels, steps = torch.tensor([0, 2]), []
    tokens = decode_sequential(model, labels, temperature=0, on_step=lambda *step: steps.append(step))
    log_p = model(tokens, labels).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert [t for t, *_ in steps] == list(range(1, 17))
    for t, told, masked, confidence in steps:
        assert torch.equal(told[:, :t], tokens[:, :t])
        assert not masked[:, :t].any() and masked[:, t:].all()
        assert (confidence[:, :t - 1] == torch.inf).all() and (confidence[:, t:] == -torch.inf).all()
        torch.testing.assert_close(confidence[:, t - 1], log_p[:, t - 1].float())
