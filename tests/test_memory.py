"""The watch over the memory of the processes of tests."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import memory
import pytest


@pytest.fixture
def grows(monkeypatch):
    """Sets what the process seems to hold, and counts how often compiled programs are dropped."""
    state = SimpleNamespace(now=400.0, left=400.0, dropped=0)

    def drop():
        state.dropped += 1

    monkeypatch.setattr(memory, "resident", lambda: state.now)
    monkeypatch.setattr(memory, "resident_after_trimming", lambda: state.left)
    monkeypatch.setattr(memory, "count_maps", lambda: 0)
    monkeypatch.setattr(jax, "clear_caches", drop)
    return state


def test_programs_are_dropped_where_there_are_many_and_no_more_often(grows):
    watch = memory.Watch()
    for grows.now in (600.0, memory.PLENTY - 1.0):
        watch.pytest_runtest_logfinish("tests/test_a.py::test_b")
    assert grows.dropped == 0
    grows.now, grows.left = memory.PLENTY + 1.0, memory.PLENTY - 100.0  # little of it was of programs
    watch.pytest_runtest_logfinish("tests/test_a.py::test_c")
    assert grows.dropped == 1
    watch.pytest_runtest_logfinish("tests/test_a.py::test_d")
    assert grows.dropped == 1
    grows.now = grows.left + memory.MORE + 1
    watch.pytest_runtest_logfinish("tests/test_a.py::test_e")
    assert grows.dropped == 2
    assert watch.complaint() is None


def test_a_test_of_many_programs_drops_them_itself(grows):
    watch = memory.Watch()
    for grows.now in (1000.0, memory.PLENTY + 1.0):
        watch.drop_programs()
    assert grows.dropped == 1


def test_a_process_with_too_much_is_reported_with_the_module_that_added_most(grows):
    watch = memory.Watch()
    for module, grows.now in (("test_a", 600.0), ("test_b", 1900.0), ("test_c", 2500.0)):
        grows.left = grows.now
        watch.pytest_runtest_logfinish(f"tests/{module}.py::test[x::y]")
    assert watch.complaint() == (
        "a process of tests held 2.5 GB after tests/test_c.py, more than 2.4 GB; "
        "most was added by tests/test_b.py: 1.3 GB"
    )


def test_programs_that_are_dropped_are_compiled_again():
    f = jax.jit(lambda x: x + 1)
    f(jnp.ones(3))
    jax.clear_caches()
    assert f._cache_size() == 0
    assert f(jnp.ones(3)).sum() == 6
