"""jaxalign: relative features that can be compared across networks."""

from jaxalign import datasets as datasets
from jaxalign import interop as interop
from jaxalign import sharding as sharding
from jaxalign import streaming as streaming
from jaxalign._version import __version__ as __version__
from jaxalign.affinity import rbf_affinity as rbf_affinity
from jaxalign.alignment import Alignment as Alignment
from jaxalign.alignment import Correspondence as Correspondence
from jaxalign.alignment import align as align
from jaxalign.alignment import correspondence as correspondence
from jaxalign.alignment import joint_affinity as joint_affinity
from jaxalign.bandwidth import SigmaSolution as SigmaSolution
from jaxalign.bandwidth import mean_density as mean_density
from jaxalign.bandwidth import solve_sigma as solve_sigma
from jaxalign.distances import squared_distances as squared_distances
from jaxalign.operators import AffinityOperator as AffinityOperator
from jaxalign.operators import affinity_operator as affinity_operator
