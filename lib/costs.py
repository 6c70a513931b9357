"""What a training will take, counted on torch's fake tensors: these have shapes but no numbers, and
compute nothing."""
from collections.abc import Callable, Iterable

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


def kept_for_backward(
    models: list[nn.Module], function: Callable[..., object], *arguments: object,
) -> int:
    """Returns the bytes that function(*arguments) keeps for its backward pass, without the
    parameters of the models.

    Call it under imagined(), with tensors made there."""
    # A view of a parameter, such as its transpose, shares the parameter's storage. Tensors and
    # storages are held until the end, so that no address comes twice.
    weights = []
    for model in models:
        weights += [parameter.detach() for parameter in model.parameters()]
    addresses_of_weights = {weight.untyped_storage()._cdata for weight in weights}
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(*arguments)
    kept = 0
    for address, storage in storages.items():
        if address not in addresses_of_weights:
            kept += storage.nbytes()
    return kept


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Returns the size of some tensors, such as a model's parameters."""
    return sum(tensor.nbytes for tensor in tensors)
