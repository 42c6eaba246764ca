"""Every case by name."""

from cases_batches import BATCHES
from cases_capture import CAPTURE
from cases_checkpoints import CHECKPOINTS
from cases_confident import CONFIDENT
from cases_guard import GUARD
from cases_index import INDEX
from cases_layers import LAYERS
from cases_losses import LOSSES
from cases_mixing import MIXING
from cases_modules import MODULES
from cases_odd import ODD
from cases_offline import OFFLINE
from cases_single import SINGLE
from cases_tokens import TOKENS
from cases_trainer import TRAINER
from cases_transforms import TRANSFORMS

GROUPS = (
    LAYERS,
    MODULES,
    LOSSES,
    BATCHES,
    SINGLE,
    ODD,
    CHECKPOINTS,
    TRAINER,
    GUARD,
    INDEX,
    CAPTURE,
    OFFLINE,
    TOKENS,
    CONFIDENT,
    TRANSFORMS,
    MIXING,
)

CASES = {case.name: case for group in GROUPS for case in group}
