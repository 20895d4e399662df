"""Muon for matrices whose rows are spread over ranks: each is stepped whole, by the rank that owns it.

    gradients      shards -> owner      all to all
    update         torch's own, of a whole matrix: that of its parts would not be orthogonal
    weights        owner -> shards      all to all

The owner steps a matrix of zeros, which becomes the change of the weights; it keeps the moments.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Muon:
    """In place of torch.optim.Muon for DTensors: of the same name and `state_dict`, which checkpoints know it by."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], lr: float, weight_decay: float, **options):
        mesh = named[0][1].device_mesh
        self.group, self.weight_decay = mesh.get_group(mesh.ndim - 1), weight_decay
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.shards = [p for _, p in named]
        load = [0] * self.size
        self.owner = []
        for _, p in named:  # to whoever has least so far
            self.owner.append(load.index(min(load)))
            load[self.owner[-1]] += p.numel()
        self.owned = {
            i: (name, nn.Parameter(torch.zeros(p.shape, device=p.device)))
            for i, (name, p) in enumerate(named)
            if self.owner[i] == self.rank
        }
        self.inner = torch.optim.Muon([{"params": list(self.owned.values())}], lr, weight_decay, **options)
        self.inner.param_groups[0].setdefault("param_names", [])  # a rank may own nothing
        self.state_dict, self.load_state_dict = self.inner.state_dict, self.inner.load_state_dict

    @property
    def param_groups(self) -> list[dict]:
        return self.inner.param_groups

    @property
    def state(self) -> dict:
        return self.inner.state

    def rows(self, i: int) -> list[int]:
        """How many rows of matrix i each rank holds: `torch.chunk`'s parts, as a DTensor's are."""
        n = len(self.shards[i])
        part = -(-n // self.size)
        return [min(part, max(0, n - part * rank)) for rank in range(self.size)]

    @torch.no_grad()
    def step(self):
        moved = [i for i, p in enumerate(self.shards) if p.grad is not None]
        mine = [i for i in moved if i in self.owned]
        of_owner = [[i for i in moved if self.owner[i] == rank] for rank in range(self.size)]
        grads = self.exchange(
            [[self.shards[i].grad.to_local() for i in of_rank] for of_rank in of_owner],
            [[(self.rows(i)[rank], self.shards[i].shape[1]) for i in mine] for rank in range(self.size)],
        )
        for i, (_, matrix) in self.owned.items():
            matrix.zero_()
            matrix.grad = torch.cat([of_rank[mine.index(i)] for of_rank in grads]) if i in mine else None
        self.inner.step()
        changes = self.exchange(
            [[self.owned[i][1].split(self.rows(i))[rank] for i in mine] for rank in range(self.size)],
            [[tuple(self.shards[i].to_local().shape) for i in of_rank] for of_rank in of_owner],
        )
        kept = 1 - self.param_groups[0]["lr"] * self.weight_decay
        for of_rank, changes_of_rank in zip(of_owner, changes):
            for i, change in zip(of_rank, changes_of_rank):
                self.shards[i].to_local().mul_(kept).add_(change)

    def exchange(self, parts: list[list[Tensor]], expected: list[list[tuple[int, int]]]) -> list[list[Tensor]]:
        """From each rank the matrices, of these shapes, that it has for this one; `parts` are those for each rank."""
        device = self.shards[0].device
        sent = [torch.cat([torch.zeros(0, device=device), *(x.flatten() for x in of_rank)]) for of_rank in parts]
        sizes = [[rows * columns for rows, columns in of_rank] for of_rank in expected]
        came = torch.empty(sum(map(sum, sizes)), device=device)
        dist.all_to_all_single(came, torch.cat(sent), [sum(s) for s in sizes], [len(x) for x in sent], self.group)
        pieces = iter(came.split([n for of_rank in sizes for n in of_rank]))
        return [[next(pieces).view(shape) for shape in of_rank] for of_rank in expected]
