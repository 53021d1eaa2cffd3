"""A domain whose self-test does not hold, for the test that says so."""

SELF_TEST = (("one", ("1",), False), ("two", ("2",), True))


def check_answer(text: str, references: tuple[str, ...], is_cut_off: bool) -> bool | None:
    return False
