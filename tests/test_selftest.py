"""The report that a Mac user pastes: it passes here, and it cannot pass when the numbers differ."""

import pytest

from toy.checks import selftest

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("device", ["cpu", "cpu-native"])
def test_the_selftest_passes_and_prints_what_it_found(device):
    report = selftest.run(device, steps=10)
    assert report.ok, str(report)
    assert {check.model for check in report.checks} == {"transformer", "gpt2", "llama", "vit"}
    text = str(report)
    assert f"selftest on {device}: ok" in text and "worst gradient" in text and "FAILED" not in text


def test_a_difference_fails_and_is_marked(monkeypatch):
    monkeypatch.setattr(selftest, "EXACT", {"gradient": 0.0, "loss": 1e-3})
    report = selftest.run("cpu", steps=2)
    assert not report.ok and "FAILED" in str(report)
    assert sorted({check.what for check in report.checks if not check.ok}) == ["worst gradient, relative L2 to numpy"]
