"""What a training will take, counted on the meta device, where nothing is computed and no memory is needed.

A step is what a training script makes for it: (its models and optimizers by name, a function that takes one step).
"""
import torch
from torch.utils.flop_counter import FlopCounterMode


def flops(function):
    """FLOPs of function(), whose tensors are on the meta device: of matrix products, attention and convolutions, 2 for
    each multiply-add, with the backward pass, without recomputation."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def kept_for_backward(function, weights):
    """Bytes that function() keeps of its forward passes for the backward passes, besides the weights, in float32."""
    known = {weight.untyped_storage()._cdata for weight in weights}
    storages = {}                                             # held, so that no address is given twice

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for storage in storages.values())


def tensor_bytes(state):
    """Of all tensors in nested dicts and lists."""
    if torch.is_tensor(state):
        return state.nbytes
    items = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return sum(map(tensor_bytes, items))


def print_plan(args, machine, step_of, what):
    """Prints what a run takes, for --dry-run. step_of(batch): such a step of so many images. what: the tokens."""
    batch = args.batch // machine.devices // args.parts
    parts, step = step_of(batch)
    weights = [p for part in parts.values() if isinstance(part, torch.nn.Module) for p in part.parameters()]
    trained = sum(p.nbytes for p in weights if p.requires_grad)
    activations = kept_for_backward(step, weights) / (2 if machine.bf16 else 1)
    each = flops(step) / batch
    total = each * args.batch * args.steps
    state = tensor_bytes({name: part.state_dict() for name, part in parts.items()})       # after a step: with moments
    model = tensor_bytes(parts["ema"].state_dict())
    if machine.leads:
        print(f"""\
parameters   {sum(p.numel() for p in parts['model'].parameters()) / 1e6:.2f} M, {what}
FLOPs        {each / 1e9:.4g} G an image, {total / 1e15:.4g} P in {args.steps} steps of {args.batch} images
time         {total / 1e12 / args.dry_run / 3600:.3g} hours at {args.dry_run:g} TFLOP/s, of all devices together
memory       about {(state + trained + activations) / 1e9:.3g} GB on each device: {(state + trained) / 1e9:.3g} for the
             weights, {activations / 1e9:.3g} for a micro-batch of {batch}
checkpoints  {model / 1e9:.3g} GB for use, {state / 1e9:.3g} GB to go on from""")
