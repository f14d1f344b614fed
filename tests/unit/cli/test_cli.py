"""The command line: golden text and JSON at 80 columns, figures computed by hand, and one sentence per mistake.

After a change that is meant: UPDATE_GOLDEN=1 pytest tests/unit/cli/test_cli.py, and read the difference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("typer")
pytest.importorskip("rich")
transformers = pytest.importorskip("transformers")

from gap_ds import GaPConfig, GaPEngine, __version__  # noqa: E402
from gap_ds.cli import doctor, plan  # noqa: E402
from gap_ds.masks import selection  # noqa: E402
from gap_ds.masks.box import Box  # noqa: E402
from gap_ds.method import rules  # noqa: E402
from gap_ds.method.plan import Entry  # noqa: E402
from gap_ds.sharding.comm import Comm  # noqa: E402
from gap_ds.training import mask_state  # noqa: E402
from gap_ds.training.selector import Selector  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]

CYCLIC = {"sparsity": 0.9, "partitions": 3, "phase_epochs": 1, "rounds": 2, "finetune_epochs": 2}
STEPS = {"sparsity": 0.8, "partitions": 2, "phase_steps": 50, "rounds": 2, "finetune_steps": 100}
LONG = {
    **CYCLIC,
    "partitions": 6,
    "partition_assignment": "interleaved",
    "phase_epochs": 0.25,
    "rounds": 20,
    "finetune_epochs": 10,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "cyclic": CYCLIC,
    "steps": STEPS,
    "long": {**LONG, "distribution": "erk"},
    "written": {
        **STEPS,
        "partitions": [["encoder", r"decoder\.layers\.0\.fc."], ["decoder.layers.1", r"decoder\.layers\.0\..*attn"]],
    },
    "split": {**STEPS, "partitions": [["fc.", "shared"], [".*attn"]], "include": ["shared"], "exclude": ["out_proj"]},
    "dsd": {"method": "dsd", "sparsity": 0.9, "phase_steps": 10, "rounds": 3, "finetune_steps": 0},
    "static": {**STEPS, "method": "static"},
    "dense": {"method": "dense", "sparsity": 0.0, "phase_steps": 10, "rounds": 2, "finetune_steps": 5},
    "parallel": {**CYCLIC, "method": "parallel", "sparsity": 0.8},
    "rigl": {"method": "rigl", "sparsity": 0.9, "phase_epochs": 6, "finetune_epochs": 2, "update_epochs": 0.1},
    "ramp": {**STEPS, "dense_steps": 30, "prune_ramp": 0.5, "update_steps": 5, "distribution": "global"},
    "many": {**STEPS, "partitions": 9},
    "typo": {**STEPS, "sparsty": 0.5},
    "range": {**STEPS, "sparsity": 1.2},
    "short": {**CYCLIC, "phase_epochs": 0.01},
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
TINY_LLAMA = {
    **LLAMA,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}

FACTS = doctor.Facts(
    python="3.11.7",
    system="Linux x86_64",
    cores=2,
    packages={name: "1.2.3" for name in ("torch", "transformers", "datasets", "tokenizers", "sacrebleu", "pyyaml")}
    | {"deepspeed": "0.19.8"},
    launchers={"deepspeed": "bin/deepspeed", "torchrun": "bin/torchrun"},
    accelerators=(),
    cuda_build=None,
    bf16=True,
    nvidia_driver=False,
    compiler="bin/c++",
    ninja=True,
    headers=True,
    loops="cache/gap_ds/cpu.so",
)

COMMANDS = ("plan", "parallel", "inspect", "report", "export", "schema", "doctor")

Run = Callable[..., tuple[int, str, str]]
Golden = Callable[[str, str], None]


@pytest.fixture
def run(command_line: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line in a folder with all configs; (exit code, stdout, stderr)."""
    monkeypatch.setattr(plan, "__version__", "0.0.0")
    monkeypatch.setattr(doctor, "__version__", "0.0.0")
    monkeypatch.setattr(doctor, "look", lambda: FACTS)
    for name, config in CONFIGS.items():
        write(Path(f"{name}.json"), config)
    return command_line


def write(path: Path, config: dict[str, Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(config), encoding="utf-8")
    return str(path)


def process(*argv: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(("-c", code) if code else ("-m", "gap_ds.cli")), *argv]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)


# -- golden text and JSON ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("plan_big.txt", "plan --model big --gap-config cyclic.json --steps-per-epoch 1000 --world-size 8"),
        ("plan_epochs.txt", "plan -m base -g long.json"),
        ("plan_entries.txt", "plan -m tiny -g written.json --entries"),
        ("plan_split.txt", "plan -m tiny -g split.json --vocab-size 6000"),
        ("plan_dsd.txt", "plan -m tiny -g dsd.json --world-size 1"),
        ("plan_static.txt", "plan -m tiny -g static.json"),
        ("plan_dense.txt", "plan -m tiny -g dense.json --world-size 2"),
        ("plan_parallel.txt", "plan -m tiny -g parallel.json --world-size 2"),
        ("plan_rigl.txt", "plan -m tiny -g rigl.json"),
        ("plan_ramp.txt", "plan -m tiny -g ramp.json --world-size 2"),
        ("plan_tiny.json", "plan -m tiny -g cyclic.json --steps-per-epoch 10 --world-size 3 --entries --json"),
        ("plan_epochs.json", "plan -m tiny -g cyclic.json --json"),
        ("doctor.txt", "doctor"),
        ("doctor.json", "doctor --json"),
    ],
)
def test_golden(run: Run, golden: Golden, name: str, argv: str) -> None:
    code, out, err = run(*argv.split())
    assert (code, err) == (0, "")
    golden(name, out)
    if name.endswith(".txt"):  # the signature is one line, so that it can be pasted
        assert all(len(line.rstrip()) <= 80 for line in out.splitlines() if not line.startswith("gap|"))


def test_the_experts_of_a_block_are_one_row(run: Run) -> None:
    settings = {**TINY_LLAMA, "model_type": "switch_transformers", "architectures": None}
    settings |= {"d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2}
    write(Path("mixture") / "config.json", settings | {"num_sparse_encoder_layers": 1, "num_experts": 4})
    code, out, err = run("plan", "-m", "mixture", "-g", "cyclic.json", "--entries")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if ".experts." in line]
    # Two matrices of 64 x 16 weights in each expert, of which a tenth is 102.
    kept = [str(4 * 2 * 102), f"{102 / 1024:.4f}"]
    assert next(row[1:] for row in rows) == ["encoder.block.1.layer.1.mlp.experts.*", "4", "experts", *kept]


def test_golden_of_experts_in_one_tensor(run: Run, golden: Golden) -> None:
    """The experts of a block that are in one partition are one row, whatever number of tensors holds them."""
    settings = {"model_type": "mixtral", "num_local_experts": 4, "head_dim": 16}
    write(Path("stacked") / "config.json", {**TINY_LLAMA, **settings, "architectures": ["MixtralForCausalLM"]})
    write(Path("four.json"), {"sparsity": 0.9, "partitions": 4, "phase_steps": 5, "rounds": 1, "finetune_steps": 5})
    code, out, err = run("plan", "-m", "stacked", "-g", "four.json", "--entries")
    assert (code, err) == (0, "")
    golden("plan_experts.txt", out)
    assert all(len(line.rstrip()) <= 80 for line in out.splitlines() if not line.startswith("gap|"))


def test_a_shipped_config_by_its_name(run: Run) -> None:
    code, out, err = run("plan", "-m", "tiny", "-g", "cyclic_90", "--json")
    signature = GaPConfig.load(ROOT / "configs" / "gap" / "cyclic_90.json").signature("0.0.0")
    assert (code, err) == (0, "") and json.loads(out)["signature"] == signature
    assert json.loads(out)["longest_steps"] == pytest.approx(10, rel=0.01)  # steps / density
    assert "up to 10.0 times" in run("plan", "-m", "tiny", "-g", "cyclic_90")[1]


def test_schema_is_the_one_of_the_config(run: Run) -> None:
    code, out, _ = run("schema")
    assert code == 0 and json.loads(out) == GaPConfig.model_json_schema()


def test_version_and_help_in_80_columns(run: Run) -> None:
    assert run("--version") == (0, f"gap-ds {__version__}\n", "")
    options = ("--model", "--gap-config", "--steps-per-epoch", "--world-size", "--vocab-size", "big")
    for argv, words in (
        ([], COMMANDS),
        (["-h"], (*COMMANDS, "--version")),
        *(([command, "--help"], options if command == "plan" else ("--help",)) for command in COMMANDS),
    ):
        code, out, err = run(*argv)
        usage, *lines = out.splitlines()
        assert (code, err) == (0, "") and usage.startswith("Usage: gap-ds")
        assert all(word in out for word in words) and not any(line.endswith("...") for line in lines)
        assert max(map(len, [usage, *lines])) <= 80


def test_the_shell_completes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bash asks: the script that --install-completion writes sets these variables."""
    monkeypatch.setenv("_GAP_DS_COMPLETE", "source_bash")
    code, out, _ = run()
    assert code == 0 and "_GAP_DS_COMPLETE=complete_bash" in out and "complete -o default -F" in out
    monkeypatch.setenv("_GAP_DS_COMPLETE", "complete_bash")
    for words, wanted in (("gap-ds ", set(COMMANDS)), ("gap-ds pl", {"plan"}), ("gap-ds plan --wo", {"--world-size"})):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        code, out, _ = run()
        assert code == 0 and set(out.split()) == wanted


# -- figures by hand ---------------------------------------------------------------------------------------------------


def test_big_has_the_prunable_weights_of_the_paper(run: Run) -> None:
    assert "176,160,768 prunable" in run("plan", "-m", "big", "-g", "cyclic.json")[1]


def test_figures_of_the_tiny_preset(run: Run) -> None:
    """d 128, ffn 512, 2+2 layers: 196,608 weights in an encoder block, 262,144 in a decoder block."""
    _, out, _ = run("plan", "-m", "tiny", "-g", "steps.json", "--vocab-size", "1000", "--world-size", "4", "--json")
    figures = json.loads(out)
    encoder, decoder = 2 * 196_608, 2 * 262_144
    assert [row["weights"] for row in figures["partitions"]] == [encoder, decoder]
    # 20 % of 16,384 and 65,536, rounded: 4 (8) matrices of 3,277 and 2 of 13,107 in each block.
    assert [row["kept"] for row in figures["partitions"]] == [2 * (4 * 3277 + 2 * 13107), 2 * (8 * 3277 + 2 * 13107)]
    kept = figures["kept"]
    one, two = kept + encoder - 78_644, kept + decoder - 104_860
    assert figures["mean_density"] == pytest.approx(
        (2 * 50 * one + 2 * 50 * two + 100 * kept) / 300 / (encoder + decoder)
    )
    head = 128 * 1000  # the tied output head multiplies, the embedding does not
    dense = encoder + decoder
    assert figures["training_flops"] == pytest.approx((figures["mean_density"] * dense + head) / (dense + head))
    assert [(p["first_step"], p["steps"]) for p in figures["phases"]] == [
        (0, 50),
        (50, 50),
        (100, 50),
        (150, 50),
        (200, 100),
    ]
    # Fine-tuning has the most masks: all entries, a quarter on each of 4 ranks, 1 bit per weight.
    assert figures["ranks"]["mask_bytes"] == dense // 4 // 8
    assert figures["ranks"]["mask_bytes_unsharded"] == dense // 8
    # 12 entries in the encoder, 20 in the decoder; the decoder's are masked first and pruned at the next boundaries.
    assert [p["pruned_entries"] for p in figures["phases"]] == [20, 12, 20, 12, 20]
    assert figures["ranks"]["boundary_bytes"] == 8 * (20 * (2048 + 1024 + 1024) + 2048)


MEASURED = """
import atexit, resource, sys
from gap_ds.cli import main
atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr))
main()
"""


def test_seventy_billion_weights_in_seconds(tmp_path: Path) -> None:
    """Llama 2 70B on 512 ranks; every figure below is computed by hand from its config."""
    model = write(tmp_path / "llama" / "config.json", LLAMA)
    config = write(tmp_path / "gap.json", {**CYCLIC, "partitions": 4})
    done = process("plan", "--model", model, "--gap-config", config, "--world-size", "512", "--json", code=MEASURED)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr) < 2 * 2**20  # KiB at the peak
    figures = json.loads(done.stdout)
    # q and o 8192 x 8192, k and v 1024 x 8192, gate, up and down 28672 x 8192, 80 times.
    layer = 2 * 67_108_864 + 2 * 8_388_608 + 3 * 234_881_024
    assert layer == 855_638_016
    kept = 2 * 6_710_886 + 2 * 838_861 + 3 * 23_488_102
    assert figures["weights"] == 80 * layer == 68_451_041_280
    assert figures["model"]["weights"] == 80 * (layer + 2 * 8192) + 8192 + 2 * 32_000 * 8192 == 68_976_648_192
    assert [row["entries"] for row in figures["partitions"]] == [20 * 7] * 4
    assert [row["blocks"][0] for row in figures["partitions"]] == [f"model.layers.{20 * k}" for k in range(4)]
    assert [row["weights"] for row in figures["partitions"]] == [20 * layer] * 4
    assert [row["kept"] for row in figures["partitions"]] == [20 * kept] * 4
    assert figures["entry_sparsity"] == pytest.approx(0.9, abs=1e-6)
    assert figures["model_sparsity"] == pytest.approx(61_605_937_280 / 68_976_648_192, abs=1e-6)
    # 8 of 10 epochs with a quarter dense and three at 10 %, 2 epochs at 10 %.
    assert figures["mean_density"] == pytest.approx((8 * (0.25 + 0.75 * 0.1) + 2 * 0.1) / 10, abs=1e-6)
    ranks = figures["ranks"]
    assert ranks["mask_bytes"] == 80 * layer // 512 // 8 == 16_711_680  # just below 16 MiB
    assert ranks["mask_bytes_unsharded"] == 80 * layer // 8 == 8_556_380_160
    assert ranks["boundary_bytes"] == 8 * (140 * 4096 + 2048) == 4_603_904  # 20 layers of 7 entries
    assert ranks["start_bytes"] == 8 * (420 * 4096 + 2048) == 13_778_944  # three of four partitions


def test_what_workers_of_seventy_billion_weights_exchange(run: Run) -> None:
    """By hand: of 20 layers a bit for each weight, and 4 bytes for each kept one."""
    write(Path("llama") / "config.json", LLAMA)
    write(Path("four.json"), {**CYCLIC, "method": "parallel", "partitions": 4})
    _, out, _ = run("plan", "-m", "llama", "-g", "four.json", "--world-size", "512", "--json")
    of_partition = 20 * 855_638_016 // 8 + 4 * 20 * (2 * 6_710_886 + 2 * 838_861 + 3 * 23_488_102)
    assert of_partition == 2_139_095_040 + 6_845_104_000
    workers = json.loads(out)["workers"]
    assert (workers["exchanges"], workers["exchange_bytes"]) == (2, [of_partition] * 4)


@pytest.mark.parametrize("budgets", [1, 5, 2049])
def test_selection_bytes_are_those_that_travel(budgets: int) -> None:
    class Counting(selection.Single):
        sent = 0

        def sum(self, counts: Tensor) -> Tensor:
            self.sent += counts.nbytes
            return counts

    def keys(lo: int, hi: int) -> Tensor:
        return torch.arange(lo, hi, dtype=torch.int32)

    reduce = Counting()
    pieces = [selection.Piece(f"{g}", Box.span(0, 4, 4), keys, g) for g in range(budgets)]
    selection.select_largest(pieces, [2] * budgets, reduce)
    assert reduce.sent == plan.selection_bytes(budgets)


@pytest.mark.parametrize(
    ("method", "travels"),
    [
        ({"method": "set", "phase_steps": 6}, ["start", "update", "update"]),
        ({"method": "gradual", "phase_steps": 6}, ["update", "update", "boundary"]),
        (
            {"partitions": 2, "rounds": 1, "phase_steps": 4, "target": "rising", "grow": "random", "grow_share": 0.9},
            ["start", "update", "boundary", "update", "boundary"],
        ),
    ],
)
def test_what_travels_in_a_run_is_forecast(
    method: dict[str, Any], travels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank contributes as much as one of several does: what the all-reduces of a whole run are given is counted."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(4)))
    config = {"sparsity": 0.5, "update_steps": 2, "finetune_steps": 1, **method}
    sent, found = [], []

    class Counting(Comm):
        def sum(self, counts: Tensor) -> Tensor:
            sent.append(counts.nbytes)
            return super().sum(counts)

    class Counted(Selector):
        def select(self, updates: Mapping[Entry, rules.Update]) -> dict[str, Tensor]:
            sent.clear()
            bits = Selector.select(replace(self, comm=Counting()), updates)
            found.extend([sum(sent)] if sent else [])
            return bits

    monkeypatch.setattr(mask_state, "Selector", Counted)
    engine = GaPEngine(model, config, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    ranks = plan.forecast(model, engine.config, world_size=2)["ranks"]
    while not engine.finished:
        engine.backward(engine(torch.randn(4, 8)).square().mean())
        engine.step()
    most = {at: max(n for n, other in zip(found, travels, strict=True) if other == at) for at in travels}
    assert most == {at: ranks[f"{at}_bytes"] for at in most}


def test_without_steps_per_epoch_fractions_of_epochs_are_exact(run: Run) -> None:
    write(Path("thirds.json"), {**CYCLIC, "phase_epochs": 0.1, "finetune_epochs": 0.15})
    figures = json.loads(run("plan", "-m", "tiny", "-g", "thirds.json", "--json")[1])
    assert [p["first_epoch"] for p in figures["phases"]] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert figures["length"] == 0.75


@pytest.mark.parametrize("warmup", [0.01, 0.5, 1])
def test_a_warmup_in_epochs_needs_no_number_of_steps(warmup: float) -> None:
    """It is refused where it is less than two steps, and how many it is nobody knows here."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3)))
    plain, warmed = (
        plan.forecast(model, GaPConfig.load({**CYCLIC, **more})) for more in ({}, {"regrow_warmup_epochs": warmup})
    )
    assert [p["first_epoch"] for p in warmed["phases"]] == [p["first_epoch"] for p in plain["phases"]]
    assert (warmed["length"], warmed["mean_density"]) == (plain["length"], pytest.approx(plain["mean_density"]))
    with pytest.raises(ValueError, match="is less than 2 steps"):
        plan.forecast(model, GaPConfig.load({**CYCLIC, "regrow_warmup_epochs": warmup}), steps_per_epoch=1)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], ["NoSuchForCausalLM"], None])
def test_model_class_from_the_config(run: Run, architectures: list[str] | None) -> None:
    write(Path("llama") / "config.json", {**TINY_LLAMA, "architectures": architectures})
    for name in ("llama", "llama/config.json"):
        figures = json.loads(run("plan", "-m", name, "-g", "steps.json", "--json")[1])
        assert figures["model"]["class"] == "LlamaForCausalLM"
        assert figures["weights"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)


def test_code_of_a_model_is_never_run(run: Run) -> None:
    config = {"model_type": "mystery", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    write(Path("evil") / "config.json", config)
    Path("evil/evil.py").write_text("import pathlib; pathlib.Path('ran').touch()", encoding="utf-8")
    code, _, err = run("plan", "-m", "evil", "-g", "steps.json")
    assert code == 2 and "it needs custom code, which gap-ds never runs" in err
    assert not Path("ran").exists()


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("plan -m tiny -g absent.json", "absent.json: cannot be read as a GaP config: No such file or directory"),
        (
            "plan -m tiny -g absent",
            "absent: is neither a file nor a shipped config. Shipped are acdc_90, cyclic_2of4, ",
        ),
        ("plan -m tiny -g typo.json", 'unknown setting "sparsty" in typo.json: did you mean "sparsity"?'),
        ("plan -m tiny -g range.json", 'sparsity=1.2: input should be less than 1. Set "sparsity" in range.json.'),
        ("plan -m tiny -g many.json", "partitions=9: the model has 4 blocks with entries"),
        (
            "plan -m tiny -g short.json --steps-per-epoch 10",
            "phase_epochs=0.01: with 10 steps in an epoch a phase has no step",
        ),
        ("plan -m tiny -g steps.json --steps-per-epoch 9", "--steps-per-epoch 9: has no effect"),
        ("plan -m ./absent -g steps.json", "--model ./absent: there is no such file or folder."),
        ("plan -m absent.json -g steps.json", "--model absent.json: there is no such file or folder."),
        ("plan -m . -g steps.json", "--model .: the folder holds no config.json."),
        ("plan -m steps.json -g steps.json", "--model steps.json: is no config of a model that transformers knows ("),
        ("plan -m bad -g steps.json", "--model bad: transformers cannot build a LlamaConfig model from it ("),
        (
            "plan -m llama -g steps.json --vocab-size 9",
            "--vocab-size 9: has no effect, because llama has its own vocabulary.",
        ),
        ("plan -m tiny", "Missing option '--gap-config' / '-g'. See gap-ds plan --help."),
        ("plan -m tiny -g steps.json --world-size 0", "Invalid value for '--world-size': "),
        ("plan --modle tiny", "No such option: --modle"),
        ("plam", "No such command 'plam'."),
        (f"inspect {'x' * 300}", f"{'x' * 200}: File name too long."),
    ],
)
def test_mistakes_are_one_sentence(run: Run, argv: str, message: str) -> None:
    write(Path("llama") / "config.json", TINY_LLAMA)
    write(Path("bad") / "config.json", {**TINY_LLAMA, "hidden_size": -64, "head_dim": 16})
    code, out, err = run(*argv.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"gap-ds: {message}") and err.count("\n") == 1, err


def test_unknown_hub_id(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **options: Any) -> None:
        assert options == {"trust_remote_code": False, "local_files_only": False}
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    assert run("plan", "-m", "bigg", "-g", "steps.json") == (
        2,
        "",
        "gap-ds: --model bigg: is neither a preset (tiny, small, base, big) nor a file, folder or module:function, and "
        "the hub does not deliver it (We couldn't connect to the hub). Did you mean big?\n",
    )


def test_a_function_builds_the_model(run: Run) -> None:
    Path("own_model_of_a_user.py").write_text(
        "from torch.nn import Linear, Sequential\n"
        "class A:\n    @staticmethod\n    def net(): return Sequential(*(Sequential(Linear(8, 8)) for _ in range(3)))\n"
        "def no(): return 1\ndef bad(): raise KeyError('x')\n",
        encoding="utf-8",
    )
    code, out, _ = run("plan", "-m", "own_model_of_a_user:A.net", "-g", "steps.json", "--json")
    assert code == 0 and json.loads(out)["model"] == {"class": "Sequential", "weights": 3 * 72}
    for name, reason in (("no", "returns a int"), ("bad", "KeyError: 'x'"), ("absent", "AttributeError: module")):
        code, _, err = run("plan", "-m", f"own_model_of_a_user:{name}", "-g", "steps.json")
        assert code == 2 and reason in err and err.count("\n") == 1, err


@pytest.mark.parametrize("library", ["typer", "rich"])
def test_without_the_extra(library: str) -> None:
    code = f"import sys; sys.modules['{library}'] = None; from gap_ds.cli import main; main()"
    done = process(code=code)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f'gap-ds: {library} is not installed: the command line needs it. Run pip install "gap_ds[cli]".\n'
    )


def test_without_transformers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = run("plan", "-m", "tiny", "-g", "steps.json")
    assert code == 2
    assert err == "gap-ds: transformers is not installed: --model needs it. Run pip install transformers.\n"


# -- doctor ------------------------------------------------------------------------------------------------------------

GPU = {"accelerators": ("H200", "H200"), "cuda_build": "12.8", "nvidia_driver": True}


@pytest.mark.parametrize(
    ("change", "what", "works", "why"),
    [
        ({}, "GPU", "no", "none found"),
        ({"nvidia_driver": True}, "GPU", "no", "torch is a build for CPUs"),
        ({"cuda_build": "12.8"}, "GPU", "no", "torch, built for 12.8, finds none"),
        (GPU, "GPU", "yes", "2 x H200"),
        ({}, "DeepSpeed ZeRO 0-3", "yes", "--num_accelerators N"),
        (GPU, "DeepSpeed ZeRO 0-3", "yes", "--num_gpus N"),
        ({"packages": {}}, "DeepSpeed ZeRO 0-3", "no", "gap_ds[deepspeed]"),
        (
            {"compiler": None, "ninja": False},
            "DeepSpeed ZeRO 0-3",
            "no",
            "needs a C++ compiler (g++, or set CXX), ninja",
        ),
        ({"headers": False}, "DeepSpeed ZeRO 0-3", "no", "Python.h"),
        ({**GPU, "compiler": None}, "DeepSpeed ZeRO 0-3", "limited", "its own need a C++ compiler"),
        ({"packages": {"deepspeed": "0.19.7"}}, "DeepSpeed ZeRO 0-3", "limited", "older than 0.19.8"),
        ({"packages": {"deepspeed": "0.20.0"}}, "DeepSpeed ZeRO 0-3", "yes", ""),
        ({"launchers": {}}, "DeepSpeed ZeRO 0-3", "limited", "torchrun"),
        ({"launchers": {}}, "plain PyTorch, DDP", "limited", "python -m torch.distributed.run"),
        ({}, "FSDP", "yes", "torchrun"),
        ({}, "fairscale", "no", "gap_ds[fairscale]"),
        ({"packages": {"fairscale": "0.4.13"}}, "fairscale", "limited", "its FSDP needs a GPU"),
        ({**GPU, "packages": {"fairscale": "0.4.13"}}, "fairscale", "yes", "torchrun"),
        ({**GPU, "bf16": False}, "bf16", "limited", "H200 emulates it"),
        ({"packages": {}}, "translation example", "no", "transformers, datasets, tokenizers, sacrebleu missing"),
        ({"packages": {}}, "YAML configs", "no", "PyYAML"),
        ({}, "loops in C", "yes", "cache/gap_ds/cpu.so"),
        ({"loops": ""}, "loops in C", "limited", "every process compiles them"),
        ({"loops": None}, "loops in C", "limited", "install gcc, or set CC"),
    ],
)
def test_doctor_judges(change: dict[str, Any], what: str, works: str, why: str) -> None:
    found = {finding.what: finding for finding in doctor.judge(replace(FACTS, **change))}
    assert found[what].works == works and why in found[what].why, found[what]


def test_doctor_looks_at_this_machine() -> None:
    facts = doctor.look()
    assert facts.packages["torch"].startswith(torch.__version__.partition("+")[0])
    assert facts.cores >= 1
    json.dumps(doctor.report())
