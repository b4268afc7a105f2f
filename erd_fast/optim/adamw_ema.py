"""AdamW with gradient clipping and an exponential moving average of the parameters, as one optimizer."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from erd_fast.errors import ConfigError


class AdamWEMA(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) that clips by the global norm and averages the parameters.

    After each step ``ema <- ema + (1 - d) (parameter - ema)``, beginning at the initial parameters. The decay warms up:
    ``d = min(ema_decay, (1 + n) / (10 + n))`` for step n = 0, 1, ..., so that short runs do not average their start in.

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay: AdamW's.
        ema_decay: decay of the average, 0 <= ema_decay < 1.
        grad_clip: largest global gradient norm; 0 does not clip.

    Attributes:
        grad_norm: () float32 tensor, global norm of the last step's gradients before clipping.

    Raises:
        ConfigError: ema_decay or grad_clip outside its range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        ema_decay: float = 0.9999,
        grad_clip: float = 0.0,
    ):
        if not 0.0 <= ema_decay < 1.0:
            raise ConfigError(f"AdamWEMA: ema_decay: given {ema_decay}, allowed 0 <= ema_decay < 1")
        if grad_clip < 0.0:
            raise ConfigError(f"AdamWEMA: grad_clip: given {grad_clip}, allowed 0 (off) or more")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.grad_norm = torch.zeros(())
        # What a group may have of its own, also one that joins later by add_param_group.
        self.defaults |= {"ema_decay": ema_decay, "grad_clip": grad_clip, "ema_steps": 0}
        for group in self.param_groups:
            for name in ("ema_decay", "grad_clip", "ema_steps"):
                group.setdefault(name, self.defaults[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Clip, AdamW, average. Parameters without a gradient are left alone, and so is their average."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        self._clip(groups)
        # torch.optim fills an empty state at its first step, so the average joins it only afterwards.
        before = {p: p.clone() for _, params in groups for p in params if p not in self.state}
        super().step()
        for group, params in groups:
            for parameter in params:
                if parameter in before:
                    self.state[parameter]["ema"] = before[parameter]
            steps = group["ema_steps"]
            decay = min(group["ema_decay"], (1 + steps) / (10 + steps))
            if params:
                torch._foreach_lerp_([self.state[p]["ema"] for p in params], params, 1.0 - decay)
            group["ema_steps"] = steps + 1
        return loss

    @contextlib.contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Within the block the parameters hold their averages. Contents are exchanged, never addresses."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, state in self.state.items():
            kept = parameter.clone()
            parameter.copy_(state["ema"])
            state["ema"].copy_(kept)

    def _clip(self, groups: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        gradients = [p.grad for _, params in groups for p in params if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        for group, params in groups:
            if group["grad_clip"] > 0:
                torch.nn.utils.clip_grads_with_norm_(params, group["grad_clip"], self.grad_norm)
