"""Alignment losses: differentiable distances between the geometries of two representations of the same samples.

`alignment_loss` compares a batch of one network with the same batch of another. It does not depend on the width, unit
and offset of features, as bandwidths are scaled automatically, and gradients pass through the bandwidths. Values and
gradients are finite for all finite features:

- If duplicates alone exceed the density, there is no sigma. All samples of that representation then count as similar (A
  = 1 everywhere), "cka" is 1, and the gradient is 0.
- With fewer valid samples than a measure needs, the loss is 0.

The density is the mean over pairs of different samples, so it does not depend on the size of the batch. `FeatureQueue`
adds past samples to a batch.
"""

from __future__ import annotations

from jaxalign.losses._alignment import MEASURES as MEASURES
from jaxalign.losses._alignment import Measure as Measure
from jaxalign.losses._alignment import alignment_loss as alignment_loss
from jaxalign.losses._decorrelation import decorrelation_loss as decorrelation_loss
from jaxalign.losses._layers import multi_layer_loss as multi_layer_loss
from jaxalign.losses._monitor import Monitor as Monitor
from jaxalign.losses._monitor import MonitorCurve as MonitorCurve
from jaxalign.losses._monitor import monitor as monitor
from jaxalign.losses._queue import FeatureQueue as FeatureQueue
from jaxalign.losses._schedules import GradientAgreement as GradientAgreement
from jaxalign.losses._schedules import gradient_cosine as gradient_cosine
from jaxalign.losses._schedules import stop_schedule as stop_schedule
from jaxalign.losses._tokens import Projector as Projector
from jaxalign.losses._tokens import token_loss as token_loss
