"""Tasks from tensorflow-datasets, in array_record files and without TensorFlow."""

import sys
from pathlib import Path

import pytest

import data
from data import tfds_source


def write_builder(folder: Path):
    """Prepare a builder of 20 + 5 + 4 examples; the test split hides its labels."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    features = tfds.features

    class Sentences(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=features.FeaturesDict(
                    {
                        "sentence": features.Text(),
                        "other": features.Text(),
                        "kind": features.Text(),
                        "label": features.ClassLabel(names=["bad", "good"]),
                    }
                ),
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(20),
                "validation": self._generate_examples(5),
                "test": self._generate_examples(4, hidden=True),
            }

        def _generate_examples(self, count, hidden=False):
            for i in range(count):
                label = -1 if hidden else i % 2
                yield (
                    i,
                    {"sentence": f"caf\xe9 {i}", "other": f"o {i}", "kind": "nv"[i % 2]}
                    | {"label": label},
                )

    builder = Sentences(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def test_tfds_folder_of_array_records(tmp_path):
    folder = write_builder(tmp_path)
    task = data.load("tfds", source=folder)
    assert task.labels == ("bad", "good")
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 20, "dev": 5}
    found = {(row.text, row.label) for row in task.splits["train"]}
    assert found == {(f"caf\xe9 {i}", ("bad", "good")[i % 2]) for i in range(20)}
    pairs = tfds_source.load(
        folder, pair="other", label="kind", splits={"train": "train[:15]", "dev": "train[15:]"}
    )
    assert pairs.labels == ("n", "v")
    assert {s: len(rows) for s, rows in pairs.splits.items()} == {"train": 15, "dev": 5}
    assert all(row.text[4:] == row.pair[1:] for row in pairs.splits["train"])
    with pytest.raises(ValueError, match="text='text'.*features.*sentence"):
        tfds_source.load(folder, text="text")
    with pytest.raises(ValueError, match="split 'nope' of"):
        tfds_source.load(folder, splits={"train": "nope"})
    with pytest.raises(ValueError, match=r"split .train. of task .* has no examples"):
        tfds_source.load(folder, splits={"train": "test"})
    with pytest.raises(ValueError, match="a folder without a prepared builder"):
        tfds_source.load(tmp_path)


def test_tfds_by_name_with_mock_data(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    splits = {"train": "train", "dev": "validation"}
    with tfds.testing.mock_data(num_examples=6):
        task = tfds_source.load("glue/mrpc", text="sentence1", pair="sentence2", splits=splits)
    assert task.labels == ("not_equivalent", "equivalent")
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 6, "dev": 6}
    assert all(row.pair for row in task.splits["train"])
    with pytest.raises(ValueError, match="has no prepared split"):
        tfds_source.load("glue/sst2", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"neither a folder nor a data set.*data_dir="):
        tfds_source.load("no_such_data_set", data_dir=tmp_path)


def test_tfds_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets importlib_resources"):
        tfds_source.load("glue/sst2")
