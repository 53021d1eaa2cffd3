"""Calibration: what a value estimated from some answers says of the next one.

The siblings of a step are drawn from the same place, so the mean of all others is an estimate of
its value that its own value has no part in: a prediction, and what came of it. Predictions are
binned by tenths. The expected calibration error (Naeini et al., AAAI 2015) is the mean over
predictions of how far the mean outcome in their bin is from the mean prediction: 0 where values
hold, and the more the fewer answers a value is the mean of.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from treerpo_ray.algo.groups import StepGroups

NUM_BINS = 10


def calibration_bins(groups: Sequence[StepGroups]) -> Float64[np.ndarray, "bins 3"]:
    """Number of predictions, their sum and that of the outcomes, by bin; the parts of a batch add.

    Groups with an errored leaf and only children predict nothing. Rewards are from 0 to 1.
    """
    places: list[np.ndarray] = []
    predicted: list[np.ndarray] = []
    came: list[np.ndarray] = []
    for group in groups:
        values = group.values[~group.is_errored]
        num_children = values.shape[-1]
        if num_children == 1:
            continue
        others = (values.sum(-1, keepdims=True) - values) / (num_children - 1)
        # What rounding makes of a third must not fall into another bin than a third.
        place = (others * NUM_BINS + 1e-9).astype(np.int64).clip(0, NUM_BINS - 1)
        places.append(place.ravel())
        predicted.append(others.ravel())
        came.append(values.ravel())
    if not places:
        return np.zeros((NUM_BINS, 3))
    place = np.concatenate(places)
    sums = (np.bincount(place, np.concatenate(own), NUM_BINS) for own in (predicted, came))
    return np.stack([np.bincount(place, minlength=NUM_BINS), *sums], axis=1)


def calibration_error(bins: Float64[np.ndarray, "bins 3"]) -> float:
    """Expected calibration error of what is in the bins; NaN if nothing is."""
    count, predicted, came = bins.T
    total = count.sum()
    return float(np.abs(predicted - came).sum() / total) if total else float("nan")
