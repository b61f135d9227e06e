"""A little of the attack on run directories: tests/runs_attack.py does as much of it as one likes."""

import random
import sys

import pytest
from runs_attack import attack_by_corruptions, attack_by_kills, damage
from single_thread import single_thread  # noqa: F401 (autouse)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_killed_runs_end_as_if_they_had_not_been(tmp_path):
    found = attack_by_kills(tmp_path, 3, random.Random(1))
    assert found.pop("killed") == 3 and found.keys() == {"runs that ended bit-identical"}, found


def test_damaged_files_are_a_sentence_or_the_right_numbers(tmp_path):
    found = attack_by_corruptions(tmp_path, 150, random.Random(1))
    assert found.keys() == {"refused in a sentence", "the right numbers"}, found
    assert min(found.values()) > 50


def test_the_damage_is_one():
    rng = random.Random(0)
    assert sum(damage(b'{"a": 1}\n{"b": 22}\n', rng)[1] != b'{"a": 1}\n{"b": 22}\n' for _ in range(200)) > 150
