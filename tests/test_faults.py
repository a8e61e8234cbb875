"""The fault tool on a miniature project: it must tell a noticed fault from every kind that is not."""

import subprocess
from pathlib import Path

import pytest

from tests import faults

SOURCE = """def larger(a, b):
    return a if a > b else b
"""

TESTS = """import larger, pytest

def test_larger():
    assert larger.larger(1, 2) == 2

def test_careless():
    larger.larger(1, 2)

def test_wrong():
    assert larger.larger(1, 2) == 1

@pytest.mark.skip("no browser here")
def test_skipped():
    assert larger.larger(1, 2) == 2
"""

SKIPPED_WHOLE = """import pytest
pytest.importorskip("no_such_module")
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A git work tree with one function, one test that holds it, one that does not, and one that is wrong."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "larger.py").write_text(SOURCE)
    (tree / "test_larger.py").write_text(TESTS)
    (tree / ".gitignore").write_text("/data/\n")
    (tree / "data").mkdir()
    (tree / "data" / "large.bin").write_bytes(bytes(9))
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    return tree


def commit(tree: Path, message: str) -> None:
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", message], cwd=tree, check=True)


def examine(tree: Path, lines: str, n: int | None = None) -> tuple[int, str]:
    said: list[str] = []
    n_ill = faults.examine(tree, faults.read_faults(lines), 1, said.append, n)
    return n_ill, "\n".join(said)


def test_a_fault_that_a_test_notices_is_fine_and_the_tree_stays_whole(tree: Path) -> None:
    n_ill, said = examine(tree, "larger.py ::: a > b ::: a < b ::: test_larger.py::test_larger")

    assert n_ill == 0
    assert "noticed" in said
    assert "1 of 1 faults noticed" in said
    assert (tree / "larger.py").read_text() == SOURCE


def test_each_fault_is_put_into_whole_code(tree: Path) -> None:
    n_ill, said = examine(
        tree,
        "larger.py ::: a > b ::: a < b ::: test_larger.py::test_larger\n"
        "larger.py ::: else b ::: else b + 0 ::: test_larger.py::test_larger\n",
    )

    assert n_ill == 1  # the second changes nothing, and the first must not be there any more
    assert "SURVIVED" in said


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("larger.py ::: a > b ::: a < b ::: test_larger.py::test_careless", faults.PASSED),
        ("larger.py ::: def larger ::: def larger( ::: test_larger.py::test_larger", faults.UNIMPORTABLE),
        (
            "larger.py ::: a > b ::: a < b ::: test_larger.py::test_wrong",
            "on the unbroken code: a test failed",
        ),
        (
            "larger.py ::: a > b ::: a < b ::: test_larger.py::test_none",
            "on the unbroken code: pytest could not",
        ),
        (
            "larger.py ::: a if ::: b if ::: test_larger.py -k nothing",
            "on the unbroken code: pytest could not",
        ),
        ("larger.py ::: b ::: c ::: test_larger.py::test_larger", "occurs 3 times in larger.py"),
        ("larger.py ::: a >= b ::: a < b ::: test_larger.py::test_larger", "occurs 0 times in larger.py"),
        ("absent.py ::: a ::: b ::: test_larger.py::test_larger", "cannot read absent.py"),
    ],
)
def test_a_fault_that_no_test_notices_is_told_with_its_reason(tree: Path, line: str, reason: str) -> None:
    n_ill, said = examine(tree, line)

    assert n_ill == 1
    assert reason in said
    assert "0 of 1 faults noticed" in said


@pytest.mark.parametrize("tests", ["test_larger.py::test_skipped", "test_skipped.py"])
def test_a_fault_whose_tests_are_all_skipped_is_untried_and_no_failure(tree: Path, tests: str) -> None:
    (tree / "test_skipped.py").write_text(SKIPPED_WHOLE)
    n_ill, said = examine(
        tree,
        f"larger.py ::: a > b ::: a < b ::: {tests}\n"
        "larger.py ::: a > b ::: a < b ::: test_larger.py::test_larger test_larger.py::test_skipped\n",
    )

    assert n_ill == 0
    assert "untried (skipped)  faults.txt:1" in said
    assert "1 of 1 faults noticed, 1 untried (skipped)" in said
    assert "SURVIVED" not in said


def test_a_fault_that_makes_its_tests_skip_survives(tree: Path) -> None:
    skipping = "import pytest; pytest.skip('by the fault')"
    n_ill, said = examine(
        tree, f"larger.py ::: return a if a > b else b ::: {skipping} ::: test_larger.py::test_larger"
    )

    assert n_ill == 1
    assert faults.SKIPPED in said


def test_a_sample_is_the_same_for_a_commit_and_another_for_the_next(tree: Path) -> None:
    lines = faults.read_faults("\n".join(f"a.py ::: x ::: {number} ::: t.py" for number in range(100)))
    commit(tree, "one")
    first, again = faults.sample(lines, 5, tree), faults.sample(lines, 5, tree)
    commit(tree, "two")
    other = faults.sample(lines, 5, tree)

    assert first == again == sorted(first, key=lambda fault: fault.line)
    assert len(set(first)) == 5
    assert set(first) != set(other)
    assert faults.sample(lines, 1000, tree) == lines


def test_outside_the_sample_a_misplaced_line_is_still_told(tree: Path) -> None:
    commit(tree, "one")
    good = "larger.py ::: a > b ::: a < b ::: test_larger.py::test_larger\n"
    n_ill, said = examine(tree, good * 3 + "absent.py ::: a ::: b ::: test_larger.py::test_larger\n", n=1)

    assert n_ill == 1
    assert "cannot read absent.py" in said
    assert "1 of 2 faults noticed" in said


def test_what_git_ignores_is_not_copied(tree: Path, tmp_path: Path) -> None:
    faults.copy_tree(tree, tmp_path / "copy")

    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        ".gitignore",
        "larger.py",
        "test_larger.py",
    ]


def test_pipes_quotes_and_hashes_stand_for_themselves() -> None:
    [fault] = faults.read_faults('# a remark\n\na.py ::: x: int | None = "#"  ::: ::: t.py -k "one or two"\n')

    assert fault.original == 'x: int | None = "#"'
    assert fault.replacement == ""
    assert fault.tests == ("t.py", "-k", "one or two")
    assert fault.line == 3


@pytest.mark.parametrize(
    "line",
    ["a.py ::: x ::: y", "a.py ::: ::: y ::: t.py", "a.py ::: x ::: y :::", "a.py ::: x ::: x ::: t.py"],
)
def test_a_line_that_is_no_fault_is_refused_with_its_number(line: str) -> None:
    with pytest.raises(ValueError, match=r"faults\.txt:2"):
        faults.read_faults(f"# first\n{line}")
