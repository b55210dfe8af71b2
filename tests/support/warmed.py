"""What takes seconds in a new process, done once in the server whose forks the killed processes are.

Imports, functions that numba loads at their first call, and the fonts of a first figure.
"""

from __future__ import annotations

import io

import anndata  # noqa: F401
import lightning_fabric  # noqa: F401
import numba.core.inline_closurecall
import numba.np.arrayobj  # noqa: F401
import numpy as np
import sklearn.cluster
import sklearn.linear_model  # noqa: F401
from matplotlib import pyplot

from histossl.cli import model_commands, nuclei_commands, study_commands  # noqa: F401
from histossl.nuclei.component_tree import TreeSettings, best_objects
from histossl.study import status  # noqa: F401

best_objects(np.eye(16, dtype=np.float32), [0.1, 0.5], 0.5, TreeSettings())
figure = pyplot.figure(layout="constrained")
figure.add_subplot().set_title("a figure")
figure.savefig(io.BytesIO())
pyplot.close(figure)
