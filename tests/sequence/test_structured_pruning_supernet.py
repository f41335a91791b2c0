"""Supernets: what is stored, what is handed on, what a candidate scores; and the baselines."""

import copy
import math
import weakref

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from locally.sequence.structured_pruning import (
    Batch,
    LocalSettings,
    Scorer,
    Space,
    build_supernet,
    compress,
    local_prune,
    open_network,
    perplexity,
    prune_uniform,
    save_compressed,
    size_of,
)
from locally.sequence.structured_pruning.baselines import METHODS
from locally.sequence.structured_pruning.cuts import narrow
from locally.sequence.structured_pruning.levels import HEADS, step_sizes, uniform
from locally.sequence.structured_pruning.network import StreamedNetwork
from locally.sequence.structured_pruning.supernet import expectation_shares
from tests.sequence.pruning_models import small_model, small_text

TEXT = small_text()


def space_of(network, sparsity=0.5, unit="query_head") -> Space:
    sublayers = network.sublayers(unit)
    return Space(sublayers, uniform(sublayers, sparsity), step_sizes(sublayers, 0.25, least=(1, 10)), 2)


def built(tmp_path, model=None, settings=None, unit="query_head"):
    network = open_network(model or small_model())
    return build_supernet(network, TEXT, space_of(network, unit=unit), tmp_path, settings, unit=unit)


def inputs_of(model, layer, which) -> torch.Tensor:
    """What o_proj or down_proj of one block sees of the text in the model as it is."""
    seen = []
    module = layer.self_attn.o_proj if which == HEADS else layer.mlp.down_proj
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        model(TEXT)
    hook.remove()
    return torch.cat(seen)


def test_first_block_is_pruned_on_the_dense_inputs(tmp_path):
    model = small_model()
    supernet = built(tmp_path, model)
    layer = model.model.layers[0]
    for which, i, groups in ((HEADS, 0, 4), ("neurons", 1, 40)):
        X = inputs_of(model, layer, which)
        W = (layer.self_attn.o_proj if which == HEADS else layer.mlp.down_proj).weight.detach().mT
        removed = supernet.space.centres[i]
        rounds = None if which == HEADS else 16
        wanted = local_prune(X.mT @ X, W, groups=groups, keep=groups - removed, rounds=rounds)
        if which == HEADS:
            cut = supernet.cut(0, removed, 0).heads
            assert cut.kept.tolist() == wanted.kept.nonzero().squeeze(1).tolist()
            columns = wanted.kept.repeat_interleave(6)
            torch.testing.assert_close(cut.weight, wanted.weight[columns].mT, rtol=1e-3, atol=1e-5)


def test_what_is_handed_on_is_the_expectation_of_outputs(tmp_path):
    """The second block is fitted to inputs that are averages over the levels of the first, weighted by density."""
    model = small_model(num_hidden_layers=2)
    network = open_network(model)
    supernet = built(tmp_path, model)
    hidden = network.embed(TEXT)
    block = network.block(0)
    space = supernet.space

    def average(kind, i, x):
        """Of the outputs of all levels of a sub-layer's last projection."""
        projection = block.self_attn.o_proj if kind == HEADS else block.mlp.down_proj
        groups = space.sublayers[i].groups
        total, weights = 0, 0
        for removed in space.choices(i):
            share = 1 - removed / groups
            if removed == 0:
                y = projection(x)
            else:
                cut = supernet.cut(0, removed, 0).heads if kind == HEADS else supernet.cut(0, 0, removed).neurons
                size = 6 if kind == HEADS else 1
                columns = (cut.kept.unsqueeze(1) * size + torch.arange(size)).flatten()
                y = F.linear(x[..., columns], cut.weight)
            total, weights = total + share * y, weights + share
        return total / weights

    averaged = copy.deepcopy(model)
    first = averaged.model.layers[0]
    outputs = {"heads": (first.self_attn.o_proj, 0), "neurons": (first.mlp.down_proj, 1)}
    for kind, (module, i) in outputs.items():
        module.forward = lambda x, kind=kind, i=i: average(kind, i, x)
    with torch.no_grad():
        X = inputs_of(averaged, averaged.model.layers[1], HEADS)
    W = model.model.layers[1].self_attn.o_proj.weight.detach().mT
    wanted = local_prune(X.mT @ X, W, groups=4, keep=2, rounds=None)
    cut = supernet.cut(1, 2, 0).heads
    assert cut.kept.tolist() == wanted.kept.nonzero().squeeze(1).tolist()
    torch.testing.assert_close(cut.weight, wanted.weight[wanted.kept.repeat_interleave(6)].mT, rtol=1e-3, atol=1e-5)
    assert hidden.shape == (12, 16, 24)


def test_shares_of_the_levels():
    settings = {
        name: LocalSettings(accumulation=name) for name in ("expectation", "center", "uniform", "random", "none")
    }
    nine = [8 - i for i in range(9)]
    shares = expectation_shares(nine, 8, 4, settings["expectation"], 0)
    assert shares == pytest.approx([(1 - r / 8) / 4.5 for r in nine])
    assert sum(s * (1 - r / 8) for s, r in zip(shares, nine)) == pytest.approx(0.708, abs=1e-3)
    assert expectation_shares(nine, 8, 4, settings["center"], 0) == [float(r == 4) for r in nine]
    assert expectation_shares(nine, 8, 4, settings["uniform"], 0) == [1 / 9] * 9
    assert sorted(expectation_shares(nine, 8, 4, settings["random"], 0)) == [0.0] * 8 + [1.0]
    assert expectation_shares(nine, 8, 4, settings["none"], 0) is None
    assert expectation_shares([8], 8, 8, settings["expectation"], 0) == [1.0]  # only the empty level


VARIANTS = [*({"accumulation": name} for name in ("center", "uniform", "random", "none")), {"sequential": True}]


@pytest.mark.parametrize("option", VARIANTS)
def test_variants_differ_from_the_second_block_on(tmp_path, option):
    default, other = built(tmp_path / "a"), built(tmp_path / "b", settings=LocalSettings(**option))
    same = lambda b: torch.equal(default.cut(b, 2, 20).heads.weight, other.cut(b, 2, 20).heads.weight)
    assert same(0)
    assert not same(2)


def test_a_group_with_its_queries(tmp_path):
    supernet = built(tmp_path, unit="kv_group")
    cut = supernet.cut(1, 1, 10)
    assert cut.heads.kept.tolist() in ([0, 1], [2, 3])
    small = compress(small_model(), supernet.plan((1, 10, 0, 0, 2, 40)))
    assert small.config.kv_heads_per_layer == [1, 2, 0]
    assert small.config.query_heads_per_layer == [2, 4, 0]


def test_a_stopped_supernet_goes_on_to_the_same_levels(tmp_path):
    class Stopped(Exception):
        pass

    network = open_network(small_model())
    space = space_of(network)
    whole = build_supernet(network, TEXT, space, tmp_path / "whole")
    for stop in range(3):
        folder = tmp_path / f"stop{stop}"

        def leave(done, of, stop=stop):
            if done == stop + 1:
                raise Stopped

        with pytest.raises(Stopped):
            build_supernet(network, TEXT, space, folder, on_block=leave)
        blocks: list[int] = []
        build_supernet(network, TEXT, space, folder, on_block=lambda done, of, blocks=blocks: blocks.append(done))
        assert blocks == list(range(stop + 2, 4))
        for file in (tmp_path / "whole").glob("*.safetensors"):
            assert file.read_bytes() == (folder / file.name).read_bytes()
    assert not list(tmp_path.glob("*/hidden*"))
    assert len(whole.plan(space.centres)) == 3


def test_one_block_at_a_time(tmp_path, monkeypatch):
    """When a block is read from a folder, no other is in memory: in making, scoring, measuring and writing."""
    small_model(num_hidden_layers=5).save_pretrained(tmp_path / "dense")
    alive: weakref.WeakSet = weakref.WeakSet()
    read = StreamedNetwork.block
    seen = []

    def watched(self, b):
        seen.append(len(alive))
        block = read(self, b)
        alive.add(block)
        return block

    monkeypatch.setattr(StreamedNetwork, "block", watched)
    network = open_network(tmp_path / "dense")
    space = space_of(network)
    supernet = build_supernet(network, TEXT, space, tmp_path / "work")
    plan = supernet.plan(space.centres)
    scorer = Scorer(supernet, TEXT, cache_bytes=0)
    mutant = space.removed(space.mutant(space.start, np.random.default_rng(0)))
    assert np.isfinite(scorer([space.centres, mutant], Batch(np.arange(2), 32))).all()
    perplexity(network, TEXT, plan=plan)
    save_compressed(network, plan, tmp_path / "pruned")
    for method in METHODS:
        prune_uniform(network, TEXT, 0.5, method=method)
    assert len(seen) > 40
    assert max(seen) == 0
    # and files of hidden states are all that grows with the text
    assert not list((tmp_path / "work").glob("hidden*"))


def reference_score(supernet, removed, ids, fitness):
    """One candidate at a time, whole models, plain formulas."""
    model = supernet.network.model
    small = compress(model, supernet.plan(removed))
    with torch.no_grad():
        dense, sparse = (m(ids, output_hidden_states=True) for m in (model, small))
    p, q = (x.logits[:, :-1].double() for x in (dense, sparse))
    if fitness == "ppl":
        return float(F.cross_entropy(q.flatten(0, 1), ids[:, 1:].flatten()))
    if fitness == "topk_kl":
        p, chosen = p.topk(7, dim=-1)
        q = q.gather(-1, chosen)
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("fitness", ["kl", "topk_kl", "ppl"])
def test_scores_of_many_candidates_are_those_of_each(tmp_path, fitness):
    supernet = built(tmp_path)
    candidates = [(2, 20) * 3, (1, 20, 3, 20, 2, 20), (2, 10, 2, 20, 2, 30), (4, 40, 2, 0, 0, 20)]
    batch = Batch(np.array([3, 0, 7]), 48)
    scorer = Scorer(supernet, TEXT, fitness=fitness, top_k=7, tokens_at_once=32)
    found = scorer(candidates, batch)
    for removed, score in zip(candidates, found):
        assert score == pytest.approx(reference_score(supernet, removed, TEXT[[3, 0, 7]], fitness), rel=1e-4)
    # what a cache of blocks keeps makes no difference, nor do other candidates
    assert Scorer(supernet, TEXT, fitness=fitness, top_k=7, cache_bytes=0)(candidates[1:2], batch) == pytest.approx(
        found[1:2], rel=1e-5
    )


def test_scores_on_a_part_of_the_last_sequence(tmp_path):
    supernet = built(tmp_path)
    removed = (2, 20) * 3
    found = Scorer(supernet, TEXT)([removed], Batch(np.array([1, 2]), 26))[0]
    whole, part = (reference_score(supernet, removed, ids, "kl") for ids in (TEXT[1:2], TEXT[2:3, :10]))
    assert found == pytest.approx((15 * whole + 9 * part) / 24, rel=1e-4)


def test_distance_of_hidden_states_is_added(tmp_path):
    supernet = built(tmp_path)
    network = supernet.network
    removed = (2, 20) * 3
    batch = Batch(np.array([4]), 16)
    kl = Scorer(supernet, TEXT)([removed, (0,) * 6], batch)
    both = Scorer(supernet, TEXT, fitness="hidden", alpha=0.5)([removed, (0,) * 6], batch)
    assert both[1] == pytest.approx(0, abs=1e-9)
    dense = sparse = network.embed(TEXT[4:5])
    apart = 0.0
    for b in range(3):
        block = network.block(b)
        dense = network.run(b, block, dense)
        sparse = network.run(b, narrow(network, block, supernet.cut(b, 2, 20)), sparse)
        apart += float((dense - sparse)[:, :-1].square().mean(-1).mean())
    assert both[0] - kl[0] == pytest.approx(0.5 * apart, rel=1e-4)


class TestBaselines:
    """The same number of heads and of neurons gone, and each method's own rule."""

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("sparsity", [1 / 3, 0.5])
    def test_budgets(self, method, sparsity):
        model = small_model()
        plan = prune_uniform(model, TEXT, sparsity, method=method)
        gone = size_of(model) - size_of(model, plan)
        if method == "layer-drop":
            blocks = round(3 * sparsity)
            assert (gone.query_heads, gone.neurons) == (4 * blocks, 40 * blocks)
        else:
            assert (gone.query_heads, gone.neurons) == (round(12 * sparsity), round(120 * sparsity))
        assert math.isfinite(perplexity(compress(model, plan), TEXT))

    def test_nothing_removed_changes_nothing(self):
        model = small_model("Llama with biases")
        for method in METHODS:
            small = compress(model, prune_uniform(model, TEXT, 0.0, method=method))
            with torch.no_grad():
                torch.testing.assert_close(small(TEXT).logits, model(TEXT).logits, rtol=0, atol=1e-5)

    def test_wanda_takes_the_smallest_products(self):
        model = small_model()
        X = inputs_of(model, model.model.layers[1], "neurons")
        scores = model.model.layers[1].mlp.down_proj.weight.detach().abs().sum(0) * X.norm(dim=0)
        cut = prune_uniform(model, TEXT, 0.5, method="wanda-sp")[1].neurons
        assert set(cut.kept.tolist()) == set(scores.argsort()[20:].tolist())

    def test_flap_restores_the_mean_of_what_is_gone(self):
        model = small_model("Llama with biases")
        layer = model.model.layers[0]
        X = inputs_of(model, layer, "neurons")
        cut = prune_uniform(model, TEXT, 0.5, method="flap")[0].neurons
        dense = X @ layer.mlp.down_proj.weight.detach().mT + layer.mlp.down_proj.bias.detach()
        pruned = X[:, cut.kept] @ cut.weight.mT + cut.bias
        torch.testing.assert_close(pruned.mean(0), dense.mean(0), rtol=0, atol=1e-5)

    def test_layer_dropping_takes_the_block_that_does_least(self):
        model = small_model()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[1].get_submodule(name).weight.data.mul_(0.01)
        plan = prune_uniform(model, TEXT, 1 / 3, method="layer-drop")
        assert [cut.heads is not None for cut in plan] == [False, True, False]

    def test_refitting_beats_masking(self):
        """Of the layer's output on the calibration text."""
        model = small_model()
        layer = model.model.layers[0]
        X = inputs_of(model, layer, HEADS)
        W = layer.self_attn.o_proj.weight.detach()
        error = {}
        for method in ("obs", "local", "magnitude", "wanda-sp"):
            cut = prune_uniform(model, TEXT, 0.5, method=method)[0].heads
            columns = (cut.kept.unsqueeze(1) * 6 + torch.arange(6)).flatten()
            error[method] = float((X[:, columns] @ cut.weight.mT - X @ W.mT).square().sum())
        assert max(error["obs"], error["local"]) < min(error["magnitude"], error["wanda-sp"])

    def test_bad_input_is_named(self):
        model = small_model()
        for sparsity in (-0.1, 1.0, math.nan):
            with pytest.raises(ValueError, match="sparsity must lie in"):
                prune_uniform(model, TEXT, sparsity)
        with pytest.raises(ValueError, match="method must be one of"):
            prune_uniform(model, TEXT, 0.5, method="random")
        with pytest.raises(ValueError, match="tokenizer does not match"):
            prune_uniform(model, TEXT + 30, 0.5)
