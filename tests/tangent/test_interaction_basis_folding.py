"""Folded networks give the same outputs; what cannot be folded is named by its path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from locally.tangent.interaction_basis import (
    CausalSelfAttention,
    LastPosition,
    Residual,
    TokenEmbedding,
    addition_transformer,
    fold,
    load_addition_transformer,
)
from locally.tangent.interaction_basis.folding import one_of

DOUBLE = torch.float64


def check(model, cuts, x, output=True):
    model = model.double().eval()
    chain = fold(model, cuts, x[:2], output=output, dtype=DOUBLE)
    torch.testing.assert_close(chain(x), model(x), rtol=1e-10, atol=1e-10)
    return chain


@settings(max_examples=20)
@given(
    acts=st.lists(
        st.sampled_from([nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus, nn.LeakyReLU, nn.ELU, nn.Mish]), min_size=1, max_size=4
    ),
    seed=st.integers(0, 1000),
    bias=st.booleans(),
)
def test_outputs_stay_and_the_constant_is_one_at_every_cut(acts, seed, bias):
    torch.manual_seed(seed)
    layers = [layer for act in acts for layer in (nn.Linear(4, 4, bias=bias), act())]
    model = nn.Sequential(*layers, nn.Linear(4, 3))
    x = torch.randn(6, 4, dtype=DOUBLE)
    chain = check(model, [str(i) for i in range(len(layers))], x)
    f = chain.start(x)
    for section in list(chain.sections)[:-1]:
        f = section(f)
        torch.testing.assert_close(f[:, -1], torch.ones(6, dtype=DOUBLE))
        factored = section.factor(f, f.shape[1])
        assert factored is not None


def test_every_kind_of_layer_folds():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6)
    norm(torch.randn(50, 6) * 3 + 1)
    model = nn.Sequential(
        nn.Linear(4, 6),
        norm,
        nn.GELU(approximate="tanh"),
        nn.Dropout(0.5),
        nn.Sequential(nn.Linear(6, 8), nn.Identity()),
        nn.LayerNorm(8),
        Residual(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 5), nn.SiLU(), nn.Linear(5, 8)),
        Residual(Residual(nn.Linear(8, 8)), nn.ReLU()),
        nn.Linear(8, 3),
    )
    chain = check(
        model, ["0", "1", "2", "4.0", "5.out", "6.0.out", "6.2", "6.add", "7.0.0", "8"], torch.randn(7, 4, dtype=DOUBLE)
    )
    assert [cut.width for cut in chain.cuts] == [5, 7, 7, 7, 10, 18, 14, 17, 25, 9, 3]
    assert [cut.name for cut in chain.cuts if cut.variance is not None] == ["5.out", "6.0.out"]
    assert not any(p.requires_grad for p in chain.parameters())


def test_transformers_fold():
    torch.manual_seed(0)
    model = nn.Sequential(
        TokenEmbedding(9, 5, 8),
        Residual(nn.LayerNorm(8), CausalSelfAttention(8, 2)),
        Residual(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
        nn.LayerNorm(8),
        nn.Linear(8, 9),
    )
    tokens = torch.randint(0, 9, (4, 5))
    chain = check(model, ["1", "1.1.mix", "1.1.out", "2", "3", "4"], tokens)
    assert [cut.width for cut in chain.cuts] == [9, 8 + 24 + 1, 8 + 8 + 1, 9, 9, 9, 9]


def test_attention_is_torchs():
    torch.manual_seed(0)
    ours, x = CausalSelfAttention(8, 2).double(), torch.randn(3, 5, 8, dtype=DOUBLE)
    q, k, v = ours.project_in(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(ours(x), ours.project_out(theirs))


def test_anything_may_stand_before_the_first_cut_and_behind_an_inner_last_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 5), nn.ReLU(), nn.Linear(5, 2))
    chain = check(model, ["3", "5"], torch.randn(4, 1, 6, 6, dtype=DOUBLE), output=False)
    assert len(chain.sections) == 1
    assert len(chain.tail) == 2


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(F.relu(self.first(x), inplace=True))


class Skip(Plain):
    def forward(self, x):
        return self.second(self.first(x)) + x.sum()


class Twice(Plain):
    def forward(self, x):
        return self.second(self.first(self.first(x)))


class Branching(Plain):
    def forward(self, x):
        return self.second(x) if x.sum() > 0 else self.first(x)


def test_modules_are_traced_to_chains():
    torch.manual_seed(0)
    check(Plain(), ["first", "relu", "second"], torch.randn(5, 4, dtype=DOUBLE))
    for model, message in ((Skip(), "not a link"), (Twice(), "first is called twice"), (Branching(), "cannot trace")):
        with pytest.raises(ValueError, match=message):
            fold(model, ["first"], torch.randn(2, 4), output=True, dtype=DOUBLE)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Linear(4, 4), nn.Tanh()], r"layer 1 \(Tanh\) never takes the value 1"),
        ([nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Conv1d(1, 1, 1))], r"layer 1\.1 \(Conv1d\) cannot be folded"),
        ([nn.Linear(4, 4), Residual(nn.Linear(4, 3))], r"layer 1 \(Residual\) must return"),
        ([nn.Linear(4, 4), nn.Linear(5, 3)], r"layer 1 \(Linear\) has in_features 5, but its input has 4"),
        ([nn.Linear(4, 4), nn.Dropout(0.5)], r"layer 1 \(Dropout\) is in training mode"),
        ([nn.Linear(4, 4), nn.BatchNorm1d(4)], r"layer 1 \(BatchNorm1d\) is in training mode"),
        ([nn.Linear(4, 4), nn.LayerNorm(5)], r"layer 1 \(LayerNorm\) normalises"),
        ([nn.Linear(4, 4), nn.GroupNorm(2, 4)], r"layer 1 \(GroupNorm\) cannot be folded"),
        ([nn.Linear(4, 4), CausalSelfAttention(6, 2)], r"layer 1 \(CausalSelfAttention\) has width 6"),
    ],
)
def test_what_cannot_be_folded_is_named(layers, message):
    with pytest.raises(ValueError, match=message):
        fold(nn.Sequential(*layers), ["0"], torch.randn(2, 4), output=True, dtype=DOUBLE)


def test_impossible_cuts_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    work = lambda cuts, x=None: fold(model, cuts, torch.randn(2, 4) if x is None else x, output=True, dtype=DOUBLE)
    with pytest.raises(ValueError, match="no layer '7'"):
        work(["7"])
    with pytest.raises(ValueError, match=r"no cut '9'; there are 0, 1, 2"):
        work(["0", "9"])
    with pytest.raises(ValueError, match="in the order of the forward pass"):
        work(["2", "0"])
    with pytest.raises(ValueError, match="distinct"):
        work(["0", "0"])
    with pytest.raises(ValueError, match=r"activations at 0 must be \(n, d\)"):
        work(["0"], torch.randn(2, 1, 3, 4))


def test_where_activation_functions_are_one():
    assert one_of("layer", nn.GELU()) == pytest.approx(1.14445, abs=1e-5)
    assert one_of("layer", nn.ReLU()) == 1.0
    c = one_of("layer", nn.Softplus())
    assert F.softplus(torch.tensor(c, dtype=DOUBLE)).item() == pytest.approx(1, abs=1e-12)


def written(tmp_path, change=lambda w: w):
    torch.manual_seed(0)
    heads, width, head, hidden, p = 2, 6, 3, 10, 7
    shapes = {
        "embed.W_E": (p + 1, width), "pos_embed.W_pos": (3, width),
        "unembed.W_U": (width, p + 1), "unembed.b_U": (p + 1,),
        **{f"blocks.0.attn.W_{x}": (heads, width, head) for x in "QKV"},
        **{f"blocks.0.attn.b_{x}": (heads, head) for x in "QKV"},
        "blocks.0.attn.W_O": (heads, head, width), "blocks.0.attn.b_O": (width,),
        "blocks.0.mlp.W_in": (width, hidden), "blocks.0.mlp.b_in": (hidden,),
        "blocks.0.mlp.W_out": (hidden, width), "blocks.0.mlp.b_out": (width,),
    }  # fmt: skip
    weights = change({name: torch.randn(*shape) for name, shape in shapes.items()})
    save_file(weights, tmp_path / "model.safetensors")
    return weights, tmp_path / "model.safetensors"


def test_a_file_of_weights_is_read_as_its_layout_says(tmp_path):
    w, path = written(tmp_path)
    model = load_addition_transformer(path)
    tokens = torch.tensor([[1, 4, 7], [6, 0, 7]])
    x = w["embed.W_E"][tokens] + w["pos_embed.W_pos"]
    out = w["blocks.0.attn.b_O"].expand_as(x).clone()
    for h in range(2):
        q, k, v = (x @ w[f"blocks.0.attn.W_{n}"][h] + w[f"blocks.0.attn.b_{n}"][h] for n in "QKV")
        scores = (q @ k.transpose(1, 2) / 3**0.5).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
        out += scores.softmax(-1) @ v @ w["blocks.0.attn.W_O"][h]
    x = (x + out)[:, -1]
    hidden = (x @ w["blocks.0.mlp.W_in"] + w["blocks.0.mlp.b_in"]).relu()
    x = x + hidden @ w["blocks.0.mlp.W_out"] + w["blocks.0.mlp.b_out"]
    torch.testing.assert_close(model(tokens), x @ w["unembed.W_U"] + w["unembed.b_U"], rtol=1e-4, atol=1e-4)
    check(model, ["attention", "mlp", "unembed"], tokens)


def test_files_that_hold_something_else_are_refused(tmp_path):
    _, path = written(tmp_path, lambda w: {k: v for k, v in w.items() if "mlp" not in k})
    with pytest.raises(ValueError, match="missing"):
        load_addition_transformer(path)
    _, path = written(tmp_path, lambda w: w | {"blocks.1.attn.W_Q": torch.ones(1)})
    with pytest.raises(ValueError, match="more than one layer"):
        load_addition_transformer(path)
    _, path = written(tmp_path, lambda w: w | {"unembed.b_U": torch.ones(3)})
    with pytest.raises(ValueError, match="shapes do not fit"):
        load_addition_transformer(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="not readable"):
        load_addition_transformer(path)


def test_impossible_sizes_are_named():
    with pytest.raises(ValueError, match="heads"):
        CausalSelfAttention(7, 2)
    with pytest.raises(ValueError, match="modulus"):
        addition_transformer(1)
    assert LastPosition()(torch.ones(1, 2, 3)).shape == (1, 3)
