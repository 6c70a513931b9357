"""What a training will take, counted on torch's fake tensors: these have shapes but no numbers, and
compute nothing."""
import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def imagined() -> FakeTensorMode:
    """Returns a context in which new tensors are fake; models with real weights may be called in
    it."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def forward_flops(function: Callable[..., object], *arguments: object) -> int:
    """Returns the FLOPs of function(*arguments): those of matrix products, attention and
    convolutions, 2 for each multiply-add.

    Call it under imagined(), with tensors made there."""
    # torch does not count the CPU's fused attention; as two matrix products it does.
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        function(*arguments)
    return counter.get_total_flops()


def kept_for_backward(model: nn.Module, *arguments: Tensor) -> int:
    """Returns the bytes that model(*arguments) keeps for its backward pass, without parameters.

    Call it under imagined(), with tensors made there."""
    # A view of a parameter, such as its transpose, shares the parameter's storage. Tensors and
    # storages are held until the end, so that no address comes twice.
    weights = [parameter.detach() for parameter in model.parameters()]
    addresses_of_weights = {weight.untyped_storage()._cdata for weight in weights}
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*arguments)
    kept = 0
    for address, storage in storages.items():
        if address not in addresses_of_weights:
            kept += storage.nbytes()
    return kept


def print_plan(
    args: argparse.Namespace, tokens: str, trained: list[nn.Module], averaged: nn.Module,
    flops: float, micro_batch: int, activations: float,
) -> None:
    """Prints what a run takes, for --dry-run at args.dry_run TFLOP/s.

    tokens: how many, of how many codes. trained: the models that learn. averaged: the one whose
    averaged weights are for use. flops: of a training step, for one image. activations: what a
    micro-batch keeps for the backward pass, in bytes."""
    for_use = bytes_of_weights(averaged)
    weights = sum(bytes_of_weights(model) for model in trained)
    to_resume = 3 * weights + for_use                   # with both moments of Adam, and the average
    memory = to_resume + weights                        # and the gradients
    total = flops * args.batch * args.steps
    hours = total / 1e12 / args.dry_run / 3600
    print(f"""\
parameters   {for_use / 4e6:.2f} M, {tokens}
FLOPs        {flops / 1e9:.4g} G an image, {total / 1e15:.4g} P in all {args.steps} steps
time         {hours:.3g} hours at {args.dry_run:g} TFLOP/s, of all devices together
memory       about {(memory + activations) / 1e9:.3g} GB on each device: {memory / 1e9:.3g} for the
             weights, {activations / 1e9:.3g} for a micro-batch of {micro_batch}
checkpoints  {for_use / 1e9:.3g} GB for use, {to_resume / 1e9:.3g} GB to go on from""")


def bytes_of_weights(model: nn.Module) -> int:
    """Returns the size of a model's parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())
