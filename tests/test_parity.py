"""The numbers of the authors' released JAX code, on small random weights (tests/data, made once with that code)."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from discriminator import Discriminator, discriminator_loss, generator_loss, r1_penalty
from maskgit import MaskGIT, MaskGITConfig, mask_counts, mvtm_loss
from vqgan import VQGAN, ResBlock, VQGANConfig, entropy_loss

DATA = Path(__file__).parent / "data"


def load(name):
    """Returns the arrays of a file as tensors by name, and the parameters in it by their Flax name."""
    arrays = {}
    params = {}
    for key, value in np.load(DATA / f"{name}.npz").items():
        if key.startswith("params/"):
            params[key.removeprefix("params/")] = torch.from_numpy(value)
        else:
            arrays[key] = torch.from_numpy(value)
    return arrays, params


def set_layer(layer, params, name):
    """Copies a Flax layer into ours: kernels (h, w, in, out) or (in, out) are transposed, `scale` is our weight."""
    for theirs, value in params.items():
        if not theirs.startswith(f"{name}/"):
            continue
        kind = theirs.removeprefix(f"{name}/")
        if kind == "kernel":
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        target = layer.bias if kind == "bias" else layer.weight
        assert target.shape == value.shape, theirs
        target.data.copy_(value)


def set_tower(tower, params, name):
    """Copies the Flax encoder or decoder into ours. Flax numbers the layers of each kind in order."""
    kinds = {ResBlock: "ResBlock", torch.nn.Conv2d: "Conv", torch.nn.GroupNorm: "GroupNorm"}
    counts = dict.fromkeys(kinds.values(), 0)
    for layer in tower.layers:
        if type(layer) not in kinds:                            # it has no parameters
            continue
        kind = kinds[type(layer)]
        path = f"{name}/{kind}_{counts[kind]}"
        counts[kind] += 1
        if kind == "ResBlock":
            set_layer(layer.norm1, params, f"{path}/GroupNorm_0")
            set_layer(layer.conv1, params, f"{path}/Conv_0")
            set_layer(layer.norm2, params, f"{path}/GroupNorm_1")
            set_layer(layer.conv2, params, f"{path}/Conv_1")
            set_layer(layer.shortcut, params, f"{path}/Conv_2")
        else:
            set_layer(layer, params, path)


@pytest.fixture(scope="module")
def tokenizer():
    arrays, params = load("tokenizer_tiny")
    model = VQGAN(VQGANConfig(codebook_size=64, codebook_dim=16, filters=32, multipliers=(1, 1, 2), res_blocks=1))
    set_tower(model.encoder, params, "encoder")
    set_tower(model.decoder, params, "decoder")
    model.quantizer.codebook.data.copy_(params["quantizer/codebook"])
    for name, value in arrays.items():
        if value.ndim == 4:                                                 # images and features: channels last in Flax
            arrays[name] = value.permute(0, 3, 1, 2)
    return model.eval(), arrays


def close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(torch.as_tensor(ours, dtype=torch.float32), torch.as_tensor(theirs, dtype=torch.float32),
                               atol=tolerance, rtol=0)


@torch.no_grad()
def test_the_tokenizer_is_the_released_one(tokenizer):
    model, ref = tokenizer
    close(model.encoder(ref["image"]), ref["encoded"])
    assert torch.equal(model.encode(ref["image"]), ref["indices"].long())
    restored, indices, losses = model(ref["image"])
    assert torch.equal(indices, ref["indices"].long())
    close(restored, ref["reconstruction"])
    close(model.decoder(model.quantizer.decode(indices)), ref["reconstruction_from_indices"])
    close(losses["commitment"], ref["commitment_loss_times_cost"])
    close(losses["codebook"], ref["codebook_loss"])
    close(losses["entropy"], ref["entropy_loss_times_ratio"])
    close(sum(losses.values()), ref["quantizer_loss"])


def test_the_gradient_goes_straight_through_the_quantizer(tokenizer):
    """The decoder's gradient reaches the features unchanged, and not the codebook."""
    model, ref = tokenizer
    features = ref["encoded"].clone().requires_grad_(True)
    quantized, _, _ = model.quantizer(features)
    weight = torch.randn_like(quantized)
    codebook_gradient, features_gradient = torch.autograd.grad(
        (quantized * weight).sum(), [model.quantizer.codebook, features], allow_unused=True)
    assert codebook_gradient is None
    assert torch.equal(features_gradient, weight)


@torch.no_grad()
def test_the_transformer_is_the_released_one():
    arrays, params = load("transformer_tiny")
    config = MaskGITConfig(codebook_size=64, num_classes=10, num_tokens=16, dim=32, depth=2, heads=4, mlp_dim=64)
    model = MaskGIT(config).eval()
    model.token_embedding.weight.copy_(params["Embed_0/word_embeddings/embedding"])
    model.position_embedding.weight.copy_(params["Embed_0/position_embeddings/embedding"])
    set_layer(model.norm, params, "Embed_0/embeddings_ln")
    for i, block in enumerate(model.blocks):
        path = f"TransformerLayer_{i}"
        attention = f"{path}/Attention_0/self_attention"
        for name in ("query", "key", "value"):                              # theirs: (dim, heads, dim / heads)
            layer = getattr(block.attention, name)
            layer.weight.copy_(params[f"{attention}/{name}/kernel"].flatten(1).T)
            layer.bias.copy_(params[f"{attention}/{name}/bias"].flatten())
        block.attention.out.weight.copy_(params[f"{attention}/out/kernel"].flatten(0, 1).T)
        block.attention.out.bias.copy_(params[f"{attention}/out/bias"])
        set_layer(block.norm1, params, f"{path}/Attention_0/attention_output_ln")
        set_layer(block.mlp[0], params, f"{path}/Mlp_0/intermediate_output")
        set_layer(block.mlp[2], params, f"{path}/Mlp_0/layer_output")
        set_layer(block.norm2, params, f"{path}/Mlp_0/layer_output_ln")
    set_layer(model.head[0], params, "MlmLayer_0/mlm_dense")
    set_layer(model.head[2], params, "MlmLayer_0/mlm_ln")
    model.head_bias.copy_(params["MlmLayer_0/mlm_bias/bias"])
    ids = arrays["input_ids"].long()
    tokens = torch.where(ids[:, 1:] < 0, model.mask_id, ids[:, 1:])
    close(model(tokens, ids[:, 0] - 64), arrays["logits"][:, 1:, :64])


def test_the_discriminator_and_its_penalty_are_the_released_ones():
    ref, _ = load("discriminator")
    disc = Discriminator(16)
    layers = {"Conv_0": disc.conv_in, "Conv_1": disc.conv_out, "Dense_0": disc.dense1, "Dense_1": disc.dense2}
    for i, block in enumerate(disc.blocks):
        layers |= {f"ResBlock_{i}/Conv_0": block.conv1, f"ResBlock_{i}/Conv_1": block.shortcut,
                   f"ResBlock_{i}/Conv_2": block.conv2}
    params = {}
    for i, (name, shape) in enumerate(sorted(json.loads((DATA / "discriminator_names.json").read_text()).items())):
        scale = 0.1 if name.endswith("bias") else 1 / np.sqrt(np.prod(shape[:-1]))
        params[name] = torch.from_numpy((np.random.RandomState(1000 + i).randn(*shape) * scale).astype(np.float32))
    for name, layer in layers.items():
        set_layer(layer, params, name)
    images = ref["image"].permute(0, 3, 1, 2)
    close(disc(images), ref["logit"].flatten())
    close(10 * r1_penalty(disc, images), ref["r1_penalty_cost10"], 1e-6)


def test_the_losses_are_the_released_ones():
    ref, _ = load("discriminator")
    for kind, name in (("non-saturating", "nonsat"), ("hinge", "hinge")):
        close(discriminator_loss(ref["real_logit"], ref["fake_logit"], kind), ref[f"d_loss_{name}"])
        close(generator_loss(ref["fake_logit"], kind), ref[f"g_loss_{name}"])
    ref, _ = load("entropy_loss")
    close(entropy_loss(ref["affinity"], 0.01), ref["softmax_t001"])
    close(entropy_loss(ref["affinity"], 1.0), ref["softmax_t1"])
    ref, _ = load("masked_loss")
    close(mvtm_loss(ref["logits"], ref["labels"].long(), ref["mask"]), ref["loss"])
    close(mvtm_loss(ref["logits"], ref["labels"].long(), ref["mask"], 0.0), ref["loss_no_smoothing"])


def test_mask_counts_are_the_released_ones():
    reference = json.loads((DATA / "mask_counts.json").read_text())
    assert len(reference) == 63
    for key, counts in reference.items():
        schedule, tokens, steps = key.split("/")
        assert mask_counts(schedule, int(steps[1:]), int(tokens[1:])) == counts, key
