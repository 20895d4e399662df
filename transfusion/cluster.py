"""Many GPUs on paper: what they are, how ranks share a run, and how long what they tell each other takes.

    replicas      [ shard 0   shard 1   ...   shard S-1 ]        FSDP: one replica, S = all ranks
    R = N / S     [ shard 0   shard 1   ...   shard S-1 ]        HSDP: several

Of P numbers, for each micro-batch (FSDP2, as ZeRO-3; Rajbhandari et al., 1910.02054, section 7), bytes that a rank
receives; backward takes twice as long as forward:

    forward       gather the weights in bf16            2 P (S - 1) / S
    backward      gather them again                     2 P (S - 1) / S
                  scatter the sums of gradients, fp32   4 P (S - 1) / S
                  sum these over replicas               4 P / S * 2 (R - 1) / R
    layers        gather keys and values of other positions, and scatter the sums of their gradients

Time is bytes over the rate of the narrowest link, without latency: ranks of one node have NVLink, of several the node's
network as far as their number in the node uses it, which is how rings run (NCCL's "bus bandwidth").
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    flops: float  # peak of products in bf16, without sparsity, FLOP/s
    memory: float  # bytes
    nvlink: float  # bytes/s in each direction
    network: float  # bytes/s of its own adapter in each direction
    float8: bool = True  # whether it multiplies it


# NVIDIA's data sheets. FLOP/s: "BFLOAT16 Tensor Core", half of what they say "with sparsity"; NVLink: half of the
# bandwidth of both directions; network: one adapter a GPU, as in the DGX of that GPU.
GPUS = {
    "a100": Gpu(312e12, 80e9, 300e9, 25e9, False),  # A100 80GB SXM (2022): 312 TF, 600 GB/s; DGX A100: 8 x 200 Gb/s
    "h100": Gpu(989.5e12, 80e9, 450e9, 50e9),  # H100 SXM (2023): 1,979 TF sparse, 900 GB/s; DGX H100: 8 x 400 Gb/s
    "h200": Gpu(989.5e12, 141e9, 450e9, 50e9),  # H200 SXM (2024): 1,979 TF sparse, 900 GB/s; DGX H200: 8 x 400 Gb/s
    "b200": Gpu(2250e12, 180e9, 900e9, 50e9),  # DGX B200 (2024), of 8: 36 PF sparse, 1,440 GB, 14.4 TB/s, 8 x 400 Gb/s
}


def peak_flops(device: torch.device) -> float:
    """FLOP/s of products in bf16 that the device is made for; 0 where GPUS does not know it."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device).lower()
    if "pcie" in name or "nvl" in name:  # slower ones of the same name
        return 0.0
    return next((gpu.flops for key, gpu in GPUS.items() if key in name), 0.0)


@dataclass(frozen=True)
class Cluster:
    """How many GPUs there are, a rank each, and how they share a run."""

    world: int = 1
    shards: int = 0  # ranks that weights and what belongs to them are parted among; 0 = all
    context: int = 1  # ranks that share the positions of a row
    per_node: int = 8

    def __post_init__(self):
        if min(self.world, self.context, self.per_node) < 1 or self.shards < 0:
            raise ValueError(f"{self}: at least 1 rank, 1 rank a row and 1 GPU a node; 0 shards are all")
        for name, n in (("shards", self.of_shard), ("context", self.context)):
            if self.world % n:
                raise ValueError(f"{self.world} ranks do not part into groups of {name} = {n}: choose a divisor")

    @property
    def of_shard(self) -> int:
        return self.shards or self.world

    @property
    def replicas(self) -> int:
        return self.world // self.of_shard

    @property
    def groups(self) -> int:
        """Of ranks that share rows; where context is 1 each rank is one."""
        return self.world // self.context

    def rate(self, gpu: Gpu, n: int, stride: int = 1) -> float:
        """Bytes/s that a rank of a group of n gets, each `stride` ranks from the next."""
        together = max(1, self.per_node // stride)  # of the group, in a node
        return gpu.nvlink if n <= together else min(gpu.nvlink, together * gpu.network)


@dataclass(frozen=True)
class Traffic:
    """What a rank receives in a step."""

    backward: bool  # or forward
    bytes: float
    seconds: float


def traffic(
    cluster: Cluster, gpu: Gpu, weights: float, trained: float, keys: float, micro_batches: int
) -> dict[str, Traffic]:
    """What a rank of several receives in a step, by collective.

    `weights` and `trained` count parameters, `keys` the numbers in all keys and values of its rows in a micro-batch.
    """
    S, R, C = cluster.of_shard, cluster.replicas, cluster.context
    found = {}

    def collective(name: str, backward: bool, n: float, group: int, stride: int = 1) -> None:
        if n:
            n *= micro_batches
            found[name] = Traffic(backward, n, n / cluster.rate(gpu, group, stride))

    collective("gather weights, forward", False, 2 * weights * (S - 1) / S, S)
    collective("gather weights, backward", True, 2 * weights * (S - 1) / S, S)
    collective("scatter gradients", True, 4 * trained * (S - 1) / S, S)
    collective("sum over replicas", True, 4 * trained / S * 2 * (R - 1) / R, R, S)
    collective("gather keys and values", False, 2 * keys * (C - 1) / C, C)
    collective("scatter their gradients", True, 2 * keys * (C - 1) / C, C)
    return found


def hidden_up_to(found: dict[str, Traffic], flops: float, gpu: Gpu) -> float:
    """The largest MFU at which a rank's `flops` of a step take as long as its traffic, forward and backward each."""
    seconds = [sum(t.seconds for t in found.values() if t.backward == backward) for backward in (False, True)]
    needed = max(3 * seconds[0], 1.5 * seconds[1])  # of a step a third is forward
    return flops / gpu.flops / needed if needed else float("inf")
