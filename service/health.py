"""When what runs columns is to be called broken, so that only a new process helps.

Pure: must not know of clocks, event loops or requests.
"""


class Health:
    """Judges by the runs that end, good or bad.

    One error of a kind that a GPU does not get over is enough. Otherwise some failures of one column in a row
    make it suspect, or one that may be of that kind; then it is to be tried on a blank picture, because the
    pictures may have been at fault: nobody should be able to have a server restarted by what is sent to it.

    Args:
        n_failures: In a row, of one column, before it is suspect. Larger: more requests fail meanwhile.
    """

    def __init__(self, n_failures: int) -> None:
        self._n_failures = n_failures
        self._in_a_row: dict[str, int] = {}
        self._in_doubt: dict[str, None] = {}

    @property
    def suspect(self) -> str | None:
        """The column that is to be run next, on a blank picture."""
        return next(iter(self._in_doubt), None)

    def succeeded(self, column: str) -> None:
        """Take in the end of a run."""
        if self._in_a_row.pop(column, 0):
            self._in_doubt.pop(column, None)

    def failed(self, column: str, error: BaseException, *, is_final: bool, may_be_final: bool) -> str:
        """Take in the end of a run; returns why everything is broken, or nothing if it is not.

        Args:
            column: What was run.
            error: What the run raised.
            is_final: It is an error that a GPU does not get over.
            may_be_final: It may be the consequence of one.
        """
        was_tried = column == self.suspect
        n = self._in_a_row[column] = self._in_a_row.get(column, 0) + 1
        if is_final:
            return f"the GPU is lost: {error}"
        if was_tried:
            return f"column {column} failed {n} times in a row, at last on a blank picture: {error}"
        if may_be_final or n >= self._n_failures:
            self._in_doubt[column] = None
        return ""
