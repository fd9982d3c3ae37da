"""Training and evaluation, installed as `score_sde.training`: one module for each command, made of `parts`."""

import os
import sys


# Python puts the folder of a script first in its path, where another's `import evaluate` would find ours
_HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [each for each in sys.path if os.path.realpath(each) != _HERE]
