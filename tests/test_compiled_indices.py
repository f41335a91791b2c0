"""What compiled loops index by is looked at before they start: they do not look themselves."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from locally.control.adversarial import covariance, dilated_bonus, local_bonus, magnitude_reduced_q, standard_q
from locally.equilibrium.halpern import Logistic
from locally.linalg.krylov import Sparse
from locally.linalg.relaxation import Splitting, SSORPreconditioner, sor_iteration_counts
from locally.linalg.sketching import Rows
from locally.optimize.gradient_normalized.designs import Design
from locally.privacy.regression import MomentProtocol, Tally
from locally.solvers.conjugate_direction.baselines import IncompleteCholesky
from locally.solvers.convergent_graph import ContractingMaps, Sparsity
from locally.training.byzantine import TrimmedMean

pytestmark = pytest.mark.usefixtures("without_shape_checks")

FAR = 10**7
MATRIX = sp.csr_array(sp.diags_array([-1.0, 4.0, -1.0], offsets=[-1, 0, 1], shape=(6, 6)))


def damaged(kind, form="csr"):
    A = MATRIX.asformat(form).copy()
    if kind == "beyond":
        A.indices[-1] = FAR
    elif kind == "negative":
        A.indices[0] = -FAR
    else:
        A.indptr[3] = FAR
    return A


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize("kind", ["beyond", "negative", "limits"])
@pytest.mark.parametrize(
    "take",
    [
        Splitting.of,
        SSORPreconditioner,
        lambda A: sor_iteration_counts(A, np.zeros(1), np.ones((1, 6)), np.ones(1)),
        Rows.of,
        lambda A: Design(A, True),
        IncompleteCholesky,
    ],
    ids=["splitting", "SSOR", "counts", "rows", "design", "incomplete Cholesky"],
)
def test_a_sparse_matrix_with_indices_outside_it_is_refused(take, kind, form):
    take(MATRIX.asformat(form))
    with pytest.raises(ValueError, match=r"ind|limits"):
        take(damaged(kind, form))


@pytest.mark.parametrize(
    ("limits", "columns"),
    [([0, 1, FAR], [0, 1]), ([0, FAR, 2], [0, 1]), ([-FAR, 1, 2], [0, 1]), ([0, 2, 1], [0, 1]), ([0, 1, 2], [0, 2])],
)
def test_a_torch_matrix_with_indices_outside_it_is_refused(limits, columns):
    with torch.sparse.check_sparse_tensor_invariants(False):
        A = torch.sparse_csr_tensor(torch.tensor(limits), torch.tensor(columns), torch.ones(2), (2, 2))
    with pytest.raises(ValueError, match="matrix"):
        Sparse(A)


def test_an_order_of_rows_that_do_not_exist_is_refused():
    rows = Rows.of(np.eye(3))
    for order in ([3], [-1], [FAR]):
        with pytest.raises(ValueError, match="order must hold row numbers"):
            rows.sweep(np.zeros(3), np.ones(3), np.array(order))
    for order in ([np.nan], [0.0], [True]):
        with pytest.raises(TypeError, match="order must hold integers"):
            rows.sweep(np.zeros(3), np.ones(3), np.array(order))


def test_layers_of_other_sizes_are_refused():
    phi, inverse, u = np.eye(4).reshape(1, 2, 2, 4) / 2, np.eye(4)[None], np.full((1, 2, 2), 0.25)
    visited, lost = np.zeros((1, 4)), np.ones(1)
    standard_q(phi, inverse, visited, lost)
    for changed in ((phi, inverse[..., :2, :2], visited, lost), (phi, inverse, visited[:, :2], lost)):
        with pytest.raises(ValueError, match="must have shape"):
            standard_q(*changed)
    with pytest.raises(ValueError, match="occupancy must have shape"):
        magnitude_reduced_q(phi, inverse, visited, lost, u[:, :1], 1.0)
    with pytest.raises(ValueError, match="weights must have shape"):
        covariance(phi, u[:, :1])
    half = np.full((1, 2, 2), 0.5)
    with pytest.raises(ValueError, match="policy must have shape"):
        local_bonus(phi, inverse, half[:, :1], 1.0)
    with pytest.raises(ValueError, match="inverse must have shape"):
        local_bonus(np.repeat(phi, 2, axis=0), inverse, np.repeat(half, 2, axis=0), 1.0)
    with pytest.raises(ValueError, match="P must have shape"):
        dilated_bonus(np.full((1, 2, 2, 2), 0.5), np.full((3, 2, 2), 0.5), np.ones((3, 2, 2)))
    with pytest.raises(ValueError, match="policy must have shape"):
        dilated_bonus(np.full((3, 2, 2, 2), 0.5), np.full((1, 2, 2), 0.5), np.ones((3, 2, 2)))


def test_payloads_of_another_width_or_kind_are_refused():
    protocol = MomentProtocol(n_features=3, epsilon=2.0, radius=2.0, clip_x=1.5, clip_y=1.5)
    tally = Tally(protocol)
    with pytest.raises(ValueError, match="payloads must have shape"):
        tally.add_payloads(np.zeros((4, protocol.width - 1), np.int64))
    with pytest.raises(TypeError, match="payloads must hold signed integers"):
        tally.add_payloads(np.full((4, protocol.width), np.nan))
    assert tally.accepted == 0


def test_a_sum_of_components_takes_no_vector_of_another_size():
    op = Logistic(np.eye(3), np.array([1.0, -1.0, 1.0]))
    for u, v in ((np.zeros(2), np.zeros(3)), (np.zeros(3), np.zeros(2))):
        with pytest.raises(ValueError, match="must have shape"):
            op.diff(u, v, np.array([0]))


def test_a_graph_takes_no_vector_of_another_size():
    ring = Sparsity.of(torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0]), num_nodes=3)
    maps = ContractingMaps(ring, torch.ones(3, 1), torch.ones(3, 1), gamma=0.5)
    with pytest.raises(ValueError, match="x must have shape"):
        maps(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="edges must join nodes"):
        Sparsity.of(torch.tensor([0, FAR]), torch.tensor([1, 0]), num_nodes=3)


def test_each_node_that_heard_gets_its_own_trimmed_mean():
    pool, heard = torch.arange(4.0)[:, None], np.ones((3, 4), bool)
    assert TrimmedMean(f=1).mix(pool, heard, np.array([0])).flatten().tolist() == [1.5, 1.5, 1.5]
