"""AdamW as one row of seven numbers that every backend reads in the same way.

    hp = [lr, beta1, beta2, eps, weight_decay, s5, s6]

    m = beta1*m + (1-beta1)*g
    v = beta2*v + (1-beta2)*g*g
    w = w*(1 - lr*weight_decay) - lr * (m*s5) / (sqrt(v*s6) + eps)

Slots 5 and 6 multiply the moments, and the *mode* says what fills them:

* lora: 1/(1-beta1^t) and 1/(1-beta2^t), the bias correction of Kingma & Ba 2015 (algorithm 1), so that the update is
  exactly AdamW (Loshchilov & Hutter 2019, algorithm 2);
* from_scratch: the constants beta1 and beta2. Nothing is corrected: the moments start at zero, so the first steps are
  small by themselves, like a warm-up, and from then on the step is scaled by beta1/sqrt(beta2).
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt


class HyperParameterRow(np.ndarray):
    """The (1, 7) float32 row, which remembers the mode it was made for (`mode`: one of the AdamW.MODE_ constants) and its
    step, counted from 1 (None: it was made without one)."""

    mode = 0
    step: int | None = None

    def __array_finalize__(self, source: np.ndarray | None) -> None:
        self.mode, self.step = getattr(source, "mode", 0), getattr(source, "step", None)

    def __reduce__(self) -> tuple[Any, ...]:  # pickle and copy keep the mode and the step
        rebuild, arguments, state = super().__reduce__()  # type: ignore[str-unpack]  # it is never a string
        return rebuild, arguments, (state, self.mode, self.step)

    def __setstate__(self, state: Any) -> None:
        state, self.mode, self.step = state
        super().__setstate__(state)


@dataclass
class AdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2); `hp_for_step(k)` gives the row of seven numbers for step k.

    For every weight w with gradient g, and moments m and v that start at zero:

        m = beta1*m + (1-beta1)*g
        v = beta2*v + (1-beta2)*g*g
        w = w*(1 - lr*weight_decay) - lr * (m*s5) / (sqrt(v*s6) + eps)

    `AdamW.bias_corrected()`: s5 = 1/(1-beta1^t), s6 = 1/(1-beta2^t) at step t = 1, 2, ...: the published AdamW.
    `AdamW.constant_slots()`: s5 = beta1, s6 = beta2, this library's convention for some of its graphs.
    Which of them a model reads is its `hp_mode`; `recipe.adamw()` makes the right one. `for_lora` and `for_from_scratch` are
    the same two by the names of the recipes that read them.
    """

    MODE_UNSET: ClassVar[int] = 0
    MODE_FROM_SCRATCH: ClassVar[int] = 1
    MODE_LORA: ClassVar[int] = 2

    lr: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    bias_correct: bool = False
    mode: int = MODE_UNSET

    @classmethod
    def constant_slots(
        cls, lr: float = 0.001, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> "AdamW":
        """Slots 5 and 6 are beta1 and beta2: what the from-scratch, warm-start and ViT graphs read."""
        return cls(lr, beta1, beta2, eps, weight_decay, bias_correct=False, mode=cls.MODE_FROM_SCRATCH)

    @classmethod
    def bias_corrected(
        cls, lr: float = 0.001, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> "AdamW":
        """Slots 5 and 6 are the bias corrections of Adam: what the GPT-2, LoRA and full-finetune graphs read."""
        return cls(lr, beta1, beta2, eps, weight_decay, bias_correct=True, mode=cls.MODE_LORA)

    for_from_scratch = constant_slots
    for_lora = bias_corrected

    def hp(self, step: int | None = None, lr: float | None = None) -> HyperParameterRow:
        """The row for one step, shape (1, 7), float32 (computed in float64).

        step: counted from 1; needed in lora mode, ignored in from_scratch mode. lr: overrides the field (schedules).
        Raises ValueError when the mode is unset, when mode and bias_correct contradict each other, when a number is out
        of range, and for a step below 1 in lora mode.
        """
        if self.mode == self.MODE_FROM_SCRATCH:
            if self.bias_correct:
                raise ValueError(
                    "mode is from_scratch but bias_correct is True: from_scratch graphs read constants in slots 5 and 6; "
                    "use AdamW.for_from_scratch(), or AdamW.for_lora() for bias correction"
                )
        elif self.mode == self.MODE_LORA:
            if not self.bias_correct:
                raise ValueError(
                    "mode is lora but bias_correct is False: lora graphs read the bias corrections in slots 5 and 6; "
                    "use AdamW.for_lora(), or AdamW.for_from_scratch() for constants"
                )
        else:
            raise ValueError(
                f"AdamW mode is unset (mode={self.mode!r}): make it with AdamW.for_from_scratch() or AdamW.for_lora(), "
                "or let recipe.adamw() choose"
            )
        lr = self.lr if lr is None else lr
        self._check_numbers(lr)
        s5, s6 = self.beta1, self.beta2
        if self.mode == self.MODE_LORA:
            if step is None or step < 1:
                raise ValueError(
                    f"step must be at least 1 in lora mode, got {step}: hp() counts from 1 because the bias correction "
                    "divides by 1 - beta^step; hp_for_step() takes a loop's step counted from 0"
                )
            s5 = 1.0 / (1.0 - self.beta1**step)
            s6 = 1.0 / (1.0 - self.beta2**step)
        numbers = np.array([[lr, self.beta1, self.beta2, self.eps, self.weight_decay, s5, s6]], dtype=np.float64)
        row = numbers.astype(np.float32).view(HyperParameterRow)
        row.mode, row.step = self.mode, step
        return row

    def hp_for_step(self, k: int, lr: float | None = None) -> HyperParameterRow:
        """The row for step k of the caller's loop, counted from 0. lr overrides the field (learning-rate schedules)."""
        if k < 0:
            raise ValueError(f"hp_for_step takes a loop's step counted from 0, got {k}")
        return self.hp(k + 1, lr=lr)

    def _check_numbers(self, lr: float) -> None:
        for name, value, low, high in (
            ("lr", lr, 0.0, math.inf),
            ("beta1", self.beta1, 0.0, 1.0),
            ("beta2", self.beta2, 0.0, 1.0),
            ("eps", self.eps, 0.0, math.inf),
            ("weight_decay", self.weight_decay, 0.0, math.inf),
        ):
            if not (math.isfinite(value) and low <= value < high):
                raise ValueError(f"AdamW {name} must be in [{low:g}, {high:g}), got {value!r}")


MODE_NAMES = {AdamW.MODE_UNSET: "unset", AdamW.MODE_FROM_SCRATCH: "from_scratch", AdamW.MODE_LORA: "lora"}


def check_row(hp: npt.ArrayLike, wanted_mode: int) -> np.ndarray:
    """`hp` as a checked float32 array of shape (1, 7).

    Raises ValueError for another shape, a number that is not finite, and a `HyperParameterRow` of another mode than
    `wanted_mode`. A plain array carries no mode and is taken as it is.
    """
    mode = getattr(hp, "mode", AdamW.MODE_UNSET)
    if isinstance(hp, np.ma.MaskedArray):
        raise ValueError("hp is a masked array, whose mask would be lost: pass numpy.ma.filled(hp, value)")
    row = np.asarray(hp, dtype=np.float32)
    if row.shape not in ((1, 7), (7,)):
        raise ValueError(f"hp must be the (1, 7) row of AdamW.hp(), got shape {row.shape}")
    if not np.isfinite(row).all():
        raise ValueError(f"hp must be seven finite numbers, got {row.ravel().tolist()}")
    if mode not in (AdamW.MODE_UNSET, wanted_mode):
        raise ValueError(
            f"hp was made by AdamW.for_{MODE_NAMES[mode]}() but this model reads the {MODE_NAMES[wanted_mode]} "
            f"convention in slots 5 and 6: use AdamW.for_{MODE_NAMES[wanted_mode]}() or recipe.adamw()"
        )
    return row.reshape(1, 7)


def without_decay(row: np.ndarray) -> np.ndarray:
    """The same (1, 7) row with a weight decay of 0: for norms and biases (see `Model.decays`)."""
    plain = np.array(row)
    plain[0, 4] = 0.0
    return plain
