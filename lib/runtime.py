"""Where a loop runs: in one process on a CPU or a GPU, in one for each GPU under torchrun (DistributedDataParallel), or
in one for all TPU chips of a host (torch-xla); precision, ranks, seeds, flags.

A script's main() parses the flags and calls launch(function, args), which calls function(args, machine) on every rank.
Bad input raises ValueError or OSError with one line for the user; `command_line` turns it into exit status 2.
"""
import contextlib
import datetime
import gc
import hashlib
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib.flags import UserError

# Linux: memory for CPU tensors in pages of 2 MB. A training step takes and returns gigabytes, and each small page that
# the kernel hands out costs time (4% of a step of the paper's transformer). Read by torch at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def cores():
    """How many CPU cores are this process's: those it may use, shared with the other ranks of the machine; at most 16,
    beyond which readers of images only take memory."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def computes_bfloat16():
    """Whether the CPU has instructions for it: AVX512-BF16 or AMX, or Arm's. torch before 2.10 does not tell: no."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class Machine:
    """The device of this process, and the ranks beside it.

    name: auto, cpu, cuda, xla, or meta, where nothing is computed (lib.costs counts what would be). bf16: autocast to
    bfloat16; compiled: torch.compile; None: what suits the device.
    Attributes: device; rank and world, the number of this process and of all; devices, how many share a batch; leads,
    whether this process is the one that writes and prints. Raises ValueError where the device is absent."""

    def __init__(self, name="auto", bf16=None, compiled=None):
        self.mesh = None
        if name == "xla":
            self._open_xla()
        else:
            self._open_torch(name)
        self.leads = self.rank == 0
        on_cuda, on_xla = self.device.type == "cuda", self.device.type == "xla"
        self.bf16 = on_cuda or on_xla or computes_bfloat16() if bf16 is None else bf16
        self.compiled = on_cuda if compiled is None else compiled and not on_xla
        self.fused = self.device.type in ("cpu", "cuda")                   # one pass over memory in the optimizers
        self.layout = torch.contiguous_format if on_xla else torch.channels_last                    # of images

    def _open_torch(self, name):
        if name == "cuda" and not torch.cuda.is_available():
            raise UserError("no CUDA device is available: use --device cpu, or install a CUDA build of torch")
        if name == "cuda" or name == "auto" and torch.cuda.is_available():
            number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if number >= there:
                raise UserError(f"process {number} of this machine has no GPU of its own, as it has {there}: start no "
                                 f"more processes than that with --nproc_per_node")
            self.device = torch.device("cuda", number)
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True                          # tries algorithms: shapes never change here
            # What autocast leaves in float32 takes differences of large numbers (R1, distances, FID): no TF32 there.
            torch.backends.cudnn.allow_tf32 = False
        else:
            self.device = torch.device("meta" if name == "meta" else "cpu")
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)   # of a CPU, too: see accumulating()
        if "RANK" in os.environ and not dist.is_initialized():             # started by torchrun
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
        several = dist.is_initialized() and name != "meta"
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self.devices = self.world

    def _open_xla(self):
        """All chips of all hosts as one device (SPMD): each has a part of every batch, and all that is no batch.

        The program is that for one chip and the whole batch; torch-xla splits it. So losses, gradients and random draws
        are those of the whole batch, whatever the number of chips, and nothing is averaged over ranks."""
        # Or each compilation prints that GSPMD, which splits the program, will have a successor.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import torch_xla.core.xla_model
        import torch_xla.distributed.spmd
        import torch_xla.runtime
        self.xla, runtime = torch_xla, torch_xla.runtime
        runtime.use_spmd()                                      # before anything is on the device, or it is moved again
        self.mesh, self.device = torch_xla.distributed.spmd.get_1d_mesh("data"), torch_xla.device()
        self.rank, self.world = runtime.process_index(), runtime.process_count()                     # of hosts
        self.devices = runtime.global_runtime_device_count()

    def autocast(self):
        device = "cpu" if self.device.type == "meta" else self.device.type               # the meta device has none
        return torch.autocast(device, torch.bfloat16, enabled=self.bf16)

    def put(self, batch, own_share=False):
        """A tensor (B, ...) -> on the device; with torch-xla, a part of its rows on each chip.

        own_share: this process has but its share of the batch, as the data loader gives it in training. Otherwise every
        process has the whole batch. On several TPU hosts it is the whole one that is returned, in either case."""
        # Rows that do not divide evenly are put on every chip: torch-xla could not split all operations on them.
        if self.mesh is None or not own_share and len(batch) % self.devices:
            return batch.to(self.device, non_blocking=True)
        rows = ("data",) + (None,) * (batch.ndim - 1)                    # split along the mesh's one axis, the first
        sharding = self.xla.distributed.spmd.ShardingSpec(self.mesh, rows, minibatch=own_share)
        return self.xla.core.xla_model.send_cpu_data_to_device(batch, self.device, sharding)[0]

    def to_floats(self, images, own_share=False):
        """uint8 images (B, 3, S, S) -> floats in [0, 1] on the device, in its layout. own_share: see put()."""
        return self.put(images, own_share).float().div(255).contiguous(memory_format=self.layout)

    def wrap(self, model):
        """What to call in place of `model` in training: averages gradients over the ranks in backward, compiled."""
        if self.world > 1 and self.mesh is None:
            model = torch.nn.parallel.DistributedDataParallel(
                model, gradient_as_bucket_view=True, bucket_cap_mb=200, broadcast_buffers=False)
        return self.compile(model)

    def compile(self, function):
        """A function or model, compiled where this machine does that."""
        return torch.compile(function) if self.compiled else function

    def freeze(self, model):
        """A model that is not trained: its matrices and convolutions converted to what autocast would at every call."""
        for module in model.modules():
            if self.bf16 and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                module.to(torch.bfloat16)
        return model.requires_grad_(False)

    @contextlib.contextmanager
    def accumulating(self, wrapped, more):
        """Around a micro-batch's passes. more: others follow, so the ranks need not exchange gradients yet.

        torch-xla gets a graph for each micro-batch: one for all of them needs the memory of the whole batch. On a CPU
        attention is two matrix products: the backward pass of the fused kernel takes four times as long in bfloat16."""
        exchange = wrapped.no_sync() if more and hasattr(wrapped, "no_sync") else contextlib.nullcontext()
        attention = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()
        with exchange, attention:
            yield
        if more:
            self.sync()

    def any(self, flag):
        """Whether `flag` is true on any rank: all learn it, and wait for each other."""
        if self.world == 1:
            return flag
        flags = torch.full((self.devices // self.world,), float(flag))          # one for each device of this process
        return self.fetch(mean_over_ranks(self.put(flags, own_share=True)).mean()) > 0

    def fetch(self, tensor):
        """The value of a tensor, as Python numbers: waits for the device."""
        self.sync()
        return tensor.tolist()

    def sync(self):
        """Ends a step. torch-xla only records operations: here all of them are compiled as one graph, once, and run.

        A value that is read without this is computed for itself: what it depends on runs again for the next one."""
        if self.mesh is not None:
            self.xla.sync()

    def generator(self, seed):
        """A random generator for tensors of the device, or None where the device has but one (torch-xla).

        seed: its lower 32 bits count, which is all that torch-xla takes."""
        seed %= 1 << 32
        if self.mesh is not None:
            self.xla.manual_seed(seed)
            return None
        return torch.Generator(self.device).manual_seed(seed)

    def seed_step(self, seed, step):
        """Makes every draw of a step a function of (seed, step, rank). Returns a CPU generator, whose draws (the masks)
        are the same on every device; dropout draws on the device.

        With torch-xla every host draws for the whole batch, and all must draw the same: as the first one does."""
        number = step_seed(seed, step, self.rank if self.mesh is None else 0)
        torch.manual_seed(number)
        self.generator(number)
        return torch.Generator().manual_seed(number)


def launch(function, args):
    """Calls function(args, machine). Raises ValueError where --device xla is asked for without torch_xla."""
    try:
        machine = Machine(args.device, args.bf16, getattr(args, "compile", None))
    except ImportError:
        raise UserError("--device xla needs torch-xla: pip install torch==2.9.0 'torch_xla[tpu]==2.9.0'") from None
    try:
        function(args, machine)
    finally:
        # A thread of gloo may be the last to hold a tensor, and asks for the interpreter to free it. If that is gone by
        # then, the process is aborted ('terminate called without an active exception'). So no rank leaves before the
        # others, and the models, whose DistributedDataParallel keeps the threads alive in reference cycles, are
        # collected first.
        if dist.is_initialized():
            # An error is of this rank alone, which then waits for no other; of a signal (SystemExit) all have learnt.
            if isinstance(sys.exception(), SystemExit | None):
                dist.barrier()
            gc.collect()
            dist.destroy_process_group()


def step_seed(seed, step, rank=0):
    """A 64-bit hash of (seed, step, rank)."""
    return int.from_bytes(hashlib.blake2s(f"{seed} {step} {rank}".encode(), digest_size=8).digest(), "little") >> 1


def mean_over_ranks(tensor):
    """The mean of a tensor over the ranks, on all of them, without a gradient. One process: the tensor, detached."""
    if not dist.is_initialized() or tensor.is_meta:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def from_first_rank(tensor):
    """The first rank's tensor, on all ranks."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def full_precision(tensor):
    """Switches autocast off. The meta device, on which bench.py counts operations, has none."""
    return contextlib.nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def from_host(tensor, like):
    """A tensor of the CPU, on the device of `like`; through pinned memory on CUDA, so that the CPU need not wait."""
    return (tensor.pin_memory() if like.is_cuda else tensor).to(like.device, non_blocking=True)


class Upsample(torch.nn.Module):
    """Every pixel twice along both sides (nearest neighbour): (B, C, H, W) -> (B, C, 2 H, 2 W)."""

    def forward(self, x):
        if x.device.type == "xla":     # whose interpolate has no backward pass: its gradients would go through the host
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return F.interpolate(x, scale_factor=2)


def hashed_uniform(key, indices, count):
    """Uniform numbers in [0, 1), float32 (len(indices), count): a pure function of (key, index, column).
    A counter hashed by splitmix64 (Steele et al. 2014): no generator to seed, and vectorised over the images."""
    x = np.asarray(indices, np.uint64)[:, None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
    x = (x + key * 0xD1342543DE82EF95 % (1 << 64)) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return ((x ^ (x >> 31)) >> 40).astype(np.float32) / (1 << 24)
