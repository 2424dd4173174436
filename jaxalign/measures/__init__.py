"""Measures of how similar two representations of the same samples are; docs/pages/measures.md compares them."""

from jaxalign.measures._affinities import affinity_distance as affinity_distance
from jaxalign.measures._cca import cca as cca
from jaxalign.measures._cca import pwcca as pwcca
from jaxalign.measures._cca import svcca as svcca
from jaxalign.measures._hsic import cka as cka
from jaxalign.measures._hsic import distance_correlation as distance_correlation
from jaxalign.measures._hsic import hsic as hsic
from jaxalign.measures._hsic import minibatch_cka as minibatch_cka
from jaxalign.measures._neighbors import cknna as cknna
from jaxalign.measures._neighbors import jaccard as jaccard
from jaxalign.measures._neighbors import mutual_knn as mutual_knn
from jaxalign.measures._neighbors import nearest_neighbors as nearest_neighbors
from jaxalign.measures._predictivity import linear_predictivity as linear_predictivity
from jaxalign.measures._registry import REGISTRY as REGISTRY
from jaxalign.measures._rsa import rdm as rdm
from jaxalign.measures._rsa import rsa as rsa
from jaxalign.measures._shape import procrustes as procrustes
from jaxalign.measures._shape import shape_distance as shape_distance
