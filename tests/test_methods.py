"""Every property of tests/conformance.py on every row of tests/cases.py."""

import itertools
from collections.abc import Iterator

import jax
import pytest
from cases import CASES
from conformance import ONCE_A_METHOD, PROPERTIES, REQUIRES, Property
from subject import Subject, is_variant, row_id, subject_of

import pefts

_rows_done = itertools.count(1)


@pytest.fixture(scope="module", params=CASES, ids=row_id)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    yield subject_of(request.param)
    # Some thirty programs a row, of which another row runs those of the base alone: gigabytes, if
    # all were kept, and the base's compiled anew for each row, if none were.
    if next(_rows_done) % 3 == 0:
        jax.clear_caches()


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.__name__)
def test_method(subject: Subject, prop: Property) -> None:
    need, holds = REQUIRES.get(prop, ("", lambda _: True))
    if not holds(subject):
        pytest.skip(f"needs {need}")
    if prop in ONCE_A_METHOD and is_variant(subject.case):
        pytest.skip("runs on the method's first row of this kind")
    prop(subject)


def test_every_method_has_a_row() -> None:
    assert {row.method for row in CASES} == set(pefts.METHODS)


def test_rows_have_names_of_their_own() -> None:
    names = [row_id(row) for row in CASES]
    assert len(names) == len(set(names)), names
