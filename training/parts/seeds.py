"""Seeds that are made of several numbers."""

import numpy as np


def mix_seeds(*numbers):
    """One 63-bit seed from several integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
