"""Molecules as strings: which are valid, known figures of known molecules, distances of distributions, pictures."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import stats


pytest.importorskip("rdkit")

from score_sde.training.parts.molecules import (  # noqa: E402
    TILE,
    canonical_smiles,
    counts,
    draw_histograms,
    draw_molecules,
    molecule_figures,
    properties,
    wasserstein,
)


def test_a_molecule_has_atoms_that_close_their_rings_within_their_valence(capfd):
    texts = ["OCC", "CCO", "", "C1CC", "C(", "FF(F)F", "c1cccc1", "c1ccccc1", "C[C@H](N)O", "xyz"]
    none = [None] * 4
    assert canonical_smiles(texts) == ["CCO", "CCO", None, *none, "c1ccccc1", "CC(N)O", None]
    # rdkit would take what stands behind white space for a name
    assert canonical_smiles(["CC(( ", "CCO xx", "CC O((", " CC", "CC\n", "CC\u2028C"]) == [None] * 6
    # a sample is often wrong, and nobody wants to read how
    assert capfd.readouterr() == ("", "")


def test_counts_are_of_what_differs_after_canonicalisation():
    found = counts(["OCC", "C(O)C", "CO", "CC", "C1"], known=["CCO", "C"])
    assert found == {"samples": 5, "valid": 4, "unique": 3, "novel": 2}
    assert counts(["C1", ""], known=[]) == {"samples": 2, "valid": 0, "unique": 0, "novel": 0}


def test_properties_are_the_published_ones():
    found = properties(["CC(=O)Oc1ccccc1C(=O)O", "c1ccccc1"])
    # aspirin, rdkit's own documentation; benzene, six times C18 and H1 of Wildman & Crippen 1999, Table 1
    assert abs(found["qed"][0] - 0.5501) < 1e-4
    assert abs(found["logp"][1] - 6 * (0.1581 + 0.1230)) < 1e-4


def test_the_wasserstein_distance_is_that_of_scipy():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=40), rng.normal(0.4, 2, size=17)
    assert abs(wasserstein(first, second) - stats.wasserstein_distance(first, second)) < 1e-12
    assert abs(wasserstein(first, first + 0.3) - 0.3) < 1e-12


def test_figures_of_samples_are_shares_of_what_is_before_them():
    data = SimpleNamespace(trained=["OCC", "CN"])
    found = {each["name"]: each for each in molecule_figures(["CCO", "OCC", "CCC", "C1"], ["CCO", "CCC"], data)}
    values = {name: each["value"] for name, each in found.items()}
    shares = {"valid molecules": 3 / 4, "unique molecules": 2 / 3, "novel molecules": 1 / 2}
    assert values == shares | {"valid, unique and novel": 1 / 4} | {
        name: values[name] for name in values if "dist" in name
    }
    logp = properties(["CCO", "CCC"])["logp"]
    expected = stats.wasserstein_distance([logp[0], logp[0], logp[1]], logp)
    assert abs(values["distance of logP to real molecules"] - expected) < 1e-12
    assert found["valid molecules"]["n"] == 4 and "of 4 texts" in found["valid molecules"]["explanation"]
    # of no molecule nothing is known but that
    found = molecule_figures(["C1"], ["CCO"], data)
    assert {each["name"]: each["value"] for each in found} == {"valid molecules": 0, "valid, unique and novel": 0}
    # what is new beside other data than those of the training is not known
    other = {each["name"] for each in molecule_figures(["CCO", "CCC"], ["CCO"], SimpleNamespace(trained=None))}
    assert {name for name in other if "distance" not in name} == {"valid molecules", "unique molecules"}
    # and of real texts that are none, no distance
    found = molecule_figures(["CCO"], ["C1"], data)
    assert not [each["name"] for each in found if "distance" in each["name"]]


def test_pictures_of_molecules_and_their_properties(tmp_path):
    draw_molecules(["CCO", "c1ccccc1", "C"], tmp_path / "grid.png", legends=["0.1", "0.2", "0.3"], columns=2)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 * TILE[0], 2 * TILE[1])
        # something is drawn in each tile that has a molecule, nothing in the last
        pixels = np.asarray(grid.convert("L"))
    tiles = pixels.reshape(2, TILE[1], 2, TILE[0]).min(axis=(1, 3))
    assert (tiles.ravel() < 255).tolist() == [True, True, True, False]
    values = properties(["CCO", "CCCO", "CCCCO"])
    draw_histograms({"test": values, "samples": values}, tmp_path / "histograms.png")
    with Image.open(tmp_path / "histograms.png") as picture:
        assert picture.width > 2 * picture.height
