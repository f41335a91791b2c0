"""The loop: recorded runs, where rules meet, batches, early ends, streaming, what delayed decoding means, refusals."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot

from locally.sequence.diffusion_decoding import (
    Decoding,
    DiffusionConfig,
    FixedCount,
    LocalLeap,
    Schedule,
    Status,
    Threshold,
    analyze_delayed_decoding,
    diffusion_generate,
)

MASK, VOCAB = 9, 10
RULES = [FixedCount(1), FixedCount(3), Schedule(2), Threshold(0.6), LocalLeap(0.6, 0.3, 2)]


class Coupled:
    """Logits of a position: a bias and a contribution of each neighbour within three positions."""

    def __init__(self, bias: torch.Tensor, R: torch.Tensor) -> None:
        self.bias, self.R = bias, R

    @classmethod
    def draw(cls, n: int, seed: int) -> "Coupled":
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        return cls(normal(n, VOCAB), 1.5 * normal(7, VOCAB, VOCAB))

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        n = ids.shape[1]
        logits = self.bias[:n].expand(len(ids), -1, -1).clone()
        for o in range(-3, 4):
            to = slice(max(0, -o), min(n, n - o))
            logits[:, to] += self.R[o + 3][ids[:, to.start + o : to.stop + o]]
        return logits


def random_prompts(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("number", [0, 1])
def test_recorded_runs(golden, number):
    recorded = np.load(golden / "03-localleap" / f"decode_{number}.npz")
    runs = json.loads((golden / "03-localleap" / f"decode_{number}.json").read_text())
    model = Coupled(torch.from_numpy(recorded["bias"]), torch.from_numpy(recorded["R"]))
    prompt = torch.from_numpy(recorded["prompt"])
    config = DiffusionConfig(
        gen_length=int(recorded["gen_length"]),
        block_length=int(recorded["block_length"]),
        mask_token_id=int(recorded["mask_id"]),
    )
    rules = {"greedy": FixedCount(1), "top2": FixedCount(2), "threshold_0.9": Threshold(0.9)}
    assert len(runs) == 6
    for name, wanted in runs.items():
        rule = rules.get(name) or LocalLeap(*(t(x) for t, x in zip((float, float, int), name.split("_")[1:])))
        trace = []

        def note(step, trace=trace):
            (row,) = step.committed
            start = prompt.shape[1] + step.block * config.block_length
            trace.append((start + row.nonzero()[:, 0]).tolist())

        out = diffusion_generate(model, prompt, replace(config, rule=rule), callback=note)
        assert out.sequences[0].tolist() == wanted["tokens"]
        assert out.nfe.tolist() == [wanted["nfe"]] == [out.forward_calls]
        assert trace == wanted["trace"]


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 2**31), blocks=st.sampled_from([1, 2, 4]))
def test_what_every_rule_keeps(rule, seed, blocks):
    prompt = random_prompts(3, 4, seed)
    decoding = Decoding(Coupled.draw(20, seed), prompt, DiffusionConfig(16, 16 // blocks, rule, mask_token_id=MASK))
    before, block = decoding.x.clone(), 0
    for step in decoding:
        known = before != MASK
        assert torch.equal(before[known], step.sequences[known])  # nothing that was settled changes
        assert step.committed.any(1).all()
        assert step.block in (block, block + 1)
        assert not (step.sequences[:, 4 : 4 + step.block * 16 // blocks] == MASK).any()  # earlier blocks are complete
        assert not (step.sequences[:, 4 : 4 + step.settled] == MASK).any()
        before, block = step.sequences.clone(), step.block
    out = decoding.output
    assert torch.equal(out.sequences[:, :4], prompt)
    assert not (out.sequences == MASK).any()
    assert (out.nfe <= 16).all()
    assert (out.nfe >= blocks).all()
    assert set(out.status) == {Status.LENGTH}
    assert ((out.commit_step >= 0) & (out.commit_step < out.nfe[:, None])).all()
    assert ((out.confidence > 0) & (out.confidence <= 1)).all()


@given(seed=st.integers(0, 2**31), rows=st.integers(2, 5))
def test_a_batch_is_its_rows_one_by_one(seed, rows):
    prompts, model = random_prompts(rows, 4, seed), Coupled.draw(20, seed)
    config = DiffusionConfig(16, 8, LocalLeap(0.6, 0.3, 2), mask_token_id=MASK)
    together = diffusion_generate(model, prompts, config)
    for r in range(rows):
        alone = diffusion_generate(model, prompts[r : r + 1], config)
        assert torch.equal(together.sequences[r], alone.sequences[0])
        assert together.nfe[r] == alone.nfe[0]
        assert torch.equal(together.commit_step[r], alone.commit_step[0])
    assert together.forward_calls <= int(together.nfe.sum())


def test_finished_rows_leave_the_batch():
    sizes = []
    model = Coupled.draw(20, 5)

    def counted(ids):
        sizes.append(len(ids))
        return model(ids)

    out = diffusion_generate(
        counted, random_prompts(6, 4, 5), DiffusionConfig(16, 16, Threshold(0.6), mask_token_id=MASK)
    )
    assert len(sizes) == out.forward_calls == int(out.nfe.max())
    assert sum(sizes) == int(out.nfe.sum()) < 6 * len(sizes)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31))
def test_where_rules_meet_whole_runs_do(seed):
    model, prompt = Coupled.draw(20, seed), random_prompts(2, 4, seed)
    run = lambda rule: diffusion_generate(model, prompt, DiffusionConfig(16, 8, rule, mask_token_id=MASK))
    same = [
        (LocalLeap(0.6, 0.6, 3), Threshold(0.6)),
        (LocalLeap(0.6, 0.2, 0), Threshold(0.6)),
        (LocalLeap(1 - 1e-15, 0.2, 8), FixedCount(1)),
        (Schedule(8), FixedCount(1)),
    ]
    for a, b in same:
        one, other = run(a), run(b)
        assert torch.equal(one.sequences, other.sequences)
        assert torch.equal(one.commit_step, other.commit_step)


@pytest.mark.parametrize("rule", RULES)
def test_positions_that_do_not_depend_on_one_another_come_out_the_same(rule):
    bias = 3 * torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = Coupled(bias, torch.zeros(7, VOCAB, VOCAB, dtype=torch.float64))
    out = diffusion_generate(model, random_prompts(1, 4, 0), DiffusionConfig(16, 4, rule, mask_token_id=MASK))
    assert torch.equal(out.responses[0], bias[4:, :MASK].argmax(-1))


def test_one_call_a_block_when_everything_is_sure():
    bias = 99.0 * one_hot(torch.arange(20) % MASK, VOCAB).double()
    model = Coupled(bias, torch.zeros(7, VOCAB, VOCAB, dtype=torch.float64))
    out = diffusion_generate(model, random_prompts(2, 4, 0), DiffusionConfig(16, 4, mask_token_id=MASK))
    assert out.nfe.tolist() == [4, 4]


def chain(ids: torch.Tensor) -> torch.Tensor:
    """Sure of the token after a known one, which is one more; knows nothing elsewhere."""
    left = torch.nn.functional.pad(ids, (1, 0), value=0)[:, :-1]
    logits = 40.0 * one_hot((left + 1) % MASK, VOCAB).double()
    return logits * (left != MASK)[..., None]


@pytest.mark.parametrize("rule", [Threshold(0.9), LocalLeap(0.9, 0.75, 4), FixedCount(1)])
def test_a_chain_takes_as_many_calls_as_tokens(rule):
    out = diffusion_generate(chain, torch.tensor([[3]]), DiffusionConfig(16, 8, rule, mask_token_id=MASK))
    assert out.responses[0].tolist() == [(4 + i) % MASK for i in range(16)]
    assert out.nfe.tolist() == [16]
    assert out.commit_step[0].tolist() == list(range(16))


def test_shifted_logits_are_read_one_to_the_left():
    model = Coupled.draw(20, 3)
    shifted = lambda ids: torch.roll(model(ids), -1, 1)  # logits at i say what token i + 1 is
    config = DiffusionConfig(16, 8, LocalLeap(0.6, 0.3, 2), mask_token_id=MASK)
    wanted = diffusion_generate(model, random_prompts(2, 4, 3), config)
    found = diffusion_generate(shifted, random_prompts(2, 4, 3), replace(config, logits_shift=1))
    assert torch.equal(found.sequences, wanted.sequences)


def test_the_end_of_sequence_ends_a_row_after_its_block():
    config = DiffusionConfig(12, 4, Threshold(0.9), mask_token_id=MASK, eos_token_id=6, early_stop=True)
    out = diffusion_generate(chain, torch.tensor([[3], [7]]), config)
    assert out.status == (Status.EOS, Status.EOS)
    assert out.responses.tolist() == [[4, 5, 6, 7] + [6] * 8, [8, 0, 1, 2, 3, 4, 5, 6] + [6] * 4]
    assert out.nfe.tolist() == [4, 8]
    assert out.commit_step[0].tolist() == [0, 1, 2, 3] + [-1] * 8
    assert out.confidence[0, 4:].isnan().all()
    assert diffusion_generate(chain, torch.tensor([[3]]), replace(config, early_stop=False)).status == (Status.LENGTH,)


def test_stop_sequences_end_a_row_across_blocks():
    config = DiffusionConfig(12, 4, mask_token_id=MASK, eos_token_id=6, stop_sequences=((7, 8),))
    out = diffusion_generate(chain, torch.tensor([[3], [4]]), config)
    assert out.status == (Status.STOP, Status.STOP)
    assert out.responses.tolist() == [[4, 5, 6, 7, 8, 0, 1, 2] + [6] * 4, [5, 6, 7, 8] + [6] * 8]
    asked = []
    told = diffusion_generate(
        chain,
        torch.tensor([[3]]),
        replace(config, stop_sequences=()),
        stop=lambda tokens: asked.append(list(tokens)) or 8 in tokens,
    )
    assert told.status == (Status.STOP,)
    assert asked == [[4, 5, 6, 7], [4, 5, 6, 7, 8, 0, 1, 2]]


def test_a_run_can_be_left_and_its_seed_repeats_it():
    decoding = Decoding(chain, torch.tensor([[3]]), DiffusionConfig(8, 8, mask_token_id=MASK))
    for calls, step in enumerate(decoding, 1):
        assert step.settled == calls
        if calls == 3:
            break
    left = decoding.output
    assert left.responses.tolist() == [[4, 5, 6] + [MASK] * 5]
    assert left.status == (Status.RUNNING,)
    with pytest.raises(ZeroDivisionError):
        diffusion_generate(
            chain, torch.tensor([[3]]), DiffusionConfig(8, 8, mask_token_id=MASK), callback=lambda step: 1 // 0
        )


def test_noise_belongs_to_the_row():
    model, prompts = Coupled.draw(20, 2), random_prompts(3, 4, 2)
    config = DiffusionConfig(16, 8, LocalLeap(0.6, 0.3, 2), temperature=1.5, mask_token_id=MASK)
    seeded = lambda *seeds: [torch.Generator().manual_seed(s) for s in seeds]
    together = diffusion_generate(model, prompts, config, generator=seeded(5, 6, 7))
    alone = diffusion_generate(model, prompts[1:2], config, generator=seeded(6))
    assert torch.equal(together.sequences[1], alone.sequences[0])
    other = diffusion_generate(model, prompts, config, generator=torch.Generator().manual_seed(1))
    again = diffusion_generate(model, prompts, config, generator=torch.Generator().manual_seed(1))
    assert torch.equal(other.sequences, again.sequences)
    assert not torch.equal(other.sequences, together.sequences)


def test_outputs_with_logits_inside_and_masks_go_through():
    seen = {}

    class Model:
        mask_token_id = MASK

        def __call__(self, ids, attention_mask=None):
            seen["mask"] = attention_mask
            return SimpleNamespace(logits=chain(ids))

    mask = torch.tensor([[0, 1], [1, 1]])
    out = diffusion_generate(Model(), torch.tensor([[0, 3], [2, 3]]), DiffusionConfig(4, 4), attention_mask=mask)
    assert out.responses.tolist() == [[4, 5, 6, 7]] * 2
    assert seen["mask"].tolist() == [[0, 1, 1, 1, 1, 1], [1] * 6]


def test_delayed_decoding_counts_what_a_loop_counts():
    model, prompts = Coupled.draw(20, 8), random_prompts(3, 4, 8)
    config = DiffusionConfig(16, 8, FixedCount(1), mask_token_id=MASK)
    steps = []
    diffusion_generate(model, prompts, config, callback=steps.append)
    found = analyze_delayed_decoding(model, prompts, config, anchor_threshold=0.6, distances=5)
    edges = found.agreement.edges
    hits, pairs = np.zeros((5, 5), int), np.zeros((5, 5), int)
    for r in range(3):
        final, commit = found.output.responses[r].tolist(), found.commit_step[r].tolist()
        for j in range(16):
            block = range(j // 8 * 8, commit[j] + 1)
            right = [s for s in block if int(steps[s].tokens[r, j % 8]) == final[j]]
            first = next(s for s in block if all(t in right for t in range(s, commit[j] + 1)))
            assert int(found.first_stable[r, j]) == first
        for s, step in enumerate(steps):
            sure = step.confidence[r].tolist()
            at = lambda i, step=step: step.block * 8 + i
            masked = [i for i in range(8) if commit[at(i)] >= s]
            for i in masked:
                for j in masked:
                    d = abs(i - j)
                    if 1 <= d <= 5 and sure[i] >= 0.5 and sure[j] < 0.6:
                        b = max(k for k in range(5) if sure[i] >= edges[k])
                        pairs[b, d - 1] += 1
                        hits[b, d - 1] += int(step.tokens[r, j]) == final[at(j)]
    assert pairs.sum() > 100
    assert np.array_equal(found.agreement.pairs.numpy(), pairs)
    assert np.array_equal(found.agreement.hits.numpy(), hits)
    assert (found.delay >= 0).all()


def test_refusals_before_the_first_call(without_shape_checks):
    def never(ids):
        raise AssertionError("called")

    prompt, fits = torch.tensor([[1, 2]]), {"gen_length": 8, "block_length": 4}
    limited = lambda ids: never(ids)
    limited.config = SimpleNamespace(max_position_embeddings=9, mask_token_id=MASK)
    refused = [
        (ValueError, "mask_token_id must be given", never, prompt, {}, {}),
        (ValueError, "at most 9 tokens, got 10", limited, prompt, {}, {}),
        (
            TypeError,
            "cache='dual' needs a model with logits_at",
            never,
            prompt,
            {"mask_token_id": MASK, "cache": "dual"},
            {},
        ),
        (ValueError, "eos_token_id must be given", never, prompt, {"mask_token_id": MASK, "early_stop": True}, {}),
        (
            ValueError,
            "attention_mask must be zeros, then ones",
            never,
            prompt,
            {"mask_token_id": MASK},
            {"attention_mask": torch.tensor([[1, 0]])},
        ),
        (
            ValueError,
            "attention_mask must have shape",
            never,
            prompt,
            {"mask_token_id": MASK},
            {"attention_mask": torch.ones(2, 2)},
        ),
        (ValueError, "input_ids must be integers", never, torch.ones(1, 2), {"mask_token_id": MASK}, {}),
        (ValueError, "generator must be one or one a row", never, prompt, {"mask_token_id": MASK}, {"generator": []}),
    ]
    for kind, message, model, ids, more, arguments in refused:
        with pytest.raises(kind, match=message):
            diffusion_generate(model, ids, DiffusionConfig(**fits, **more), **arguments)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("gen_length", 0, ValueError),
        ("block_length", 5, ValueError),
        ("block_length", 2.0, TypeError),
        ("rule", "localleap", TypeError),
        ("temperature", -1.0, ValueError),
        ("confidence", "guess", ValueError),
        ("logits_shift", 2, ValueError),
        ("cache", "all", ValueError),
        ("stop_sequences", ((),), ValueError),
    ],
)
def test_bad_settings_are_named(field, value, kind, without_shape_checks):
    with pytest.raises(kind, match=field):
        replace(DiffusionConfig(8, 4), **{field: value})


def test_models_that_break_their_word_are_named():
    prompt, config = torch.tensor([[1, 2]]), DiffusionConfig(8, 4, mask_token_id=MASK)
    with pytest.raises(ValueError, match="model must return logits of shape"):
        diffusion_generate(lambda ids: torch.zeros(1, 3, VOCAB), prompt, config)
    with pytest.raises(ValueError, match="model must return logits of shape"):
        diffusion_generate(lambda ids: None, prompt, config)
    with pytest.raises(ValueError, match="mask_token_id must be below 5"):
        diffusion_generate(lambda ids: torch.zeros(1, 10, 5), prompt, config)
    with pytest.raises(ValueError, match="NaN"):
        diffusion_generate(lambda ids: torch.full((1, 10, VOCAB), torch.nan), prompt, config)
    with pytest.warns(UserWarning, match="hold the mask token"):
        diffusion_generate(chain, torch.tensor([[1, MASK, 2]]), config)
