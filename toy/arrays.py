"""Arrays as they come in from Python: what a plain numpy array cannot say is refused, not dropped."""

import numpy as np
import numpy.typing as npt


def plain_array(name: str, value: npt.ArrayLike) -> np.ndarray:
    """`value` as a plain numpy array, not copied where it is one.

    Raises ValueError (naming `name`) for a masked array, whose mask would be lost, and for lists that are no array.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array, whose mask would be lost: pass numpy.ma.filled({name}, value)")
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be an array, and this is none: {error}") from error


def whole_numbers(name: str, value: npt.ArrayLike, low: int, high: int) -> np.ndarray:
    """A copy of the vector `value` as integers (the caller may reuse the array), each in low .. high-1.

    Raises ValueError (naming `name`) for anything else.
    """
    numbers = plain_array(name, value)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a vector of whole numbers, got {numbers.dtype} {numbers.shape}")
    if numbers.size and (numbers.min() < low or numbers.max() >= high):
        wrong = numbers[(numbers < low) | (numbers >= high)][0]
        raise ValueError(f"{name} must lie in [{low}, {high}), got {wrong}")
    return numbers.astype(np.intp)
