"""What the commands do, stage by stage, without printing: usable from Python with the dataclasses of `config`.

`prune` is: open the images, make the network and load or train it, trace, score, plan, narrow, verify, recalibrate
BatchNorm, fine-tune; evaluated dense, right after the cut, and at the end.
"""

from .job import Job, Reporter, Settings, open_images, open_job
from .networks import Figures, check_outputs, dense_network, figures, from_run, inspect_network, load_dense
from .oneshot import make_plan, score
from .prune import Result, prune, train_dense

__all__ = [
    "Figures",
    "Job",
    "Reporter",
    "Result",
    "Settings",
    "check_outputs",
    "dense_network",
    "figures",
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
