"""Where a loop runs: on a CPU or a GPU, on several GPUs, or on TPUs; with its precision and seeds.

Several GPUs: torchrun starts a process for each (a rank), and DistributedDataParallel averages
their gradients. TPUs: torch-xla runs one process for all chips of a host.

A script's main() parses the flags and calls launch(function, args), which calls
function(args, machine) on every rank.
"""
import contextlib
import datetime
import gc
import hashlib
import os
import shutil
import sys
import sysconfig
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib.devices import prepare_blocks, replace_upsampling
from lib.errors import UserError

# Linux: get memory for CPU tensors in pages of 2 MB. A training step allocates and frees gigabytes,
# and small pages cost time (4% of a step of the paper's transformer). torch reads this once, at its
# first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


MOST_CORES = 16         # for each rank: more processes that read images would only take memory


def cores() -> int:
    """Returns this process's share of the CPU cores: those allowed, divided by the ranks on this
    computer, at most MOST_CORES."""
    allowed = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_CORES, allowed // ranks))


def computes_bfloat16() -> bool:
    """Returns True if the CPU has bfloat16 instructions: AVX512-BF16, AMX, or Arm's.

    Before version 2.10 torch does not tell, and the answer is False."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def has_nvidia_gpu() -> bool:
    """Returns True if the computer has an NVIDIA GPU that is not hidden, whether torch can use it
    or not. An empty CUDA_VISIBLE_DEVICES, or -1, hides all GPUs."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return Path("/proc/driver/nvidia").exists() or Path("/dev/nvidia0").exists()


def choose_device(name: str) -> torch.device:
    """Returns the device for `auto`, `cpu` or `cuda`. Under torchrun each process has its own GPU.

    Raises UserError if torch cannot use the GPU that is asked for, or that `auto` finds, and if
    there are more processes than GPUs."""
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        if name == "auto" and not has_nvidia_gpu():
            return torch.device("cpu")
        reason = "there is none"
        if torch.version.cuda is None:
            reason = "it is a build for CPUs"
        elif has_nvidia_gpu():
            reason = f"its CUDA {torch.version.cuda} needs a newer driver"
        raise UserError(f"torch {torch.__version__} cannot use an NVIDIA GPU here ({reason}): "
                        f"install a build of torch for your driver's CUDA version, or give "
                        f"--device cpu")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    if number >= gpus:
        raise UserError(f"process {number} has no GPU of its own, as this computer has {gpus}: "
                        f"start at most that many processes with --nproc_per_node")
    return torch.device("cuda", number)


LONG_TRAINING = 1000            # steps from which compiling blocks on a CPU pays


class Machine:
    """The device of this process, and the ranks beside it.

    name: auto, cpu, cuda or xla. bf16: autocast to bfloat16. compiled: use torch.compile. None
    stands for what suits the device. training_steps: how long a transformer is trained; a CPU
    compiles its blocks if that is long. Raises UserError if the device is missing.

    Attributes:
        device, layout    the torch device, and the memory layout of images on it
        rank, world       the number of this process, and how many processes there are
        devices           how many devices share a batch
        leads             True for the process that writes files and prints
        bf16, compiled    as above, decided
        compiles_blocks   True if on a CPU the blocks of a transformer are compiled
        fused             True if optimizers can update all parameters in one pass
        mesh              the TPU chips, or None
    """

    def __init__(
        self, name: str = "auto", bf16: bool | None = None, compiled: bool | None = None,
        training_steps: int = 0,
    ):
        self.mesh = None
        if name == "xla":
            self._open_xla()
        else:
            self._open_torch(name)
        self.leads = self.rank == 0
        on_xla = self.device.type == "xla"
        self.bf16 = self._default_bf16() if bf16 is None else bf16
        self.compiled = self._default_compiled() if compiled is None else compiled
        self.compiles_blocks = self.device.type == "cpu" and self.compiled
        if self.device.type == "cpu" and compiled is None and training_steps >= LONG_TRAINING:
            self.compiles_blocks = sys.platform == "linux" and shutil.which("g++") is not None
        if on_xla:                                          # torch-xla compiles everything anyway
            self.compiled = False
        self.fused = self.device.type in ("cpu", "cuda")
        self.layout = torch.contiguous_format if on_xla else torch.channels_last

    def _open_torch(self, name: str):
        self.device = choose_device(name)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True       # try all algorithms, as shapes never change
        else:
            # Despite its name this also governs the CPU: sum bfloat16 attention in bfloat16.
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        if "RANK" in os.environ and not dist.is_initialized():                # torchrun sets RANK
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
        self.rank = 0
        self.world = 1
        if dist.is_initialized():
            self.rank = dist.get_rank()
            self.world = dist.get_world_size()
        self.devices = self.world

    def _open_xla(self):
        """Opens all TPU chips of all hosts as one device (SPMD).

        The program is written for one chip and the whole batch, and torch-xla splits it. So losses,
        gradients and random draws are those of the whole batch, whatever the number of chips, and
        there is nothing to average over ranks."""
        # Each compilation would print that GSPMD, which splits the program, will have a successor.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        try:
            import torch_xla.backends
            import torch_xla.core.xla_model
            import torch_xla.distributed.spmd
            import torch_xla.runtime
        except ImportError:
            raise UserError("--device xla needs torch-xla: pip install torch==2.9.0 "
                            "'torch_xla[tpu]==2.9.0'") from None
        self.xla = torch_xla
        # A TPU would round the factors of float32 products to bfloat16: --bf16 decides that.
        torch_xla.backends.set_mat_mul_precision("highest")
        torch_xla.runtime.use_spmd()            # before any tensor is on the device
        self.mesh = torch_xla.distributed.spmd.get_1d_mesh("data")
        self.device = torch_xla.device()
        self.rank = torch_xla.runtime.process_index()
        self.world = torch_xla.runtime.process_count()
        self.devices = torch_xla.runtime.global_runtime_device_count()

    def _default_bf16(self) -> bool:
        if self.device.type == "cpu":
            return computes_bfloat16()
        if self.device.type == "xla" or torch.cuda.is_bf16_supported(including_emulation=False):
            return True
        self._note("this GPU has no bfloat16 instructions: computing in float32")
        return False

    def _default_compiled(self) -> bool:
        if self.device.type != "cuda":
            return False
        c_compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        headers = Path(sysconfig.get_path("include"), "Python.h").exists()
        if c_compiler and headers and torch.cuda.get_device_capability() >= (7, 0):
            return True
        self._note("torch.compile needs a C compiler (gcc), Python's headers (python3-dev) and a "
                   "GPU of compute capability 7.0 or more: going on without it")
        return False

    def _note(self, text: str) -> None:
        if self.leads:
            print(text, file=sys.stderr)

    # ---- tensors and models on the device

    def autocast(self) -> torch.autocast:
        """Returns a context in which products and convolutions are taken in bfloat16 (--bf16)."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def put(self, batch: Tensor, of_this_rank: bool = False) -> Tensor:
        """Returns a tensor (B, ...) on the device; with torch-xla, its rows spread over the chips.

        of_this_rank: True if these rows are only this rank's part of the batch, as the data loader
        gives it in training; otherwise every rank has the whole batch. On several TPU hosts the
        result is the whole batch in either case."""
        # torch-xla cannot split every operation on rows that do not divide evenly: such a batch is
        # copied to every chip.
        if self.mesh is None or (not of_this_rank and len(batch) % self.devices):
            return batch.to(self.device, non_blocking=True)
        rows = ("data",) + (None,) * (batch.ndim - 1)           # split along the first axis only
        sharding = self.xla.distributed.spmd.ShardingSpec(self.mesh, rows, minibatch=of_this_rank)
        return self.xla.core.xla_model.send_cpu_data_to_device(batch, self.device, sharding)[0]

    def to_floats(self, images: Tensor, of_this_rank: bool = False) -> Tensor:
        """Returns uint8 images (B, 3, S, S) as floats in [0, 1] on the device.

        of_this_rank: see put()."""
        return self.put(images, of_this_rank).float().div(255).contiguous(memory_format=self.layout)

    def place(self, model: nn.Module) -> nn.Module:
        """Moves a model to the device, in the memory layout of images, and returns it."""
        if self.device.type == "xla":
            replace_upsampling(model)
        return model.to(self.device, memory_format=self.layout)

    def freeze(self, model: nn.Module) -> nn.Module:
        """Prepares a model that is not trained, and returns it.

        Converts its matrices and convolutions once to what autocast would at every call."""
        if self.bf16:
            for module in model.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.to(torch.bfloat16)
        return model.requires_grad_(False)

    def compile(self, function: Callable) -> Callable:
        """Returns a function or model, compiled if this machine compiles.

        Each shape has a program of its own: one for all shapes would be slower, since Inductor
        could not choose the layout of its convolutions."""
        return torch.compile(function, dynamic=False) if self.compiled else function

    def wrap(self, model: nn.Module, blocks: nn.ModuleList | None = None) -> nn.Module:
        """Returns what to call in place of `model` in training: compiled, and its backward pass
        averages the gradients over the ranks.

        blocks: those of a transformer, which a CPU compiles one by one."""
        if self.device.type == "cpu" and blocks is not None:
            prepare_blocks(blocks, self.bf16, self.compiles_blocks)
            return self._distribute(model)
        return self.compile(self._distribute(model))

    def _distribute(self, model: nn.Module) -> nn.Module:
        if self.world == 1 or self.mesh is not None:
            return model
        return nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=True, bucket_cap_mb=200)

    # ---- the steps of a loop

    @contextlib.contextmanager
    def micro_batch(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Surrounds the forward and backward pass of a micro-batch.

        Ranks exchange gradients only in the last one of a step; a CPU may take attention as two
        products; torch-xla runs what it has recorded. wrapped: from wrap()."""
        with contextlib.ExitStack() as contexts:
            if not last and hasattr(wrapped, "no_sync"):
                contexts.enter_context(wrapped.no_sync())
            if self.device.type == "cpu" and not self.compiles_blocks:
                # Attention as two matrix products: they are faster than the CPU's fused kernel in
                # bfloat16, unless the code around it is compiled.
                contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield
        if not last:
            self.sync()         # a graph for all micro-batches would need the memory of the batch

    def seed_step(self, seed: int, step: int) -> torch.Generator:
        """Makes every draw of a step a function of (seed, step, rank).

        Returns a CPU generator, whose draws (the masks) are the same on every device; dropout draws
        on the device. With torch-xla every host draws for the whole batch, as the first one does.
        """
        number = step_seed(seed, step, self.rank if self.mesh is None else 0)
        torch.manual_seed(number)
        if self.mesh is not None:
            self.xla.manual_seed(number % (1 << 32))                # it takes 32 bits
        return torch.Generator().manual_seed(number)

    def true_on_any_rank(self, flag: bool) -> bool:
        """Returns True if `flag` is true on any rank. All ranks wait here for each other."""
        if self.world == 1:
            return flag
        devices_here = self.devices // self.world
        flags = torch.full((devices_here,), float(flag))
        return self.fetch(mean_over_ranks(self.put(flags, of_this_rank=True)).mean()) > 0

    def range_over_ranks(self, value: int) -> tuple[int, int]:
        """Returns the least and the greatest value of all ranks, exact below 2^24."""
        if self.world == 1:
            return value, value
        devices_here = self.devices // self.world
        values = self.put(torch.full((devices_here,), float(value)), of_this_rank=True)
        if dist.is_initialized():
            gathered = [torch.empty_like(values) for _ in range(self.world)]
            dist.all_gather(gathered, values)
            values = torch.cat(gathered)
        least, most = self.fetch(torch.stack([values.min(), values.max()]))
        return int(least), int(most)

    def wait_for_ranks(self):
        """Waits until all ranks are here."""
        self.true_on_any_rank(False)

    @contextlib.contextmanager
    def first_rank_first(self) -> Iterator[None]:
        """Surrounds what fetches a file: the first rank does it, and then the others find the file.
        """
        if not self.leads:
            self.wait_for_ranks()
        yield
        if self.leads:
            self.wait_for_ranks()

    def fetch(self, tensor: Tensor):
        """Returns the values of a tensor as Python numbers. Waits for the device."""
        self.sync()
        return tensor.tolist()

    def sync(self):
        """Ends a step. torch-xla only records operations; here it compiles and runs them.

        Without this, each value that is read is computed alone, with all that it depends on."""
        if self.mesh is not None:
            self.xla.sync()

    def wait(self):
        """Waits until the device has computed all that it was asked for, as a clock must.

        torch-xla computes only what a variable still holds."""
        if self.mesh is not None:
            self.xla.sync()
            self.xla.core.xla_model.wait_device_ops()       # sync(wait=True) does not wait, in SPMD
        elif self.device.type == "cuda":
            torch.cuda.synchronize()


# ---- ranks and seeds

def launch(
    function: Callable[[Namespace, Machine], None], args: Namespace, training_steps: int = 0,
):
    """Calls function(args, machine) on the device that the flags name.

    Raises UserError if the device is missing, and whatever the function raises. After an error
    command_line() ends this rank at once, since the other ranks wait for it and know nothing."""
    # Only the training scripts and bench.py have --compile.
    compiled = getattr(args, "compile", False)
    machine = Machine(args.device, args.bf16, compiled, training_steps)
    try:
        function(args, machine)
    except SystemExit:                          # after a signal, of which all ranks know
        leave_ranks()
        raise
    leave_ranks()


def leave_ranks():
    """Ends the communication with the other ranks; all of them must call this.

    A thread of gloo may be the last to hold a tensor, and needs the interpreter to free it. If that
    has ended by then, the process aborts ('terminate called without an active exception'). So no
    rank leaves before the others, and the models, whose DistributedDataParallel keeps the threads
    alive in reference cycles, are collected first."""
    if dist.is_initialized():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Returns a 63-bit hash of (seed, step, rank)."""
    digest = hashlib.blake2s(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Returns the mean of a tensor over the ranks, without a gradient, on all of them."""
    if not dist.is_initialized():
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def from_first_rank(tensor: Tensor) -> Tensor:
    """Overwrites a tensor with that of the first rank, and returns it."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def hashed_uniform(key: int, indices: Sequence[int] | np.ndarray, columns: int) -> np.ndarray:
    """Returns uniform numbers in [0, 1), float32 (len(indices), columns): a pure function of
    (key, index, column).

    It hashes a counter by splitmix64 (Steele et al. 2014), so there is no generator to seed, and
    all images are drawn at once."""
    first = np.asarray(indices, np.uint64)[:, None] * np.uint64(columns)
    x = first + np.arange(columns, dtype=np.uint64)
    x = (x + key * 0xD1342543DE82EF95 % (1 << 64)) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return ((x ^ (x >> 31)) >> 40).astype(np.float32) / (1 << 24)
