from standin.server.rates import RateCounter


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_passes_until_its_tick_ends_and_costs_a_window_of_silence() -> None:
    clock = Clock()
    rate = RateCounter(5, tick=5, window=60, clock=clock)
    assert not rate.exceeded()
    rate.add(500)
    clock.now = 4.9
    assert not rate.exceeded()
    clock.now = 5.1
    assert rate.exceeded()
    clock.now = 60
    assert rate.exceeded()
    clock.now = 65.1
    assert not rate.exceeded()


def test_below_the_limit_nothing_is_exceeded() -> None:
    clock = Clock()
    rate = RateCounter(10, tick=1, window=60, clock=clock)
    for second in range(100):
        clock.now = second
        rate.add(9)
        assert not rate.exceeded()


def test_at_the_limit_it_is_exceeded() -> None:
    clock = Clock()
    rate = RateCounter(10, tick=1, window=60, clock=clock)
    rate.add(10)
    clock.now = 1.0
    assert rate.exceeded()


def test_no_limit_is_never_exceeded() -> None:
    rate = RateCounter(None, tick=1, window=60, clock=lambda: 0.0)
    rate.add(10**9)
    assert not rate.exceeded()
