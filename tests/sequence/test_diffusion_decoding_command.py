"""`locally generate`: where prompts come from, what is printed and kept, resuming after a kill, refusals."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from locally.cli import main
from locally.sequence.diffusion_decoding import build, save

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SHORT = ["--gen-length", "8", "--block-length", "4"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A LLaDA, a BERT and a Llama folder with one tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "<eos>", "[MASK]", *"abcdefghij"]
    letters = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, unk_token="[UNK]", eos_token="<eos>", mask_token="[MASK]"
    )
    folder = tmp_path_factory.mktemp("models")
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 48, "max_sequence_length": 64}
    tokens = {"vocab_size": 13, "mask_token_id": 2, "eos_token_id": 1}
    torch.manual_seed(0)
    save(build({"architectures": ["LLaDAModelLM"], **sizes, **tokens}), folder / "llada", tokenizer=tokenizer)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=13, **SIZES))
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=13, eos_token_id=1, **SIZES))
    for name, model in (("bert", bert), ("llama", llama)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def locally(monkeypatch, capsys):
    """Run a command line in this process: exit status, standard output, standard error."""

    def call(*words, stdin=""):
        monkeypatch.setattr(sys, "argv", ["locally", "generate", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


@pytest.fixture
def refused(locally):
    def call(*words, **options):
        code, out, err = locally(*words, **options)
        assert (code, out) == (2, ""), err
        assert err.startswith("locally: ")
        assert err.count("\n") == 1
        return err

    return call


def test_prompts_come_from_options_files_and_standard_input(locally, models, tmp_path):
    (tmp_path / "lines.txt").write_text("a b c\n\nd e\n")
    (tmp_path / "objects.jsonl").write_text('{"prompt": "a b c"}\n{"prompt": "d e", "more": 1}\n')
    ways = [
        locally(models / "llada", "-p", "a b c", "-p", "d e", *SHORT),
        locally(models / "llada", "--prompts", tmp_path / "lines.txt", *SHORT),
        locally(models / "llada", "--prompts", tmp_path / "objects.jsonl", *SHORT),
        locally(models / "llada", *SHORT, stdin="a b c\nd e\n"),
        locally(models / "llada", "--prompts", "-", "--stream", *SHORT, stdin="a b c\r\nd e\r\n"),
    ]
    assert {code for code, _, _ in ways} == {0}
    assert len({out for _, out, _ in ways}) == 1
    assert ways[0][1].count("\n") == 2
    assert "2 of 2 prompts" in ways[0][2]


def test_json_is_one_object_a_prompt(locally, models):
    code, out, err = locally(models / "llada", "-p", "a b", "-p", "c", "--json", "--cache", "dual", *SHORT)
    assert (code, err) == (0, "")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [(a["index"], a["prompt"]) for a in answers] == [(0, "a b"), (1, "c")]
    assert answers[0].keys() == {"index", "prompt", "text", "tokens", "calls", "seconds", "status"}
    assert all(1 <= a["calls"] <= 8 for a in answers)


@pytest.mark.parametrize("rule", [["greedy"], ["fixed", "--tokens-per-step", "4"], ["schedule", "--steps", "2"]])
def test_rules_take_the_calls_that_they_say(locally, models, rule):
    _, out, _ = locally(models / "llada", "-p", "a b", "--json", "--rule", *rule, *SHORT)
    wanted = {"greedy": 8, "fixed": 2, "schedule": 2}[rule[0]]
    answer = json.loads(out)
    assert answer["calls"] == wanted or answer["status"] == "end of sequence"


def test_masked_and_causal_checkpoints_work_too(locally, models):
    for name in ("bert", "llama"):
        code, out, _ = locally(models / name, "-p", "a b", "--json", *SHORT)
        assert code == 0
        assert json.loads(out)["tokens"] <= 8


def test_a_file_of_answers_is_resumed_where_it_was_cut(locally, refused, models, tmp_path):
    prompts, answers = tmp_path / "prompts.txt", tmp_path / "deep" / "answers.jsonl"
    prompts.write_text("".join(f"{a} {b}\n" for a in "abc" for b in "def"))
    words = [models / "llada", "--prompts", prompts, "-o", answers, "--temperature", "1", "-b", "4", *SHORT]
    assert locally(*words)[0] == 0
    whole = answers.read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [a["index"] for a in lines] == list(range(9))
    assert "exists already: --resume" in refused(*words)
    code, _, err = locally(*words, "--resume")
    assert (code, answers.read_bytes()) == (0, whole)
    assert "nothing left to do" in err

    answers.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + b'{"index": 3, "prom')
    assert locally(*words, "--resume")[0] == 0
    again = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [{**a, "seconds": 0} for a in again] == [{**a, "seconds": 0} for a in lines]

    assert "other settings" in refused(*words, "--seed", "1", "--resume")
    assert "other settings" in refused(*words, "--radius", "1", "--resume")
    prompts.write_text("b a\n")
    assert "answers another prompt 1" in refused(*words, "--resume")
    answers.write_text("no answer\n")
    assert "line 1: no answer" in refused(*words, "--resume")
    assert [p.name for p in answers.parent.iterdir()] == ["answers.jsonl"]


def test_a_killed_run_leaves_whole_lines(locally, models, tmp_path):
    prompts, answers = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("a b c\n" * 400)
    words = ["generate", str(models / "llada"), "--prompts", str(prompts), "-o", str(answers), "--gen-length", "32"]
    command = [sys.executable, "-m", "locally.cli", *words, "-b", "1", "--rule", "greedy"]
    worker = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (answers.exists() and answers.read_bytes().count(b"\n") >= 3):
        assert time.monotonic() < deadline
        assert worker.poll() is None
        time.sleep(0.02)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    kept = answers.read_bytes()
    whole = [json.loads(line) for line in kept[: kept.rindex(b"\n")].splitlines()]
    assert 3 <= len(whole) < 400
    prompts.write_text("a b c\n" * (len(whole) + 1))
    assert locally(*words[1:], "-b", "1", "--rule", "greedy", "--resume")[0] == 0
    resumed = [json.loads(line) for line in answers.read_text().splitlines()]
    assert resumed[: len(whole)] == whole
    assert [a["index"] for a in resumed] == list(range(len(whole) + 1))


def test_bad_usage_is_one_line_before_any_work(refused, models, tmp_path, without_shape_checks):
    llada = models / "llada"
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    told = [
        (["-p", "a", "--gen-length", "8", "--block-length", "3"], "block_length must divide gen_length = 8, got 3"),
        (["-p", "a", "--anchor-threshold", "1"], r"anchor_threshold must be in (0, 1), got 1.0"),
        (["-p", "a", "--relaxed-threshold", "0"], r"relaxed_threshold must be in (0, 1), got 0.0"),
        (["-p", "a", "--threshold", "1.5"], r"threshold must be in (0, 1), got 1.5"),
        (["-p", "a", "--relaxed-threshold", "0.95"], "relaxed_threshold must be at most anchor_threshold"),
        (["-p", "a", "--rule", "fastest"], "--rule must be one of localleap, threshold"),
        (["-p", "a", "--steps", "4"], "--steps and --rule schedule belong together"),
        (["-p", "a", "--cache", "half"], "cache must be one of None, 'prefix', 'dual'"),
        (["-p", "a", "--gen-length", "64"], "prompt 1 has 1 tokens: prompt and gen_length together must be at most 64"),
        (["-p", "a", "--device", "abacus"], "--device abacus cannot be used"),
        (["-p", "a", "--dtype", "int8"], "--dtype must be one of float32"),
        (["-p", "a", "--chat", *SHORT], "has no chat template"),
        (["-p", "a", "--prompts", "x"], "give --prompt or --prompts, not both"),
        (["-p", " "], "a prompt must not be empty"),
        (["-p", "a", "--resume"], "--resume needs --output"),
        (["-p", "a", "--stream", "--json"], "--stream is for text"),
        (["-p", "a", "-o", tmp_path], "it is no file"),
        (["--prompts", tmp_path / "nothing"], "cannot read"),
        (["--prompts", tmp_path / "binary"], "not UTF-8 text"),
        (["--prompts", tmp_path / "bad.jsonl"], 'line 1: no object with a text under "prompt"'),
        ([], "no prompt: there is nothing to complete"),
    ]
    for words, message in told:
        assert message in refused(llada, *words)
    assert "there is no folder" in refused(tmp_path / "nowhere", "-p", "a")
    assert "--rule and --cache are for masked diffusion" in refused(models / "llama", "-p", "a", "--rule", "greedy")
    assert "--cache is for LLaDA and Dream" in refused(models / "bert", "-p", "a", "--cache", "dual")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"architectures": ["T5ForConditionalGeneration"]}')
    assert "holds T5ForConditionalGeneration; supported are LLaDAModelLM, DreamModel" in refused(other, "-p", "a")


def test_help_stays_light():
    code = "import sys; from locally.cli import generate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
