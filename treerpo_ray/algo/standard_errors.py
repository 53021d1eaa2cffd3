"""Standard errors: how far a value may be from what more samples would give.

The children of a step are independent draws from the same policy after the same prefix, and what
lies below one belongs to it alone. So the children's values, whatever trees they come from, are
independent and alike in distribution, and the spread between them holds all there is: that of
the children and that of everything sampled below. Leaves below one step are correlated; counting
them as independent, as a binomial over all leaves does, gives errors that are far too small.
"""

import numpy as np
from jaxtyping import Float64

ROUNDING = 1e-9
"""Values closer than this are equal: a mean of equal numbers may be off by a last digit."""


def standard_error_of_mean(
    values: Float64[np.ndarray, "*groups children"],
) -> Float64[np.ndarray, "*groups"]:
    """Standard error of the mean of each group of N values in [0, 1]: s / sqrt(N), s unbiased.

    Equal values show no spread, which does not mean that there is none. Of 0/1 values
    s^2 / N = m (1 - m) / (N - 1), and for equal values, of whatever size, this is taken with
    Jeffreys' estimate m = (sum + 1/2) / (N + 1) of their mean: the spread of children that are
    right or wrong altogether, the largest that values in [0, 1] of this mean can have. NaN where a
    value is NaN.
    """
    count = values.shape[-1]
    free = max(count - 1, 1)
    mean = values.mean(-1, keepdims=True)
    variance = ((values - mean) ** 2).sum(-1) / (free * count)
    jeffreys = (values.clip(0, 1).sum(-1) + 0.5) / (count + 1)
    is_equal = values.max(-1) - values.min(-1) < ROUNDING
    return np.sqrt(np.where(is_equal, jeffreys * (1 - jeffreys) / free, variance))
