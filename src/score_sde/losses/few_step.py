"""Objectives for one to four evaluations: networks that map a noisy sample along the probability-flow ODE.

In the coordinates (9) of `paths` with k = 1, y = x / (alpha + sigma) and u = sigma / (alpha + sigma), every path is the
straight one, y = (1 - u) x0 + u noise. A flow map from time t to s, of u and r there, is given by its mean velocity U:

(1)  y_s = y_t + (r - u) U(x_t, t, s),   U = (x_t - c D(x_t, t, s)) / sigma,   D = a x_t + b F

with the network's output F and the row of what it predicts: D stands where a denoised sample stands in a step of DDIM,
and at s = t, where U is the ODE's velocity V, it is one. U obeys, along the ODE (MeanFlow, Geng et al. 2025, Eq. 6),

(2)  U = V - (u - r) dU/du

and for any time m between s and t, r < w < u,

(3)  (u - r) U(x_t, t, s) = (u - w) U(x_t, t, m) + (w - r) U(x_m, m, s).

A consistency model is the map to s = t_min (Song et al. 2023). Which velocity V stands in these says what is learned:
that of the data given the noise, noise - x0, whose mean is the ODE's; or a teacher's.
"""

import logging
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..schedulers.checks import check_choice
from ..schedulers.paths import as_time, expand_all, expand_to, sent


logger = logging.getLogger(__name__)


# --- maps ---------------------------------------------------------------------------------------------------------


def _coefficients(scheduler, t):
    """(of_y, of_output, of_input, timestep) at t, float64: U = of_y y_t + of_output F(of_input y_t, timestep)."""
    if scheduler.domain is not None:
        raise ValueError(f"few steps are learned in flat space, not on domain {scheduler.config.domain!r}")
    (a, b, input_scale), path = scheduler.parameterization.row(t), scheduler.path
    sigma, (c, _) = path.sigma(t), path.straight_coordinates(t, 1.0)
    return torch.stack(
        torch.broadcast_tensors(c * (1 - c * a) / sigma, -c * b / sigma, c * input_scale, _timestep(scheduler, t))
    )


def _timestep(scheduler, t):
    return scheduler.parameterization.timestep(t).to(as_time(t).dtype)


def place(scheduler, t):
    """u = sigma / (alpha + sigma) at times t, float64, the shape of t."""
    return scheduler.path.straight_coordinates(t, 1.0)[1]


def straight_sample(scheduler, x, t):
    """y_t = x_t / (alpha + sigma) of samples (B, ...) at times (B,)."""
    return x / expand_to(scheduler.path.straight_coordinates(t, 1.0)[0], x)


def _told(scheduler, s, x):
    """The keyword that tells a network where the map leads to."""
    return {} if s is None else {"timestep_to": sent(scheduler.timestep(s), x.device, torch.float32)}


def mean_velocity(network, scheduler, y, t, s=None, conditions=None):
    """U of Eq. (1).

    Args:
        network: called as network(x, timestep, timestep_to=, **conditions).sample; without timestep_to where s is None.
        scheduler: the `ScoreSDEScheduler` that will sample: it owns the path and what the output means.
        y: samples in straight coordinates (B, C, ...). t: their times (B,), float64.
        s: times (B,) to which the map leads; None for a network that isn't told: of an ordinary one U is the ODE's
            velocity, of a consistency model it leads to t_min.
        conditions: {keyword of the network's forward: tensor (B, ...)}; None for none.

    Returns (B, C, ...), dy/du on the average of the way from t to s.
    """
    table = sent(_coefficients(scheduler, t), y.device, torch.promote_types(y.dtype, torch.float32))
    of_y, of_output, of_input = expand_all(table[:3].unbind(), y)
    told = _told(scheduler, s, y)
    output = network(of_input * y, table[3].float(), **told, **conditions or {}).sample[:, : y.shape[1]]
    return of_y * y + of_output * output


def flow_map(network, scheduler, x, t, s, conditions=None, told=True):
    """Samples x_s (B, C, ...) at the end of the map from x_t at t to s, by one evaluation.

    Args:
        network, scheduler, conditions: see `mean_velocity`. x: samples (B, C, ...) at times t (B,). s: times (B,).
        told: False for a network that isn't told s.
    """
    y = straight_sample(scheduler, x, t)
    way = expand_to(place(scheduler, s) - place(scheduler, t), y)
    y = y + way * mean_velocity(network, scheduler, y, t, s if told else None, conditions)
    return y * expand_to(scheduler.path.straight_coordinates(s, 1.0)[0], y)


def guided(velocity, without, scale):
    """Classifier-free guidance of velocities: without + scale (velocity - without), scale () or (B,): 1 leaves a sample
    as it is, such as one whose condition was dropped."""
    return without + expand_to(as_time(scale), velocity) * (velocity - without)


# --- derivatives --------------------------------------------------------------------------------------------------


def _dropout_of_now(device):
    """A context in which random numbers are those that come next now, whenever it is entered; it uses none of them
    up."""
    own = [device] if device.type == "cuda" else []
    state, states = torch.get_rng_state(), [torch.cuda.get_rng_state(each) for each in own]

    @contextmanager
    def again():
        # of this device alone, of however many there are
        with torch.random.fork_rng(own):
            torch.set_rng_state(state)
            for each, its_state in zip(own, states, strict=True):
                torch.cuda.set_rng_state(its_state, each)
            yield

    return again


def _by_jvp(function, inputs, tangents):
    # of the kernels of attention this one has a forward derivative
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(function, inputs, tangents)


# of the way along the tangents: what float32 loses by cancelling is here about what the step leaves out
STEP = 1e-3


def _by_difference(function, inputs, tangents):
    device = inputs[0].device
    # the dropout of the function's own value
    again = _dropout_of_now(device)

    def moved(step):
        with again(), torch.no_grad(), torch.autocast(device.type, enabled=False):
            return function(*(each + step * tangent for each, tangent in zip(inputs, tangents, strict=True))).float()

    slope = (moved(STEP) - moved(-STEP)) / (2 * STEP)
    return function(*inputs), slope


# f(function, inputs, tangents) -> (its value, its derivative along the tangents)
DERIVATIVES = {"jvp": _by_jvp, "finite_difference": _by_difference}


def mean_velocity_and_slope(network, scheduler, y, t, s, direction, conditions=None, derivative="jvp"):
    """(U, dU/du): the mean velocity, and its derivative at fixed s along a path of velocity `direction` = dy/du.

    Args:
        network, scheduler, y, t, s, conditions: see `mean_velocity`. direction: (B, C, ...).
        derivative: of the network: "jvp", torch's forward derivative, for which attention runs by its plain kernel; or
            "finite_difference", in float32, of two more evaluations.

    Returns two tensors (B, C, ...); the second takes no gradient.
    """
    check_choice("derivative", derivative, DERIVATIVES)
    t = as_time(t)
    table, slopes = torch.func.jvp(lambda t: _coefficients(scheduler, t), (t,), (torch.ones_like(t),))
    # by u instead of by t
    rate = torch.func.jvp(lambda t: place(scheduler, t), (t,), (torch.ones_like(t),))[1]
    both = sent(torch.cat([table, slopes / rate]), y.device, torch.promote_types(y.dtype, torch.float32))
    of_y, of_output, of_input, more_y, more_output, more_input = expand_all([*both[:3], *both[4:7]], y)
    told = _told(scheduler, s, y)

    def output_of(scaled, timestep):
        return network(scaled, timestep, **told, **conditions or {}).sample[:, : y.shape[1]]

    # steps of the finite difference stay within (0, 1): they shrink towards both ends
    u = sent(place(scheduler, t), y.device, torch.float32)
    reach = u * (1 - u)
    wide = expand_to(reach, y)
    tangents = wide * (of_input * direction + more_input * y), reach * both[7].float()
    output, slope = DERIVATIVES[derivative](output_of, (of_input * y, both[3].float()), tangents)
    slope = more_y * y + of_y * direction + more_output * output + of_output * slope / wide
    return of_y * y + of_output * output, slope.detach()


# of u, in noise, to either side: there steps of log(sigma / alpha) are hardly any way in u, and divided by it, what a
# network rounds in bfloat16 would be most of the slope
LEAST_DIFFERENCE = 0.02


def mean_velocity_and_wide_slope(network, scheduler, y, t, s, direction, conditions=None, step=0.5):
    """(U, dU/du) as of `mean_velocity_and_slope`, the derivative by a central difference along that path, of times at
    which log(sigma / alpha) is larger and smaller by `step`, in noise also u by LEAST_DIFFERENCE where s is told, but
    at most t_max and at least s (None: t_min).

    Its error is of second order in `step`. What a network does between the times that it has seen, which its embedding
    of 1000 t lets it, is averaged away, where the derivative itself is hardly anything else; and a network may compute
    in bfloat16. One that always leads to t_min learns better by `step` alone (benchmarks/README.md).
    """
    path, u = scheduler.path, place(scheduler, t)
    last, first = (place(scheduler, each) for each in (scheduler.t_max, scheduler.t_min if s is None else s))
    log_level = torch.logit(u, 1e-4)
    least = 0.0 if s is None else LEAST_DIFFERENCE * (u > 0.5)
    later = torch.sigmoid(log_level + step).maximum(u + least).minimum(last)
    earlier = torch.sigmoid(log_level - step).minimum(u - least).maximum(first)
    # the same dropout in all three
    again = _dropout_of_now(y.device)

    @torch.no_grad()
    def moved(place_there):
        there = path.t_from_straight(place_there, 1.0).clamp(scheduler.t_min, scheduler.t_max)
        with again():
            y_there = y + expand_to(place_there - u, y) * direction
            return mean_velocity(network, scheduler, y_there, there, s, conditions).float()

    slope = moved(later) - moved(earlier)
    # both are t_max where s is
    slope = slope / expand_to((later - earlier).clamp_min(1e-12), y)
    return mean_velocity(network, scheduler, y, t, s, conditions), slope


def working_derivative(network, *arguments, **options):
    """The name of the derivative that a network has: "jvp", or, where a kernel or layer has no forward derivative,
    "finite_difference"; says in the log which, and why. The arguments are those of `mean_velocity_and_slope`, which is
    tried once."""
    scheduler, y, t, s, _, *conditions = arguments
    with torch.no_grad():
        # what a network cannot do at all is no matter of its derivative
        mean_velocity(network, scheduler, y, t, s, *conditions, **options)
    try:
        with torch.no_grad():
            mean_velocity_and_slope(network, *arguments, **options, derivative="jvp")
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        logger.warning("derivatives by finite differences in float32: torch.func.jvp fails, %s", reason)
        return "finite_difference"
    logger.info("derivatives by torch.func.jvp, attention by its plain kernel")
    return "jvp"


# --- objectives ---------------------------------------------------------------------------------------------------


def _plain(square):
    return square


def _adaptive(square):
    # MeanFlow (Geng et al. 2025, Eq. 22) with p = 1
    return square / (square.detach() + 1e-3)


def _normalized(square):
    # of the tangent (Lu & Song 2025, section 4.2)
    return square / (square.detach().sqrt() + 0.1)


def _pseudo_huber(square, c=0.00054):
    # Song & Dhariwal 2024, section 3.3, over the root of the number of dimensions
    return (square + c**2).sqrt() - c


# a sample's loss by its mean squared error
ERROR_WEIGHTS = {
    "none": _plain,
    "adaptive": _adaptive,
    "normalized": _normalized,
    "pseudo_huber": _pseudo_huber,
}


def weighted(error, error_weight):
    """The loss of each sample (B,), float32, of an error (B, C, ...), by a name of `ERROR_WEIGHTS`."""
    return ERROR_WEIGHTS[error_weight](error.float().square().flatten(1).mean(1))


def continuous_loss(
    network,
    scheduler,
    y,
    velocity,
    t,
    s,
    conditions=None,
    told=True,
    warmup=1.0,
    error_weight="none",
    derivative="jvp",
    step=0.0,
):
    """The squared error of Eq. (2), whose right side takes no gradient.

    With s of its own for each sample, error_weight "adaptive" and velocity noise - x0 it is MeanFlow (Geng et al.
    2025); with s = t_min and error_weight "normalized" continuous-time consistency, training by that velocity and
    distillation by a teacher's (sCT and sCD, Lu & Song 2025), in these coordinates instead of TrigFlow's: the gradient
    is along the same tangent, dy_s/du. At s = t it is the denoising objective in V.

    Args:
        network, scheduler, conditions: see `mean_velocity`. y: noisy samples in straight coordinates (B, C, ...).
        velocity: V (B, C, ...): noise - x0, a teacher's `mean_velocity` at y, or either one `guided`; no gradient.
        t, s: times (B,), float64, s <= t.
        told: whether the network is told s; without, s is t_min for all.
        warmup: share of the derivative in Eq. (2), which grows from 0 to 1 in the first steps (Lu & Song 2025).
        error_weight: a name of `ERROR_WEIGHTS`: a sample's loss by its mean squared error.
        derivative: see `mean_velocity_and_slope`.
        step: instead of the derivative, a difference over so much of log(sigma / alpha) to either side: see
            `mean_velocity_and_wide_slope`; 0 for the derivative.

    Returns (B,) float32. Raises ValueError for unknown names.
    """
    check_choice("error_weight", error_weight, ERROR_WEIGHTS)
    velocity = velocity.detach()
    arguments = network, scheduler, y, t, s if told else None, velocity, conditions
    if step:
        value, slope = mean_velocity_and_wide_slope(*arguments, step)
    else:
        value, slope = mean_velocity_and_slope(*arguments, derivative)
    way = expand_to(warmup * (place(scheduler, t) - place(scheduler, s)), y)
    return weighted(value - (velocity - way * slope), error_weight)


@torch.no_grad()
def composed_velocity(network, scheduler, y, t, middle, s, velocity=None, conditions=None, told=True):
    """The right side of Eq. (3), (B, C, ...), without gradients: see `composed_loss`."""
    u, w, r = (place(scheduler, each) for each in (t, middle, s))
    if velocity is None:
        velocity = mean_velocity(network, scheduler, y, t, middle, conditions)
    y_middle = y + expand_to(w - u, y) * velocity
    second = mean_velocity(network, scheduler, y_middle, middle, s if told else None, conditions)
    share = expand_to((u - w) / (u - r), y)
    return share * velocity + (1 - share) * second


def composed_loss(
    network,
    scheduler,
    y,
    t,
    middle,
    s,
    velocity=None,
    conditions=None,
    told=True,
    target=None,
    error_weight="none",
    of_end=False,
):
    """The squared error of Eq. (3), whose right side takes no gradient: a first leg from t to `middle`, and a second by
    the map itself.

    The first leg by noise - x0 and s = t_min is consistency training (Song et al. 2023; Song & Dhariwal 2024) and easy
    consistency tuning (Geng et al. 2025b); by a teacher's velocity it is consistency distillation, with Euler's step,
    or by `heun_velocity` with Heun's; by the map itself self-consistency, as shortcut models have it (Frans et al.
    2025).

    Args:
        network, scheduler, y, conditions, told, error_weight: see `continuous_loss`.
        t, middle, s: times (B,), float64, s <= middle <= t, and s < t.
        velocity: V of the first leg (B, C, ...); None for the map itself, which is told `middle`.
        target: the network of the right side; None for `network` itself (Song & Dhariwal 2024, section 3.2).
        of_end: the error is that of the map's end, as the originals have it: u - r times that of the mean velocity.

    Returns (B,) float32. Raises ValueError for unknown names, and for a map that isn't told where it leads to and is
    its own first leg.
    """
    check_choice("error_weight", error_weight, ERROR_WEIGHTS)
    if velocity is None and not told:
        raise ValueError("a network that isn't told the time that it leads to has no first leg: give its velocity")
    # the same dropout on both sides (Song et al. 2023, section 5)
    again = _dropout_of_now(y.device)
    value = mean_velocity(network, scheduler, y, t, s if told else None, conditions)
    with again():
        expected = composed_velocity(target or network, scheduler, y, t, middle, s, velocity, conditions, told)
    error = value - expected
    if of_end:
        error = expand_to(place(scheduler, t) - place(scheduler, s), y) * error
    return weighted(error, error_weight)


def heun_velocity(velocity, scheduler, y, t, s):
    """The mean velocity (B, C, ...) from times t to s (B,) by Heun's step of the ODE, of `velocity`, f(y, t), at its
    beginning and its end: consistency distillation (Song et al. 2023, Eq. 6)."""
    first = velocity(y, t)
    end = y + expand_to(place(scheduler, s) - place(scheduler, t), y) * first
    return (first + velocity(end, s)) / 2


# --- times --------------------------------------------------------------------------------------------------------


def tuning_times(scheduler, t, stage, q=2.0, k=8.0, b=1.0):
    """The middle times of easy consistency tuning (Geng et al. 2025b, Eq. 13), (B,): of noise levels sigma / alpha
    smaller by the factor 1 - (1 + k sigmoid(-b level)) / q^stage, at least that of t_min, which
    it is for all at stage 0."""
    level = torch.exp(-scheduler.path.half_log_snr(t))
    factor = (1 - (1 + k * torch.sigmoid(-b * level)) / q**stage).clamp_min(1e-12)
    return scheduler.path.t_from_half_log_snr(-(factor * level).log()).clamp_min(scheduler.t_min).minimum(as_time(t))
