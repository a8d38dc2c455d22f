"""Which device a frame of a plan without exchanges is given to."""

from robustdice.runtime.turns import Turns


def test_devices_take_turns() -> None:
    turns = Turns(3)
    assert [turns.order(frame, {}, [])[0] for frame in range(5)] == [0, 1, 2, 0, 1]


def test_those_with_less_to_do_come_first() -> None:
    assert Turns(3).order(0, {0: 2, 1: 1}, []) == [2, 1, 0]


def test_nobody_gets_a_frame_twice() -> None:
    assert Turns(3).order(0, {}, [0]) == [1, 2]
    assert Turns(2).order(0, {}, [0, 1]) == []


def test_a_silent_device_comes_last_until_it_is_heard_of() -> None:
    turns = Turns(3)
    turns.missed([0])
    assert turns.order(0, {1: 3, 2: 4}, []) == [1, 2, 0]
    turns.heard(0)
    assert turns.order(0, {1: 3, 2: 4}, [])[0] == 0


def test_patience_follows_what_a_device_takes_and_has_to_do() -> None:
    turns = Turns(2)
    at_first = turns.overdue_at(0, 1.0, 1) - 1.0
    for _ in range(50):
        turns.answered(0, 0.2)
    idle, busy = turns.overdue_at(0, 1.0, 0), turns.overdue_at(0, 1.0, 3)
    assert 1.2 < idle < 1.0 + at_first
    assert abs(busy - idle - 0.6) < 1e-9
    assert turns.overdue_at(1, 1.0, 1) - 1.0 == at_first
