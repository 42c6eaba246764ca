"""Every case by name."""

from cases_batches import BATCHES
from cases_checkpoints import CHECKPOINTS
from cases_layers import LAYERS
from cases_losses import LOSSES
from cases_modules import MODULES
from cases_offline import OFFLINE
from cases_single import SINGLE
from cases_trainer import TRAINER

CASES = {case.name: case for case in [*LAYERS, *MODULES, *LOSSES, *BATCHES, *SINGLE, *CHECKPOINTS, *TRAINER, *OFFLINE]}
