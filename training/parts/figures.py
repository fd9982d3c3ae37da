"""Figures as metrics.json and the card have them."""

import numpy as np
import torch

from score_sde.sharing.facts import dataset_name

from .metrics import frechet_distance, inception_score, kernel_distance, moments, precision_and_recall
from .real_images import trained_on, training_facts
from .sources import on_hub


# how the Hub calls metrics in a model index
METRIC_TYPES = {"FID": "fid", "kernel distance (KID)": "kid", "inception score": "inception_score"}


def distance_metrics(tables, real, network, facts, config, accelerator):
    """The metrics of the features of some sets of images beside those of real ones."""
    real, _ = real.columns()
    found = {}
    for table in tables:
        features, logits = table.columns()
        values = {"Fréchet distance": frechet_distance(*moments(features), *moments(real))}
        values["kernel distance (KID)"] = kernel_distance(features, real, seed=config.seed)[0]
        values["precision"], values["recall"] = precision_and_recall(real, features, device=accelerator.device)
        if logits is not None:
            values["inception score"] = inception_score(logits, seed=config.seed)[0]
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    metrics, count = [], config.num_images
    for name, values in found.items():
        name = "FID" if (name, network.name) == ("Fréchet distance", "Inception") else name
        what = f"{count:,} samples"
        if name != "inception score":
            what += f" to the {len(real):,} images of {config.reference_split}{of_other_data(config)}"
        metric = {"name": f"{name} of {what}, {network.name}", "value": float(f"{np.mean(values):.5g}"), "n": count}
        metric |= {"type": METRIC_TYPES.get(name, name), "split": config.reference_split, "features": network.name}
        metric |= {"reference_images": len(real), "repeats": len(values)} | facts
        if config.features == "classifier":
            metric |= classifier_facts(config)
        if len(values) > 1:
            metric["explanation"] = (
                f"mean of {len(values)} sets of samples, standard deviation {np.std(values, ddof=1):.3g}."
            )
        metrics.append(metric)
        print(f"{metric['name']}: {metric['value']}")
    return metrics


def class_metrics(recognised, correct, facts, config):
    """The metrics of a classifier that recognised real images or didn't, (N,), and generated ones."""
    real, generated = (float(each.float().mean()) for each in (recognised, correct))
    print(f"the classifier recognises {real:.1%} of {len(recognised)} real test images")
    print(f"and {generated:.1%} of {len(correct)} samples as the class asked for")
    return [
        {
            "name": f"classifier accuracy on real images{of_other_data(config)}",
            "type": "accuracy",
            "value": round(real, 4),
            "n": len(recognised),
            "split": config.test_split,
            "explanation": f"share of real {config.test_split} images that the classifier recognises; it was "
            f"trained on the images of split {config.split}.",
        }
        | classifier_facts(config),
        {
            "name": f"classifier accuracy on samples{of_other_data(config)}",
            "type": "accuracy",
            "value": round(generated, 4),
            "n": len(correct),
            "split": config.split,
            "explanation": "share of samples that the same classifier recognises as the class asked for.",
        }
        | classifier_facts(config)
        | facts,
    ]


def pair_errors(images, truth, measurement=None):
    """The mean squared errors of images (B, C, H, W) in [-1, 1] that were drawn by what was seen of the true ones, and
    of what is measured of them, where that is a `Measurement`: (B, 1) or (B, 2)."""
    pairs = [(images, truth)]
    if measurement is not None:
        pairs.append((measurement.operator(images), measurement.operator(truth)))
    return torch.stack([(one - other).square().flatten(1).mean(1) for one, other in pairs], dim=1)


def pair_metrics(errors, measured, facts, config):
    """The metrics of `pair_errors` (N, ...); `measured` is the name of the measurement, None without."""
    # an exact image counts as 100 dB; a peak of 2 from -1 to 1
    psnr = float((10 * (4 / errors[:, 0].double().clamp_min(4e-10)).log10()).mean())
    found = [("PSNR", "psnr", psnr, "of samples to the images whose condition images they were shown, in dB.")]
    if measured is not None:
        residual = float(errors[:, 1].double().mean().sqrt())
        what = f"root mean square difference between {measured} of the samples and of these images, from -1 to 1."
        found.append(("residual", "residual", residual, what))
    metrics = []
    for name, kind, value, explanation in found:
        metric = {"name": f"{name} of {len(errors):,} samples to {config.test_split} images{of_other_data(config)}"}
        metric |= {"type": kind, "value": float(f"{value:.5g}"), "n": len(errors), "split": config.test_split}
        metrics.append(metric | {"explanation": explanation} | facts)
        print(f"{metric['name']}: {metric['value']}")
    return metrics


def classifier_facts(config):
    return {"classifier_split": config.split, "classifier_epochs": config.classifier_epochs}


def of_other_data(config):
    """What a figure's name says where the real images are not those that the pipeline was trained on."""
    if trained_on(config, training_facts(config)):
        return ""
    return f" of {dataset_name({'dataset': config.dataset, 'dataset_on_hub': on_hub(config.dataset)})}"


def sampling_facts(pipeline, nfe, config):
    """How samples were drawn, with the corrector where there is one."""
    corrector = pipeline.scheduler.config.get("corrector")
    return {
        "sampler": pipeline.scheduler.config.get("predictor") or type(pipeline.scheduler).__name__,
        **({"corrector": corrector} if corrector is not None else {}),
        "num_inference_steps": config.num_inference_steps,
        "nfe": nfe,
        "guidance_scale": config.guidance_scale,
    } | averaging_facts(config)


def averaging_facts(config):
    """Which average the weights of the pipeline are, as far as its training.json says."""
    facts = training_facts(config)
    found = {"ema_decay": facts.get("config", {}).get("ema_decay"), "ema_sigma_rel": facts.get("ema_sigma_rel")}
    return {name: value for name, value in found.items() if value is not None}
