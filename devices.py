"""Where a loop runs: a CPU, CUDA GPUs under torchrun, or TPU chips under torch-xla; precision, compilation, ranks, seeds.

    python train_vq.py                                             # one process on what is there
    torchrun --nproc_per_node 8 train_vq.py --data imagenet        # DistributedDataParallel
    python train_vq.py --data imagenet --device xla                # all TPU chips of the host

A script's main() parses the flags and calls launch(function, args), which calls function(args, machine) on every rank.
Bad input raises ValueError or OSError with one line for the user; `command_line` turns it into exit status 2.
"""
import contextlib
import datetime
import gc
import hashlib
import os
import sys
import threading
import time

import torch
import torch.distributed as dist

# Linux: memory for CPU tensors in pages of 2 MB. A training step takes and returns gigabytes, and each small page that the
# kernel hands out costs time (4% of a step of the paper's transformer). Read by torch at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def command_line(main):
    """Runs a script's main(): a ValueError or OSError becomes one line on stderr and exit status 2.

    TRACEBACK=1 in the environment shows where it came from."""
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):     # CUDA's, the CPU's
            raise
        print("error: out of memory: in training lower --micro-batch (the result stays that of --batch) or the model's sizes, else the "
              "number of images at once (--num, --batch)",
              file=sys.stderr)
        sys.exit(2)


def yes_or_no(text):
    """argparse type: yes or no."""
    return {"yes": True, "no": False}[text] if text in ("yes", "no") else int("")


def add_machine_flags(parser):
    """The flags that say where to run, for every script."""
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "xla"),
                        help="xla: TPU, through torch-xla (default: cuda where there is one, else cpu)")
    parser.add_argument("--bf16", type=yes_or_no, metavar="YES_NO",
                        help="bfloat16 matrix products and convolutions (default: yes on cuda and xla)")
    parser.add_argument("--compile", type=yes_or_no, metavar="YES_NO", help="torch.compile (default: yes on cuda)")


def is_amd():
    """Whether the CPU is AMD's, without AMX (Linux; elsewhere: no)."""
    try:
        with open("/proc/cpuinfo") as file:
            text = file.read()
    except OSError:
        return False
    return "AuthenticAMD" in text and "amx" not in text


class Machine:
    """The device of this process, and the ranks beside it: CPU and CUDA processes started by torchrun, or TPU chips.

    name: auto, cpu, cuda or xla. bf16: autocast to bfloat16; compiled: torch.compile; None: what suits the device.
    Attributes: device, rank, world (the number of ranks). Raises ValueError where the device is absent."""

    barrier, rank0_synced = threading.Barrier(int(os.environ.get("CPU_NUM_DEVICES", 1))), False    # of torch-xla's CPU replicas

    def __init__(self, name="auto", bf16=None, compiled=None):
        self.rank, self.world = 0, 1
        if name == "xla":
            import torch_xla.core.xla_model
            import torch_xla.debug.metrics
            import torch_xla.runtime
            self.xla = torch_xla
            self.device, self.rank = torch_xla.device(), torch_xla.runtime.global_ordinal()
            self.world = torch_xla.runtime.world_size()
            self.threads = self.world > 1 and torch_xla.runtime.device_type() == "CPU"
        else:
            if name == "cuda" and not torch.cuda.is_available():
                raise ValueError("no CUDA device is available: use --device cpu, or install a CUDA build of torch")
            self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
                torch.cuda.set_device(self.device)
                torch.set_float32_matmul_precision("high")                 # TF32 where autocast leaves float32
            elif is_amd():
                # torch gives float32 products to MKL, which on AMD's CPUs uses half of AVX-512. Where bfloat16 would do it
                # gives them to oneDNN, which without AMX computes in float32 all the same, and twice as fast.
                torch.backends.mkldnn.matmul.fp32_precision = "bf16"
            if "RANK" in os.environ and not dist.is_initialized():         # torchrun
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
            if dist.is_initialized():
                self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.bf16 = self.device.type != "cpu" if bf16 is None else bf16
        self.compiled = self.device.type == "cuda" if compiled is None else compiled
        self.fused = self.device.type != "xla"                             # one pass over memory in the optimizers
        self.layout = torch.contiguous_format if self.device.type == "xla" else torch.channels_last    # of images

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def trainable(self, model):
        """What to call in place of `model` in training: averages gradients over the ranks in backward, compiled."""
        if self.world > 1 and self.device.type == "xla":
            self.xla.core.xla_model.collective_broadcast(list(model.parameters()))   # ranks may be threads, whose draws mix
            self.sync()
        elif self.world > 1:
            model = torch.nn.parallel.DistributedDataParallel(model)
        return torch.compile(model) if self.compiled else model

    def accumulating(self, model, more):
        """Around a micro-batch's forward and backward pass. more: others follow, so ranks need not exchange gradients yet."""
        return model.no_sync() if more and hasattr(model, "no_sync") else contextlib.nullcontext()

    def reduce_gradients(self, optimizer):
        """After the last backward pass of a step. DistributedDataParallel has done it on the way; torch-xla has not."""
        if self.device.type == "xla":
            self.xla.core.xla_model.reduce_gradients(optimizer)

    def mean(self, tensor):
        """The mean of a tensor over the ranks, on all of them; no gradient."""
        if self.world == 1:
            return tensor
        if self.device.type == "xla":
            return self.xla.core.xla_model.all_reduce("sum", tensor.detach(), 1 / self.world)
        tensor = tensor.detach().clone()
        dist.all_reduce(tensor)
        return tensor / self.world

    def any(self, flag):
        """Whether `flag` is true on any rank: all learn it, and wait for each other."""
        # Not a scalar: torch-xla compiles the scalars 0 and 1 into the program, which must be the same on all ranks.
        return flag if self.world == 1 else self.fetch(self.mean(torch.tensor([float(flag)]).to(self.device)))[0] > 0

    def wait_for_ranks(self):
        self.any(False)

    def fetch(self, tensor):
        """The value of a tensor, as Python numbers: waits for the device."""
        self.sync()
        return tensor.tolist()

    def sync(self, alone=False):
        """Ends a step. torch-xla only records operations: this is where the step's one graph is handed to the device.

        alone: the other ranks do not get here."""
        if self.device.type != "xla":
            return
        if self.threads and not alone:
            self._in_turn()
        self.xla.sync()

    def _in_turn(self):
        """Replicas of torch-xla's CPU device are threads, and a collective meets only its own in the same compiled program. Two
        threads that compile at the same time get two programs: so the others wait until rank 0 has compiled this step's, or
        found it in the cache, where they find it too. (It may not return before they have joined it.)"""
        compiled = lambda: (self.xla.debug.metrics.metric_data("CompileTime") or [0])[0]
        found = lambda: self.xla.debug.metrics.counter_value("CachedCompile") or 0
        self.barrier.wait()
        before, Machine.rank0_synced = (compiled(), found()), False
        self.barrier.wait()
        while self.rank and (compiled(), found()) == before and not Machine.rank0_synced:
            time.sleep(0.001)
        if self.rank and compiled() > before[0]:
            time.sleep(0.5)                           # compiled, but only soon in the cache
        self.xla._XLAC._xla_step_marker(str(self.device), [], wait=False, reset_scope=True)
        Machine.rank0_synced |= self.rank == 0
        self.barrier.wait()

    def generator(self, seed):
        """A random generator for tensors of the device, or None where the device has but one (torch-xla).

        seed: its lower 32 bits count, which is all that torch-xla takes."""
        seed %= 1 << 32
        if self.device.type == "xla":
            self.xla.manual_seed(seed)
            return None
        return torch.Generator(self.device).manual_seed(seed)

    def seed_step(self, seed, step):
        """Makes every draw of a step a function of (seed, step, rank). Returns a CPU generator, whose draws (the masks)
        are the same on every device; dropout draws on the device."""
        number = step_seed(seed, step, self.rank)
        torch.manual_seed(number)
        if self.device.type == "xla":
            self.xla.manual_seed(number % (1 << 32))
        return torch.Generator().manual_seed(number)


def micro_batches(args, machine):
    """Into how many parts each rank's share of --batch is split. Raises ValueError where it does not divide evenly."""
    share, rest = divmod(args.batch, machine.world)
    micro = min(args.micro_batch or share, share)
    if rest or share % micro:
        raise ValueError(f"--batch {args.batch} on {machine.world} devices does not split into micro-batches of {micro}: "
                         f"choose --micro-batch so that it does")
    return share // micro


def launch(function, args):
    """Calls function(args, machine); with --device xla on each chip of the host. Raises ValueError without torch_xla."""
    if args.device != "xla":
        function(args, Machine(args.device, args.bf16, args.compile))
        if dist.is_initialized():
            leave_together()
        return
    try:
        import torch_xla
    except ImportError:
        raise ValueError("--device xla needs torch-xla: pip install torch==2.9.0 'torch_xla[tpu]==2.9.0'") from None
    torch_xla.launch(_on_chip, (function, args))


def leave_together():
    """Ends the process group when all ranks are done, and with it its threads.

    A thread of gloo may be the last to hold a tensor, and asks for the interpreter to free it. If that is gone by then, the
    process is aborted ('terminate called without an active exception'). So no rank leaves before the others, and the models, whose
    DistributedDataParallel keeps the threads alive in reference cycles, are collected first."""
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


def _on_chip(index, function, args):
    try:
        command_line(lambda: function(args, Machine("xla", args.bf16, False)))
    except BaseException:
        Machine.barrier.abort()                                        # or the other replicas would wait for this one
        raise


def step_seed(seed, step, rank=0):
    """A 64-bit hash of (seed, step, rank)."""
    return int.from_bytes(hashlib.blake2s(f"{seed} {step} {rank}".encode(), digest_size=8).digest(), "little") >> 1
