"""Recovery training: what is trained, what resuming gives, merged against unmerged, examples from files, refusals."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open

from locally.sequence.gated_linearization import Examples, LigerConfig, Schedule, Status, fit_lora, read_examples
from locally.sequence.gated_linearization.recovery import mean_loss
from locally.sequence.gated_linearization.text import BadText
from tests.sequence.test_gated_linearization_models import converted, tokens

FAST = {"lr": 5e-3, "batch_size": 4, "accumulation": 1, "epochs": 2, "evaluate_every": 3}


def corpus(n=16, T=16):
    """Counting up, from anywhere, in steps of 1 or 2: something that can be learned."""
    generator = torch.Generator().manual_seed(0)
    start, step = torch.randint(0, 31, (n, 1), generator=generator), torch.randint(1, 3, (n, 1), generator=generator)
    return Examples(2 + (start + step * torch.arange(T)) % 31)


def weights(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_only_adapters_are_trained_and_their_number_is_known():
    model = converted()
    before = weights(model)
    found = fit_lora(model, corpus(), None, Schedule(**FAST))
    # three layers, rank 8: inputs and outputs of q (32, 32), k and v (32, 16)
    assert found.trainable == 3 * 8 * ((32 + 32) + 2 * (32 + 16))
    assert found.parameters == sum(x.numel() for x in before.values())
    assert found.status is Status.FINISHED
    assert found.losses[-1] < found.losses[0]
    merged = weights(found.merged())
    assert merged.keys() == before.keys()
    changed = {name.split(".")[-2] for name in before if not torch.equal(merged[name], before[name])}
    assert changed == {"q_proj", "k_proj", "v_proj"}


def test_merged_and_unmerged_give_the_same_logits():
    found = fit_lora(converted(), corpus(), None, Schedule(**FAST), rank=4, alpha=16.0)
    x = tokens()
    unmerged = found.model(input_ids=x).logits
    torch.testing.assert_close(found.merged()(x).logits, unmerged, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("decay", ["plateau", "cosine", "constant"])
def test_a_resumed_run_gives_the_same_numbers(tmp_path, decay):
    schedule = Schedule(
        **FAST | {"epochs": 3, "batch_size": 2, "accumulation": 2, "patience": 0},
        decay=decay,
        warmup=3,
        max_grad_norm=1.0,
    )
    validation = corpus()[slice(0, 4)]
    whole = fit_lora(converted(), corpus(), validation, schedule, checkpoint=tmp_path / "whole", save_every=4)

    class Killed(Exception):
        pass

    path = tmp_path / "parts"
    for last, saved in ((6, 4), (11, 8)):

        def kill(step, total, loss, last=last):
            assert total == 12
            if step == last:
                raise Killed

        with pytest.raises(Killed):
            fit_lora(converted(), corpus(), validation, schedule, checkpoint=path, save_every=4, callback=kill)
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["progress"])["step"] == saved
    found = fit_lora(converted(), corpus(), validation, schedule, checkpoint=path, save_every=4)
    assert found.resumed_from == 8
    assert found.losses == whole.losses
    assert found.validation == whole.validation
    assert found.best_step == whole.best_step
    assert same(weights(found.merged()), weights(whole.merged()))
    done = fit_lora(converted(), corpus(), validation, schedule, checkpoint=path)  # nothing is left to do
    assert done.losses == whole.losses
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_callback_stops_and_the_rest_follows_later(tmp_path):
    schedule = Schedule(**FAST)
    stopped = fit_lora(
        converted(), corpus(), None, schedule, checkpoint=tmp_path / "c", callback=lambda step, *_: step < 3
    )
    assert (stopped.status, len(stopped.losses)) == (Status.STOPPED, 3)
    rest = fit_lora(converted(), corpus(), None, schedule, checkpoint=tmp_path / "c")
    assert (rest.status, rest.resumed_from) == (Status.FINISHED, 3)
    assert rest.losses == fit_lora(converted(), corpus(), None, schedule).losses


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"schedule": Schedule(**FAST | {"lr": 1e-4})}, "schedule"),
        ({"train": corpus()[slice(0, 12)]}, "examples"),
        ({"validation": corpus()[slice(0, 3)]}, "validation"),
        ({"rank": 4}, "rank"),
        ({"model": lambda: converted(variant="hgrn2")}, "conversion"),
        ({"model": lambda: converted("llama, tied")}, "model"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, word):
    given = {"model": converted, "train": corpus(), "validation": None, "schedule": Schedule(**FAST), "rank": 8}

    def go(model, train, validation, schedule, rank):
        return fit_lora(
            model(), train, validation, schedule, rank=rank, checkpoint=tmp_path / "c", callback=lambda *_: False
        )

    go(**given)
    with pytest.raises(ValueError, match=f"another run: .*{word}"):
        go(**given | change)


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "c").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        fit_lora(converted(), corpus(), None, Schedule(**FAST), checkpoint=tmp_path / "c")


def test_divergence_is_a_status_and_keeps_finite_adapters():
    found = fit_lora(
        converted(), corpus(), None, Schedule(**FAST | {"lr": 1e30, "evaluate_every": 1}, decay="constant")
    )
    assert found.status is Status.DIVERGED
    assert all(bool(x.isfinite().all()) for x in weights(found.model).values())


def test_the_best_adapters_are_kept():
    validation = corpus()[slice(0, 4)]
    schedule = Schedule(**FAST | {"lr": 0.3, "epochs": 4}, decay="constant")  # too fast: it gets worse again
    found = fit_lora(converted(), corpus(), validation, schedule)
    losses = dict(found.validation)
    assert losses[found.best_step] == min(losses.values())
    assert mean_loss(found.merged(), validation, 2) == pytest.approx(losses[found.best_step], rel=1e-4)


def test_plateau_lowers_the_rate_down_to_its_floor(tmp_path):
    schedule = Schedule(**FAST | {"lr": 0.1, "epochs": 3, "evaluate_every": 2}, patience=0, factor=0.5, min_lr=0.03)
    fit_lora(converted(), corpus(), corpus()[slice(0, 2)], schedule, checkpoint=tmp_path / "c")
    with safe_open(tmp_path / "c", "pt") as file:
        assert json.loads(file.metadata()["progress"])["lr"] in (0.1, 0.05, 0.03)


def test_masked_and_weighted_targets():
    x = corpus(4, 10).tokens
    labels = x.clone()
    labels[:, :6] = -100
    model = converted()
    logits = model(x, use_cache=False).logits[:, 5:-1].log_softmax(-1)
    losses = -logits.gather(-1, x[:, 6:, None]).squeeze(-1)
    assert mean_loss(model, Examples(x, labels), 3) == pytest.approx(losses.mean().item(), rel=1e-5)
    w = torch.rand(x.shape)
    wanted = (losses * w[:, 6:]).sum() / w[:, 6:].sum()
    assert mean_loss(model, Examples(x, labels, w), 2) == pytest.approx(wanted.item(), rel=1e-5)


def test_an_epoch_reads_every_example_once():
    schedule = Schedule(batch_size=2, accumulation=3, epochs=2)
    assert schedule.steps(19) == 6
    rows = [schedule.rows(step, 19) for step in range(6)]
    for epoch in (rows[:3], rows[3:]):
        assert len(set(torch.cat(epoch).tolist())) == 18
    assert not torch.equal(rows[0], rows[3])


def test_bad_examples_and_schedules_are_named(without_shape_checks):
    x = corpus(3, 8).tokens
    with pytest.raises(ValueError, match=r"\[0, 33\).*tokenizer"):
        fit_lora(converted(), Examples(x + 30))
    with pytest.raises(ValueError, match="labels"):
        Examples(x, x[:, :4])
    with pytest.raises(ValueError, match="nothing to predict"):
        Examples(x, torch.full_like(x, -100))
    with pytest.raises(ValueError, match="weights"):
        Examples(x, None, -torch.ones(3, 8))
    with pytest.raises(ValueError, match="at least 2 tokens"):
        Examples(x[:, :1])
    for field, value in (
        ("lr", 0.0), ("epochs", 0), ("batch_size", 0), ("decay", "linear"), ("factor", 1.0), ("max_grad_norm", 0.0),
        ("warmup", -1), ("weight_decay", math.nan), ("min_lr", -1.0), ("evaluate_every", 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=field):
            Schedule(**{field: value})
    with pytest.raises(ValueError, match="rank"):
        fit_lora(converted(), corpus(), rank=0)
    with pytest.raises(ValueError, match="alpha"):
        fit_lora(converted(), corpus(), alpha=0.0)


# Examples from files --------------------------------------------------------------------------------------------------


def tokenizer():
    """A letter a token; token 1 ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["?", "<end>", "<s>", *"abcdefghijklmnopqrstuvwxyz .:\n#IRnpstu"]
    made = Tokenizer(models.WordLevel({x: i for i, x in enumerate(dict.fromkeys(letters))}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="?")


def test_text_is_packed_and_some_is_held_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 10)
    train, validation = read_examples(path, tokenizer(), 10, held_out=0.2)
    assert (len(train), len(validation)) == (8, 2)
    assert train.tokens[0].tolist() == list(range(3, 13))
    whole, nothing = read_examples(path, tokenizer(), 7)
    assert (len(whole), nothing) == (101 // 7, None)
    short, one = read_examples(path, tokenizer(), 40, held_out=0.01)
    assert (len(short), len(one)) == (1, 1)


@pytest.mark.parametrize("kind", [".json", ".jsonl"])
def test_only_answers_of_instructions_are_targets(tmp_path, kind):
    records = [
        {"instruction": "ab", "input": "", "output": "cd"},
        {"instruction": "e", "input": "f", "output": "gh"},
    ] * 5
    path = tmp_path / f"a{kind}"
    path.write_text(json.dumps(records) if kind == ".json" else "\n".join(map(json.dumps, records)))
    made = tokenizer()
    train, _ = read_examples(path, made, 200)
    targets = train.tokens[train.labels != -100]
    assert made.decode(targets[:6]).replace(" ", "") == "cd<end>gh<end>"
    assert "### Response" in made.decode(train.tokens[0]).replace(" ", "").replace("###R", "### R").replace("?", "R")


def test_token_numbers_need_no_tokenizer(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(50, dtype=np.uint16))
    train, _ = read_examples(tmp_path / "a.npy", None, 8)
    assert train.tokens.flatten().tolist() == list(range(48))


def test_bad_files_are_named(tmp_path):
    def refused(name, content, message, made=None, length=4):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(BadText, match=message):
            read_examples(path, made, length, held_out=0.1 if "held" in message else 0.0)

    made = tokenizer()
    refused("a.txt", b"abc", "no tokenizer")
    refused("b.txt", b"abc", "fewer than one sequence", made, 100)
    refused("c.txt", b"\xff\xfe\xff", "not UTF-8", made)
    refused("d.csv", b"a,b", "none of .txt", made)
    refused("e.json", b"{", "not JSON", made)
    refused("f.json", b"{}", "list of records", made)
    refused("g.jsonl", b'{"instruction": "a"}', "record 1", made)
    refused("h.npy", b"abc", "not an array")
    refused("i.txt", b"abcdefg", "none can be held out", made, 5)
    np.save(tmp_path / "f.npy", np.zeros((2, 2)))
    with pytest.raises(BadText, match="one row of integers"):
        read_examples(tmp_path / "f.npy", None, 2)
    with pytest.raises(BadText, match="no file"):
        read_examples(tmp_path / "absent.txt", made, 2)
    with pytest.raises(ValueError, match="length"):
        read_examples(tmp_path / "a.txt", made, 1)


def test_config_of_recovered_models_says_what_they_are():
    found = fit_lora(converted(variant="gsa", slots=4), corpus(), None, Schedule(**FAST | {"epochs": 1}))
    assert LigerConfig.from_dict(found.merged().config.liger).slots == 4
