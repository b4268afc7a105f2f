"""AdamW with gradient clipping, loss scaling and averages of the parameters, as one optimizer of two ops."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from erd_fast.errors import ConfigError
from erd_fast.ops.adamw_ema import (
    COLUMNS,
    GROWTH_INTERVAL,
    INITIAL_LOSS_SCALE,
    Factor,
    Setting,
    StepState,
    adamw_ema,
)
from erd_fast.ops.checks import check_dense
from erd_fast.ops.core.autotune import capturing
from erd_fast.ops.grad_norm import grad_norm
from erd_fast.ops.tensor_table import MOST_EMAS, Slot, Slots, TensorTable, check_floating, check_plain

_OWN = "erd_fast"  # the key of what a state_dict has besides torch's
_PICKLED = ("counts", "_scalars", "_factors", "_settings", "_settings_given", "_decays", "_masters", "_growth_interval")


class AdamWEMA(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) that clips by the global norm and averages the parameters.

    A step is :func:`erd_fast.ops.adamw_ema.adamw_ema`, which gives the formulas: two passes over memory, of which the
    first reads the gradients for their norm. All that it counts is on the device, nothing is read back, and a captured
    CUDA graph of a step goes on by itself. A step whose gradients are not finite changes no parameter and no state; it
    is counted in ``counts``.

    Averages begin at the initial parameters. Their decay warms up, ``min(ema_decay, n / (n + 9))`` at step n = 1, 2,
    ..., so that short runs do not average their start in.

    A parameter in bfloat16 or float16 has a float32 master in its state, ``state[p]["master"]``, which the step
    changes; the parameter is a copy of it. A gradient in ``p.main_grad``, of any of the dtypes, goes before ``p.grad``:
    there one may sum micro-batches of a low-precision parameter in float32, and begins the next sum oneself.

    Learning rates follow ``group["lr"]`` as torch's schedulers set it, times the warm-up and half cosine of ``warmup``
    and ``cosine_steps``, which the device works out.

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay: AdamW's.
        ema_decay: decay of the average, 0 <= ema_decay < 1, or up to four of them: averages ``state[p]["ema"]``,
            ``["ema_1"]``, ...
        grad_clip: largest global gradient norm; 0 does not clip.
        warmup: steps in which the rate grows linearly.
        cosine_steps: step at which half a cosine after the warm-up ends at 0; 0 keeps the rate.
        masters: float32 values of low-precision parameters, where they are known better than as the parameters.
        scale_loss: scale for float16: begins at 65536, doubled after 2000 steps without overflow, halved at each.

    Attributes:
        counts: (3,) int64 tensor: steps taken, steps since the loss scale changed, steps skipped.

    Raises:
        ConfigError: a setting outside its range.
        ValueError: parameters on several devices, in integers, or with holes in their memory.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        ema_decay: float | Sequence[float] = 0.9999,
        grad_clip: float = 0.0,
        warmup: int = 0,
        cosine_steps: int = 0,
        masters: Mapping[nn.Parameter, Tensor] | None = None,
        scale_loss: bool = False,
    ):
        self._decays = len(_decays(ema_decay))
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "ema_decay": ema_decay}
        defaults |= {"grad_clip": grad_clip, "warmup": warmup, "cosine_steps": cosine_steps, "start": 0}
        super().__init__(params, defaults)
        self._masters = dict(masters or {})
        self._growth_interval = GROWTH_INTERVAL if scale_loss else 0
        parameters = self._parameters()
        device = parameters[0].device if parameters else torch.device("cpu")
        double = any(p.dtype == torch.float64 for p in parameters)
        dtype = torch.float64 if double else torch.float32
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        scale = INITIAL_LOSS_SCALE if scale_loss else 1.0
        self._scalars = torch.tensor([scale, 0.0], dtype=dtype, device=device)
        self._table = TensorTable(device)
        self._key: list[tuple[Any, ...]] = []
        self._kept: Slots | None = None
        self._settings_given: list[list[float]] = []
        self._settings = torch.zeros((0, COLUMNS), dtype=torch.float64, device=device)
        self._factors = torch.zeros((0, COLUMNS), dtype=dtype, device=device)

    @property
    def loss_scale(self) -> Tensor:
        """() tensor on the device: what the loss of the next step is to be multiplied by; 1 without ``scale_loss``."""
        return self._scalars[0]

    @property
    def grad_norm(self) -> Tensor:
        """() tensor on the device: norm of the last step's gradients, unscaled and before clipping."""
        return self._scalars[1]

    @property
    def last_lr(self) -> Tensor:
        """() tensor on the device: learning rate of the first group in the last step."""
        return self._factors[0, Factor.LR]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's warm-up and corrections of bias begin with its first step."""
        if hasattr(self, "counts"):
            param_group = {"start": int(self.counts[0]), **param_group}
        _check_group({**self.defaults, **param_group}, self._decays)
        super().add_param_group(param_group)
        try:
            for parameter in self.param_groups[-1]["params"]:
                _check_parameter(parameter, self._parameters()[0].device)
        except ValueError:
            del self.param_groups[-1]
            raise

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in self.__dict__.items() if name in _PICKLED}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "counts" in state:  # of a pickle or a copy; load_state_dict passes here too, and keeps the table
            self._table, self._key, self._kept = TensorTable(self.counts.device), [], None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Norm, then clip, AdamW, average, copy. Parameters without a gradient are left alone, and so is their
        average."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        slots = self._slots()
        self.refresh()
        if slots is None:
            self._scalars[1] = 0.0
            return loss
        norm = grad_norm(slots.gradients, self._table)
        state = StepState(self.counts, self._scalars, self._factors)
        adamw_ema(slots, self._table, self._settings, norm, state, growth_interval=self._growth_interval)
        return loss

    def refresh(self) -> None:
        """Take over what schedulers and users changed in ``param_groups``, and addresses that a capture noted: call it
        before each replay of a captured step. Without changes, and within a capture, it does nothing."""
        self._table.upload()
        given = [self._setting(group) for group in self.param_groups]
        if given == self._settings_given or capturing(self.counts.device):
            return
        if len(given) != len(self._settings):
            self._settings = self._settings.new_zeros((len(given), COLUMNS))
            self._factors = self._factors.new_zeros((len(given), COLUMNS))
        self._settings.copy_(torch.tensor(given, dtype=torch.float64))
        self._settings_given = given

    def average(self, parameter: nn.Parameter, index: int = 0) -> Tensor:
        """The average of a parameter, float32; before its first step itself."""
        state = self.state.get(parameter, {})
        return state[_ema(index)] if state else parameter.detach()

    def master(self, parameter: nn.Parameter) -> Tensor:
        """What the step changes: the parameter, or of one in low precision its float32 values."""
        state = self.state.get(parameter, {})
        return state.get("master", self._masters.get(parameter, parameter)).detach()

    @contextlib.contextmanager
    def swap_ema(self, index: int = 0) -> Iterator[None]:
        """Within the block the parameters hold their averages. Contents are exchanged, never addresses; parameters in
        low precision hold rounded averages, and afterwards what their masters say."""
        self._exchange(index)
        try:
            yield
        finally:
            self._exchange(index, back=True)

    @torch.no_grad()
    def _exchange(self, index: int, back: bool = False) -> None:
        for parameter, state in self.state.items():
            ema = state[_ema(index)]
            if "master" in state:
                parameter.copy_(state["master"] if back else ema)
            else:
                kept = parameter.clone()
                parameter.copy_(ema)
                ema.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """torch's, and under ``"erd_fast"`` what the device counts."""
        own = {"counts": self.counts.clone(), "scalars": self._scalars.clone()}
        return {**super().state_dict(), _OWN: own}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`; tensors that are there already keep their memory.

        Moments, averages and masters become float32 (float64 of a float64 parameter), whatever they were saved in.

        Raises:
            ConfigError: it is not one of an AdamWEMA, lacks something, has a setting outside its range, or a tensor of
                it has another shape than its parameter. Nothing is changed then.
        """
        self._check_state_dict(state_dict)
        before = {parameter: dict(state) for parameter, state in self.state.items()}
        given = {key: value for key, value in state_dict.items() if key != _OWN}
        super().load_state_dict(given)
        # torch casts a state to the dtype of its parameter, which would round masters and moments.
        numbers = [number for group in given["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, self._parameters(), strict=True):
            if number in given["state"]:
                self._masters.pop(parameter, None)
                kept = before.get(parameter, {})
                self.state[parameter] = {
                    name: _into(kept.get(name), value, parameter) for name, value in given["state"][number].items()
                }
                if _is_low(parameter) and "master" not in self.state[parameter]:  # of an optimizer in float32
                    self.state[parameter]["master"] = parameter.detach().float()
        self._key, self._kept = [], None
        self.counts.copy_(state_dict[_OWN]["counts"])
        self._scalars.copy_(state_dict[_OWN]["scalars"])

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Before anything is changed."""
        if not {_OWN, "state", "param_groups"} <= state_dict.keys():
            raise ConfigError(f"AdamWEMA: state_dict must be one of an AdamWEMA, got keys {sorted(state_dict)}")
        own = state_dict[_OWN] if isinstance(state_dict[_OWN], Mapping) else {}
        _check_saved("counts", own.get("counts"), self.counts, torch.int64)
        _check_saved("scalars", own.get("scalars"), self._scalars)
        for group in state_dict["param_groups"]:
            if missing := [name for name in (*self.defaults, "params") if name not in group]:
                raise ConfigError(
                    f"AdamWEMA: state_dict: each group must have {', '.join(self.defaults)}, got one without "
                    f"{', '.join(missing)}"
                )
            _check_group(group, self._decays, "AdamWEMA: state_dict")
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        if unknown := [number for number in state_dict["state"] if number not in numbers]:
            raise ConfigError(f"AdamWEMA: state_dict: state must be of parameters in a group, got {unknown[0]!r}")
        for number, parameter in zip(numbers, self._parameters(), strict=False):  # torch checks how many there are
            if number in state_dict["state"]:
                self._check_saved_state(number, parameter, state_dict["state"][number])

    def _check_saved_state(self, number: int, parameter: nn.Parameter, state: Any) -> None:
        names = list(state) if isinstance(state, Mapping) else []
        averages = sum(name.startswith("ema") for name in names)
        if averages != self._decays:
            raise ConfigError(
                f"AdamWEMA: state_dict: parameter {number} must have {self._decays} averages, got {averages}"
            )
        required = ["exp_avg", "exp_avg_sq", *map(_ema, range(self._decays))]
        if missing := [name for name in required if name not in names]:
            raise ConfigError(
                f"AdamWEMA: state_dict: parameter {number} must have {', '.join(required)}, got a state without "
                f"{', '.join(missing)}"
            )
        if "master" in names and not _is_low(parameter):
            raise ConfigError(
                f"AdamWEMA: state_dict: parameter {number} must be bfloat16 or float16 to have a master, "
                f"got {parameter.dtype}"
            )
        for name, value in state.items():
            _check_saved(f"{name} of parameter {number}", value, parameter)

    def _slots(self) -> Slots | None:
        """All that a step changes, of the parameters with a gradient; made anew when an address has changed."""
        found = [
            (parameter, number, gradient)
            for number, group in enumerate(self.param_groups)
            for parameter in group["params"]
            if (gradient := _gradient(parameter)) is not None
        ]
        if not found:
            return None
        if self._kept is not None and self._key_of(found) == self._key:
            return self._kept._replace(gradients=[gradient for _, _, gradient in found])
        for parameter, _, gradient in found:
            _check_gradient(parameter, gradient)
        slots = [self._slot(*one) for one in found]
        made = Slots.of(slots)
        self._table.update(slots)
        copied = any(slot.gradient is not gradient for slot, (_, _, gradient) in zip(slots, found, strict=True))
        self._key, self._kept = (
            ([] if copied else self._key_of(found)),
            made._replace(gradients=[]),
        )  # these would outlive their step
        return made

    def _key_of(self, found: list[tuple[nn.Parameter, int, Tensor]]) -> list[tuple[Any, ...]]:
        """What tells these slots from others. ids are enough for a state: slots that are kept hold its tensors."""
        return [
            (p.data_ptr(), g.data_ptr(), g.dtype, g.shape, g.stride(), *map(id, self.state.get(p, {}).values()))
            for p, _, g in found
        ]

    def _slot(self, parameter: nn.Parameter, group: int, gradient: Tensor) -> Slot:
        state = self.state[parameter]
        if not state:
            state |= self._new_state(parameter)
        if gradient.stride() != parameter.stride():  # chunks are runs of memory, so all must have one order
            gradient = torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
        master = state.get("master")
        return Slot(
            gradient,
            parameter.detach() if master is None else master,
            state["exp_avg"],
            state["exp_avg_sq"],
            None if master is None else parameter.detach(),
            tuple(state[_ema(index)] for index in range(self._decays)),
            group,
        )

    def _new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = {}
        value = parameter.detach()
        if _is_low(parameter):
            known = self._masters.pop(parameter, value)
            value = state["master"] = torch.empty_like(value, dtype=torch.float32).copy_(known)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(value), torch.zeros_like(value)
        return state | {_ema(index): value.clone() for index in range(self._decays)}

    def _setting(self, group: dict[str, Any]) -> list[float]:
        decays = _decays(group["ema_decay"])
        named = {
            Setting.LR: group["lr"],
            Setting.BETA1: group["betas"][0],
            Setting.BETA2: group["betas"][1],
            Setting.EPS: group["eps"],
            Setting.WEIGHT_DECAY: group["weight_decay"],
            Setting.GRAD_CLIP: group["grad_clip"],
            Setting.WARMUP: group["warmup"],
            Setting.COSINE_STEPS: group["cosine_steps"],
            Setting.START: group["start"],
            **{Setting.EMA_DECAY + index: decay for index, decay in enumerate(decays)},
        }
        return [float(named.get(column, 0.0)) for column in range(COLUMNS)]


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    main = getattr(parameter, "main_grad", None)
    gradient = parameter.grad if main is None else main
    if gradient is None:
        return None
    check_plain("AdamWEMA: grad" if main is None else "AdamWEMA: main_grad", gradient)
    return gradient.resolve_neg() if gradient.is_neg() else gradient  # kernels read what lies in memory


def _check_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    given = "AdamWEMA: grad" if getattr(parameter, "main_grad", None) is None else "AdamWEMA: main_grad"
    check_floating(given, gradient)
    if (gradient.shape, gradient.device) != (parameter.shape, parameter.device):
        raise ValueError(
            f"{given} must have shape {tuple(parameter.shape)} and device {parameter.device} as its parameter, "
            f"got {tuple(gradient.shape)} and {gradient.device}"
        )


def _ema(index: int) -> str:
    return f"ema_{index}" if index else "ema"


def _into(kept: Tensor | None, value: Tensor, parameter: nn.Parameter) -> Tensor:
    """``value`` in the memory of ``kept``, or in memory of its own in the order of the parameter's dimensions."""
    if kept is None:
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        kept = torch.empty_like(parameter, dtype=dtype, memory_format=torch.preserve_format).detach()
    return kept.copy_(value)


def _is_low(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _decays(given: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(given) if isinstance(given, Iterable) else (given,)


def _check_saved(name: str, value: Any, like: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise ConfigError unless ``value`` can be copied into ``like`` and has the dtype, or is floating point."""
    got = type(value).__name__
    if isinstance(value, Tensor):
        right = value.is_floating_point() if dtype is None else value.dtype == dtype
        if right and value.shape == like.shape and value.layout == torch.strided and not value.is_meta:
            return
        got = f"{value.dtype} {tuple(value.shape)}, {value.layout} on {value.device}"
    kind = "floating point" if dtype is None else dtype
    raise ConfigError(f"AdamWEMA: state_dict: {name} must be {kind} of shape {tuple(like.shape)}, got {got}")


def _check_group(group: dict[str, Any], averages: int, where: str = "AdamWEMA") -> None:
    decays = _decays(group["ema_decay"])
    if not 1 <= len(decays) <= MOST_EMAS:
        raise ConfigError(f"{where}: ema_decay must be 1 to {MOST_EMAS} numbers, got {len(decays)}")
    if len(decays) != averages:
        raise ConfigError(f"{where}: ema_decay must have {averages} numbers in each group, got {len(decays)}")
    for decay in decays:
        _check_number(f"{where}: ema_decay", decay, "at least 0 and less than 1", below=1.0)
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ConfigError(f"{where}: betas must be two numbers, got {betas!r}")
    for beta in betas:
        _check_number(f"{where}: betas", beta, "at least 0 and less than 1", below=1.0)
    for name in ("lr", "eps", "weight_decay", "start"):
        _check_number(f"{where}: {name}", group[name], "at least 0")
    for name in ("grad_clip", "warmup", "cosine_steps"):
        _check_number(f"{where}: {name}", group[name], "at least 0 (off)")


def _check_number(name: str, given: Any, allowed: str, below: float = math.inf) -> None:
    try:
        right = 0.0 <= float(given) < below
    except (TypeError, ValueError, RuntimeError, OverflowError):
        right = False
    if not right:
        raise ConfigError(f"{name} must be {allowed}, got {given!r}")


def _check_parameter(parameter: nn.Parameter, device: torch.device) -> None:
    if (kind := type(parameter.data)) is not Tensor:  # its memory would be taken for that of a plain tensor
        raise ValueError(f"AdamWEMA: params must be plain tensors, got {kind.__name__}")
    if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"AdamWEMA: params: given {parameter.dtype}, allowed float32, bfloat16, float16 and float64")
    if parameter.device != device:
        raise ValueError(f"AdamWEMA: params: given some on {parameter.device} and {device}, allowed one device")
    check_dense("AdamWEMA", "params", parameter)
