"""Training: a compiled step for any loss function and any optax optimizer, and whole runs that can be stopped and resumed."""

from fbackprop.training.checkpoints import RunError as RunError
from fbackprop.training.fit import Fit as Fit
from fbackprop.training.fit import History as History
from fbackprop.training.fit import Stopped as Stopped
from fbackprop.training.fit import fit as fit
from fbackprop.training.gradients import gradient_errors as gradient_errors
from fbackprop.training.optimizers import OPTIMIZERS as OPTIMIZERS
from fbackprop.training.optimizers import make_optimizer as make_optimizer
from fbackprop.training.step import TrainState as TrainState
from fbackprop.training.step import init_train_state as init_train_state
from fbackprop.training.step import make_step as make_step

__all__ = [
    "OPTIMIZERS",
    "Fit",
    "History",
    "RunError",
    "Stopped",
    "TrainState",
    "fit",
    "gradient_errors",
    "init_train_state",
    "make_optimizer",
    "make_step",
]
