"""Many processes, the ranks, train one model: who computes what, who holds what, and what they tell each other.

    torchrun --nproc-per-node 4 -m transfusion.cli train CONFIG

    rank       0          1          2          3
    rows       0 .. 7     8 .. 15    16 .. 23   24 .. 31     each computes rows of its own ...
    weights    0 .. 1/4   .. 1/2     .. 3/4     .. 1         ... and holds a part of each weight, of its gradient, its
                                                             moments and its average: FSDP. A layer is gathered where
                                                             it computes, in bfloat16; gradients are added in float32
               0 .. 1/2   .. 1       0 .. 1/2   .. 1         with parallel.shards = 2: each part is held twice, and
                                                             gathered from fewer ranks: HSDP

Losses are sums, which every rank divides by the counts of the whole step: so gradients just add up, however text and
images are spread over the ranks. The model knows nothing of all this, and one process alone passes through none of it.
PyTorch FSDP: Zhao et al. 2023, arXiv 2304.11277.
"""

import faulthandler
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from transfusion.context import Context
from transfusion.weights import weights

CPU = torch.device("cpu")
SLACK = 60  # seconds that a collective waits longer than a step may take: so that all ranks say where they stand
MET, FAILED = "met", "failed"  # keys of the store: how often ranks came to a meeting; what the first to fail said


@dataclass(frozen=True)
class ParallelConfig:
    """How many ranks there are is torchrun's to say."""

    shards: int = 0  # ranks that a weight is spread over; 0 = all
    context: int = 1  # ranks that share the positions of a row (context.py)
    timeout: float = 1800.0  # seconds that a step may take, a sheet and a checkpoint included; the start is not timed

    def __post_init__(self):
        if self.shards < 0 or self.context < 1 or self.timeout <= 0:
            raise ValueError(
                f"parallel.shards = {self.shards}, parallel.context = {self.context}, parallel.timeout = "
                f"{self.timeout}: shards are a number of ranks, 0 for all of them, context is at least 1, and the "
                "timeout is in seconds, above 0"
            )


@dataclass(frozen=True)
class Ranks:
    """This process among all that train the model. One alone has no mesh, and its sums are its own numbers."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    mesh: DeviceMesh | None = None  # [copies, shards]
    context: Context | None = None  # this rank among those that share its rows
    saving: dist.ProcessGroup | None = None  # on which checkpoints are agreed on, while training goes on
    store: dist.Store | None = None  # where the ranks found each other
    timeout: float = 0.0
    idle: list[float] = field(default_factory=lambda: [0.0])  # seconds that it has waited for the others' numbers
    clock: list[threading.Timer] = field(default_factory=list)  # of the step that it is in

    @property
    def leads(self) -> bool:
        """Whether this is the rank that prints, logs and draws."""
        return self.rank == 0

    @property
    def rows(self) -> tuple[int, int]:
        """(which part of the step's rows this rank computes, how many there are)."""
        share = self.context.size if self.context else 1
        return self.rank // share, self.size // share

    def total(self, *numbers: float) -> list[float]:
        """The sum over all ranks of each of the numbers, which need not be on the device."""
        return self.reduced(dist.ReduceOp.SUM, numbers)

    def most(self, *numbers: float) -> list[float]:
        """The largest of all ranks of each of the numbers."""
        return self.reduced(dist.ReduceOp.MAX, numbers)

    def reduced(self, how: dist.ReduceOp, numbers: tuple[float, ...]) -> list[float]:
        if self.mesh is None:
            return list(numbers)
        values, begun = torch.tensor(numbers, dtype=torch.float64), time.perf_counter()
        dist.all_reduce(values, how)
        self.idle[0] += time.perf_counter() - begun
        return values.tolist()

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks of a tensor on the device, which does not wait for it."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def wait(self):
        """Returns once all ranks are here."""
        self.total(0)

    def meet(self):
        """Returns once all ranks are here, however long that takes: at the start one may encode a data set for hours.

        OSError where another has failed, or rank 0 is gone, with which the store is. It is torchrun that ends the
        others where one is killed.
        """
        if self.store is None:
            return
        try:
            came, pause, told = self.store.add(MET, 1), 0.01, time.monotonic()
            expected = -(-came // self.size) * self.size  # nobody comes to the next meeting before all came to this
            while (here := self.store.add(MET, 0)) < expected:
                if self.store.check([FAILED]):
                    raise OSError(f"another rank has failed: {self.store.get(FAILED).decode()}")
                if time.monotonic() - told > self.timeout:
                    told, here = time.monotonic(), self.size + here - expected
                    words = f"rank {self.rank} waits for the start of others: {here} of {self.size} are here"
                    print(words, file=sys.stderr, flush=True)
                time.sleep(pause)
                pause = min(1.0, 2 * pause)
        except dist.DistError:
            raise OSError("the ranks' store is gone, and so is rank 0 or its torchrun: see what it said") from None

    @contextmanager
    def lead_first(self) -> Iterator[None]:
        """The block is run by the rank that leads, then by the others: what it leaves on disk they find there."""
        if not self.leads:
            self.meet()
        yield
        if self.leads:
            self.meet()

    def strain(self, waited: float, seconds: float) -> dict[str, float]:
        """What held up the last `seconds`, of which this rank `waited` for data, and what they took.

        data_wait    share of the time that the rank which waited most waited for data
        straggler    share of the time that the quickest process waited for the slowest, beyond what that one waited;
                     a GPU that computes slowly holds the others up in collectives of their own, which this is blind to
        memory       bytes at most so far, of the rank that took most: of the GPU, or of the process
        """
        idle, self.idle[0] = self.idle[0], 0.0
        waited, longest, shortest, memory = self.most(waited, idle, -idle, peak_memory(self.device))
        found = {"data_wait": waited / seconds, "memory": memory}
        return found if self.mesh is None else {**found, "straggler": (longest + shortest) / seconds}

    def alive(self):
        """To be called once a step: a process that has not for `timeout` seconds says where it stands, and ends."""
        if self.mesh is None:
            return
        self.rest()
        words = (
            f"rank {self.rank}: a step has not ended in parallel.timeout = {self.timeout:g} s, so all ranks leave. "
            "Below stands where it is; the one that hangs is elsewhere than the others, which wait for it. If a step "
            "may take so long, with its sheet and its checkpoint, raise parallel.timeout"
        )
        self.clock.append(threading.Timer(self.timeout, print, [words], {"file": sys.stderr, "flush": True}))
        self.clock[0].daemon = True
        self.clock[0].start()
        faulthandler.dump_traceback_later(self.timeout + 1, exit=True)  # which no lock of a hanging library holds up

    def rest(self):
        """From here on nothing is timed, until the next step."""
        faulthandler.cancel_dump_traceback_later()
        while self.clock:
            self.clock.pop().cancel()


ALONE = Ranks()


def peak_memory(device: torch.device) -> float:
    """Bytes that this process has held at most: of the GPU's memory, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def join(config: ParallelConfig, device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started, this one among them; without torchrun this process alone.

    ValueError where shards do not divide them.
    """
    if "RANK" not in os.environ:
        if config.shards or config.context > 1:
            raise ValueError(
                f"parallel.shards = {config.shards}, parallel.context = {config.context} are for several ranks, and "
                "this is one process: start it by torchrun, or leave them out"
            )
        yield Ranks(device=torch.device(device))
        return
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    on = torch.device(device)
    cuda = on.type == "cuda"
    if on.type not in ("cpu", "cuda") or on.index is not None:
        raise ValueError(f"device = {device!r}: each rank takes a GPU of its own, or all the CPU: say cuda, or cpu")
    if cuda:
        on = torch.device("cuda", local)
        torch.cuda.set_device(on)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    patience = timedelta(seconds=config.timeout + SLACK)
    how = {"timeout": patience, "rank": rank, "world_size": size, "device_id": on if cuda else None}
    store = meeting_place(patience)
    dist.init_process_group(backend, store=store, **how)
    try:
        mesh = mesh_of(config, size, on.type)
        saving = dist.new_group(backend="gloo", timeout=patience)
        ranks = Ranks(rank, size, on, mesh, context_of(config, on.type), saving, store, config.timeout)
        yield ranks
        ranks.wait()
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, when another has left: this one has yet to say why
        leave(rank, error, store)
    ranks.rest()
    dist.destroy_process_group()


def meeting_place(patience: timedelta) -> dist.Store:
    """Where the ranks find each other; after a restart not where they did before.

    torchrun may keep one store over restarts (pytorch/pytorch issue 135712), in which the addresses of those that died
    still stand. It counts restarts for each machine by itself: on several, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has it
    make a store anew, as the recipes in launch/ do.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=patience))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store


def leave(rank: int, error: BaseException, store: dist.Store):
    """Ends this process at once: to wait for others, which may be gone, could take for ever. They notice.

    It says why; or, where another failed first, that it ends as that one, or for it.
    """
    first = ""
    with suppress(dist.DistError):  # where the store is gone the others know
        first = store.compare_set(FAILED, "", f"rank {rank}: {error}").decode()
    other, _, reason = first.partition(": ")
    alone = other in ("", f"rank {rank}")
    told = isinstance(error, ValueError | OSError)  # which say all there is to say
    words = f" ends: {error}"
    if not alone and reason == str(error):
        words = f" ends as {other} does"
    elif not alone and not told:
        words = f" ends: another rank has failed: {first}; here a {type(error).__name__}"
    elif not told:
        traceback.print_exception(error)
    if sys.stdout:  # what the ranks that do not lead print goes nowhere
        sys.stdout.flush()
    print(f"rank {rank}{words}\n", end="", file=sys.stderr, flush=True)  # at once, or ranks' lines run together
    os._exit(1 if alone and not told else 2)


def mesh_of(config: ParallelConfig, size: int, device: str) -> DeviceMesh:
    """The ranks as [copies, shards]."""
    shards = config.shards or size
    if size % shards:
        raise ValueError(f"parallel.shards = {shards} does not divide the {size} ranks: set it to a divisor, or to 0")
    return init_device_mesh(device, (size // shards, shards), mesh_dim_names=("copy", "shard"))


def context_of(config: ParallelConfig, device: str) -> Context | None:
    """This rank among those that share its rows, which are neighbours; None where each has rows of its own."""
    size, n = dist.get_world_size(), config.context
    if size % n:
        raise ValueError(f"parallel.context = {n} does not divide the {size} ranks: set it to a divisor, or to 1")
    if n == 1:
        return None
    mesh = init_device_mesh(device, (size // n, n), mesh_dim_names=("row", "context"))["context"]
    return Context(mesh.get_local_rank(), n, mesh.get_group())


# ---- what each holds ----


def shard(model: nn.Module, ranks: Ranks, bf16: bool):
    """Parts the weights of a model on the meta device, layer by layer, and makes room for this rank's; no numbers yet.

    `bf16`: gathered layers compute in bfloat16. What is held and added up is float32.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = ranks.mesh if ranks.mesh["copy"].size() > 1 else ranks.mesh["shard"]
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # gradients add up: losses are divided by the whole step's counts
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    model.layers[0].register_forward_pre_hook(go_back, prepend=True)
    model.to_empty(device=ranks.device)


def go_back(layer: nn.Module, args: tuple) -> tuple:
    """The first layer's arguments, of which its streams ask for a gradient, if only to be thrown away.

    On the way back FSDP gathers and scatters the layers that a gradient goes through, as it comes by: where text is
    frozen, it would come by on the ranks whose rows have images, and not on the others, which they would wait for.
    """
    streams, *rest = args
    if torch.is_grad_enabled() and not any(x.requires_grad for x in streams):
        streams = [streams[0].detach().requires_grad_(), *streams[1:]]
    return streams, *rest


def scatter(whole: nn.Module | None, model: nn.Module):
    """Gives each rank its parts of the weights of `whole`, a plain model on the CPU of the rank that leads."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    given = weights(whole) if whole is not None else {}
    with torch.no_grad():
        for name, own in weights(model).items():  # one after the other: no device ever holds more than a whole one
            full = torch.empty(own.shape, dtype=own.dtype, device=own.device)
            if given:
                full.copy_(given[name])
            if isinstance(own, DTensor):
                own.copy_(distribute_tensor(full, own.device_mesh, own.placements))
            else:
                own.copy_(full)


def room(tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Raises torch's OutOfMemoryError where there is none to gather the largest of the tensors."""
    torch.empty(2, max(tensor.numel() for tensor in tensors.values()), device=ranks.device)  # in parts, and joined


@torch.no_grad()
def gather(tensors: dict[str, Tensor], whole: nn.Module | None) -> None:
    """Gives `whole`, a plain model on the rank that leads, these tensors by name; the others must call it too.

    One after the other, and in the types that `whole` has: no device ever holds more of them beside it than one.
    """
    from torch.distributed.tensor import DTensor

    room_of = weights(whole) if whole is not None else {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if room_of:
            room_of[name].copy_(full)
