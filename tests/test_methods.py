"""Every property of tests/conformance.py on every row of tests/cases.py."""

from collections.abc import Iterator

import jax
import pytest
from cases import CASES
from conformance import PROPERTIES, REQUIRES, Property
from subject import Subject, row_id, subject_of

import pefts


@pytest.fixture(scope="module", params=CASES, ids=row_id)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    yield subject_of(request.param)
    # Some thirty programs a row, none of which another row runs: gigabytes, if they were kept.
    jax.clear_caches()


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.__name__)
def test_method(subject: Subject, prop: Property) -> None:
    need, holds = REQUIRES.get(prop, ("", lambda _: True))
    if not holds(subject):
        pytest.skip(f"needs {need}")
    prop(subject)


def test_every_method_has_a_row() -> None:
    assert {row.method for row in CASES} == set(pefts.METHODS)


def test_rows_have_names_of_their_own() -> None:
    names = [row_id(row) for row in CASES]
    assert len(names) == len(set(names)), names
