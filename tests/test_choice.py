"""Which answer a client takes, and how many frames it sends at once."""

from __future__ import annotations

import math

from robustdice.runtime.choice import Choice, Pace


def taken(choice: Choice, answers: dict[int, tuple[float, float]], asked: set[int]) -> tuple[float, float]:
    """One frame: ``answers[device]`` is (seconds, coverage). When the best one is taken, and what it covers."""
    coverages: dict[int, float] = {}
    first_at = None
    result = None
    for device, (at, coverage) in sorted(answers.items(), key=lambda item: item[1]):
        waiting = asked - coverages.keys()
        due = choice.due(coverages, waiting, first_at)
        if result is None and due is not None and due <= at:
            assert first_at is not None
            choice.expire(coverages, waiting, first_at, due)
            result = max(due, first_at), max(coverages.values())
        choice.heard(device)
        first_at = at if first_at is None else first_at
        choice.answered(device, coverage, at - first_at)
        coverages[device] = coverage
        if result is None and choice.due(coverages, asked - coverages.keys(), first_at) == -math.inf:
            result = at, max(coverages.values())
    if result is None:
        due = choice.due(coverages, asked - coverages.keys(), first_at)
        assert due is not None
        assert first_at is not None
        choice.expire(coverages, asked - coverages.keys(), first_at, due)
        result = due, max(coverages.values())
    return result


def test_an_answer_that_covers_everything_is_taken_at_once() -> None:
    assert taken(Choice(4), {2: (0.1, 1.0)}, {0, 1, 2, 3}) == (0.1, 1.0)


def test_the_best_answer_counts_and_not_that_of_a_lonely_device_that_is_first() -> None:
    choice = Choice(3)
    for _ in range(20):
        at, coverage = taken(choice, {0: (0.01, 0.57), 1: (0.3, 0.84), 2: (0.31, 0.84)}, {0, 1, 2})
        late = coverage
    assert (at, late) == (0.3, 0.84), "it has learnt how late the others are, and waits for no more than one of them"


def test_a_dead_device_is_waited_for_once() -> None:
    choice = Choice(3)
    for _ in range(5):
        assert taken(choice, {0: (0.1, 1.0), 1: (0.1, 1.0), 2: (0.1, 1.0)}, {0, 1, 2})[0] == 0.1
    answers = {0: (0.10, 0.8), 1: (0.101, 0.8)}
    first, _ = taken(choice, answers, {0, 1, 2})
    assert 0.1 < first <= 0.4
    for _ in range(20):
        assert taken(choice, answers, {0, 1, 2}) == (0.10, 0.8)
    choice.heard(2)
    assert taken(choice, {**answers, 2: (0.12, 1.0)}, {0, 1, 2}) == (0.12, 1.0)


def test_nothing_is_taken_before_there_is_an_answer_unless_all_have_refused() -> None:
    choice = Choice(2)
    assert choice.due({}, {0, 1}, None) is None
    assert choice.due({}, set(), None) == -math.inf


def test_the_first_frame_goes_alone_and_a_fast_network_fills_the_window() -> None:
    pace = Pace(8, 2.0, 1)
    assert pace.allowed == 1
    for _ in range(7):
        pace.finished(0.02, pace.allowed)
    assert pace.allowed == 8


def test_the_window_shrinks_until_frames_have_time_enough_and_grows_again() -> None:
    pace = Pace(8, 2.0, 1)
    for _ in range(50):
        pace.finished(0.3 * pace.allowed, pace.allowed)
    assert 2 <= pace.allowed <= 3
    for _ in range(3):  # the network becomes slower still: no frame comes back in time
        pace.finished(2.0, pace.allowed)
    assert pace.allowed == 1
    for _ in range(10):
        pace.finished(0.05, pace.allowed)
    assert pace.allowed == 8


def test_a_long_way_alone_does_not_shrink_the_window() -> None:
    pace = Pace(8, 2.0, 1)
    for _ in range(100):
        pace.finished(0.5, pace.allowed)
    assert pace.allowed == 8


def test_devices_are_given_less_time_where_frames_and_answers_are_long_under_way() -> None:
    pace = Pace(1, 2.0, 2)
    assert pace.given([0], 2.0) == pace.given([0, 1], 2.0) == 2.0
    for _ in range(30):
        pace.answered(1, 0.2, 0.0)
    assert pace.given([0], 2.0) == 2.0
    assert 1.7 < pace.given([1], 2.0) < 1.8
    for _ in range(30):
        pace.answered(1, 3.0, 0.0)
    assert pace.given([1], 2.0) == 0.5, "some time is left to the device whatever the way"


def test_devices_that_work_together_are_given_as_much_time_as_two_of_them_have() -> None:
    pace = Pace(1, 2.0, 4)
    for _ in range(30):
        for device, seconds in enumerate([0.6, 0.2, 0.1, 0.9]):
            pace.answered(device, seconds, 0.0)
    everyone = pace.given(range(4), 2.0)
    assert everyone == pace.given([1], 2.0) < pace.given([2], 2.0)
    assert pace.given([0, 3], 2.0) == pace.given([3], 2.0)


def test_devices_that_have_fallen_silent_do_not_say_how_long_the_ways_of_others_are() -> None:
    pace = Pace(1, 2.0, 4)
    for _ in range(30):
        for device, seconds in enumerate([0.01, 0.01, 0.4, 0.5]):
            pace.answered(device, seconds, 0.0)
    pace.unanswered(dict.fromkeys(range(4), 1.0))
    assert pace.given(range(4), 2.0) == 2.0
    for _ in range(30):
        for device, seconds in ((2, 0.4), (3, 0.5)):  # they came too late, and tell all the same
            pace.answered(device, seconds, 0.0)
    assert pace.given(range(4), 2.0) == pace.given([3], 2.0) < 1.6


def test_a_client_that_is_answered_too_late_gives_less_time_the_next_time() -> None:
    """Answers need 0.6 s, and devices take all the time that they are given, waiting for something that is lost: one
    frame after the other, each sent when the time of the one before has run out, whose answer is still on its way."""
    pace, now, came = Pace(1, 2.0, 2), 0.0, []
    for _ in range(30):
        for device in (0, 1):
            pace.answered(device, 0.01, now)
    for _ in range(8):
        asked, taken = now, pace.given(range(2), 2.0) + 0.6
        came.append(taken <= 2.0)
        if not came[-1]:
            pace.unanswered(dict.fromkeys(range(2), asked))
        for device in (0, 1):
            pace.answered(device, 0.6, asked + taken)
        now = max(asked + 2.0, asked + taken) if came[-1] else asked + 2.0
    assert not came[0]
    assert all(came[3:])
