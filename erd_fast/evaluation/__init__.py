"""How good samples are."""

from erd_fast.evaluation.features import Judge, get_judge
from erd_fast.evaluation.metrics import frechet_distance, mean_and_covariance

__all__ = ["Judge", "frechet_distance", "get_judge", "mean_and_covariance"]
