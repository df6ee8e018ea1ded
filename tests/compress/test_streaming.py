"""A checkpoint compressed block by block from disk: the same as in memory, whenever it is killed, and never half written."""

import gc
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

import small_models
import tiny
from echelon.calibrate import Moments
from echelon.compress import SVD, LoRD, SliceGPT, compress_checkpoint
from echelon.errors import UserError
from echelon.models.families import UnsupportedFamily

LINEAR = {"target_modules": "all-linear", "nsamples": 12, "seqlen": 24}
METHODS = {
    "svd": SVD(ratio=0.5, round_to=1, **LINEAR),
    "svd_global": SVD(ratio=0.6, round_to=1, whiten=True, allocation="global", **LINEAR),
    "lord": LoRD(rank=0.4, round_rank=1, **LINEAR),
    "lord_energy": LoRD(energy=0.7, round_rank=1, **LINEAR),
    "lord_sequential": LoRD(rank=0.4, round_rank=1, sequential=True, **LINEAR),
    "slicegpt": SliceGPT(sparsity=0.25, nsamples=12, seqlen=24),
    "slicegpt_all": SliceGPT(schedule="redundancy", sparsity=0.3, slice_head=True, final_orientation="random", pca_on="normalized", nsamples=12, seqlen=24),
    "slicegpt_0": SliceGPT(sparsity=0.0, final_orientation="random", nsamples=12, seqlen=24),
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.*makes this model grow", "ignore:.*saves nothing")


def checkpoint(folder, family="llama", dtype=torch.float32, shards="20KB"):
    """A folder with a sharded model, a generation config that differs from the default, and a tokenizer."""
    model = small_models.model(family, dtype)
    model.generation_config.repetition_penalty = 1.25
    model.save_pretrained(folder, max_shard_size=shards)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def in_memory(source, compressor, out, data, dtype="auto"):
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    result = compressor.compress(model, data, seed=3)
    result.save(out, transformers.AutoTokenizer.from_pretrained(source, padding_side="left"))
    return result


def tensors(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def configs(folder):
    found = {file.name: json.loads(file.read_text()) for file in folder.glob("*config.json")}
    return found


def same(one, other, rtol=1e-5, atol=1e-5):
    ours, theirs = tensors(one), tensors(other)
    assert {name: (value.shape, value.dtype) for name, value in ours.items()} == {name: (value.shape, value.dtype) for name, value in theirs.items()}
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=atol, msg=lambda told, name=name: f"{name}: {told}")
    assert configs(one) == configs(other)


def streamed(source, compressor, out, family="llama", **arguments):
    return compress_checkpoint(source, compressor, out, small_models.data(family), seed=3, **arguments)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", small_models.CAUSAL)
def test_it_is_what_memory_would_have_made(family, name, tmp_path):
    source = checkpoint(tmp_path / "source", family)
    made = in_memory(source, METHODS[name], tmp_path / "memory", small_models.data(family))
    report = streamed(source, METHODS[name], tmp_path / "out", family)
    same(tmp_path / "memory", tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(small_models.logits(again, family), small_models.logits(made.model, family), rtol=1e-4, atol=1e-4)
    ours, theirs = report.to_dict(), made.report.to_dict()
    for field in ("method", "skipped", "tokens", *(f"{what}_{when}" for what in ("parameters", "bytes", "macs") for when in ("before", "after"))):
        assert ours[field] == theirs[field], field
    assert list(ours["modules"]) == list(theirs["modules"])
    for module, told in ours["modules"].items():
        assert told == pytest.approx(theirs["modules"][module], rel=1e-4, abs=1e-6), module
    assert sorted(os.listdir(tmp_path)) == ["memory", "out", "source"]
    assert {file.name for file in (tmp_path / "memory").iterdir()} - {"model.safetensors"} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_of_the_layers_that_are_done_neither_statistics_nor_dense_weights_are_kept(tmp_path, monkeypatch):
    config = transformers.LlamaConfig(**tiny.SPECIAL, **small_models.WIDE | {"num_hidden_layers": 6}, **small_models.GROUPED)
    with torch.random.fork_rng():
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "source", max_shard_size="20KB")
    kept = []
    convert = LoRD.convert

    def counting(self, *arguments):
        alive = gc.get_objects()
        dense = [o for o in alive if type(o) is torch.nn.Linear and not o.weight.is_meta]
        kept.append((sum(isinstance(o, Moments) for o in alive), len(dense)))
        return convert(self, *arguments)

    monkeypatch.setattr(LoRD, "convert", counting)
    compress_checkpoint(tmp_path / "source", METHODS["lord"], tmp_path / "out", small_models.data("llama"), seed=3)
    first, last = kept[:7], kept[-7:]
    assert len(kept) == 42 and max(count for count, _ in last) <= max(count for count, _ in first)
    assert max(count for _, count in last) <= max(count for _, count in first)


def test_half_precision_is_kept_and_near_what_memory_makes(tmp_path):
    source = checkpoint(tmp_path / "source", "qwen3", torch.bfloat16)
    for name in ("lord", "slicegpt"):
        in_memory(source, METHODS[name], tmp_path / "memory", small_models.data("qwen3"))
        streamed(source, METHODS[name], tmp_path / "out", "qwen3")
        same(tmp_path / "memory", tmp_path / "out", rtol=0.02, atol=0.02)
    in_memory(source, METHODS["svd"], tmp_path / "memory", small_models.data("qwen3"), torch.float32)
    streamed(source, METHODS["svd"], tmp_path / "out", "qwen3", dtype=torch.float32)
    same(tmp_path / "memory", tmp_path / "out")


def test_a_head_can_be_a_target_with_statistics_of_what_really_reaches_it(tmp_path):
    source = checkpoint(tmp_path / "source")
    for sequential in (False, True):
        compressor = LoRD(rank=6, round_rank=1, target_modules=["lm_head", "1.mlp.up_proj"], sequential=sequential, nsamples=12, seqlen=24)
        made = in_memory(source, compressor, tmp_path / "memory", small_models.data("llama"))
        assert "lm_head" in made.report.modules
        streamed(source, compressor, tmp_path / "out")
        same(tmp_path / "memory", tmp_path / "out")


def test_padded_batches_and_a_size_are_taken_as_in_memory(tmp_path):
    source = checkpoint(tmp_path / "source", "gpt2")
    generator = torch.Generator().manual_seed(4)
    batches = []
    for length in (5, 9, 7):
        ids, mask = torch.randint(4, tiny.VOCAB, (3, length), generator=generator), torch.ones(3, length, dtype=torch.long)
        mask[0, :2] = 0
        mask[2, 3:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    for compressor in (METHODS["lord"], METHODS["slicegpt"]):
        model = transformers.AutoModelForCausalLM.from_pretrained(source)
        knob = {"bytes": 0.9} if compressor.method_name == "slicegpt" else {"parameters": 24_448}
        compressor.compress(model, batches, seed=3, **knob).save(tmp_path / "memory", transformers.AutoTokenizer.from_pretrained(source, padding_side="left"))
        report = compress_checkpoint(source, compressor, tmp_path / "out", batches, seed=3, **knob)
        same(tmp_path / "memory", tmp_path / "out")
        assert report.bytes_after / report.bytes_before == pytest.approx(knob.get("bytes", 4 * 24_448 / report.bytes_before), rel=0.005)


def test_one_file_and_names_without_the_prefix_are_read(tmp_path):
    """As on the hub: GPT-2 without ``transformer.``, in a single file."""
    source = checkpoint(tmp_path / "source", "gpt2", shards="1GB")
    bare = tmp_path / "bare"
    shutil.copytree(source, bare)
    transformers.AutoModelForCausalLM.from_pretrained(source).transformer.save_pretrained(bare)
    assert "h.0.attn.c_attn.weight" in tensors(bare)
    for folder, out in ((source, "a"), (bare, "b")):
        streamed(folder, METHODS["slicegpt"], tmp_path / out, "gpt2")
    ours, theirs = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_it_holds_one_block_at_a_time(tmp_path, monkeypatch):
    """Weights that are real, counted when a block's work begins: those of this block and no other, and none outside the blocks."""
    source, seen = checkpoint(tmp_path / "source"), []

    def watch(model, walked):
        real = {name for name, tensor in model.named_parameters() if not tensor.is_meta}
        seen.append((walked.name, {name.split(".")[2] if ".layers." in name else name for name in real}))

    replace = LoRD.convert
    monkeypatch.setattr(LoRD, "convert", lambda self, job, layer, spec: watch(job.model, layer) or replace(self, job, layer, spec))
    streamed(source, METHODS["lord"], tmp_path / "out")
    assert len(seen) == 14 and all(real == {name.split(".")[2]} for name, real in seen)


def test_progress_tells_each_block_of_each_pass(tmp_path):
    told = []
    streamed(checkpoint(tmp_path / "source"), METHODS["svd_global"], tmp_path / "out", on_progress=told.append)
    assert [(entry["step"], entry["done"], entry["of"]) for entry in told] == [(step, done, 2) for step in ("spectra", "blocks") for done in (0, 1, 2, 2)]


DRIVER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import small_models, test_streaming
from echelon.compress import compress_checkpoint

source, name, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])

def attempt(out, die=None, before=False, after=None):
    "In a process of its own: its exit status. It kills itself at its die-th rename, or is killed after some seconds."
    pid = os.fork()
    if not pid:
        try:
            if die is not None:
                replace, count = os.replace, 0
                def dying(*arguments):
                    nonlocal count
                    count += 1
                    if count == die and before:
                        os.kill(os.getpid(), signal.SIGKILL)
                    replace(*arguments)
                    if count == die:
                        os.kill(os.getpid(), signal.SIGKILL)
                os.replace = dying
            compress_checkpoint(source, test_streaming.METHODS[name], out, small_models.data("llama"), seed=3)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def whole(out):
    return not out.exists() or (out / "config.json").exists() and (out / "compression_report.json").exists()

started = time.perf_counter()
assert attempt(folder / "unbroken") == 0
takes = time.perf_counter() - started
kills = {"random": 0, "renames": 0}
generator = random.Random(5)
while True:
    status = attempt(folder / "random", after=generator.uniform(0.1, 1.0) * takes * (1 + kills["random"] / 10))  # the machine may have become slower
    assert status in (0, -9), status
    assert whole(folder / "random")
    if status == -9:
        kills["random"] += 1
        assert kills["random"] < 100
    elif kills["random"] >= 3:
        break
    else:  # it was faster than the first time
        shutil.rmtree(folder / "random")
        takes /= 2
die = 1
while (status := attempt(folder / "renames", die=die, before=die == 2)) == -9:
    kills["renames"] += 1
    assert whole(folder / "renames")
    die = 1 + kills["renames"] % 3
assert status == 0, status
print(json.dumps(kills))
"""


@pytest.mark.parametrize("name", ["slicegpt_all", "lord_energy"])
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(name, tmp_path):
    source = checkpoint(tmp_path / "source")
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", DRIVER, source, name, tmp_path], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    kills = json.loads(ran.stdout.splitlines()[-1])
    assert kills["random"] >= 3 and kills["renames"] >= 15, kills
    files = {file.name for file in (tmp_path / "unbroken").iterdir()}
    for out in ("random", "renames"):
        assert {file.name for file in (tmp_path / out).iterdir()} == files
        for file in files - {"compression_report.json"}:  # which tells the seconds
            assert (tmp_path / out / file).read_bytes() == (tmp_path / "unbroken" / file).read_bytes(), file
        reports = [json.loads((tmp_path / folder / "compression_report.json").read_text()) | {"seconds": 0} for folder in (out, "unbroken")]
        assert reports[0] == reports[1]
    assert sorted(os.listdir(tmp_path)) == ["random", "renames", "source", "unbroken"]


class Stop(Exception):
    """Stands for a crash."""


def stop_after(blocks):
    def tell(entry):
        if entry["step"] == "blocks" and entry["done"] == blocks:
            raise Stop

    return tell


def interrupted(source, tmp_path, name="slicegpt"):
    """The work folder of a compression that was stopped behind its first block."""
    with pytest.raises(Stop):
        streamed(source, METHODS[name], tmp_path / "out", on_progress=stop_after(1))
    assert not (tmp_path / "out").exists()
    return tmp_path / ".out.work"


def test_what_was_done_is_not_done_again(tmp_path, monkeypatch):
    source, told = checkpoint(tmp_path / "source"), []
    work = interrupted(source, tmp_path)
    written = {file.name: file.stat().st_mtime_ns for file in (work / "model").iterdir()}
    assert len(written) == 2
    streamed(source, METHODS["slicegpt"], tmp_path / "out", on_progress=told.append)
    assert [entry["done"] for entry in told] == [2, 2] and not work.exists()
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == when for name, when in written.items())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"compressor": SliceGPT(sparsity=0.5, nsamples=12, seqlen=24)}, "knobs.sparsity was 0.25 and is 0.5"),
        ({"compressor": METHODS["lord"]}, "method was 'slicegpt' and is 'lord'"), ({"seed": 4}, "seed was 3 and is 4"),
        ({"data": [[5, 6, 7, 8, 9, 10, 11, 12] * 3] * 12}, "data was"), ({"dtype": torch.bfloat16}, "dtype was 'torch.float32'"),
        ({"source": "another"}, "source was"), ({"parameters": 0.9}, "parameters was None and is 0.9"),
    ],
)  # fmt: skip
def test_other_work_in_the_folder_is_refused_and_stays(change, named, tmp_path):
    source = checkpoint(tmp_path / "source")
    work = interrupted(source, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in work.rglob("*")}
    given = {"source": source, "compressor": METHODS["slicegpt"], "out": tmp_path / "out", "data": small_models.data("llama"), "seed": 3} | change
    if change.get("source"):
        given["source"] = shutil.copytree(source, tmp_path / "another")
    with pytest.raises(UserError, match=named):
        compress_checkpoint(**given)
    assert {file: file.stat().st_mtime_ns for file in work.rglob("*") if file.name != "lock"} == {f: t for f, t in before.items() if f.name != "lock"}
    streamed(source, METHODS["slicegpt"], tmp_path / "out")
    assert (tmp_path / "out").exists()


def test_a_checkpoint_that_changed_meanwhile_is_refused(tmp_path):
    source = checkpoint(tmp_path / "source")
    interrupted(source, tmp_path)
    shard = sorted(source.glob("*.safetensors"))[0]
    os.utime(shard, ns=(1, 1))
    with pytest.raises(UserError, match=f"checkpoint.{shard.name} was"):
        streamed(source, METHODS["slicegpt"], tmp_path / "out")


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    source, inner = checkpoint(tmp_path / "source"), []

    def again(entry):
        if not inner:
            inner.append(entry)
            with pytest.raises(UserError, match="another process"):
                streamed(source, METHODS["svd"], tmp_path / "out")

    streamed(source, METHODS["svd"], tmp_path / "out", on_progress=again)
    assert inner


def test_folders_that_hold_something_else_are_refused(tmp_path):
    source = checkpoint(tmp_path / "source")
    for name in ("papers", "work"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is no model"):
        streamed(source, METHODS["svd"], tmp_path / "papers")
    with pytest.raises(UserError, match="is no work folder"):
        streamed(source, METHODS["svd"], tmp_path / "out", work=tmp_path / "work")
    with pytest.raises(UserError, match="is the model itself"):
        streamed(source, METHODS["svd"], source)
    assert all((tmp_path / name / "thesis.txt").read_text() == "mine" for name in ("papers", "work"))


def test_a_model_that_was_there_is_replaced_as_a_whole(tmp_path):
    source = checkpoint(tmp_path / "source")
    checkpoint(tmp_path / "out", "gpt2")
    (tmp_path / "out" / "old.txt").write_text("old")
    with pytest.raises(Stop):
        streamed(source, METHODS["svd"], tmp_path / "out", on_progress=stop_after(2))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt2"
    streamed(source, METHODS["svd"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama" and not (tmp_path / "out" / "old.txt").exists()


def test_a_disk_that_is_full_in_mid_save_costs_nothing_but_that_step(tmp_path):
    """A limit on the size of files makes the kernel refuse in the middle of a write, as a full disk does."""
    source, told = checkpoint(tmp_path / "source"), []
    streamed(source, METHODS["slicegpt"], tmp_path / "unbroken")
    sizes = sorted(file.stat().st_size for file in (tmp_path / "unbroken").glob("*.safetensors"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up(entry):
        told.append(entry)
        if entry["done"] == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] - 100, hard))

    try:
        with pytest.raises(UserError, match=r"cannot write .*(too large|No space|os error 27).*goes on from here"):
            streamed(source, METHODS["slicegpt"], tmp_path / "out", on_progress=fill_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    assert {file.name for file in (tmp_path / ".out.work" / "model").iterdir()} == {f"model-0000{i}-of-00004.safetensors" for i in (1, 2)}
    streamed(source, METHODS["slicegpt"], tmp_path / "out", on_progress=told.append)
    assert [entry["done"] for entry in told] == [0, 1, 2, 2]
    ours, theirs = tensors(tmp_path / "out"), tensors(tmp_path / "unbroken")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items()) and len(ours) == len(theirs)


@pytest.mark.parametrize("harm", ["cut", "gone", "empty", "index", "weights", "shape", "nan", "bin", "config", "quantised"])
def test_a_checkpoint_that_is_not_whole_is_an_error_before_any_work(harm, tmp_path):
    source = checkpoint(tmp_path / "source")
    shards, index, config = sorted(source.glob("*.safetensors")), source / "model.safetensors.index.json", source / "config.json"
    noted = json.loads(index.read_text())
    expected = {
        "cut": "cut short", "gone": f"shard {shards[2].name} is missing", "empty": "cut short", "index": "no index of shards", "weights": "has no tensor",
        "shape": "in the checkpoint and .* by config.json", "nan": "NaN", "bin": "only safetensors", "config": "config", "quantised": "quantised or compressed",
    }[harm]  # fmt: skip
    if harm == "cut":
        shards[2].write_bytes(shards[2].read_bytes()[:-40])
    elif harm == "gone":
        shards[2].unlink()
    elif harm == "empty":
        shards[2].write_bytes(b"")
    elif harm == "index":
        index.write_text(index.read_text()[:50])
    elif harm == "weights":
        (lost,) = [name for name in noted["weight_map"] if name.endswith("1.mlp.up_proj.weight")]
        rest = {name: value for name, value in load_file(source / noted["weight_map"][lost]).items() if name != lost}
        from safetensors.torch import save_file

        save_file(rest, source / noted["weight_map"].pop(lost))
        index.write_text(json.dumps(noted))
    elif harm == "shape":
        config.write_text(config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 50'))
    elif harm == "nan":
        small = small_models.model("llama")
        small.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
        small.save_pretrained(source, max_shard_size="20KB")
    elif harm == "bin":
        for file in [*shards, index]:
            file.unlink()
        (source / "pytorch_model.bin").write_bytes(b"x")
    elif harm == "config":
        config.write_text("{}")
    else:
        shutil.rmtree(source)
        SVD(ratio=0.5, round_to=1).compress(small_models.model("llama")).save(source)
    with pytest.raises((UserError, ValueError), match=expected):
        streamed(source, METHODS["lord"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if harm != "nan":  # which shows when the block is read
        assert not (tmp_path / ".out.work").exists()


def test_what_cannot_be_streamed_says_so(tmp_path):
    source = checkpoint(tmp_path / "source")
    with pytest.raises(ValueError, match="merge_shortcuts"):
        streamed(source, SliceGPT(merge_shortcuts=True), tmp_path / "out")
    with pytest.raises(ValueError, match="needs calibration data"):
        compress_checkpoint(source, METHODS["lord"], tmp_path / "out")
    with pytest.raises(UserError, match="no folder"):
        streamed(tmp_path / "nowhere", METHODS["svd"], tmp_path / "out")
    from echelon.compress import Compressor

    class Whole(Compressor):
        method_name = "whole"

        def prepare(self, job):
            return None

        specs = apply = prepare

    with pytest.raises(ValueError, match="whole needs the whole model at once"):
        streamed(source, Whole(), tmp_path / "out")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small_models.mixtral().save_pretrained(tmp_path / "mixtral")
        encoder = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
        transformers.T5ForConditionalGeneration(encoder).save_pretrained(tmp_path / "t5")
    for name, compressor in (("mixtral", METHODS["svd"]), ("mixtral", METHODS["slicegpt"]), ("t5", METHODS["svd"])):
        with pytest.raises((UnsupportedFamily, ValueError), match="layout|encoder-decoder|not support"):
            streamed(tmp_path / name, compressor, tmp_path / "out")
    with pytest.raises(ValueError, match="saves nothing"):
        streamed(source, LoRD(rank=0.95, round_rank=1, strict=True, **LINEAR), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    streamed(source, METHODS["svd"], tmp_path / "out")  # a refusal leaves nothing behind that would be in the way of another try


def test_randomness_is_the_seeds_alone(tmp_path):
    source, state = checkpoint(tmp_path / "source"), torch.random.get_rng_state()
    streamed(source, METHODS["slicegpt_all"], tmp_path / "out")
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_command_line_streams_and_says_what_does_not_go_with_it(tmp_path, capsys):
    from echelon.cli import main

    source = checkpoint(tmp_path / "source")
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 " * 60)
    words = ["compress", "--model", str(source), "--method", "slicegpt", "--method.nsamples=8", "--method.seqlen=16", "--data", str(tmp_path / "text.txt")]
    assert main([*words, "--stream", "--json", "--out", str(tmp_path / "out")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"] == 128 and told["parameters_after"] < told["parameters_before"]
    assert main([*words, "--out", str(tmp_path / "memory")]) == 0
    same(tmp_path / "memory", tmp_path / "out")
    capsys.readouterr()
    for more, named in (
        (["--stream", "--eval", "x.txt"], "--eval does not go with --stream"), (["--work", "w"], "--work is for --stream"),
        (["--stream", "--recover_steps", "2"], "--recover_steps does not go with --stream"), (["--stream", "--model", "gpt2"], "is no folder"),
    ):  # fmt: skip
        assert main([*words, "--out", str(tmp_path / "other"), *more]) == 2
        told = capsys.readouterr().err
        assert named in told and told.count("\n") == 1, told
    assert not (tmp_path / "other").exists()
