"""The loss weighting rules, each in the forms it was published in (docs/math.md C, D).

A weight depends on what the model predicts: one objective has as many weights as there are targets. A rule therefore
lists its published forms, and its *invariant* J = w D^2, which is the same for all targets of one objective
(docs/math.md B2); a target without a published form has w = J / D^2, and that form is marked derived.

With a = alpha^2 and s = sigma^2, forms are written without a quotient that could be 0 / 0: min(SNR, g) / SNR is
g s / max(g s, a).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from erd_fast.diffusion.target import target_coefficients


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a form is a function of; values are NumPy arrays or tensors, alike in kind and shape."""

    alpha: Any
    sigma: Any
    d_alpha: Any
    d_sigma: Any
    gamma: Any
    k: float
    maximum: Callable[[Any, Any], Any]

    @property
    def a(self) -> Any:
        return self.alpha**2

    @property
    def s(self) -> Any:
        return self.sigma**2

    @property
    def drift(self) -> Any:
        """sigma d_alpha - alpha d_sigma = alpha sigma lambda' / 2."""
        return self.sigma * self.d_alpha - self.alpha * self.d_sigma


Form = Callable[[Terms], Any]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One weighting: its published forms by target, and how the others follow."""

    published: dict[str, Form]
    invariant: Form | None = None
    """J = w D^2; None where every target has a published form."""
    gamma: float | None = None
    """Default of the rule's parameter gamma; None if it has none."""
    uses_k: bool = False
    needs_derivatives: bool = False
    source: str = ""


def _one(x: Terms) -> Any:
    return 1.0 + 0.0 * (x.alpha + x.sigma)


def _erd(target: str) -> Form:
    def score(x: Terms) -> Any:
        c_x, c_eps = target_coefficients(target, x.alpha, x.sigma, d_alpha=x.d_alpha, d_sigma=x.d_sigma)
        return ((c_x * x.alpha) ** 2 + (c_eps * x.sigma) ** 2) ** 0.5

    return score


def _cosmap(x: Terms) -> Any:
    return 2.0 / (math.pi * (1.0 - 2.0 * x.sigma + 2.0 * x.s))


_ALL = ("x0", "eps", "v", "u", "flow")

RULES: dict[str, Rule] = {
    "constant": Rule(dict.fromkeys(_ALL, _one)),
    "erd": Rule({target: _erd(target) for target in _ALL}, source="arXiv 2605.10790, Eq. 11"),
    "min_snr": Rule(  # min(SNR, g) on x0
        {
            "eps": lambda x: x.gamma * x.s / x.maximum(x.gamma * x.s, x.a),
            "x0": lambda x: x.gamma * x.a / x.maximum(x.gamma * x.s, x.a),
            "v": lambda x: x.gamma * x.a * x.s / (x.maximum(x.gamma * x.s, x.a) * (x.a + x.s)),
        },
        lambda x: x.gamma * x.a * x.s / x.maximum(x.gamma * x.s, x.a),
        gamma=5.0,
        source="arXiv 2303.09556",
    ),
    "max_snr": Rule(  # max(SNR, g) on x0
        {
            "eps": lambda x: x.maximum(x.a, x.gamma * x.s) / x.a,
            "x0": lambda x: x.maximum(x.a, x.gamma * x.s) / x.s,
        },
        lambda x: x.maximum(x.a, x.gamma * x.s),
        gamma=5.0,
        source="arXiv 2303.09556, code",
    ),
    "soft_min_snr": Rule(  # SNR g / (SNR + g) on x0
        {
            "eps": lambda x: x.gamma * x.s / (x.gamma * x.s + x.a),
            "x0": lambda x: x.gamma * x.a / (x.gamma * x.s + x.a),
            "v": lambda x: x.gamma * x.a * x.s / ((x.gamma * x.s + x.a) * (x.a + x.s)),
        },
        lambda x: x.gamma * x.a * x.s / (x.gamma * x.s + x.a),
        gamma=5.0,
        source="arXiv 2401.11605",
    ),
    "p2": Rule(  # 1 / (k + SNR)^g on eps
        {
            "eps": lambda x: (x.s / (x.k * x.s + x.a)) ** x.gamma,
            "v": lambda x: (x.s / (x.k * x.s + x.a)) ** x.gamma * x.a / (x.a + x.s),
        },
        lambda x: (x.s / (x.k * x.s + x.a)) ** x.gamma * x.a,
        gamma=1.0,
        uses_k=True,
        source="arXiv 2204.00227",
    ),
    "debias": Rule(  # 1 / sqrt(SNR) on eps; the published v form is another objective
        {"eps": lambda x: x.sigma / x.alpha, "v": lambda x: x.s / (x.a + x.s)},
        lambda x: x.alpha * x.sigma,
        source="arXiv 2310.08442",
    ),
    "min_debias": Rule(  # min(1 / sqrt(SNR), 1) on eps
        {"eps": lambda x: x.sigma / x.maximum(x.sigma, x.alpha)},
        lambda x: x.a * x.sigma / x.maximum(x.sigma, x.alpha),
        source="arXiv 2605.10790, code",
    ),
    "max_debias": Rule(  # max(1 / sqrt(SNR), 1) on eps
        {"eps": lambda x: x.maximum(x.sigma, x.alpha) / x.alpha},
        lambda x: x.alpha * x.maximum(x.sigma, x.alpha),
        source="arXiv 2605.10790, code",
    ),
    "snr": Rule({"x0": lambda x: x.a / x.s}, lambda x: x.a, source="arXiv 2202.00512"),
    "inv_snr": Rule({"x0": lambda x: x.s / x.a}, lambda x: x.s**2 / x.a, source="arXiv 2303.09556, code"),
    "trunc_snr": Rule(  # max(SNR, 1) on x0
        {"x0": lambda x: x.maximum(x.a, x.s) / x.s},
        lambda x: x.maximum(x.a, x.s),
        source="arXiv 2202.00512",
    ),
    "sigma_sqrt": Rule(  # applied to x0 and to velocity predictions alike, so two objectives; x0's is carried on
        dict.fromkeys(("x0", "u", "flow"), lambda x: 1.0 / x.s),
        lambda x: 0.0 * x.s + 1.0,
        source="arXiv 2403.03206, code of diffusers",
    ),
    "cosmap": Rule(
        dict.fromkeys(("x0", "u", "flow"), _cosmap),
        lambda x: x.s * _cosmap(x),
        source="arXiv 2403.03206, code of diffusers",
    ),
    "sit_velocity": Rule(  # a constant weight on target flow
        {"eps": lambda x: (x.drift / x.alpha) ** 2},
        lambda x: x.drift**2,
        needs_derivatives=True,
        source="arXiv 2401.08740, code",
    ),
    "sit_likelihood": Rule(  # |lambda'| / 2 on eps
        {"eps": lambda x: abs(x.drift) / (x.alpha * x.sigma)},
        lambda x: abs(x.drift) * x.alpha / x.sigma,
        needs_derivatives=True,
        source="arXiv 2401.08740, code",
    ),
}
