r"""All mathematics of noise on tokens: every formula stands here once, and everything else derives from it.

Time t runs over [0, 1], 0 = data, 1 = noise; s < t throughout. Each of a sequence's tokens goes its own way through a
continuous-time Markov chain, of which a path owns the survival alpha(t), the chance that nothing has happened to a
token, and the distribution pi that a token to which something has happened is drawn from: MASK (absorbing), or uniform
over the vocabulary. With one(x) for the distribution that is x for certain:

(1)  q(x_t | x0) = alpha_t one(x0) + (1 - alpha_t) pi                                              (marginal)
(2)  q(x_t | x_s) = r one(x_s) + (1 - r) pi,  r = alpha_t / alpha_s                                (transition)
(3)  rate matrix  R_t(x -> y) = beta_t (pi(y) - [x = y]),  beta = -d log alpha / dt                (rate)
     (Austin et al. 2021; Campbell et al. 2022; Lou et al. 2024; Sahoo et al. 2024; Schiff et al. 2025).

What a network says of a token is p(x0 | x_t), given all tokens. Let o(x0) be what the other tokens alone say of it:

(4)  p(x0 | x_t) = o(x0) q(x_t | x0) / Z,  Z = (1 - alpha) pi(x_t) + alpha o(x_t)                 (clean, leave_one_out)

With absorbing noise this is the SUBS rule of Sahoo et al. 2024: a token that is shown stays, and o is what the network
says of one that is not. From (4), summed over x0:

(5)  p_t(y) / p_t(x_t) = sum_x0 p(x0 | x_t) q_t(y | x0) / q_t(x_t | x0)
                       = ((1 - alpha) pi(y) + alpha o(y)) / Z                                      (score)
     the concrete score (Lou et al. 2024): of one other token y at this place. Absorbing, from MASK:
     alpha / (1 - alpha) p(y | x_t). It is linear in o, so that its inverse is closed: ratios, normed over y, are
     (1 - alpha) pi + alpha o.                                                                     (clean_from_score)
(6)  p(x_s | x_t) = sum_x0 p(x0 | x_t) q(x_s | x_t, x0) = q(x_t | x_s) ((1 - alpha_s) pi(x_s) + alpha_s o(x_s)) / Z
     Bayes' rule for (1) and (2), and exact for one token                                          (posterior)
(7)  reverse rate  x_t -> y:  R_t(y -> x_t) p_t(y) / p_t(x_t) = beta pi(x_t) score(y)              (reverse_rates)

The bound on -log p(x0) is the expected rate of (8) over x_t ~ q(x_t | x0), integrated over t, and two ends (9). With
score_0(y) = q_t(y | x0) / q_t(x_t | x0):

(8)  beta pi(x_t) sum_{y != x_t} [score(y) - score_0(y) log score(y) + score_0(y) (log score_0(y) - 1)]
     denoising score entropy (Lou et al. 2024, theorems 3.4 and 3.6). With (5) and absorbing noise it is the cross
     entropy of masked tokens, times -alpha' / (1 - alpha) (Sahoo et al. 2024; Shi et al. 2024); with (5) and uniform
     noise that of Schiff et al. 2025, see (10).                                                   (elbo_rate)
(9)  at t_min  E[-log p(x0 | x_t)]; at t_max  KL(q(x_t | x0) | pi) for uniform noise. Absorbing noise: as if alpha fell
     to 0 after t_max, in one more step, whose part is -alpha log p(x0 | all masked).              (likelihood_bound)
(10) (8) with uniform noise: with b = (1 - alpha) / V and g(y) = log(1 + alpha o(y) / b), log score(y) = g(y) - g(x_t);
     with D, how much more g is than where o is one(x0):
     beta / (V q(x_t | x0)) [expm1(-D(x_t)) + D(x_t) - alpha D(x0) - b sum_y D(y)]                  (elbo_rate)

Numbers: times are floats or tensors of shape () or (B,), best on the CPU; what a path returns about them is a float64
tensor. Tokens are int64 (B, L). Distributions over tokens keep the dtype of the network's log-probabilities.
"""

import inspect
import math

import torch

from .checks import check_choice, check_number
from .paths import as_time, expand_to, finest


# --- survival alpha(t) ------------------------------------------------------------------------------------------------


class Noise:
    """Survival alpha(t), falling from 1 at t = 0. Subclasses state `log_alpha`, `fall` and `t_from_log_alpha`."""

    def log_alpha(self, t):
        raise NotImplementedError

    def fall(self, t):
        """-d alpha / dt."""
        raise NotImplementedError

    def t_from_log_alpha(self, log_alpha):
        raise NotImplementedError


class Polynomial(Noise):
    """alpha = 1 - (1 - alpha_min) t^exponent (Shi et al. 2024)."""

    def __init__(self, exponent: float = 2.0, alpha_min: float = 1e-3):
        check_number("exponent", exponent, 0.1, 10)
        check_number("alpha_min", alpha_min, 0, 0.01)
        self.exponent, self.span = exponent, 1 - alpha_min

    def log_alpha(self, t):
        return torch.log1p(-self.span * t**self.exponent)

    def fall(self, t):
        return self.span * self.exponent * t ** (self.exponent - 1)

    def t_from_log_alpha(self, log_alpha):
        return (-torch.expm1(log_alpha) / self.span) ** (1 / self.exponent)


class LogLinear(Polynomial):
    """alpha = 1 - (1 - alpha_min) t: the noise -log(alpha) of Lou et al. 2024 and Sahoo et al. 2024."""

    def __init__(self, alpha_min: float = 1e-3):
        super().__init__(1.0, alpha_min)


class Cosine(Noise):
    """alpha = 1 - (1 - alpha_min) cos((1 - t) pi/2), as MaskGIT masks (Chang et al. 2022; Shi et al. 2024)."""

    def __init__(self, alpha_min: float = 1e-3):
        check_number("alpha_min", alpha_min, 0, 0.01)
        self.alpha_min, self.span = alpha_min, 1 - alpha_min

    def log_alpha(self, t):
        # each without cancellation at its end
        near_0 = torch.log1p(-self.span * torch.sin(t * math.pi / 2))
        near_1 = torch.log(self.alpha_min + 2 * self.span * torch.sin((1 - t) * math.pi / 4) ** 2)
        return torch.where(t < 0.5, near_0, near_1)

    def fall(self, t):
        return self.span * math.pi / 2 * torch.sin((1 - t) * math.pi / 2)

    def t_from_log_alpha(self, log_alpha):
        near_0 = torch.asin((-torch.expm1(log_alpha) / self.span).clamp_max(1)) * 2 / math.pi
        half = ((log_alpha.exp() - self.alpha_min) / (2 * self.span)).clamp(0, 1).sqrt()
        return torch.where(log_alpha > -0.5, near_0, 1 - torch.asin(half) * 4 / math.pi)


class Geometric(Noise):
    """-log(alpha) = sigma_min ((sigma_max / sigma_min)^t - 1): the geometric noise of Lou et al. 2024,
    less its value at t = 0, where nothing has happened to the data."""

    def __init__(self, sigma_min: float = 1e-4, sigma_max: float = 20.0):
        check_number("sigma_min", sigma_min, 1e-9, 1)
        check_number("sigma_max", sigma_max, 5, 500)
        self.sigma_min, self.log_ratio = sigma_min, math.log(sigma_max / sigma_min)

    def log_alpha(self, t):
        return -self.sigma_min * torch.expm1(t * self.log_ratio)

    def fall(self, t):
        return self.log_alpha(t).exp() * self.sigma_min * self.log_ratio * torch.exp(t * self.log_ratio)

    def t_from_log_alpha(self, log_alpha):
        return torch.log1p(-log_alpha / self.sigma_min) / self.log_ratio


class Given(Noise):
    """A function alpha(t) of float64 tensors in [0, 1], differentiable by autograd.

    Raises ValueError where it does not fall strictly from 1 (at least 0.99) to 0 (at most 0.01), and where it is 0
    before t = 1.
    """

    def __init__(self, alpha):
        self.function = alpha
        values = alpha(torch.linspace(0, 1, 1001, dtype=torch.float64))
        if not torch.is_tensor(values) or values.shape != (1001,):
            raise ValueError("noise must be a function of a tensor of times that returns alpha, of the same shape")
        first, last = float(values[0]), float(values[-1])
        # nan is in no range
        if not (0.99 <= first <= 1 and 0 <= last <= 0.01):
            raise ValueError(
                f"noise must have alpha(0) from 0.99 to 1 and alpha(1) from 0 to 0.01; it has {first:g} and {last:g}"
            )
        # at the ends rounding may hide that it falls
        inside = (values[1:] > 1e-9) & (values[:-1] < 1 - 1e-9)
        if not (values.diff() <= 0).all() or not (values.diff() < 0)[inside].all():
            raise ValueError("noise must be a function alpha(t) that falls strictly from t = 0 to 1")
        if zero := int((values[:-1] == 0).sum()):
            reached = (1000 - zero) / 1000
            raise ValueError(
                f"noise has alpha = 0 from t = {reached:g} on, where nothing is left to learn: it must be above 0 up "
                f"to t = 0.999; stretch it, such as by lambda t: noise({reached:g} * t)"
            )

    def log_alpha(self, t):
        return self.function(t).log()

    def fall(self, t):
        with torch.enable_grad():
            t = t.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.function(t).sum(), t)
        return -slope

    def t_from_log_alpha(self, log_alpha):
        low, high = torch.zeros_like(log_alpha), torch.ones_like(log_alpha)
        for _ in range(60):
            middle = (low + high) / 2
            later = self.log_alpha(middle) > log_alpha
            low, high = torch.where(later, middle, low), torch.where(later, high, middle)
        return (low + high) / 2


NOISES = {"log_linear": LogLinear, "cosine": Cosine, "geometric": Geometric, "polynomial": Polynomial}


# in the order in which a scheduler takes them
NOISE_OPTIONS = ("alpha_min", "exponent", "sigma_min", "sigma_max")


def options_of(noise):
    """The names of the options of noise with this name; a function alpha(t) has none. Raises ValueError for an unknown
    name."""
    if callable(noise):
        return []
    check_choice("noise", noise, NOISES)
    return list(inspect.signature(NOISES[noise]).parameters)


def build_noise(noise, options):
    """The `Noise` of this name with these options, or of this function alpha(t). Raises ValueError for unknown names
    and options, and numbers out of their range."""
    allowed = options_of(noise)
    if unknown := sorted(options.keys() - set(allowed)):
        name = repr(noise) if isinstance(noise, str) else "a function"
        raise ValueError(f"noise {name} has no option {', '.join(unknown)}; it has {', '.join(allowed) or 'none'}")
    return Given(noise) if callable(noise) else NOISES[noise](**options)


# --- draws ------------------------------------------------------------------------------------------------------------


def draw_uniforms(shape, generator=None, device=None):
    """Uniform numbers in [0, 1), float64 (float32 on devices without it), of this shape (B, ...); from a generator, or
    from a list of one per sample, on whose device they are drawn."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators do not fit a batch of {shape[0]}: pass one for each sample")
        return torch.cat([draw_uniforms((1, *shape[1:]), each, device) for each in generator])
    device = torch.device(device or "cpu")
    drawn_on = generator.device if generator is not None else device
    # not rounded afterwards, which might give 1
    dtype = torch.float32 if torch.float32 in (finest(drawn_on), finest(device)) else torch.float64
    return torch.rand(shape, generator=generator, device=drawn_on, dtype=dtype).to(device)


# --- paths ------------------------------------------------------------------------------------------------------------


class DiscretePath:
    """Noise on tokens: alpha(t), and what a token becomes. Subclasses state what follows from their pi.

    Args:
        vocab_size: number V of tokens, 0 to V - 1.
        noise: log_linear, cosine, geometric, polynomial, or a function alpha(t) of float64 tensors.
        options: of the noise: alpha_min, alpha at t = 1 (log_linear, cosine, polynomial); exponent (polynomial);
            sigma_min and sigma_max, the ends of -log(alpha) (geometric).

    Attributes:
        vocab_size: V.
        num_states: S, the number of values that a token of x_t has.
        mask_token_id: the state that stands for no token; None where there is none.
        t_min: the smallest time that training and the likelihood use: 1e-3, or less where by then more than 1 % of the
            tokens are noised, so that 0.1 % are.
        t_max: the largest time at which every formula is finite: 1, or a little less where alpha(1) = 0.

    Raises ValueError for a vocabulary of fewer than two tokens, unknown noise, options, and numbers out of range.
    """

    t_min = 1e-3
    mask_token_id: int | None = None

    def __init__(self, vocab_size: int, noise="log_linear", **options):
        check_number("vocab_size", vocab_size, 2, 2**31, whole=True)
        self.vocab_size = self.num_states = vocab_size
        self.noise = build_noise(noise, options)
        self.t_max = 1.0 if self.alpha(1.0) > 0 else 0.999
        first = float(self.alpha(0.0))
        if self.alpha(self.t_min) < 0.99 * first:
            self.t_min = float(self.t_from_alpha(0.999 * first))
        elif self.log_noised(self.t_min) == -math.inf:
            # a function so flat that it rounds to 1, which would make every weight of a time infinite
            self.t_min = float(self.t_from_alpha(1 - 1e-12))

    # --- times ---

    def log_alpha(self, t):
        return self.noise.log_alpha(self._time(t))

    def alpha(self, t):
        """The chance that nothing has happened to a token: float64, the shape of t."""
        return self.log_alpha(t).exp()

    def fall(self, t):
        """-d alpha / dt."""
        return self.noise.fall(self._time(t))

    def rate(self, t):
        """beta = -d log alpha / dt, Eq. (3): how often something happens to a token, per unit of t."""
        return self.fall(t) / self.alpha(t)

    def log_noised(self, t):
        """log(1 - alpha), exact at t near 0, too."""
        return (-torch.expm1(self.log_alpha(t))).log()

    def transition(self, s, t):
        """r = alpha_t / alpha_s of Eq. (2), for s < t."""
        return (self.log_alpha(t) - self.log_alpha(s)).exp()

    def t_from_alpha(self, alpha):
        """The inverse of `alpha`. Raises ValueError for values that alpha(t) does not reach."""
        alpha, (first, last) = as_time(alpha), self.alpha(torch.tensor([0.0, 1.0]))
        if alpha.device.type == "cpu" and not ((alpha >= last - 1e-12) & (alpha <= first + 1e-12)).all():
            raise ValueError(f"alpha must be from {last:g} to {first:g}; got {alpha.flatten()[:4].tolist()}")
        return self.noise.t_from_log_alpha(alpha.clamp_max(float(first)).log()).clamp(0, 1)

    def _time(self, t):
        t = as_time(t)
        # on a device the check would wait for it
        if t.device.type == "cpu" and not ((t >= 0) & (t <= 1)).all():
            raise ValueError(f"t must be from 0 (data) to 1 (noise); got {t.flatten()[:4].tolist()}")
        return t

    # --- the chain ---

    def check_tokens(self, tokens, states=None):
        """Raise ValueError unless tokens are int64 (B, L) from 0 to `states` - 1 (None: those of clean data)."""
        if not torch.is_tensor(tokens) or tokens.dtype != torch.int64 or tokens.ndim != 2:
            kind = f"{tokens.dtype} {tuple(tokens.shape)}" if torch.is_tensor(tokens) else type(tokens).__name__
            raise ValueError(f"tokens must be a tensor of int64 (B, L); got {kind}")
        states = states or self.vocab_size
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < states:
            found = f"{int(tokens.min())} to {int(tokens.max())}"
            raise ValueError(
                f"token ids must be from 0 to {states - 1} (vocab_size {self.vocab_size}); got ids from {found}: "
                f"use the tokenizer that the model was trained with"
            )

    def prior(self, shape, generator=None, device=None):
        """Tokens (B, L) of pi, which sampling starts from at t = 1; generator: one, or a list of one per sample."""
        raise NotImplementedError

    def noised(self, x0, uniforms):
        """Tokens drawn from pi where something has happened, by uniform numbers in [0, 1) of the same shape."""
        raise NotImplementedError

    def corrupt(self, x0, t, generator=None, uniforms=None):
        """Draw x_t given x0, Eq. (1): tokens (B, L).

        Args:
            x0: clean tokens (B, L), int64. t: () or (B,).
            generator: of the draws, or a list of one per sample.
            uniforms: the draws themselves, (B, L) in [0, 1), best float64.

        Raises ValueError for token ids out of range and t outside [0, 1].
        """
        if x0.device.type == "cpu":
            self.check_tokens(x0)
        if uniforms is None:
            uniforms = draw_uniforms(x0.shape, generator, x0.device)
        alpha = expand_to(self.alpha(t), uniforms)
        # what is left of a number that is at least alpha is uniform again
        return torch.where(uniforms < alpha, x0, self.noised(x0, ((uniforms - alpha) / (1 - alpha)).clamp(0, 1)))

    def marginal(self, x0, t):
        """q(x_t | x0), Eq. (1): probabilities (B, L, S), float64."""
        self.check_tokens(x0)
        kept = torch.nn.functional.one_hot(x0, self.num_states).to(finest(x0.device))
        alpha = expand_to(self.alpha(t), kept)
        return alpha * kept + (1 - alpha) * self.pi(x0.device)

    def pi(self, device=None):
        """What a token to which something has happened is drawn from: (S,), float64 where the device has it."""
        raise NotImplementedError

    # --- what a network says ---

    def clean(self, logits, x_t, t=None):
        """log p(x0 | x_t), Eq. (4), normed, from a network's logits of the clean token; both (B, L, V)."""
        raise NotImplementedError

    def leave_one_out(self, log_p0, x_t, t):
        """What the other tokens alone say of x0, log o of Eq. (4): (B, L, V), from log p(x0 | x_t)."""
        raise NotImplementedError

    def score(self, log_p0, x_t, t):
        """log p_t(y) / p_t(x_t), Eq. (5), for the V tokens y: (B, L, V), from log p(x0 | x_t); 0 for y = x_t."""
        raise NotImplementedError

    def clean_from_score(self, log_score, x_t, t):
        """The inverse of `score`: log p(x0 | x_t), normed, for a network's log ratios, too, that are of no
        distribution: what would be negative is next to 0."""
        raise NotImplementedError

    def posterior(self, log_p0, x_t, t, s):
        """p(x_s | x_t), Eq. (6), for s < t: probabilities (B, L, S) of each token, from log p(x0 | x_t) (B, L, V).

        With log p0 = log one(x0) it is Bayes' rule for a known x0.
        """
        raise NotImplementedError

    def reverse_rates(self, log_score, x_t, t):
        """Rates x_t -> y of the process backwards, Eq. (7): (B, L, V), 0 for y = x_t."""
        raise NotImplementedError

    # --- the bound ---

    def score_entropy_rate(self, log_score, x0, x_t, t):
        """Denoising score entropy, Eq. (8): nats per unit of t, (B, L), from log p_t(y) / p_t(x_t) (B, L, V)."""
        raise NotImplementedError

    def elbo_rate(self, log_p0, x0, x_t, t):
        """The same from log p(x0 | x_t) (B, L, V): what a token adds to the bound on -log p(x0), per unit of t."""
        raise NotImplementedError

    def prior_gap(self, denoise, x0, t):
        """What the end t = t_max adds to the bound, Eq. (9): nats, (B, L)."""
        raise NotImplementedError


class AbsorbingPath(DiscretePath):
    """A token becomes MASK, the state after the V tokens, and stays MASK."""

    def __init__(self, vocab_size: int, noise="log_linear", **options):
        super().__init__(vocab_size, noise, **options)
        self.mask_token_id, self.num_states = vocab_size, vocab_size + 1

    def pi(self, device=None):
        pi = torch.zeros(self.num_states, dtype=torch.float64)
        pi[self.mask_token_id] = 1
        return pi.to(device, finest(torch.device(device or "cpu")))

    def prior(self, shape, generator=None, device=None):
        return torch.full(shape, self.mask_token_id, device=device)

    def noised(self, x0, uniforms):
        return torch.full_like(x0, self.mask_token_id)

    def reveal_rate(self, t):
        """-alpha' / (1 - alpha): how often a masked token is shown, backwards, per unit of t."""
        return self.fall(t) / -torch.expm1(self.log_alpha(t))

    def _log_odds(self, t):
        """log(alpha / (1 - alpha))."""
        return self.log_alpha(t) - self.log_noised(t)

    def _shown(self, log_p0, x_t, certain=0.0):
        """`log_p0` of masked tokens; of those that are shown, `certain` for the token itself and -inf for others."""
        shown = (x_t != self.mask_token_id).unsqueeze(-1)
        own = torch.arange(self.vocab_size, device=x_t.device) == x_t.unsqueeze(-1)
        return torch.where(shown, torch.where(own, certain, -torch.inf).to(log_p0.dtype), log_p0)

    def clean(self, logits, x_t, t=None):
        return self._shown(torch.log_softmax(logits, -1), x_t)

    def leave_one_out(self, log_p0, x_t, t):
        """Of a masked token log_p0 itself; one that is shown hides what the others say: it stays, too."""
        return log_p0

    def score(self, log_p0, x_t, t):
        """As stated; a token that is shown has ratio 0 to others, which no reverse step takes."""
        return self._shown(log_p0 + expand_to(self._log_odds(t), log_p0), x_t)

    def clean_from_score(self, log_score, x_t, t):
        return self.clean(log_score, x_t)

    def posterior(self, log_p0, x_t, t, s):
        stays = expand_to((self.log_noised(s) - self.log_noised(t)).exp(), log_p0)
        masked = (x_t == self.mask_token_id).unsqueeze(-1)
        tokens = torch.where(masked, (1 - stays) * log_p0.exp(), self._shown(log_p0, x_t).exp())
        return torch.cat([tokens, torch.where(masked, stays, torch.zeros_like(stays))], -1)

    def reverse_rates(self, log_score, x_t, t):
        masked = (x_t == self.mask_token_id).unsqueeze(-1)
        return torch.where(masked, (log_score + expand_to(self.rate(t).log(), log_score)).exp(), 0.0)

    def score_entropy_rate(self, log_score, x0, x_t, t):
        # beta times alpha / (1 - alpha), the ratio to the true token, is the rate at which tokens are shown
        excess = log_score - expand_to(self._log_odds(t), log_score)
        rates = expand_to(self.reveal_rate(t), excess[..., 0]) * (excess.exp().sum(-1) - 1 - at(excess, x0))
        return torch.where(x_t == self.mask_token_id, rates, 0.0)

    def elbo_rate(self, log_p0, x0, x_t, t):
        cross_entropy = torch.where(x_t == self.mask_token_id, -at(log_p0, x0), 0.0)
        return expand_to(self.reveal_rate(t), cross_entropy) * cross_entropy

    def prior_gap(self, denoise, x0, t):
        t = as_time(t)
        log_p0 = denoise(self.prior(x0.shape, device=x0.device), t.expand(len(x0)))
        return expand_to(self.alpha(t), log_p0[..., 0]) * -at(log_p0, x0)


class UniformPath(DiscretePath):
    """A token becomes any of the V tokens, itself among them, with equal chances."""

    def pi(self, device=None):
        dtype = finest(torch.device(device or "cpu"))
        return torch.full((self.vocab_size,), 1 / self.vocab_size, dtype=dtype, device=device)

    def prior(self, shape, generator=None, device=None):
        uniforms = draw_uniforms(shape, generator, device)
        return self.noised(torch.zeros(shape, dtype=torch.int64, device=device), uniforms)

    def noised(self, x0, uniforms):
        return (uniforms * self.vocab_size).long().clamp_max(self.vocab_size - 1)

    def _log_other(self, t):
        """log (1 - alpha) / V: the chance of each other token."""
        return self.log_noised(t) - math.log(self.vocab_size)

    def _log_own(self, t):
        """log(alpha + (1 - alpha) / V): the chance of the token itself."""
        return torch.log1p(torch.expm1(self.log_alpha(t)) * (1 - 1 / self.vocab_size))

    def _own(self, x_t):
        return torch.arange(self.vocab_size, device=x_t.device) == x_t.unsqueeze(-1)  # (B, L, V)

    def _with_likelihood(self, values, x_t, t, power=1):
        """values + power log q(x_t | x0), (B, L, V), less a number of each place: but at x_t all are the same."""
        # finite at t = 0, too
        log_odds = power * (self._log_own(t) - self._log_other(t)).clamp_max(1e30)
        index = x_t.unsqueeze(-1)
        return values.scatter_add(-1, index, values.new_zeros(index.shape) + expand_to(log_odds, values))

    def _mixed(self, log_o, t):
        """log of (1 - alpha) / V + alpha o, the distribution of x_t at a place given the other tokens."""
        return torch.logaddexp(expand_to(self.log_alpha(t), log_o) + log_o, expand_to(self._log_other(t), log_o))

    def clean(self, logits, x_t, t=None):
        """Without t the logits are those of p(x0 | x_t) itself; with t of o, what the other tokens say (the "sample" of
        Schiff et al. 2025), and Bayes' rule adds what the token itself says."""
        if t is not None:
            logits = self._with_likelihood(logits, x_t, t)
        return torch.log_softmax(logits, -1)

    def leave_one_out(self, log_p0, x_t, t):
        return torch.log_softmax(self._with_likelihood(log_p0, x_t, t, power=-1), -1)

    def score(self, log_p0, x_t, t):
        log_marginal = self._mixed(self.leave_one_out(log_p0, x_t, t), t)
        return log_marginal - at(log_marginal, x_t).unsqueeze(-1)

    def clean_from_score(self, log_score, x_t, t):
        # ratio 1 to itself, whatever a network says; what is subtracted may be nearly all
        log_score = torch.where(self._own(x_t), 0.0, log_score).to(finest(x_t.device))
        left = torch.softmax(log_score, -1) - expand_to(self._log_other(t).exp(), log_score)
        # above 0, so that its logarithm has a gradient
        return self.clean(left.clamp_min(1e-12).log(), x_t, t)

    def posterior(self, log_p0, x_t, t, s):
        r = self.transition(s, t)
        other = expand_to(torch.log1p(-r) - math.log(self.vocab_size), log_p0)
        own = expand_to((r + (1 - r) / self.vocab_size).log(), log_p0)
        from_s = torch.where(self._own(x_t), own, other)
        return torch.softmax(from_s + self._mixed(self.leave_one_out(log_p0, x_t, t), s), -1)

    def reverse_rates(self, log_score, x_t, t):
        log_rate = expand_to((self.rate(t) / self.vocab_size).log(), log_score)
        return torch.where(self._own(x_t), 0.0, (log_score + log_rate).exp())

    def score_entropy_rate(self, log_score, x0, x_t, t):
        # score_0 (r - 1 - log r), r = score / score_0
        exact = self._with_likelihood(torch.zeros_like(log_score), x0, t)
        exact = exact - at(exact, x_t).unsqueeze(-1)
        excess = log_score - exact
        entropy = torch.where(self._own(x_t), 0.0, exact.exp() * (torch.expm1(excess) - excess)).sum(-1)
        return expand_to(self.rate(t) / self.vocab_size, entropy) * entropy

    def elbo_rate(self, log_p0, x0, x_t, t):
        # g at x_t and x0 and its sum, less what they are where o is one(x0), Eq. (10)
        log_odds = self.log_alpha(t) - self._log_other(t)
        gains = softplus(self.leave_one_out(log_p0, x_t, t) + expand_to(log_odds, log_p0))
        exact, same = expand_to(softplus(log_odds), gains[..., 0]), x0 == x_t
        here, clean = gains.gather(-1, torch.stack((x_t, x0), -1)).unbind(-1)
        here, clean, total = here - same * exact, clean - exact, gains.sum(-1) - exact
        alpha, other = (expand_to(each(t).exp(), here) for each in (self.log_alpha, self._log_other))
        weight = self.rate(t) / self.vocab_size * (-self._log_other(t)).exp()
        nats = torch.expm1(-here) + here - alpha * clean - other * total
        return expand_to(weight, here) * torch.where(same, (-exact).exp(), 1.0) * nats

    def prior_gap(self, denoise, x0, t):
        own, other = self._log_own(t), self._log_other(t)
        gap = own.exp() * own + (self.vocab_size - 1) * other.exp() * other + math.log(self.vocab_size)
        return gap.to(x0.device, finest(x0.device)).expand(x0.shape)


def at(values, tokens):
    """values[..., token] of (B, L, V) and (B, L)."""
    return values.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def softplus(x):
    """log(1 + e^x), in float64 as exact as others are."""
    return torch.nn.functional.softplus(x, threshold=40)


DISCRETE_PATHS: dict[str, type[DiscretePath]] = {"absorbing": AbsorbingPath, "uniform": UniformPath}


# --- what a network predicts ------------------------------------------------------------------------------------------

# each maps (path, output (B, L, V), x_t, t) to log p(x0 | x_t)
DISCRETE_PREDICTIONS = {
    "sample": lambda path, output, x_t, t: path.clean(output, x_t),
    "leave_one_out": lambda path, output, x_t, t: path.clean(output, x_t, t),
    "score": lambda path, output, x_t, t: path.clean_from_score(output, x_t, t),
}


# --- the likelihood ---------------------------------------------------------------------------------------------------


def times_of_bound(path, u, t_min, t_max, length):
    """(t, 1 / p(t)) for uniform numbers u (B,): times in [t_min, t_max] for the bound of sequences of this length.

    With m = 1 - alpha the density in m is as 1 + 1 / sqrt(length m): uniform but where few tokens are noised. That is
    next to the least variance, as the square of the rate per m is on average about as length^2 + length / m.
    """
    scale = length**-0.5
    # x = sqrt(m); the distribution function is m + 2 scale x, up to a constant
    first, last = (path.log_noised(t).exp() for t in (t_min, t_max))
    first, last = (m + 2 * scale * m.sqrt() for m in (first, last))
    below = first + (last - first) * u
    x = below / (scale + (scale**2 + below).sqrt())
    t = path.t_from_alpha(1 - x**2).clamp(t_min, t_max)
    return t, (last - first) / (1 + scale / x) / path.fall(t)


def likelihood_bound(path, denoise, x0, u, t_min, t_max, generator=None, given=None):
    """An unbiased estimate of an upper bound on -log p(x0), Eq. (8) and (9): nats per sequence, (B,) float64 where the
    device has it.

    Args:
        path: a `DiscretePath`.
        denoise: f(x_t (B, L), t (B,)) -> log p(x0 | x_t) (B, L, V), normed; called two times, and once more, on all
            tokens masked, for absorbing noise.
        x0: clean tokens (B, L).
        u: uniform numbers in (0, 1), float64 (B,): independent, or one in each of B equal parts of the interval.
        t_min, t_max: the times between which the bound is integrated, those of sampling.
        generator: of the noise on x0, or a list of one per sample.
        given: (B, L) bool, tokens that are known: they stay clean, and the bound is that of the others given them.
    """
    counted = torch.ones_like(x0, dtype=torch.bool) if given is None else ~given

    def evaluate(x_t, t):
        return denoise(torch.where(counted, x_t, x0), t).to(finest(x0.device))

    t, weight = times_of_bound(path, u, t_min, t_max, x0.shape[1])
    x_t = path.corrupt(x0, t, generator)
    inside = path.elbo_rate(evaluate(x_t, t), x0, x_t, t)
    first = as_time(t_min).expand(len(x0))
    at_t_min = -at(evaluate(path.corrupt(x0, first, generator), first), x0)
    nats = expand_to(weight, inside) * inside + at_t_min + path.prior_gap(evaluate, x0, t_max)
    return torch.where(counted, nats, 0.0).sum(-1)
