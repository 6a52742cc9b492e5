"""Allocations by formulas of a few numbers, or of none, in the order of the table.

The heads of their classes have symbols, sources, and differences from the authors' code.
"""

import math
from collections.abc import Sequence
from itertools import chain
from statistics import fmean

from atp_tune.allocations.budget import (
    Bounds,
    Budget,
    Formula,
    LinearSparsities,
    Points,
    Shape,
    Sparsities,
    by_block,
    level,
    proportional,
    spread,
)


class Uniform(Formula):
    """Uniform: every block has the target sparsity, s_i = S."""

    def sparsities(self, budget: Budget) -> tuple[float, ...]:
        """One sparsity per block, all equal to the target S."""
        return (budget.target,) * len(budget.sizes)


class ATP(Formula):
    """ATP: sparsities in arithmetic progression; early blocks, whose errors grow in later blocks, stay denser.

        s_i = S + β (i - c)        i = 0 … L-1

    S target, β common difference per block, L number of blocks, c mean index weighted by block size, so that the
    weighted mean of s is S; (L-1)/2 for blocks of equal size. All s_i are in [0, 1] if and only if

        -min(S / (L-1-c), (1-S) / c)  <=  β  <=  min(S / c, (1-S) / (L-1-c))

    which is |β| <= 2 min(S, 1-S) / (L-1) for blocks of equal size.

    Source: Huang et al., "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective",
    ICML 2025, section 3.3. The paper searches 0 < β on a grid of 0.002.
    """

    contains = ("uniform",)

    def bounds(self, budget: Budget) -> Bounds:
        """The admissible interval of `beta`; (0, 0) for a single block."""
        below, above = budget.centre, len(budget.sizes) - 1 - budget.centre
        if below <= 0 or above <= 0:
            return {"beta": (0.0, 0.0)}
        zeros, kept = budget.target, budget.highest - budget.target
        return {"beta": (-min(zeros / above, kept / below), min(zeros / below, kept / above))}

    def initial_points(self, budget: Budget) -> Points:
        """Half the upper bound, the middle of the increasing progressions."""
        return [{"beta": self.bounds(budget)["beta"][1] / 2}]

    def sparsities(self, budget: Budget, beta: float) -> tuple[float, ...]:
        """One sparsity per block; ValueError if one is outside [0, 1]."""
        budget.check(self.bounds(budget), beta=beta)
        return tuple(min(1.0, max(0.0, budget.target + beta * (i - budget.centre))) for i in range(len(budget.sizes)))


class Curve(Formula):
    """Curve: the progression of ATP with a curvature, denser ends, and other sparsities in attention than in the MLP.

        s_il = S + β i + γ u_i² + φ e_i + δ a_l + ν v_l - mean        i = 0 … L-1, l a linear of block i

    S target; β (`beta`) common difference per block, as in `atp`; γ (`gamma`) curvature: how much sparser both ends are
    than the middle, u_i = 2i/(L-1) - 1 from -1 to 1; φ (`ends`) how much sparser the first block is, e_0 = 1, and half
    of that for the last, e_(L-1) = 1/2; δ (`split`) how much sparser attention is than the MLP, a_l = 1 in attention; ν
    (`value`) how much sparser the value projection is, v_l = 1 for it. `mean` is the mean of the terms weighted by
    size, which keeps the target. If all parameters are 0 the allocation is uniform; if all but β are 0 it is exactly
    ATP.

    With w = min(S, 1-S), β has the interval of ATP, |γ| and |δ| are at most w/2, and φ and ν are in [-w, 0]. If the sum
    of the terms leaves [0, 1], all values are shifted by one number and clipped, such that the mean is S.

    Reason: the ATP paper names the progression itself as its limit (Huang et al., ICML 2025, limitations). On
    SmolLM2-135M at 60 % a denser first block and denser value projections gain more than β does; numbers in
    `docs/results.md`.
    """

    contains = ("uniform", "atp")

    def bounds(self, budget: Budget) -> Bounds:
        """The interval of each parameter; (0, 0) for a term that does not apply to the model."""
        wall = min(budget.target, 1 - budget.target)
        shapes = list(chain.from_iterable(budget.linears))
        ends = wall if len(budget.sizes) > 2 else 0.0
        splits = wall / 2 if len({shape.attention for shape in shapes}) == 2 else 0.0
        values = wall if any(shape.value for shape in shapes) else 0.0
        return atp.bounds(budget) | {
            "gamma": (-ends / 2, ends / 2),
            "ends": (-ends, 0.0),
            "split": (-splits, splits),
            "value": (-values, 0.0),
        }

    def initial_points(self, budget: Budget) -> Points:
        """The initial point of ATP; then half its `beta`, with half the bound of `ends` and the bound of `value`."""
        bounds = self.bounds(budget)
        middle = {**dict.fromkeys(bounds, 0.0), **atp.initial_points(budget)[0]}
        bent = {"beta": middle["beta"] / 2, "ends": bounds["ends"][0] / 2, "value": bounds["value"][0]}
        return [middle, {**middle, **bent}]

    def sparsities(
        self, budget: Budget, beta: float, gamma: float, ends: float, split: float, value: float
    ) -> Sparsities:
        """One sparsity per linear, or per block if `split` and `value` are 0; ValueError outside the bounds."""
        budget.check(self.bounds(budget), beta=beta, gamma=gamma, ends=ends, split=split, value=value)
        # Of each block.
        last = len(budget.sizes) - 1
        bend = [gamma * (2 * i / max(1, last) - 1) ** 2 for i in range(last + 1)]
        bend[0] += ends
        bend[-1] += ends / 2
        mean = budget.mean(tuple(bend))
        blocks = [budget.target + beta * (i - budget.centre) + (b - mean) for i, b in enumerate(bend)]
        if split == value == 0:
            return level(blocks, budget.sizes, budget.target)

        # Of each linear.
        def within(shape: Shape) -> float:
            return split * shape.attention + value * shape.value

        shapes = list(chain.from_iterable(budget.linears))
        mean = sum(within(shape) * shape.size for shape in shapes) / sum(budget.sizes)
        wanted = [s + within(shape) - mean for s, row in zip(blocks, budget.linears, strict=True) for shape in row]
        return by_block(level(wanted, [shape.size for shape in shapes], budget.target), budget.linears)


class OWL(Formula):
    """OWL: blocks with more outlier scores stay denser.

        r_i = share of the Wanda scores |W_jk| ‖X_k‖ of all linears of the block above M times their mean
        n_i = (r_i - min r) / (max r - min r)
        s_i = S - 2λ (n_i - n̄)                                                              i = 0 … L-1

    S target, M threshold, λ (`lam`) half the range of the sparsities, X the inputs in the dense model, n̄ the mean of n
    weighted by block size, which keeps the weighted mean at S. Since n_i - n̄ is in [-1, 1], all s_i are in [0, 1] for
    every λ <= min(S, 1-S) / 2. With λ = 0 or equal ratios the allocation is uniform.

    Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
    Sparsity", ICML 2024; github.com/luuyin/OWL. The defaults M = 5 and λ = 0.08 are those of their script; the
    intervals cover the values that they try. Differences from their code: n̄ is weighted (theirs is not, which is the
    same for blocks of equal size); λ has a bound (theirs sets negative sparsities to 0.01 and so misses the target);
    scores are float32 and their mean float64 (theirs are float16).
    """

    measures_inputs = True

    def bounds(self, budget: Budget) -> Bounds:
        """The authors' intervals of `M` and `lam`; `lam` is limited so that sparsities stay in [0, 1]."""
        highest = min(budget.target, 1 - budget.target) / 2
        return {"M": (3.0, 10.0), "lam": (min(0.02, highest), min(0.2, highest))}

    def initial_points(self, budget: Budget) -> Points:
        """The authors' defaults, with λ limited to its interval."""
        return [{"M": 5.0, "lam": min(0.08, self.bounds(budget)["lam"][1])}]

    def sparsities(self, budget: Budget, M: float = 5.0, lam: float = 0.08) -> tuple[float, ...]:
        """One sparsity per block; ValueError for M < 0 or λ outside [0, min(S, 1-S) / 2]."""
        budget.check({"M": (0.0, math.inf), "lam": (0.0, min(budget.target, 1 - budget.target) / 2)}, M=M, lam=lam)
        levels = spread(budget.require_dense_metrics("owl").outlier_ratios(M))
        middle = budget.mean(levels)
        return tuple(min(1.0, max(0.0, budget.target - 2 * lam * (level - middle))) for level in levels)


class AlphaPruning(Formula):
    """AlphaPruning: blocks whose weights have a heavier-tailed spectrum, a sign of better training, stay denser.

        α_i = mean exponent of the linears of block i                            low: heavy tail
        w_i = 1 - ε + 2ε (α_i - min α) / (max α - min α)                         in [1-ε, 1+ε]
        s_i = min(1, c w_i)                                                      i = 0 … L-1

    c makes the mean of s weighted by block size equal to the target S. The exponent of a linear W is that of a power
    law fitted by Hill's estimator to the eigenvalues of WᵀW above some xmin (`blocks/dense_metrics.py`). With ε = 0 or
    equal exponents the allocation is uniform.

    Source: Lu et al., "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of
    Large Language Models", NeurIPS 2024, section 3; github.com/haiquanlu/AlphaPruning. This is the default variant of
    their program: `alpha_peak` (xmin near the peak of the spectrum), `block_wise`, ε = 0.3, also the default here;
    their scripts set ε from 0.2 to 0.5 by model and pruner. Differences from their code: a sparsity above 1 is set to 1
    and the others are scaled up (theirs keeps it and misses the target); means are weighted by the sizes of blocks;
    spectra are float64.
    """

    usual = 0.3  # ε, the authors' default

    def bounds(self, budget: Budget) -> Bounds:
        """The interval of `epsilon` covers the values that the authors use."""
        return {"epsilon": (0.2, 0.5)}

    def initial_points(self, budget: Budget) -> Points:
        """The authors' default."""
        return [{"epsilon": self.usual}]

    def sparsities(self, budget: Budget, epsilon: float = 0.3) -> Sparsities:
        """One sparsity per block; ValueError for an ε outside [0, 1]."""
        budget.check({"epsilon": (0.0, 1.0)}, epsilon=epsilon)
        exponents = budget.require_dense_metrics("alphapruning").tail_exponents()
        return _by_exponents(budget, epsilon, [fmean(block) for block in exponents], budget.sizes)


class AlphaPruningLinear(AlphaPruning):
    """AlphaPruning as its authors' code for image classifiers has it: a sparsity for each linear, not for each block.

        w_l = 1 - ε + 2ε (α_l - min α) / (max α - min α)                         in [1-ε, 1+ε], l a linear of any block
        s_l = min(1, c w_l)

    c makes the mean of s weighted by size equal to the target S. α_l is Hill's estimator over the upper half of the
    eigenvalues of WᵀW (`middle_exponent` in `blocks/dense_metrics.py`), α_l low: a heavy tail, a denser linear. With ε
    = 0 or equal exponents the allocation is uniform.

    Source: Lu et al., "AlphaPruning", NeurIPS 2024; github.com/haiquanlu/AlphaPruning, `image_classifiers`: metric
    `alpha_mid`, ε = 0.2, also the default here. Differences from their code: a sparsity above 1 is set to 1 and the
    others are scaled up (theirs keeps it and misses the target); spectra are float64 and without numerical zeros;
    query, key and value are three matrices in transformers, one in timm.
    """

    usual = 0.2

    def sparsities(self, budget: Budget, epsilon: float = 0.2) -> Sparsities:
        """One sparsity per linear, or per block if all exponents are equal; ValueError for an ε outside [0, 1]."""
        budget.check({"epsilon": (0.0, 1.0)}, epsilon=epsilon)
        exponents = [*chain(*budget.require_dense_metrics("alphapruning-linear").tail_exponents("middle"))]
        sparsities = _by_exponents(budget, epsilon, exponents, [shape.size for shape in chain(*budget.linears)])
        return sparsities if min(exponents) == max(exponents) else by_block(sparsities, budget.linears)


def _by_exponents(
    budget: Budget, epsilon: float, exponents: Sequence[float], sizes: Sequence[int]
) -> tuple[float, ...]:
    """Sparsities of blocks, or of linears, of these sizes; of blocks if all exponents are equal."""
    if min(exponents) == max(exponents):
        return (budget.target,) * len(budget.sizes)
    return proportional([1 - epsilon + 2 * epsilon * level for level in spread(exponents)], sizes, budget.target)


class ErdosRenyi(Formula):
    """Erdős–Rényi: linears with few weights relative to their width stay denser, as in a random sparse graph.

        density_k = min(1, c (rows_k + columns_k) / (rows_k columns_k))          over all linears k of the model
        s_k = 1 - density_k

    c makes the share of zeros over all weights equal to the target S: linears whose density would exceed 1 stay dense,
    and the others become sparser instead. There are no parameters, and nothing is measured.

    Source: Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity Inspired
    by Network Science", Nature Communications 2018, equation 1; Evci et al., "Rigging the Lottery", ICML 2020, section
    3, whose ERK (`erk`) adds the dimensions of convolution kernels. A linear has none, so both names mean this class.
    As in their code, linears above the bound are set dense and c is computed again; here all of them at once, there the
    largest first, with the same result.
    """

    def sparsities(self, budget: Budget) -> LinearSparsities:
        """One sparsity per linear of each block."""
        shapes = list(chain.from_iterable(budget.linears))
        weights = [(shape.rows + shape.columns) / shape.size for shape in shapes]
        densities = proportional(weights, [shape.size for shape in shapes], 1 - budget.target)
        return by_block([1 - density for density in densities], budget.linears)


class Global(Formula):
    """Global: one threshold for the scores of the whole model gives the sparsity of each linear.

        s_k = share of linear k's scores among the ⌊S N⌋ lowest of the model     N weights over all linears

    The scores are |W_ij| for `magnitude`, and |W_ij| ‖X_j‖ with inputs of the dense model for the other pruners. Among
    equal scores the first in the order of the model count as lower. There are no parameters. The share of zeros is
    ⌊S N⌋ / N, which misses the target by less than one weight.

    Source: the usual baseline of global pruning, as in Lee et al., "SNIP: Single-shot Network Pruning based on
    Connection Sensitivity", ICLR 2019, section 4, with other scores. Only the sparsities of linears are global: the
    pruner chooses the weights. So `magnitude` prunes exactly the lowest weights of the model, and Wanda prunes equally
    many in each row of a linear.
    """

    measures_inputs = True

    def sparsities(self, budget: Budget) -> LinearSparsities:
        """One sparsity per linear of each block."""
        return budget.require_dense_metrics("global").global_sparsities(budget.target, budget.score)


uniform, atp, curve, owl = Uniform(), ATP(), Curve(), OWL()
alphapruning, alphapruning_linear, er, globally = AlphaPruning(), AlphaPruningLinear(), ErdosRenyi(), Global()
