"""A plan: everything that a trial decides, and that `apply` needs to do it again."""

from dataclasses import dataclass, field, replace

from atp_tune.allocations import ALLOCATIONS, Budget, LinearSparsities
from atp_tune.allocations.budget import SYMBOLS


@dataclass(frozen=True)
class Plan:
    """A pruner and one sparsity per block (share of zeros, first block first), with how they came about.

    `linear_sparsities` holds one per linear of each block where they differ within blocks.
    """

    pruner: str
    allocation: str
    sparsities: tuple[float, ...]
    parameters: dict[str, float] = field(default_factory=dict)
    linear_sparsities: LinearSparsities | None = None

    @property
    def is_uniform(self) -> bool:
        """Whether every linear gets the same sparsity."""
        return self.linear_sparsities is None and len(set(self.sparsities)) == 1

    def of(self, index: int, linears: int) -> tuple[float, ...]:
        """The sparsity of each of the linears of block `index`."""
        return self.linear_sparsities[index] if self.linear_sparsities else (self.sparsities[index],) * linears

    def __str__(self) -> str:
        if self.is_uniform:
            return f"{self.pruner} uniform"
        return f"{self.pruner} {self.allocation} {shown(self.parameters)}".rstrip()


def shown(parameters: dict[str, float]) -> str:
    """Parameters as people read them: β=0.00569 γ=-0.12."""
    formats = {"beta": ".5f"}
    return " ".join(
        f"{SYMBOLS.get(name, name)}={value:{formats.get(name, '.3g')}}" for name, value in parameters.items()
    )


def make_plan(pruner: str, allocation: str, budget: Budget, parameters: dict[str, float]) -> Plan:
    """The plan of one allocation at given parameters; ValueError where they are not admissible."""
    budget = replace(budget, score="magnitude" if pruner == "magnitude" else "wanda")
    shared = ALLOCATIONS[allocation].sparsities(budget, **parameters)
    blocks = tuple(s for s in shared if not isinstance(s, tuple))
    if blocks:
        return Plan(pruner, allocation, blocks, parameters)
    linears = tuple(s for s in shared if isinstance(s, tuple))
    return Plan(pruner, allocation, budget.block_means(linears), parameters, linears)
