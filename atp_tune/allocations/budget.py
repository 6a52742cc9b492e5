"""The budget that an allocation shares out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Target S (share of zeros over all linears, in [0, 1]) and the number of prunable weights of each block."""

    target: float
    sizes: tuple[int, ...]

    @property
    def centre(self) -> float:
        """Mean block index, weighted by size: (L-1)/2 where all blocks are alike."""
        return sum(i * size for i, size in enumerate(self.sizes)) / sum(self.sizes)

    def mean(self, sparsities: tuple[float, ...]) -> float:
        """Weighted mean of one sparsity per block: the share of zeros that they make."""
        return sum(s * size for s, size in zip(sparsities, self.sizes, strict=True)) / sum(self.sizes)
