"""Click logs: ids, numbers and labels as a table has them, and the log that is made up."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from echelon.data.clicks import Clicks, ClickSchema, read_table, synthetic_log
from echelon.errors import UserError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


LOG = "when,click,site,tags,price\n1,0,a,x|y,0\n2,1,b,,3\n3,0,a,y|z|x,7\n4,1,,z,\n"
SAID = {"dense": ["price"], "several": ["tags"], "ignore": ["when"]}


def test_a_generic_log_becomes_the_ids_and_numbers_written_down_here(tmp_path):
    path = write(tmp_path / "log.csv", LOG)
    schema = ClickSchema.fit(path, **SAID)
    assert (schema.label, schema.fields, schema.slots, schema.vocab_sizes) == ("click", ("site", "tags"), (1, 3), [4, 5])
    clicks = schema.read(path)
    assert clicks.sparse_ids.tolist() == [[2, 2, 3, 0], [3, 0, 0, 0], [2, 3, 4, 2], [0, 4, 0, 0]]
    assert clicks.labels.tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(clicks.dense[:, 0].numpy(), [0, np.log(4) / np.log(8), 1, 0], rtol=1e-6)


def test_new_values_are_unseen_and_rare_ones_have_no_id(tmp_path):
    schema = ClickSchema.fit(write(tmp_path / "log.csv", LOG), **SAID, min_count=2)
    assert schema.values == (("a",), ("x", "y", "z"))
    new = schema.read(write(tmp_path / "new.csv", "click,site,tags,price\n1,b,q|x,1\n0,a,,2\n"))
    assert new.sparse_ids.tolist() == [[1, 1, 2, 0], [2, 0, 0, 0]]


def test_the_schema_survives_the_disk(tmp_path):
    schema = ClickSchema.fit(write(tmp_path / "log.csv", LOG), **SAID, threshold=0.5)
    schema.save_pretrained(tmp_path)
    assert ClickSchema.load(tmp_path) == schema
    write(tmp_path / "click_schema.json", "{")
    with pytest.raises(UserError, match="cannot read"):
        ClickSchema.load(tmp_path)


def test_criteos_own_files_have_tabs_and_no_header(tmp_path):
    rows = [["1", *map(str, range(13)), *[f"h{i}" for i in range(26)]], ["0", *[""] * 13, *[f"h{i + 1}" for i in range(25)], ""]]
    path = write(tmp_path / "train.txt", "\n".join("\t".join(row) for row in rows) + "\n")
    schema = ClickSchema.fit(path)
    assert schema.dense[0] == "I1" and schema.fields[-1] == "C26"
    clicks = schema.read(path)
    assert clicks.sparse_ids.shape == (2, 26) and clicks.dense.shape == (2, 13) and clicks.labels.tolist() == [1, 0]
    assert clicks.sparse_ids[1, 25] == 0 and schema.values[0] == ("h0", "h1")


@pytest.mark.parametrize(
    ("text", "said", "error"),
    [
        ("click,site\n2,a\n", {}, "row 1: click is '2'; it must be 0 or 1"), ("click,site\n", {}, "empty"), ("click\n1\n", {}, "no field of ids"),
        ("site\na\n", {}, "no column 'label'; it has site"), ("click,site,p\n1,a,dear\n", {"dense": ["p"]}, "p is 'dear'"),
        ("click,site\n1,a\n", {"dense": ["price"]}, "no column 'price'"), ("", {}, "cannot read"),
    ],
)  # fmt: skip
def test_a_bad_log_is_one_clear_error(tmp_path, text, said, error):
    path = write(tmp_path / "log.csv", text)
    with pytest.raises(UserError, match=error) as caught:
        ClickSchema.fit(path, **said).read(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read .*nowhere"):
        read_table(tmp_path / "nowhere.csv")


def test_no_rows_are_no_log():
    with pytest.raises(ValueError, match="empty"):
        Clicks(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 1), torch.zeros(0))
    with pytest.raises(ValueError, match="equally many"):
        Clicks(torch.zeros(3, 2, dtype=torch.long), torch.zeros(2, 1), torch.zeros(3))


def test_splits_and_batches_hold_every_row_once():
    rows = torch.arange(103)
    clicks = Clicks(rows[:, None], rows[:, None].float(), (rows % 2).float())
    train, valid = clicks.split(0.1, seed=3)
    assert sorted([*train.sparse_ids[:, 0].tolist(), *valid.sparse_ids[:, 0].tolist()]) == rows.tolist() and len(valid) == 10
    again = clicks.split(0.1, seed=3)[1]
    assert torch.equal(valid.sparse_ids, again.sparse_ids) and not torch.equal(valid.sparse_ids, clicks.split(0.1, seed=4)[1].sparse_ids)
    assert clicks.split(0.0)[1] is None
    mixed = torch.cat([batch["sparse_ids"] for batch in clicks.batches(10, torch.Generator().manual_seed(0))])[:, 0]
    assert mixed.tolist() != rows.tolist() and sorted(mixed.tolist()) == rows.tolist()
    drawn = clicks.sample(20, seed=1).sparse_ids[:, 0].tolist()
    assert len(set(drawn)) == 20 and drawn == sorted(drawn)


def test_the_made_up_log_is_zipfian_deterministic_and_leaves_the_random_state_alone():
    state, theirs = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    table, chances = synthetic_log(20000, fields=3, values=500, zipf=1.1, noise=0.2, seed=5)
    assert torch.equal(state, torch.random.get_rng_state()) and (theirs == np.random.get_state()[1]).all()
    pd.testing.assert_frame_equal(table, synthetic_log(20000, fields=3, values=500, zipf=1.1, noise=0.2, seed=5)[0])
    assert not table.equals(synthetic_log(20000, fields=3, values=500, zipf=1.1, noise=0.2, seed=6)[0])
    counts = table["C1"][table["C1"] != ""].value_counts()
    assert abs((table["C1"] == "").mean() - 0.2) < 0.02
    slope = np.polyfit(np.log(np.arange(1, 51)), np.log(counts[[f"v{i}" for i in range(50)]].to_numpy()), 1)[0]
    assert -1.2 < slope < -1.0
    # The labels are drawn with the chances that are told: bin by bin they agree.
    labels = table["label"].astype(int).to_numpy()
    for low in np.arange(0, 1, 0.2):
        inside = (chances >= low) & (chances < low + 0.2)
        assert abs(labels[inside].mean() - chances[inside].mean()) < 4 * 0.5 / inside.sum() ** 0.5


@pytest.mark.skipif("ECHELON_DATA" not in os.environ, reason="ECHELON_DATA does not name the folder of public data")
def test_the_public_samples_are_read():
    folder = Path(os.environ["ECHELON_DATA"]) / "ctr_sample"
    criteo = ClickSchema.fit(folder / "criteo_sample.txt")
    clicks = criteo.read(folder / "criteo_sample.txt")
    raw = pd.read_csv(folder / "criteo_sample.txt")
    assert clicks.sparse_ids.shape == (200, 26) and clicks.dense.shape == (200, 13) and clicks.labels.sum() == raw["label"].sum()
    assert ((clicks.sparse_ids.numpy() == 0) == raw[[f"C{i}" for i in range(1, 27)]].isna().to_numpy()).all()
    assert criteo.vocab_sizes == [raw[f"C{i}"].nunique() + 2 for i in range(1, 27)]
    films = ClickSchema.fit(
        folder / "movielens_sample.txt", label="rating", threshold=4, several=["genres"], ignore=["timestamp", "title"], dense=["age"]
    )  # fmt: skip
    genres = pd.read_csv(folder / "movielens_sample.txt")["genres"].str.split("|")
    read = films.read(folder / "movielens_sample.txt")
    assert films.slots[films.fields.index("genres")] == genres.map(len).max()
    assert ((read.sparse_ids[:, 2 : 2 + genres.map(len).max()] != 0).sum(1).numpy() == genres.map(len).to_numpy()).all()
