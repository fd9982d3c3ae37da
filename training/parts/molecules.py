"""Molecules as SMILES strings: which are valid, how they are distributed, their pictures. Needs rdkit."""

import re

import numpy as np
from matplotlib.figure import Figure

from score_sde.pipelines.writing import whole_file


# what molecules are compared by: name, and what it is called in figures
PROPERTIES = {"qed": "QED", "logp": "logP"}
# sides of a molecule in a grid, in pixels
TILE = (180, 140)


def open_rdkit():
    """rdkit's module Chem. Raises ValueError where rdkit is missing."""
    try:
        from rdkit import Chem
    except ImportError:
        raise ValueError("molecules need rdkit: pip install 'score-sde[molecules]'") from None
    return Chem


def canonical_smiles(texts):
    """The canonical SMILES of each text, without stereo; None of one that is no molecule.

    A molecule is what rdkit reads with its checks of valence and aromaticity, and has at least one atom. SMILES have no
    white space: what stands behind one rdkit would take for a name, whatever it is."""
    chem = open_rdkit()
    from rdkit import rdBase

    found = []
    with rdBase.BlockLogs():  # an error message for each text that is none
        for text in texts:
            molecule = None if re.search(r"\s", text) else chem.MolFromSmiles(text)
            is_one = molecule is not None and molecule.GetNumAtoms() > 0
            found.append(chem.MolToSmiles(molecule, isomericSmiles=False) if is_one else None)
    return found


def counts(texts, known):
    """How many texts are molecules, how many of these differ, and how many of those are new.

    Args:
        texts: generated SMILES, in any form.
        known: canonical SMILES that the model was trained on.

    Returns:
        {"samples": n, "valid": n, "unique": n, "novel": n}: each a part of the one before, after canonicalisation.
    """
    valid = [smiles for smiles in canonical_smiles(texts) if smiles is not None]
    unique = set(valid)
    return {"samples": len(texts), "valid": len(valid), "unique": len(unique), "novel": len(unique - set(known))}


def properties(smiles):
    """{"qed": (N,), "logp": (N,)} of N valid SMILES: drug-likeness in [0, 1] (Bickerton et al. 2012), and the logarithm
    of the partition coefficient between octanol and water by Crippen's atom contributions (Wildman & Crippen 1999)."""
    chem = open_rdkit()
    from rdkit.Chem import QED, Crippen

    molecules = [chem.MolFromSmiles(each) for each in smiles]
    return {
        "qed": np.array([QED.qed(each) for each in molecules]),
        "logp": np.array([Crippen.MolLogP(each) for each in molecules]),
    }


def wasserstein(first, second):
    """The Wasserstein-1 distance of two samples of numbers, (N,) and (M,): the area between their distribution
    functions, in their unit."""
    places = np.sort(np.concatenate([first, second]))
    below = [np.searchsorted(np.sort(each), places[:-1], side="right") / len(each) for each in (first, second)]
    return float((np.abs(below[0] - below[1]) * np.diff(places)).sum())


def molecule_figures(texts, real, data):
    """Shares of generated texts that are molecules, different ones, and new ones, and how far the distributions of
    their properties are from those of real ones: a row of `text_figures.FIGURES`. A share of none, or a distance to
    none, is left out, and so is what is new where the data are others than those of the training."""
    trained = data.trained
    found = counts(texts, () if trained is None else [smiles for smiles in canonical_smiles(trained) if smiles])
    samples, valid, unique, novel = (found[name] for name in ("samples", "valid", "unique", "novel"))
    shares = [
        ("valid molecules", valid, samples, f"of {samples:,} texts those that rdkit reads, with at least one atom"),
        ("unique molecules", unique, valid, f"of {valid:,} valid texts the different ones, in canonical SMILES"),
    ]
    if trained is None:
        print("novel molecules are left out: they are told from those of the training alone, and these data are others")
    else:
        new = f"of {unique:,} different molecules those that are not in the training data"
        shares += [
            ("novel molecules", novel, unique, f"{new}, {len(trained):,} texts"),
            ("valid, unique and novel", novel, samples, f"of {samples:,} texts"),
        ]
    figures = [
        {"name": name, "value": part / whole, "n": samples, "explanation": f"{explanation}."}
        for name, part, whole, explanation in shares
        if whole
    ]
    own, theirs = (properties([smiles for smiles in canonical_smiles(each) if smiles]) for each in (texts, real))
    for name, title in PROPERTIES.items() if valid and len(theirs["qed"]) else ():
        distance = wasserstein(own[name], theirs[name])
        explanation = (
            f"Wasserstein-1 distance between the {title} of {valid:,} valid samples, mean {own[name].mean():.3f}, and "
            f"of {len(theirs[name]):,} real molecules, mean {theirs[name].mean():.3f}."
        )
        figures.append(
            {
                "name": f"distance of {title} to real molecules",
                "value": distance,
                "n": valid,
                "explanation": explanation,
            }
        )
    return figures


def draw_molecules(smiles, path, legends=None, columns=8):
    """Write a grid of molecules as a .png file; `legends` are short texts below them."""
    chem = open_rdkit()
    from rdkit.Chem import Draw

    molecules = [chem.MolFromSmiles(each) for each in smiles]
    grid = Draw.MolsToGridImage(molecules, legends=legends, molsPerRow=columns, subImgSize=TILE)
    with whole_file(path) as temporary:
        grid.save(temporary, format="PNG")


def draw_histograms(named, path, bins=40):
    """Draw the distributions of properties side by side into a .png file.

    Args:
        named: {label: what `properties` returns}.
    """
    figure = Figure(figsize=(5.5 * len(PROPERTIES), 3.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PROPERTIES)), PROPERTIES.items(), strict=True):
        every = np.concatenate([each[name] for each in named.values()])
        edges = np.linspace(*np.quantile(every, [0.001, 0.999]), bins + 1)
        for label, values in named.items():
            axes.hist(values[name], edges, density=True, histtype="step", label=label, linewidth=1.4)
        axes.set(title=title, yticks=[])
        axes.legend(fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
