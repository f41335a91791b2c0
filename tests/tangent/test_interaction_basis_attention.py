"""Sections around one attention: the closed form is the section, its derivatives, and its ablations."""

import pytest
import torch
from torch import nn

from locally.tangent.interaction_basis import (
    Ablation,
    CausalSelfAttention,
    LastPosition,
    LocalInteractionBasis,
    Residual,
)
from locally.tangent.interaction_basis.folding import Section

RULES = [{}, {"integration": "gauss-legendre", "n_intervals": 2}]
# heads of 3 and 4: activations are wider than twice that, and not wider
NETS = {
    "whole sequence": lambda: [nn.Linear(5, 8), Residual(CausalSelfAttention(8, 2, 3)), nn.Linear(8, 4)],
    "last position": lambda: [nn.Linear(5, 7), Residual(CausalSelfAttention(7, 3, 4)), LastPosition(), nn.Linear(7, 4)],
    "no stream": lambda: [nn.Linear(5, 6), CausalSelfAttention(6, 2), nn.Linear(6, 4)],
    "linear before": lambda: [
        *(nn.Linear(5, 6), Residual(nn.Linear(6, 4), CausalSelfAttention(4, 2, 3), nn.Linear(4, 6)), nn.Linear(6, 4))
    ],
    "stream in a stream": lambda: [nn.Linear(5, 6), Residual(Residual(CausalSelfAttention(6, 2))), nn.Linear(6, 4)],
}


def network(kind):
    torch.manual_seed(0)
    layers = NETS[kind]()
    return nn.Sequential(*layers).double(), ["1", str(len(layers) - 1)]


def sequences(n, seed=1):
    return 2 * torch.randn(n, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("rule", RULES)
def test_closed_forms_equal_backward_passes(kind, rule, monkeypatch):
    (net, cuts), x = network(kind), sequences(24)
    lib = LocalInteractionBasis(cuts, memory=30_000, **rule).fit(net, x)
    section, f = lib.chain_.sections[0], lib.chain_.start(x)
    closed = section.attend(f, f.shape[-1])
    assert closed is not None
    torch.testing.assert_close(closed(f), section(f), rtol=1e-12, atol=1e-12)
    J = torch.func.vmap(torch.func.jacrev(lambda row: section(row[None])[0]))(f)
    J = J if J.ndim == 5 else J[:, None]
    blocks = torch.cat(list(closed.jacobian_blocks(f, [(1.0, 1.0)], 4000)))
    torch.testing.assert_close(blocks, J, rtol=1e-10, atol=1e-12)

    graph = lib.interaction_graph(x)
    monkeypatch.setattr(Section, "attend", lambda *_: None)
    slow = LocalInteractionBasis(cuts, **rule).fit(net, x)
    for cut, basis in lib.bases_.items():
        torch.testing.assert_close(basis.C @ basis.C_pinv, slow.bases_[cut].C @ slow.bases_[cut].C_pinv)
        torch.testing.assert_close(basis.C.abs(), slow.bases_[cut].C.abs(), rtol=1e-6, atol=1e-8)
    for ours, theirs in zip(graph.edges, slow.interaction_graph(x).edges):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", NETS)
def test_masked_sections_are_sections_of_masked_features(kind):
    (net, cuts), x = network(kind), sequences(30)
    lib = LocalInteractionBasis(cuts).fit(net, x)
    here, C_next = lib.bases_[cuts[0]], lib._next(1)
    graph = lib.interaction_graph(x)
    labels = torch.arange(30) % 4
    ablation = Ablation(lib, x, labels, batch_size=11)
    features = ablation.activations[0] @ here.C
    for kept in (0, 5, 17):
        mask = graph.mask(cuts[0], kept)
        expected = torch.stack(
            [(lib._section(0)((features * row) @ here.C_pinv) @ C_next)[..., i] for i, row in enumerate(mask)], -1
        )
        torch.testing.assert_close(ablation._masked_section(0, features, mask), expected, rtol=1e-9, atol=1e-9)


def test_only_one_attention_among_linear_layers_has_the_form():
    attention = lambda: Residual(CausalSelfAttention(6, 2))
    x = sequences(8)
    for layers in (
        [nn.Linear(5, 6), attention(), attention(), nn.Linear(6, 4)],
        [nn.Linear(5, 6), attention(), nn.ReLU(), nn.Linear(6, 4)],
        [nn.Linear(5, 6), Residual(nn.LayerNorm(6), CausalSelfAttention(6, 2)), nn.Linear(6, 4)],
        [nn.Linear(5, 6), nn.Linear(6, 4)],
    ):
        torch.manual_seed(0)
        lib = LocalInteractionBasis(["1"]).fit(nn.Sequential(*layers).double(), x)
        assert lib.chain_.sections[0].attend(x, 7) is None
