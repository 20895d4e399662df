"""Traffic on paper against collectives played through, rank by rank."""

import pytest
import torch

from transfusion.cluster import GPUS, Cluster, Gpu, hidden_up_to, peak_flops, traffic

GPU = Gpu(flops=1e15, memory=80e9, nvlink=400e9, network=40e9)


def ring(n: int, size: float) -> float:
    """Bytes that each of n ranks receives until all have every part of `size` bytes, handed on around a ring."""
    has, received = [{r} for r in range(n)], [0.0] * n
    for hop in range(n - 1):
        for r in range(n):
            has[r].add((r - 1 - hop) % n)
            received[r] += size / n
    assert all(len(parts) == n for parts in has) and len(set(received)) == 1
    return pytest.approx(received[0])


def test_what_a_rank_receives_is_what_a_ring_hands_it():
    found = traffic(Cluster(8), GPU, 1000, 600, 0, micro_batches=3)
    assert {name: t.bytes / 3 for name, t in found.items()} == {
        "gather weights, forward": ring(8, 2 * 1000),
        "gather weights, backward": ring(8, 2 * 1000),
        "scatter gradients": ring(8, 4 * 600),
    }


def test_replicas_add_up_the_gradients_of_a_shard():
    found = traffic(Cluster(64, shards=16), GPU, 1000, 1000, 0, 1)
    assert found["gather weights, forward"].bytes == ring(16, 2000)
    of_replicas = found["sum over replicas"]
    assert of_replicas.bytes / 2 == ring(4, 4000 / 16), "sums are scattered, then gathered"
    assert of_replicas.seconds == of_replicas.bytes / 40e9, "each through its own adapter"


def test_ranks_that_share_rows_gather_keys_and_scatter_their_gradients():
    found = traffic(Cluster(8, context=4), GPU, 1000, 1000, 500, 1)
    for name, backward in (("gather keys and values", False), ("scatter their gradients", True)):
        assert found[name].bytes == ring(4, 2 * 500) and found[name].backward == backward


def test_a_node_has_nvlink_and_several_the_adapters_that_a_group_has_in_each():
    cluster = Cluster(64)
    assert cluster.rate(GPU, 8) == 400e9
    assert cluster.rate(GPU, 16) == 8 * 40e9
    assert cluster.rate(GPU, 4, stride=8) == 40e9
    assert cluster.rate(GPU, 4, stride=2) == 400e9
    assert cluster.rate(GPU, 8, stride=2) == 4 * 40e9
    assert Cluster(64, per_node=16).rate(GPU, 64) == 400e9, "never more than NVLink"


def test_at_the_mfu_up_to_which_traffic_hides_one_of_the_two_ways_takes_just_as_long():
    found, flops = traffic(Cluster(64), GPU, 1e9, 1e9, 0, 1), 1e13
    step = flops / GPU.flops / hidden_up_to(found, flops, GPU)
    forward, backward = (sum(t.seconds for t in found.values() if t.backward == b) for b in (False, True))
    assert forward < step / 3 and backward == pytest.approx(step * 2 / 3)
    assert hidden_up_to({}, flops, GPU) == float("inf")


@pytest.mark.parametrize(
    "fields", [{"shards": 3}, {"context": 5}, {"world": 0}, {"per_node": 0}, {"shards": -1}], ids=str
)
def test_a_cluster_that_cannot_be_is_refused(fields):
    with pytest.raises(ValueError, match=r"at least 1 rank|choose a divisor"):
        Cluster(**({"world": 8} | fields))


def test_the_table_of_gpus_has_bytes_and_flops_a_second():
    for gpu in GPUS.values():
        assert 1e14 < gpu.flops < 1e16 and 1e10 < gpu.memory < 1e12 and gpu.network < gpu.nvlink < 1e12


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA H100 80GB HBM3", 989.5e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("T4", 0), ("NVIDIA H100 PCIe", 0)],
)
def test_a_gpu_is_known_by_its_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak and peak_flops(torch.device("cpu")) == 0
