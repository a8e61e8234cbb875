"""The record of a request with several pictures."""

import pytest

from service.engine import Served
from service.models import Answer, together


def answer(settled_s: float, accuracy: float, decode_s: float) -> Answer:
    served = Served(
        outcome="answered",
        arrived_s=0.0,
        deadline_s=1.0,
        settled_s=settled_s,
        queue_s=settled_s / 4,
        inference_s=settled_s / 2,
        columns_run=("1",),
        accuracy=accuracy,
        stopped_by="budget",
    )
    return Answer(served, decode_s)


def test_several_pictures_are_one_request_that_ends_with_the_last_of_them() -> None:
    whole = together([answer(0.2, 0.8, 0.01), answer(0.4, 0.9, 0.02), answer(0.1, 1.0, 0.03)])

    assert (whole.served.settled_s, whole.served.queue_s, whole.served.inference_s) == (0.4, 0.1, 0.2)
    assert whole.served.accuracy == pytest.approx(0.9)
    assert whole.decode_s == pytest.approx(0.06)
