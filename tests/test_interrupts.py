"""Signals become requests to stop, and what handled them before handles them again afterwards."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from raftdiff import interrupts
from raftdiff.interrupts import Interrupted, stop_requests


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_waits_for_the_next_safe_point(signum, code):
    with stop_requests() as stop:
        assert not stop
        stop.check()
        os.kill(os.getpid(), signum)
        assert stop
        with pytest.raises(Interrupted, match=signal.Signals(signum).name) as stopped:
            stop.check()
    assert stopped.value.exit_code == code


def test_a_second_signal_stops_at_once():
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted) as stopped:
            os.kill(os.getpid(), signal.SIGINT)
        assert stop
    assert stopped.value.exit_code == 130


def test_without_a_safe_point_the_grace_period_ends_the_wait(monkeypatch):
    monkeypatch.setattr(interrupts, "GRACE_S", 0.01)
    with stop_requests(), pytest.raises(Interrupted) as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            pass
    assert stopped.value.exit_code == 143


def test_no_handler_and_no_alarm_is_left_behind():
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    before = [signal.getsignal(signum) for signum in signals]
    with pytest.raises(Interrupted), stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        stop.check()
    assert [signal.getsignal(signum) for signum in signals] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_run_in_another_thread_leaves_the_signals_alone():
    before = signal.getsignal(signal.SIGTERM)
    found: list[object] = []

    def work() -> None:
        with stop_requests() as stop:
            found.extend([bool(stop), signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, before]


def test_an_except_clause_for_errors_does_not_swallow_it():
    assert not issubclass(Interrupted, Exception)
