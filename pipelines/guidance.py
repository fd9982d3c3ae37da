"""The network of a call under guidance: by a scale, a guider of diffusers, a weaker network, and a classifier."""

import copy
from contextlib import nullcontext

import torch


def told_beside(call, network, model_input):
    """What a network is told beside its conditions: the time to which its map leads, and the guidance scale whose
    effect it has learned, (B,) each."""
    told, n = {}, len(model_input)
    # a consistency model is trained without: it always leads to the same time
    leads = call._timestep_to is not None and call.scheduler.config.get("network_map") == "flow_map"
    if leads and network.config.get("two_times"):
        told["timestep_to"] = call._timestep_to.expand(n)
    if network.config.get("guidance_embeds"):
        told["guidance"] = torch.full((n,), float(call._guidance_scale), device=model_input.device)
    return told


def knows_guidance(config):
    """Whether the network of this config has learned guidance, so that one evaluation does the work of two."""
    return bool(config.get("guidance_embeds")) or config.get("folded_guidance") is not None


def run(name, network, conditions, model_input, timesteps, call):
    """The network's output in float32. diffusers' feature caches keep what was computed under one name apart from what
    was under another."""

    def in_its_dtype(value):
        # whole numbers, such as tokens, labels and masks, stay what they are
        return value.to(network.dtype) if value.is_floating_point() else value

    # times and scales stay float32
    conditions = {key: in_its_dtype(value) for key, value in conditions.items()}
    conditions |= told_beside(call, network, model_input)
    with network.cache_context(name) if hasattr(network, "cache_context") else nullcontext():
        return network(in_its_dtype(model_input), timesteps, **conditions).sample.float()


def sides(call, networks, model_input, timesteps):
    """(what a network predicts for the conditions that guidance leads to, what one predicts for those that it leads
    away from), float32; None for the side that the scale, or a network that has learned guidance, leaves out. See
    `guided`, whose arguments these are."""
    origin, target = networks
    scale, conditions = call._guidance_scale, call._conditions
    away, to = ({name: value[row] for name, value in conditions.items()} for row in (0, -1))
    if scale == 1 or is_alone(call) or knows_guidance(target.config):
        return run("with a class", target, to, model_input, timesteps, call), None
    if scale == 0:
        return None, run("without a class", origin, away, model_input, timesteps, call)
    if origin is target:
        both = {name: torch.cat([to[name], away[name]]) for name in to}
        output = run("with a class", target, both, torch.cat([model_input] * 2), torch.cat([timesteps] * 2), call)
        return tuple(output.chunk(2))
    towards = run("with a class", target, to, model_input, timesteps, call)
    return towards, run("without a class", origin, away, model_input, timesteps, call)


def is_alone(call):
    """Whether a callback has ended guidance: it left the conditions with nothing that it leads away from."""
    return any(len(value) == 1 for value in call._conditions.values())


def guided(call, networks, guider=None):
    """The network under guidance, which leads from what one network predicts for one set of conditions to what another,
    or the same one, predicts for another.

    Args:
        call: what may change between evaluations: its `_timestep_to`, where a map leads; and by callbacks its
            `_guidance_scale`, and its `_conditions` {name: (2, B, ...)}, those that guidance leads away from first; one
            with the last alone, (1, B, ...), ends it.
        networks: those that guidance leads away from and to; the same one twice runs once on a doubled batch.
        guider: one of `diffusers.guiders`, instead of the scale.

    Returns f(model_input (B, C, ...), timesteps (B,)) -> output, float32.
    """
    origin, target = networks
    guider, evaluations = copy.deepcopy(guider), 0

    def network(model_input, timesteps):
        if guider is not None and not is_alone(call):
            away, to = ({name: value[row] for name, value in call._conditions.items()} for row in (0, -1))
            return by_guider(model_input, timesteps, (to, away))
        towards, start = sides(call, networks, model_input, timesteps)
        if start is None or towards is None:
            return start if towards is None else towards
        return start + call._guidance_scale * (towards - start)

    def by_guider(model_input, timesteps, conditions):
        nonlocal evaluations
        guider.set_state(evaluations, len(call.scheduler.timesteps), timesteps[0])
        evaluations += 1
        names = "with a class", "without a class"
        batches = guider.prepare_inputs({"name": names, "network": (target, origin), "conditions": conditions})
        for batch in batches:
            guider.prepare_models(batch.network)
            batch.noise_pred = run(batch.name, batch.network, batch.conditions, model_input, timesteps, call)
            guider.cleanup_models(batch.network)
        return guider(batches).pred

    return network


def steered_by_classifier(scheduler, network, classifier, classes, scale):
    """The network with `scale` times the gradient of the classifier's log p(class | x_t) added to its score (Song et
    al. 2021, section 5), for `classes` (B,)."""

    def towards_class(x, t, denoise):
        with torch.enable_grad():
            noisy = x.detach().requires_grad_()
            model_input, half_log_snr = scheduler.classifier_input(noisy, t)
            logits = classifier(model_input.to(classifier.dtype), half_log_snr).logits
            chosen = torch.log_softmax(logits, dim=1).gather(1, classes[:, None])
            [gradient] = torch.autograd.grad(chosen.sum(), noisy)
        return scheduler.path.add_to_score(denoise(x, t), scale * gradient, t)

    return scheduler.steered(network, towards_class)
