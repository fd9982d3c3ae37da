"""Reference runs of token diffusion: text and molecules, beside n-grams and autoregressive transformers of the same
size that were trained on the same tokens by the same loop.

    python benchmarks/ngrams.py --data DATA
    python benchmarks/discrete.py --data DATA --runs RUNS --parts train --only qm9 --seconds 1800
    python benchmarks/discrete.py --data DATA --runs RUNS --parts train --only qm9_autoregressive
    python benchmarks/discrete.py --data DATA --runs RUNS              # all that can be measured of what is there

DATA holds qm9_smiles_{split}.parquet, classics_{split}.parquet and tinyshakespeare.txt; RUNS gets a folder for each
training of `RUNS_OF`. Every part goes on where it was stopped; what a part has found stands in OUTPUT.json and isn't
measured again.

- train: in order, those of --only; an autoregressive one takes as many steps as its diffusion model has.
- likelihood: bits per character of the test split, a bound with its standard error; of autoregressive models exact.
- molecules: 10,000 samples of each model: valid, unique, novel, and how QED and logP are distributed.
- guidance: samples of the highest class of QED, without guidance and with it.
- infilling: molecules that begin with a ring, or hold one.
- steps: what every sampler makes of how many evaluations: the share of valid molecules; of text, bits per character
  under the n-grams, beside the entropy of its letters, which falls where a sampler repeats itself.
- report: tables, pictures, and the cards' figures.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from autoregressive import NextToken
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from ngrams import Alphabet, NGrams, read_texts
from safetensors.torch import load_file

from score_sde import DiscreteScoreScheduler, DiTModel, ScoreSDETextPipeline, load_bundle
from score_sde.pipelines.writing import write_json
from score_sde.schedulers.discrete_solvers import PREDICTORS
from score_sde.sharing.bundles import add_metrics, save_bundle
from score_sde.sharing.facts import read_json
from score_sde.sharing.model_card import write_card
from score_sde.training import evaluate
from score_sde.training.parts.molecules import (
    canonical_smiles,
    counts,
    draw_histograms,
    draw_molecules,
    properties,
    wasserstein,
)
from score_sde.training.parts.plots import plot_runs
from score_sde.training.parts.provenance import provenance
from score_sde.training.parts.tokenizers import make_tokenizer


# its networks aren't told the time, without which p(x0 | x_t) of a token that may be noise is unknown
UNIFORM = ["--process", "uniform", "--prediction_type", "leave_one_out"]
# {run: (its configuration, its data set, more options)}; an autoregressive one is of the same configuration
RUNS_OF = {
    "qm9": ("qm9/diffusion", "qm9_smiles", []),
    "classics_words": ("classics_words/diffusion", "classics", []),
    "classics_words_uniform": ("classics_words/diffusion", "classics", UNIFORM),
    "classics_words_uniform_from_masked": ("classics_words/diffusion", "classics", UNIFORM),
    "classics": ("classics/diffusion", "classics", []),
    "classics_uniform": ("classics/diffusion", "classics", UNIFORM),
    "tinyshakespeare": ("tinyshakespeare/diffusion", "tinyshakespeare", []),
    "tinyshakespeare_uniform": ("tinyshakespeare/diffusion", "tinyshakespeare", UNIFORM),
    "tinyshakespeare_uniform_from_masked": ("tinyshakespeare/diffusion", "tinyshakespeare", UNIFORM),
}
BASELINE = "_autoregressive"
# goes on with the weights of the run of the same name without it, whose noise is masks
FROM_MASKED = "_uniform_from_masked"
# of other data and far larger networks (12 layers of 768, 27 symbols, 90 million characters, up to a million steps)
PUBLISHED = {"SEDD absorb": 1.39, "MDLM": 1.40, "autoregressive": 1.23}
# the pieces of words of classics_words
PIECES = 4096
# what molecules are drawn for
PROMPTS = {"a ring in front": "c1cc", "a ring within": "[MASK]c1ccoc1[MASK]", "an amide within": "[MASK]NC(=O)[MASK]"}
# {run: its folder in model_cards}, and what of a pipeline is there
CARDS = {"qm9": "qm9", "classics_words": "classics"}
CARD_FILES = ("model_index.json", "training.json", "metrics.json", "samples.png", "*/*config.json")
# {name: (options of the scheduler, of the call)}: the model's own distribution; an order that prefers what is likely;
# one that prefers what has no rival, colder; and one that draws again, colder, what it has drawn
MOLECULE_SAMPLERS = {
    "first_hitting": ({"predictor": "first_hitting"}, {}),
    "confidence": ({"predictor": "confidence"}, {}),
    "margin": ({"predictor": "margin"}, {"temperature": 0.6}),
    "remasking": (
        {"predictor": "ancestral", "corrector": "remasking", "remasking_eta": 0.1},
        {"temperature": 0.25, "num_inference_steps": 70},
    ),
}
STEPS = (2, 4, 8, 16, 32, 64)
GUIDANCE = (1.0, 2.0, 4.0)


class Findings:
    """What has been measured, {key: JSON-able}, in a file that is whole after every part."""

    def __init__(self, path):
        self.path, self.found = path, read_json(path) or {}

    def once(self, key, measure):
        """What `measure`() finds, or has found before under this key."""
        if key not in self.found:
            began = time.process_time()
            value = measure()
            if value is None:
                return None
            self.found[key] = value | {"processor_seconds": round(time.process_time() - began, 1)}
            write_json(self.path, self.found)
            print(key, json.dumps({k: v for k, v in self.found[key].items() if not isinstance(v, (list, dict))}))
        return self.found[key]


# --- trainings ----------------------------------------------------------------------------------------------------


def data_options(options, name):
    if name == "tinyshakespeare":
        folder = options.runs / "tinyshakespeare_data"
        folder.mkdir(exist_ok=True)
        for split in ("train", "validation", "test"):
            [text] = read_texts(options.data, name, split)
            (folder / f"{split}.txt").write_text(text, encoding="utf-8")
        return ["--dataset", folder / "{split}.txt"]
    return ["--dataset", options.data / f"{name}_{{split}}.parquet"]


def train(options, findings):
    for run in options.only or RUNS_OF:
        config, data, more = RUNS_OF[run.removesuffix(BASELINE)]
        command = [sys.executable, "-m", "score_sde.cli", "train"]
        if run.endswith(BASELINE):
            facts = options.runs / run.removesuffix(BASELINE) / "pipeline" / "training.json"
            more = ["--max_train_steps", json.loads(facts.read_text())["steps"]]
            command = [sys.executable, Path(__file__).with_name("autoregressive.py")]
        if run.endswith(FROM_MASKED):
            start = options.runs / f"{run}_start"
            if not start.exists():
                uniform_start(options.runs / run.removesuffix(FROM_MASKED) / "pipeline", start)
            # its network is that of the start
            more = [*more, "--init_from", start, "--network_kwargs", "{}"]
        command += [config, *data_options(options, data), "--output_dir", options.runs / run, *more]
        if config.startswith("classics_words"):
            folder = options.runs / f"pieces_{PIECES}"
            if not folder.exists():
                texts = read_texts(options.data, "classics", "train")
                make_tokenizer("bpe", texts, PIECES, end_mark=True).save_pretrained(folder)
            command += ["--tokenizer", folder]
        if options.seconds and not run.endswith(BASELINE):
            command += ["--max_train_seconds", options.seconds]
        command += ["--resume_from_checkpoint", "latest", *options.training]
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = subprocess.run(list(map(str, command)))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, time.monotonic() - began
        with open(options.runs / f"{run}.cpu", "a") as file:
            print(*(f"{each:.1f}" for each in used), file=file)
        ended.check_returncode()


def uniform_start(masked, folder):
    """Save a pipeline of uniform noise whose network has the weights of one that learned masks, and is told the time:
    by zeros at first, so that its outputs are the same."""
    pipeline = load_bundle(masked)
    network = DiTModel.from_config(pipeline.transformer.config, time_conditioning=True)
    network.load_state_dict(pipeline.transformer.state_dict(), strict=False)
    vocab_size = pipeline.scheduler.config.vocab_size
    scheduler = DiscreteScoreScheduler(vocab_size, process="uniform", prediction_type="leave_one_out")
    save_bundle(ScoreSDETextPipeline(scheduler, network, pipeline.tokenizer), folder)


def processor_seconds(options, run):
    """What a training took, of all its parts."""
    path = options.runs / f"{run}.cpu"
    lines = path.read_text().split("\n") if path.exists() else []
    return sum(sum(map(float, line.split()[:2])) for line in lines if line.strip())


def trained(options, diffusion=True):
    """The runs that are through, in the order of `RUNS_OF`."""
    names = [name if diffusion else name + BASELINE for name in RUNS_OF]
    marks = {True: "pipeline/model_index.json", False: "autoregressive.json"}
    return [name for name in names if (options.runs / name / marks[diffusion]).exists()]


def open_model(options, run):
    pipeline = load_bundle(options.runs / run / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- parts --------------------------------------------------------------------------------------------------------


def likelihood(options, findings):
    for run in trained(options):
        folder = options.runs / run / "pipeline"

        def measure(folder=folder):
            arguments = ["--pipeline", folder, "--likelihood", options.sequences, "--num_times", 8, "--num_texts", 0]
            # without the classes, which would be told for nothing
            evaluate.main(list(map(str, [*arguments, "--batch_size", 64, "--label_column", "none"])))
            metrics = json.loads((folder / "metrics.json").read_text())
            found = {each["type"]: each for each in metrics if each.get("split") == "test"}
            return {name: found[name] for name in ("bits_per_token", "bits_per_character")}

        findings.once(f"likelihood {run}", measure)


def samples_of(pipeline, count, batch_size=1000, seed=0, **settings):
    """(texts, mean evaluations of each)."""
    texts, evaluated, generator = [], 0.0, torch.Generator().manual_seed(seed)
    while len(texts) < count:
        size = min(batch_size, count - len(texts))
        output = pipeline(batch_size=size, generator=generator, **settings)
        texts += output.texts
        evaluated += float(output.nfe_of_each.sum())
    return texts, evaluated / count


def open_baseline(options, run):
    """(the network of an autoregressive run, the tokenizer of its diffusion model)."""
    pipeline = open_model(options, run.removesuffix(BASELINE))
    kwargs = {key: pipeline.transformer.config[key] for key in ("hidden_size", "num_layers", "num_attention_heads")}
    network = NextToken(pipeline.vocab_size, pipeline.length, kwargs)
    network.llama.load_state_dict(load_file(options.runs / run / "model" / "model.safetensors"))
    return network.eval(), pipeline


def molecule_texts(options, run, count, sampler):
    """(samples of a run, of its classes in turn, each as often as it is in the data; mean evaluations of each)."""
    if run.endswith(BASELINE):
        network, pipeline = open_baseline(options, run)
        return pipeline.decode(network.sample(count, pipeline.length, pipeline.tokenizer.eos_token_id)), None
    pipeline, texts, evaluated = open_model(options, run), [], []
    of_scheduler, of_call = MOLECULE_SAMPLERS[sampler]
    pipeline.scheduler = DiscreteScoreScheduler.from_config(pipeline.scheduler.config, **of_scheduler)
    labels = [i % pipeline.num_classes for i in range(1000)] if pipeline.num_classes else None
    for start in range(0, count, 1000):
        size = min(1000, count - start)
        settings = {"class_labels": labels and labels[:size], "num_inference_steps": options.molecule_steps}
        found, each = samples_of(pipeline, size, seed=start, **(settings | of_call))
        texts, evaluated = texts + found, [*evaluated, each]
    return texts, float(np.mean(evaluated))


def molecules(options, findings):
    known = set(read_texts(options.data, "qm9_smiles", "train"))
    real = properties(read_texts(options.data, "qm9_smiles", "test"))
    diffusion, others = ([each for each in trained(options, kind) if "qm9" in each] for kind in (True, False))
    models = [(run, sampler) for sampler in MOLECULE_SAMPLERS for run in diffusion]
    for run, sampler in [*models, *((run, "") for run in others)]:

        def measure(run=run, sampler=sampler):
            texts, nfe = molecule_texts(options, run, options.molecules, sampler)
            path = options.runs / f"{run}_{sampler}_samples.txt"
            path.write_text("\n".join(texts) + "\n", encoding="utf-8")
            own = properties([smiles for smiles in canonical_smiles(texts) if smiles])
            distances = {f"distance_of_{name}": wasserstein(own[name], real[name]) for name in own}
            means = {f"mean_{name}": float(own[name].mean()) for name in own}
            return counts(texts, known) | distances | means | {"evaluations": nfe}

        findings.once(f"molecules {run} {sampler}".strip(), measure)


def guidance(options, findings):
    if "qm9" not in trained(options):
        return
    pipeline, known = open_model(options, "qm9"), set(read_texts(options.data, "qm9_smiles", "train"))
    pipeline.scheduler = DiscreteScoreScheduler.from_config(pipeline.scheduler.config, predictor="first_hitting")
    highest = pipeline.num_classes - 1
    for scale in GUIDANCE:

        def measure(scale=scale):
            settings = {"class_labels": highest, "guidance_scale": scale}
            texts, nfe = samples_of(pipeline, options.guided, num_inference_steps=options.molecule_steps, **settings)
            valid = [smiles for smiles in canonical_smiles(texts) if smiles]
            own = {name: values.round(4).tolist() for name, values in properties(valid).items()}
            limit = float(pipeline.config.id2label[str(highest)].split(" to ")[0])
            share = float((np.array(own["qed"]) >= limit).mean())
            found = {"mean_qed": float(np.mean(own["qed"])), "share_in_class": share, "evaluations": nfe}
            return counts(texts, known) | found | {"properties": own, "smiles": valid[:48]}

        findings.once(f"guidance {scale:g}", measure)


def infilling(options, findings):
    if "qm9" not in trained(options):
        return
    pipeline = open_model(options, "qm9")
    for name, prompt in PROMPTS.items():

        def measure(prompt=prompt):
            # gaps of every size that the length of a molecule leaves, for the text before and behind
            prompts = [prompt]
            if "[MASK]" in prompt:
                middle = prompt.removeprefix("[MASK]").removesuffix("[MASK]")
                prompts = [before * "[MASK]" + middle + behind * "[MASK]" for before in (2, 4) for behind in (2, 4)]
            size = 200 // len(prompts)
            prompts = [each for each in prompts for _ in range(size)]
            generator = torch.Generator().manual_seed(0)
            texts = pipeline(
                prompt=prompts, complete="[MASK]" in prompt, num_inference_steps=pipeline.length, generator=generator
            ).texts
            valid = [smiles for smiles in canonical_smiles(texts) if smiles]
            return {"samples": len(texts), "valid": len(valid), "texts": texts[:24]}

        findings.once(f"infilling {name}", measure)


def samplers(process):
    """{name: options of the scheduler} of all that there are for a process."""
    rows = {name: {"predictor": name} for name, row in PREDICTORS.items() if process in row.processes}
    if process == "absorbing":
        return rows | {"remasking": {"predictor": "ancestral", "corrector": "remasking"}}
    return rows | {"gibbs": {"predictor": "ancestral", "corrector": "gibbs"}}


def steps(options, findings):
    for run in trained(options):
        pipeline = open_model(options, run)
        judge = judged_molecules if run.startswith("qm9") else judge_of_texts(options, RUNS_OF[run][1])
        process = pipeline.scheduler.config.process
        for name, settings in samplers(process).items():
            scheduler = DiscreteScoreScheduler.from_config(pipeline.scheduler.config, **settings)
            pipeline.scheduler = scheduler
            for count in [*(each for each in STEPS if each < pipeline.length), pipeline.length][: len(STEPS)]:

                def measure(pipeline=pipeline, count=count, judge=judge, run=run):
                    size = options.texts if judge is not judged_molecules else options.sampler_molecules
                    classes = pipeline.num_classes
                    told = {"class_labels": [i % classes for i in range(size)]} if classes else {}
                    texts, nfe = samples_of(pipeline, size, size, num_inference_steps=count, **told)
                    return judge(texts) | {"evaluations": nfe, "samples": size}

                findings.once(f"steps {run} {name} {count}", measure)


def judged_molecules(texts):
    valid = [smiles for smiles in canonical_smiles(texts) if smiles]
    return {"valid": len(valid) / len(texts), "unique": len(set(valid)) / max(len(valid), 1)}


def judge_of_texts(options, data):
    """What `steps` says of texts: bits per character under n-grams, of the order that is best on test, and the entropy
    of letters in bits."""
    order = {"tinyshakespeare": 5, "classics": 7}[data]
    train, test = (read_texts(options.data, data, split) for split in ("train", "test"))
    alphabet = Alphabet(train)
    # one more for what the model writes and the data never hold
    model = NGrams([alphabet.encode(text) for text in train], len(alphabet.characters) + 1, order)

    def judge(texts):
        unknown = len(alphabet.characters)
        rows = [np.array([alphabet.numbers.get(c, unknown) for c in text], np.int64) for text in texts if text]
        share = np.bincount(np.concatenate(rows)) / sum(map(len, rows))
        entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
        return {"ngram_bits": float(-model.log2_probabilities(rows)[-1].mean()), "letter_entropy": float(entropy)}

    print(f"{data}: real texts", judge([text[:2000] for text in test][:64]))
    return judge


# --- what is written ----------------------------------------------------------------------------------------------


def report(options, findings):
    found, folder = findings.found, options.output.parent
    print(bits_table(options, found), molecule_table(options, found), guidance_table(found), sep="\n\n")
    for run in trained(options):
        draw_steps(found, run, f"{options.output}_{run}_steps.png")
    runs = [options.runs / run for run in (*trained(options), *trained(options, False))]
    for data in ("qm9", "classics", "tinyshakespeare"):
        own = [each for each in runs if each.name.startswith(data)]
        if own:
            plot_runs(own, f"{options.output}_{data}_curves.png")
    guided = {f"guidance {scale:g}": found.get(f"guidance {scale:g}") for scale in GUIDANCE}
    guided = {name: each for name, each in guided.items() if each}
    if guided:
        real = properties(read_texts(options.data, "qm9_smiles", "test"))
        named = {name: {k: np.array(v) for k, v in each["properties"].items()} for name, each in guided.items()}
        draw_histograms({"test molecules": real} | named, f"{options.output}_guidance.png")
        best = guided[f"guidance {GUIDANCE[1]:g}"]["smiles"][:32]
        legends = [f"QED {qed:.2f}" for qed in properties(best)["qed"]]
        draw_molecules(best, f"{options.output}_guided_molecules.png", legends)
    samples = options.runs / "qm9_first_hitting_samples.txt"
    if samples.exists():
        valid = [smiles for smiles in canonical_smiles(samples.read_text().split("\n")[:200]) if smiles][:48]
        draw_molecules(valid, options.runs / "qm9" / "pipeline" / "samples.png")
        draw_molecules(valid, folder / "discrete_molecules.png")
        add_metrics(options.runs / "qm9" / "pipeline", molecule_metrics(options, found))
    if options.cards:
        write_cards(options)


def write_cards(options):
    """Copy what is small of the pipelines into model_cards."""
    for run, name in CARDS.items():
        pipeline, card = options.runs / run / "pipeline", Path(__file__).parents[1] / "model_cards" / name
        if pipeline.is_dir():
            for path in (path for pattern in CARD_FILES for path in sorted(pipeline.glob(pattern))):
                target = card / path.relative_to(pipeline)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            write_card(str(card))


def bits_table(options, found):
    """Bits per character, of molecules with their end mark, a row for each model."""
    lines = ["| data | model | parameters | steps | sequences seen | processor s | bits per character |"]
    lines += ["|---|---|---|---|---|---|---|"]
    path = Path(__file__).with_name("ngrams.json")
    counted = json.loads(path.read_text())["bits_per_character"] if path.exists() else {}
    for data, values in counted.items():
        best = min(range(len(values)), key=values.__getitem__)
        lines += [f"| {data} | {best + 1}-grams, the best | | | | | {values[best]:.3f} |"]
    for run in trained(options):
        facts = json.loads((options.runs / run / "pipeline" / "training.json").read_text())
        bits = found.get(f"likelihood {run}", {}).get(unit_of(run))
        cell = "" if bits is None else f"at most {bits['value']:.3f} ± {bits['standard_error']:.3f}"
        size = f"{facts['parameters']:,} | {facts['steps']:,} | {facts['images_seen']:,}"
        lines += [f"| {RUNS_OF[run][1]} | {run} | {size} | {processor_seconds(options, run):,.0f} | {cell} |"]
    for run in trained(options, False):
        facts = json.loads((options.runs / run / "autoregressive.json").read_text())
        cell = f"{facts['test'][unit_of(run)]:.3f}"
        if "bits_per_character_with_full_context" in facts:
            cell += f"; with full context {facts['bits_per_character_with_full_context']:.3f}"
        size = f"{facts['parameters']:,} | {facts['steps']:,} | {facts['images_seen']:,}"
        data = RUNS_OF[run.removesuffix(BASELINE)][1]
        lines += [f"| {data} | {run} | {size} | {processor_seconds(options, run):,.0f} | {cell} |"]
    published = ", ".join(f"{name} {value:.2f}" for name, value in PUBLISHED.items())
    return "\n".join(
        [*lines, "", f"Published, of text8, 90 million characters, and networks of 92 million: {published}."]
    )


def unit_of(run):
    """What the n-grams' figures are of: molecules have an end mark, which is a token."""
    return "bits_per_token" if run.startswith("qm9") else "bits_per_character"


def molecule_table(options, found):
    lines = ["| model | valid | unique of valid | novel of unique | valid, unique and novel of all | QED | logP |"]
    lines += ["|---|---|---|---|---|---|---|"]
    path = Path(__file__).with_name("ngrams.json")
    counted = json.loads(path.read_text())["molecules"] if path.exists() else {}
    rows = {f"{order}-grams": counted[order] for order in ("5", "10") if order in counted}
    rows |= {key.removeprefix("molecules "): each for key, each in found.items() if key.startswith("molecules ")}
    for name, row in rows.items():
        shares = row["valid"] / row["samples"], row["unique"] / row["valid"], row["novel"] / row["unique"]
        shares = (*shares, row["novel"] / row["samples"])
        away = [f"{row[key]:.3f}" if key in row else "" for key in ("distance_of_qed", "distance_of_logp")]
        lines += [f"| {name} | {' | '.join([*(f'{share:.1%}' for share in shares), *away])} |"]
    return "\n".join(lines)


def guidance_table(found):
    lines = ["| guidance | mean QED | in the class | valid | unique of valid |", "|---|---|---|---|---|"]
    for scale in GUIDANCE:
        row = found.get(f"guidance {scale:g}")
        if row:
            shares = [row["share_in_class"], row["valid"] / row["samples"], row["unique"] / row["valid"]]
            lines += [f"| {scale:g} | {row['mean_qed']:.3f} | {' | '.join(f'{share:.1%}' for share in shares)} |"]
    return "\n".join(lines)


def draw_steps(found, run, path):
    """Quality against evaluations, a line for each sampler."""
    keys = {key: value for key, value in found.items() if key.startswith(f"steps {run} ")}
    if not keys:
        return
    names = ("valid", "unique") if run.startswith("qm9") else ("ngram_bits", "letter_entropy")
    titles = {"valid": "share of valid molecules", "unique": "share of different ones among them"}
    titles |= {"ngram_bits": "bits per character under n-grams", "letter_entropy": "entropy of letters, bits"}
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), names, strict=True):
        for sampler in dict.fromkeys(key.split()[2] for key in keys):
            points = [value for key, value in keys.items() if key.split()[2] == sampler]
            axes.plot([p["evaluations"] for p in points], [p[name] for p in points], "o-", ms=3, lw=1, label=sampler)
        axes.set(title=titles[name], xlabel="evaluations of a sequence, mean")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def molecule_metrics(options, found):
    """The figures for the card of qm9: of the model's own distribution, and of more valid molecules."""
    shares = {"valid molecules": ("valid", "samples"), "unique of valid": ("unique", "valid")}
    shares |= {"novel of unique": ("novel", "unique")}
    shared = {"type": "share", "split": "train", "seed": 0, "dataset": "qm9_smiles"}
    shared |= {"num_inference_steps": options.molecule_steps, "guidance_scale": 1.0} | provenance(torch.device("cpu"))
    metrics = []
    for sampler in ("first_hitting", "margin"):
        row, temperature = found[f"molecules qm9 {sampler}"], MOLECULE_SAMPLERS[sampler][1].get("temperature", 1.0)
        how = shared | {"sampler": sampler, "temperature": temperature, "nfe": round(row["evaluations"])}
        at = f"{sampler} at temperature {temperature:g}"
        metrics += [
            {"name": f"{name}, {at}", "value": round(row[part] / row[whole], 4), "n": row[whole]}
            | {"explanation": f"{row[part]:,} of {row[whole]:,}, in canonical SMILES."}
            | how
            for name, (part, whole) in shares.items()
        ]
    return metrics


PARTS = {"train": train, "likelihood": likelihood, "molecules": molecules, "guidance": guidance}
PARTS |= {"infilling": infilling, "steps": steps, "report": report}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--runs", type=Path, default=Path("runs/discrete"), help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/discrete"), help="without .json and .png")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[each for each in PARTS if each != "train"])
    parser.add_argument("--only", nargs="+", choices=[*RUNS_OF, *(name + BASELINE for name in RUNS_OF)])
    parser.add_argument("--seconds", type=float, help="of a training, in which its learning rate falls")
    parser.add_argument("--sequences", type=int, default=2000, help="of the bound (default: %(default)s)")
    parser.add_argument("--molecules", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--molecule_steps", type=int, default=35, help="time steps of those (default: %(default)s)")
    parser.add_argument("--guided", type=int, default=1000, help="molecules of a guidance (default: %(default)s)")
    parser.add_argument("--sampler_molecules", type=int, default=500, help="of a sampler (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=16, help="of a sampler (default: %(default)s)")
    parser.add_argument("--cards", action="store_true", help="report: also copy the cards into model_cards")
    parser.add_argument("--training", nargs=argparse.REMAINDER, default=[], help="last: more options of the training")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    findings = Findings(Path(f"{options.output}.json"))
    for part in options.parts:
        PARTS[part](options, findings)


if __name__ == "__main__":
    main()
