"""The product of matrices under the kernels (toy/_kernels/product.h): all that this processor has, and sgemm beside them.

`multiply_nt`, `multiply_nn` and `multiply_tn` are C functions, called here through the capsules of Cython.
"""

import ctypes
import mmap
import os
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

if os.environ.get("TOY_PURE_PYTHON", "") not in ("", "0"):
    pytest.skip("TOY_PURE_PYTHON is set: the compiled kernels are not tested", allow_module_level=True)

from toy import switch
from toy._kernels import blas, linear, threads

FORMS = ("nt", "nn", "tn")  # whether a and b lie in memory transposed
OWN = [name for name in blas.PRODUCTS if name != "sgemm"]
FEWEST_ROWS, FEWEST_COLUMNS = 3, 4  # of the project's own product, as in blas.pyx
SIZE, POINTER = ctypes.c_ssize_t, ctypes.c_void_p


def c_function(module, name, *types):
    python = ctypes.pythonapi
    python.PyCapsule_GetName.restype, python.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    python.PyCapsule_GetPointer.restype = POINTER
    python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    capsule = module.__pyx_capi__[name]
    address = python.PyCapsule_GetPointer(capsule, python.PyCapsule_GetName(capsule))
    return ctypes.CFUNCTYPE(None, *types)(address)


MULTIPLY = {
    form: c_function(
        blas, f"multiply_{form}", SIZE, SIZE, SIZE, POINTER, SIZE, POINTER, SIZE, ctypes.c_float, POINTER, SIZE
    )
    for form in FORMS
}


def stride(x):
    return x.strides[0] // 4 if len(x) > 1 else max(x.shape[1], 1)


def multiply(form, a, b, c, add):
    """c = a b or c += a b; a and b as the form has them in memory, their rows as far apart as they are."""
    k = a.shape[0] if form == "tn" else a.shape[1]
    MULTIPLY[form](
        *c.shape, k, a.ctypes.data, stride(a), b.ctypes.data, stride(b), float(add), c.ctypes.data, stride(c)
    )


def in_float64(form, a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a.T if form == "tn" else a) @ (b.T if form == "nt" else b)


def operands(form, m, n, k, gap=0, seed=0):
    """a and b of the form; `gap` more numbers, NaN, from the end of a row to the next."""
    rng = np.random.default_rng([seed, m, n, k])
    matrices = []
    for rows, columns in ((k, m) if form == "tn" else (m, k), (n, k) if form == "nt" else (k, n)):
        wide = np.full((rows, columns + gap), np.nan, np.float32)
        wide[:, :columns] = rng.standard_normal((rows, columns))
        matrices.append(wide[:, :columns])
    return matrices


@pytest.fixture(params=blas.PRODUCTS)
def product(request):
    before = blas.blas_info()["product"]
    blas.set_product(request.param)
    yield request.param
    blas.set_product(before)


@pytest.fixture(params=OWN)
def own_product(request):
    before = blas.blas_info()["product"]
    blas.set_product(request.param)
    yield request.param
    blas.set_product(before)


def check_product(form, m, n, k, gap, add):
    a, b = operands(form, m, n, k, gap)
    wide = np.full((m, n + gap), 7.0, np.float32)
    c = wide[:, :n]
    c[:] = np.random.default_rng(1).standard_normal((m, n)) if add else np.nan  # what is overwritten is not read
    expected = in_float64(form, a, b) + (c if add else 0)
    # of a sum of k terms in any order
    bound = (k + 2) * 2.0**-24 * (in_float64(form, np.abs(a), np.abs(b)) + (np.abs(c) if add else 0)) * 1.01
    multiply(form, a, b, c, add)
    assert (np.abs(c - expected) <= bound).all()
    assert (wide[:, n:] == 7.0).all()


small = st.integers(0, 40) | st.integers(0, 5)
hypothesis_settings = hypothesis.settings(
    deadline=None, max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


@hypothesis_settings
@hypothesis.given(st.sampled_from(FORMS), small, st.integers(0, 100), small, st.sampled_from([0, 1, 30]), st.booleans())
def test_any_small_product(product, form, m, n, k, gap, add):
    check_product(form, m, n, k, gap, add)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "m, n, k",
    [(1, 300, 900), (14, 33, 385), (29, 800, 390), (300, 9, 1), (30, 65, 2000), (5, 1537, 257), (768, 16, 48)],
)
def test_products_larger_than_what_is_packed_at_a_time(product, form, m, n, k):
    check_product(form, m, n, k, 5, True)
    check_product(form, m, n, k, 0, False)


@pytest.mark.parametrize("form", FORMS)
def test_infinities_and_nan_come_out_as_in_numpy(product, form):
    a, b = operands(form, 37, 71, 50)
    for matrix, places in ((a, ((3, 4), (20, 30), (36, 36))), (b, ((0, 0), (49, 49), (7, 20)))):
        for place, value in zip(places, (np.inf, np.nan, -np.inf)):
            matrix[place] = value
    a[10, :], b[:, 3] = 0.0, 1e30  # 0 * inf is NaN too
    c = np.zeros((37, 71), np.float32)
    multiply(form, a, b, c, add=False)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = in_float64(form, a, b).astype(np.float32)
    assert np.isnan(expected).any() and np.isinf(expected).any() and np.isfinite(expected).any()
    np.testing.assert_array_equal(np.isnan(c), np.isnan(expected))
    np.testing.assert_array_equal(np.where(np.isinf(c), c, 0), np.where(np.isinf(expected), expected, 0))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(c[finite], expected[finite], rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# the same bits
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m, n, k", [(61, 90, 40), (30, 1000, 777), (200, 40, 385)])
def test_any_part_of_a_product_has_the_bits_that_it_has_in_the_whole(own_product, form, m, n, k):
    a, b = operands(form, m, n, k)
    whole = np.ones((m, n), np.float32)
    multiply(form, a, b, whole, add=True)
    rng = np.random.default_rng(0)
    for _ in range(20):
        row, column = rng.integers(0, m - FEWEST_ROWS), rng.integers(0, n - FEWEST_COLUMNS)
        rows, columns = rng.integers(FEWEST_ROWS, m - row + 1), rng.integers(FEWEST_COLUMNS, n - column + 1)
        part = np.ones((rows, columns), np.float32)
        multiply(
            form,
            a[:, row : row + rows] if form == "tn" else a[row : row + rows],
            b[column : column + columns] if form == "nt" else b[:, column : column + columns],
            part,
            add=True,
        )
        np.testing.assert_array_equal(part, whole[row : row + rows, column : column + columns])


F32 = 0  # the precision, of toy._kernels.products


class Linear(ctypes.Structure):
    """As in toy/_kernels/linear.pxd."""

    _fields_ = [(name, SIZE) for name in ("n", "n_in", "n_out")] + [
        ("precision", ctypes.c_int), ("x", POINTER), ("x_stride", SIZE), ("weight", POINTER), ("bias", POINTER),
        ("y", POINTER), ("y_stride", SIZE),
    ]  # fmt: skip


class LinearBackward(ctypes.Structure):
    _fields_ = [(name, SIZE) for name in ("n", "n_in", "n_out")] + [
        ("precision", ctypes.c_int), ("d_y", POINTER), ("d_y_stride", SIZE), ("x", POINTER), ("x_stride", SIZE),
        ("weight", POINTER), ("d_x", POINTER), ("d_x_stride", SIZE), ("d_weight", POINTER), ("d_bias", POINTER),
        ("beta", ctypes.c_float),
    ]  # fmt: skip


@pytest.mark.parametrize("n, n_in, n_out", [(40, 70, 50), (7, 33, 100), (65, 17, 9), (129, 40, 300), (33, 300, 41)])
def test_a_linear_layer_has_the_same_bits_for_any_number_of_slices(own_product, n, n_in, n_out):
    """Bands of 16 rows or columns leave a remainder here, of which no slice is made: sgemm would do it, otherwise rounded."""
    rng = np.random.default_rng(0)
    x, weight, bias, d_y = (
        rng.standard_normal(shape, dtype=np.float32) for shape in ((n, n_in), (n_out, n_in), n_out, (n, n_out))
    )
    kernels = {
        name: c_function(linear, name, POINTER, ctypes.c_int, ctypes.c_int)
        for name in ("linear_forward", "linear_backward_input", "linear_backward_weight")
    }

    def results(slices):
        y, d_x, d_weight, d_bias = (np.zeros(s, np.float32) for s in ((n, n_out), (n, n_in), (n_out, n_in), n_out))
        at = [array.ctypes.data for array in (x, weight, bias, y, d_y, d_x, d_weight, d_bias)]
        forward = Linear(n, n_in, n_out, F32, at[0], n_in, at[1], at[2], at[3], n_out)
        backward = LinearBackward(
            n, n_in, n_out, F32, at[4], n_out, at[0], n_in, at[1], at[5], n_in, at[6], at[7], 1.0
        )  # fmt: skip
        for name, kernel in kernels.items():
            for ith in range(slices):
                kernel(ctypes.addressof(forward if name == "linear_forward" else backward), ith, slices)
        return y, d_x, d_weight, d_bias

    one = results(1)
    for given, expected in zip(one, (x @ weight.T + bias, d_y @ weight, d_y.T @ x, d_y.sum(axis=0))):
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4)
    for slices in (2, 3, 5, 16):
        for given, expected in zip(results(slices), one):
            np.testing.assert_array_equal(given, expected)


# ----------------------------------------------------------------------------------------------------------------------
# memory
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are closed by Linux's mprotect")
@pytest.mark.parametrize("at_end", [True, False], ids=["a closed page after", "a closed page before"])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_outside_of_the_matrices_is_touched(own_product, form, at_end):
    """Each matrix begins or ends where a page begins or ends that nobody may read or write: the process would die."""
    closing = ctypes.CDLL(None, use_errno=True).mprotect
    closing.argtypes = [POINTER, ctypes.c_size_t, ctypes.c_int]
    keep = []

    def place(matrix):
        size = (matrix.nbytes + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
        pages = mmap.mmap(-1, size + 2 * mmap.PAGESIZE)
        memory = np.frombuffer(pages, np.uint8)
        keep.append((pages, memory))
        for closed in (0, size + mmap.PAGESIZE):
            assert closing(memory.ctypes.data + closed, mmap.PAGESIZE, 0) == 0
        start = mmap.PAGESIZE + (size - matrix.nbytes if at_end else 0)
        placed = memory[start : start + matrix.nbytes].view(np.float32).reshape(matrix.shape)
        placed[:] = matrix
        return placed

    try:
        for m, n, k in [(4, 8, 1), (14, 32, 16), (17, 33, 5), (31, 65, 50), (5, 47, 3), (28, 64, 387), (16, 100, 18)]:
            a, b = (place(matrix) for matrix in operands(form, m, n, k))
            c = place(np.zeros((m, n), np.float32))
            for add in (False, True):
                multiply(form, a, b, c, add)
            np.testing.assert_allclose(c, 2 * in_float64(form, a, b), rtol=1e-4, atol=1e-3)
    finally:
        for _, memory in keep:  # before Python gives the pages back
            closing(memory.ctypes.data, memory.nbytes, mmap.PROT_READ | mmap.PROT_WRITE)


WITHOUT_MEMORY = """
import ctypes, resource, sys, threading
import numpy as np
sys.path.insert(0, {tests!r})
from test_product import FORMS, blas, multiply, operands

blas.set_product({product!r})
aligned = ctypes.CDLL(None).posix_memalign
aligned.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
matrices = {{form: operands(form, 50, 100, 500) for form in FORMS}}
results = {{form: [np.zeros((50, 100), np.float32) for _ in range(2)] for form in FORMS}}
start, end = threading.Event(), threading.Event()
place, refused = ctypes.c_void_p(), []

def multiply_in_a_new_thread():  # which has no memory for panels yet
    start.wait()
    while aligned(ctypes.addressof(place), 64, 384 * 768 * 4) == 0:
        refused.append(place.value)  # the allocator's own reserve is taken first
    for form in FORMS:
        multiply(form, *matrices[form], results[form][0], False)
    end.set()

thread = threading.Thread(target=multiply_in_a_new_thread)
thread.start()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (1, limits[1]))
start.set()
end.wait()
resource.setrlimit(resource.RLIMIT_AS, limits)
thread.join()
for form in FORMS:
    multiply(form, *matrices[form], results[form][1], False)
    np.testing.assert_array_equal(*results[form])
print(len(refused))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a limit of memory that Linux keeps")
def test_without_memory_to_pack_into_the_bits_are_the_same(own_product):
    code = WITHOUT_MEMORY.format(tests=os.path.dirname(__file__), product=own_product)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


# ----------------------------------------------------------------------------------------------------------------------
# which one
# ----------------------------------------------------------------------------------------------------------------------


def test_the_widest_product_is_chosen_and_named():
    info = blas.blas_info()
    assert info["product"] == list(blas.PRODUCTS)[-1]
    words = switch.backends()
    shown = next(row.version for row in words if row.name == "cython")
    assert info["name"].split()[0] in shown
    assert ("AVX" in shown) == (info["product"] != "sgemm")


def test_an_unknown_product_is_refused():
    before = blas.blas_info()["product"]
    blas.set_product(before)
    with pytest.raises(ValueError, match="name is 'mkl', expected one of sgemm"):
        blas.set_product("mkl")
    assert blas.blas_info()["product"] == before


def test_threads_have_memory_of_their_own(own_product):
    before = threads.get_num_threads()
    threads.set_num_threads(4)
    try:
        from toy.ops import accelerated

        x, weight = operands("nt", 600, 300, 400)
        for _ in range(5):
            y, _ = accelerated.linear(x, weight)
            np.testing.assert_allclose(y, x @ weight.T, rtol=1e-4, atol=1e-3)
    finally:
        threads.set_num_threads(before)
