"""Broken is what fails by itself, not what fails on what it is sent."""

from service.health import Health

FAILED = RuntimeError("no")


def suspect(health: Health) -> str | None:
    return health.suspect  # a type checker that saw the property would take it for a constant


def failed(health: Health, column: str) -> str:
    return health.failed(column, FAILED, is_final=False, may_be_final=False)


def test_some_failures_in_a_row_make_a_column_suspect_and_one_success_clears_it() -> None:
    health = Health(2)
    assert [failed(health, column) for column in ("1", "2")] == ["", ""]
    assert suspect(health) is None
    assert failed(health, "2") == ""
    assert suspect(health) == "2"
    health.succeeded("1")
    assert suspect(health) == "2"
    health.succeeded("2")
    assert suspect(health) is None


def test_a_suspect_that_fails_once_more_is_broken() -> None:
    health = Health(2)
    assert [failed(health, "1") for _ in range(2)] == ["", ""]
    assert failed(health, "1") == "column 1 failed 3 times in a row, at last on a blank picture: no"


def test_a_lost_gpu_is_broken_at_once() -> None:
    assert Health(9).failed("1", FAILED, is_final=True, may_be_final=False) == "the GPU is lost: no"


def test_what_may_come_of_a_lost_gpu_makes_a_column_suspect_at_once() -> None:
    health = Health(9)
    assert health.failed("2", FAILED, is_final=False, may_be_final=True) == ""
    assert suspect(health) == "2"
    health.succeeded("2")
    assert suspect(health) is None
    assert health.failed("2", FAILED, is_final=False, may_be_final=True) == ""
    assert failed(health, "2") == "column 2 failed 2 times in a row, at last on a blank picture: no"
