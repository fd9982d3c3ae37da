"""Where things lie in a checkout."""

from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "training"
CONFIGS = TRAINING / "configs"
HELPERS = ROOT / "tests" / "helpers"
FIXTURES = ROOT / "tests" / "fixtures"
# real data beside the checkout, where there are any
SHARED = ROOT.parent / "shared" / "data"


def files_of(folder):
    """{path in the folder: its bytes}."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
