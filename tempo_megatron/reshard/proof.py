"""Whether what a replica holds is what the trainer holds: digests of the same rectangles on both sides, compared.

The trainer's side goes by what its ranks hold, the replica's by what its loader takes; the plan between them, the
messages and the copies are what is proved. Of copies that hold the same, another one is asked than the one that sends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tempo_megatron.reshard.digests import Weights, added_up, digest, equal
from tempo_megatron.reshard.holdings import WeightSource
from tempo_megatron.reshard.plan import Plan
from tempo_megatron.reshard.regions import Mapped, Region


class Proof:
    """Of one update: digests of the tensors in ``checked``, all if None.

    Args:
        rank: this one.
    """

    def __init__(self, plan: Plan, rank: int, device: torch.device, checked: set[str] | None = None) -> None:
        self._plan, self._rank, self._device = plan, rank, device
        names = [name for name in plan.holdings.shapes if checked is None or name in checked]
        self.index = {name: number for number, name in enumerate(names)}
        self._weights = Weights(device)
        self._landed: list[tuple[int, Tensor]] = []
        self._read: dict[tuple[int, Region], Tensor] = {}
        self._wanted: dict[int, list[tuple[str, Mapped]]] = {}
        for target, tensor, mapped in plan.destination_of(rank).landings:
            if tensor in self.index:
                self._wanted.setdefault(target, []).append((tensor, mapped))

    def see(self, target: int, matrix: Tensor, is_lent: bool) -> None:
        """Take the digests of what one target of this rank holds; each once.

        Args:
            is_lent: it is the trainer's own memory, which is read for both sides at once.
        """
        for tensor, mapped in self._wanted.pop(target, ()):
            own = mapped.local(mapped.region).of(matrix)
            found = self._of_trainer(own, mapped.region) if is_lent else digest(own, mapped.region, self._weights)
            self._landed.append((self.index[tensor], found))

    def _of_trainer(self, values: Tensor, region: Region) -> Tensor:
        """Of memory that does not change during an update."""
        key = values.data_ptr(), region
        if key not in self._read:
            self._read[key] = digest(values, region, self._weights)
        return self._read[key]

    def differing(self, source: WeightSource, group: dist.ProcessGroup | None) -> list[str]:
        """Names of tensors that differ on this rank. Collective: the trainer's digests are summed over all ranks."""
        landed = added_up(self._landed, len(self.index), self._device)
        expected = self._expected(source)
        if group is not None:
            dist.all_reduce(expected, group=group)
        wrong = ~equal(expected[self._rank % self._plan.replica_size], landed)
        unseen = {tensor for wanted in self._wanted.values() for tensor, _ in wanted}
        return [name for name, n in self.index.items() if wrong[n] or name in unseen]

    def _expected(self, source: WeightSource) -> Tensor:
        """``[replica size, tensors]``: of what each rank of a replica takes, as far as this rank answers for it."""
        plan = self._plan
        found: list[tuple[int, Tensor]] = []
        takes = [_by_tensor(d.landings, self.index) for d in plan.destinations]
        kinds = [{t: d.targets[landing].dtype for landing, t, _ in d.landings} for d in plan.destinations]
        for part in plan.holdings.parts:
            holders = plan.holdings.groups[part.group]
            if holders[(part.turn + 1) % len(holders)] != self._rank:
                continue
            for tensor, held in part.held:
                if tensor not in self.index:
                    continue
                known: dict[tuple[Region, str], Tensor] = {}
                for within, wanted in enumerate(takes):
                    for mapped in wanted.get(tensor, ()):
                        region = held.region.meet(mapped.region)
                        if region is None:
                            continue
                        key = region, kinds[within][tensor]
                        if key not in known:
                            values = source.read(part.name, tensor, held.local(region), region)
                            cast = values.to(getattr(torch, key[1]))
                            own = not source.is_derived(tensor) and cast.data_ptr() == values.data_ptr()
                            known[key] = (
                                self._of_trainer(values, region) if own else digest(cast, region, self._weights)
                            )
                        found.append((within * len(self.index) + self.index[tensor], known[key]))
        return added_up(found, plan.replica_size * len(self.index), self._device).view(plan.replica_size, -1)


def _by_tensor(landings: Sequence[tuple[int, str, Mapped]], wanted: dict[str, int]) -> dict[str, list[Mapped]]:
    found: dict[str, list[Mapped]] = {}
    for _, tensor, mapped in landings:
        if tensor in wanted:
            found.setdefault(tensor, []).append(mapped)
    return found
