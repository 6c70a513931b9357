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
    storages = {}                                             # held, so that no address is given twice

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    for weight in weights:
        storages.pop(weight.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in storages.values())


def state_bytes(part):
    """Of the tensors that a model or an optimizer saves."""
    states = part.state.values() if isinstance(part, torch.optim.Optimizer) else [part.state_dict()]
    return sum(tensor.nbytes for state in states for tensor in state.values())


def print_plan(args, machine, step_of, what):
    """Prints what a run takes, for --dry-run. step_of(batch): such a step of so many images. what: the tokens."""
    batch = args.batch // machine.devices // args.parts
    parts, step = step_of(batch)
    weights = [p for part in parts.values() if isinstance(part, torch.nn.Module) for p in part.parameters()]
    trained = sum(p.nbytes for p in weights if p.requires_grad)
    activations = kept_for_backward(step, weights) / (2 if machine.bf16 else 1)
    each = flops(step) / batch
    total = each * args.batch * args.steps
    state = sum(map(state_bytes, parts.values()))                           # after a step: with moments
    if machine.leads:
        print(f"""\
parameters   {sum(p.numel() for p in parts['model'].parameters()) / 1e6:.2f} M, {what}
FLOPs        {each / 1e9:.4g} G an image, {total / 1e15:.4g} P in {args.steps} steps of {args.batch} images
time         {total / 1e12 / args.dry_run / 3600:.3g} hours at {args.dry_run:g} TFLOP/s, of all devices together
memory       about {(state + trained + activations) / 1e9:.3g} GB on each device: {(state + trained) / 1e9:.3g} for the
             weights, {activations / 1e9:.3g} for a micro-batch of {batch}
checkpoints  {state_bytes(parts["ema"]) / 1e9:.3g} GB for use, {state / 1e9:.3g} GB to go on from""")
