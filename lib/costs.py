"""What a training will take, counted on torch's fake tensors, which compute nothing."""
import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


def imagined() -> FakeTensorMode:
    """Returns a context in which tensors have shapes but no numbers; real ones may be used in it.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


def forward_flops(function: Callable[..., object], *arguments: Tensor) -> float:
    """Returns the FLOPs of function(*arguments): matrix products, attention, convolutions; 2 for
    each multiply-add.

    Call it under imagined(), with arguments made there."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


def kept_for_backward(function: Callable[..., object], *arguments: Tensor) -> int:
    """Returns the bytes that function(*arguments) keeps for its backward pass, without parameters.

    Call it under imagined()."""
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage                # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(*arguments)
    return sum(storage.nbytes() for storage in storages.values())


def print_plan(
    args: argparse.Namespace, what: str, trained: list[nn.Module], averaged: nn.Module,
    flops: float, micro_batch: int, activations: float,
) -> None:
    """Prints what a run takes, for --dry-run at args.dry_run TFLOP/s.

    what: the tokens. trained: the models that learn. averaged: the one whose average is kept for
    use. flops: of a training step, for an image. activations: bytes of a micro-batch."""
    use = sum(parameter.nbytes for parameter in averaged.parameters())
    weights = 0
    for model in trained:
        weights += sum(parameter.nbytes for parameter in model.parameters())
    state = 3 * weights + use                           # with both moments of Adam, and the average
    memory = state + weights                            # and the gradients
    total = flops * args.batch * args.steps
    hours = total / 1e12 / args.dry_run / 3600
    print(f"""\
parameters   {use / 4e6:.2f} M, {what}
FLOPs        {flops / 1e9:.4g} G an image, {total / 1e15:.4g} P in all {args.steps} steps
time         {hours:.3g} hours at {args.dry_run:g} TFLOP/s, of all devices together
memory       about {(memory + activations) / 1e9:.3g} GB on each device: {memory / 1e9:.3g} for the
             weights, {activations / 1e9:.3g} for a micro-batch of {micro_batch}
checkpoints  {use / 1e9:.3g} GB for use, {state / 1e9:.3g} GB to go on from""")
