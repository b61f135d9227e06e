"""The report that a Mac user pastes: it passes here, and it cannot pass when the numbers differ."""

import numpy as np
import pytest

from toy.checks import selftest

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("device", ["cpu", "cpu-native"])
def test_the_selftest_passes_and_prints_what_it_found(device):
    report = selftest.run(device, steps=10)
    assert report.ok, str(report)
    assert {check.model for check in report.checks} == {
        *("transformer", "gpt2", "llama", "vit"),
        *("finetune f32", "lora f32", "lora f16", "lora q8_0", "lora q4_0"),
    }
    assert report.system[-1].endswith(": float32")
    text = str(report)
    assert f"selftest on {device}: ok" in text and "worst gradient" in text and "FAILED" not in text


def test_a_difference_fails_and_is_marked(monkeypatch):
    monkeypatch.setattr(selftest, "EXACT", {"gradient": 0.0, "loss": 1e-3})
    report = selftest.run("cpu", steps=2)
    assert not report.ok and "FAILED" in str(report)
    assert sorted({check.what for check in report.checks if not check.ok}) == ["worst gradient, relative L2 to numpy"]


def test_a_device_that_rounds_gets_the_wider_bars(monkeypatch):
    monkeypatch.setattr(selftest, "product_error", lambda device: 3e-4)
    report = selftest.run("cpu", steps=2, cases=["gpt2"])
    assert {check.bar for check in report.checks} == {*selftest.ROUNDED.values(), 1, 0, None}
    assert report.system[-1] == "products: relative error 3.0e-04: rounded, so the wider bars hold"


def test_the_error_of_a_product_tells_rounding():
    """Operands of 10 bits, as of halves and TF32, are on the other side of the bar than float32."""
    assert selftest.product_error("cpu-native") < 0.1 * selftest.EXACT_PRODUCT
    x, w = np.random.default_rng(0).standard_normal((2, 64, 256)).astype(np.float32)
    rounded = (x.astype(np.float16).astype(np.float64)) @ w.astype(np.float16).astype(np.float64).T
    assert selftest._relative(rounded, x.astype(np.float64) @ w.T.astype(np.float64)) > 10 * selftest.EXACT_PRODUCT
