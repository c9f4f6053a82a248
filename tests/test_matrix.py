"""The compatibility matrix: the document says what is recorded, and what is recorded happens again."""

import matrix_cases as matrix
import pytest


@pytest.fixture(scope="module")
def recorded():
    return matrix.read_record()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("matrix")
    matrix.save_model(path)
    return path


def test_every_combination_is_recorded(recorded):
    assert recorded.keys() == {cell.key for cell in matrix.all_cells()}


def test_every_combination_runs_as_it_should_or_is_refused_by_a_sentence_about_a_key(recorded):
    for key, facts in recorded.items():
        assert facts["run"] == matrix.OK or facts["run"].startswith(("adapter.", "memory.", "quantization.")), key
        assert facts.get("resume", matrix.OK) == matrix.OK, key


def test_the_document_is_made_from_the_record(recorded):
    assert matrix.DOCUMENT.read_text() == matrix.document_of(recorded)


def test_the_record_survives_writing_and_reading(recorded):
    assert matrix.record_of(recorded) == matrix.RECORD.read_text()


def test_a_sample_has_its_recorded_outcome(recorded, folder):
    cells = matrix.sample(recorded)
    found = matrix.outcomes(cells, folder)
    assert found == {cell.key: recorded[cell.key] for cell in cells}


@pytest.mark.nightly
def test_every_combination_has_its_recorded_outcome(recorded, tmp_path):
    matrix.save_model(tmp_path)
    assert matrix.outcomes(matrix.all_cells(), tmp_path, at_once=matrix.AT_ONCE) == recorded
