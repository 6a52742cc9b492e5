"""A plan: everything that a trial decides, and that `apply` needs to do it again."""

from dataclasses import dataclass, field

from atp_tune.allocations import ALLOCATIONS, Budget


@dataclass(frozen=True)
class Plan:
    """A pruner and one sparsity per block (share of zeros, first block first), with how they came about."""

    pruner: str
    allocation: str
    sparsities: tuple[float, ...]
    parameters: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        if len(set(self.sparsities)) == 1:
            return f"{self.pruner} uniform"
        values = " ".join(f"{'β' if name == 'beta' else name}={value:.5f}" for name, value in self.parameters.items())
        return f"{self.pruner} {self.allocation} {values}".rstrip()


def make_plan(pruner: str, allocation: str, budget: Budget, parameters: dict[str, float]) -> Plan:
    """The plan of one allocation at given parameters; ValueError where they are not admissible."""
    return Plan(pruner, allocation, ALLOCATIONS[allocation].sparsities(budget, **parameters), parameters)
