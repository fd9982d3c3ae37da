"""Data and an autoencoder for small runs."""

import datasets
import pytest
from places import ROOT

from runs import EMBEDDED_TRAIN, TINY_DATA, run
from score_sde.training import train_autoencoder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """60 real images, so that encoding takes no time."""
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    data = datasets.Dataset.from_parquet(str(ROOT / EMBEDDED_TRAIN))
    data.select(range(0, 10_000, 167)).to_parquet(path)
    return str(path)


@pytest.fixture
def tiny_vae(tmp_path, small_data):
    arguments = ["--block_out_channels", 8, 8, "--norm_num_groups", 4, "--lr_warmup_steps", 0, "--batch_size", 4]
    run(
        train_autoencoder.main,
        *TINY_DATA,
        *arguments,
        *("--dataset", small_data, "--max_train_steps", 3, "--output_dir", tmp_path / "autoencoder"),
    )
    return tmp_path / "autoencoder" / "vae"
