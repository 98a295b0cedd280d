"""The commands without printing, stage by stage. They can be used from Python with the dataclasses of `config`.

`prune`: open the images, load or train the network, trace, score, plan, narrow, verify, recalibrate BatchNorm, fine-tune. The
network is evaluated dense, after the cut, and at the end.
"""

from .job import Job, Reporter, Settings, open_images, open_job
from .networks import Costs, check_outputs, costs_of, dense_network, from_run, inspect_network, load_dense
from .oneshot import make_plan, score
from .prune import Result, prune, train_dense

__all__ = [
    "Costs",
    "Job",
    "Reporter",
    "Result",
    "Settings",
    "check_outputs",
    "costs_of",
    "dense_network",
    "from_run",
    "inspect_network",
    "load_dense",
    "make_plan",
    "open_images",
    "open_job",
    "prune",
    "score",
    "train_dense",
]
