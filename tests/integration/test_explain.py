"""`adam-mini explain` as a user types it: recipes, models of other libraries, and what is wrong in one line."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
import yaml

pytest.importorskip("transformers")

import tiny_models
from lightning_adam_mini import AdamMini, explain
from lightning_adam_mini.cli import runnable_models
from lightning_adam_mini.cli.main import main
from lightning_adam_mini.cli.messages import show
from lightning_adam_mini.measure import adamw_state_bytes, optimizer_state_bytes
from tiny_runs import RECIPE, error_line, write_recipe

COMMAND, VALUE = 2, 1  # exit codes: what is wrong
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 11,
}
LLAMA3_70B = LLAMA | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}
UNET = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.30.0",
    "block_out_channels": [32, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Nothing is ever downloaded."""

    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_json(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


def as_json(capsys, *arguments):
    """What the command prints with `--json`, and nothing else."""
    capsys.readouterr()
    assert main(["explain", *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def as_text(capsys, *arguments):
    capsys.readouterr()
    assert main(["explain", *arguments]) == 0
    return capsys.readouterr().out


def of_row(data, name):
    (row,) = [row for row in data["rows"] if row["name"] == name]
    return row


# Recipes


def test_a_packaged_recipe(folder, capsys):
    shown = as_text(capsys, "llm/gpt2_tiny")
    assert "model.transformer.h.{0..3}.attn.c_attn.weight  x4" in shown
    assert "also model.lm_head.weight" in shown
    assert "warning" not in shown
    assert list(folder.iterdir()) == [], "no run begins"


def test_a_recipe_gives_partition_and_overrides(folder, capsys):
    """The header of the recipe has the same figures."""
    data = as_json(capsys, "llm/llama2_7b.yaml")
    assert data["totals"]["blocks"] == 1_032_801
    assert of_row(data, "model.model.layers.0.self_attn.v_proj.weight")["why"].endswith("override 'value'")
    assert data["warnings"] == []


@pytest.mark.slow
def test_options_win_over_the_recipe(folder, capsys):
    data = as_json(capsys, "llm/llama2_7b", "--override", "value=row")
    assert data["totals"]["blocks"] == 1_163_841
    data = as_json(capsys, "llm/llama2_7b", "--partition", "transformer_early", "--override", "re:.*k_proj.*=element")
    assert data["partition"] == "transformer_early"
    structures = {
        name: of_row(data, f"model.model.layers.0.self_attn.{name}_proj.weight")["structure"] for name in "qkv"
    }
    assert structures == {"q": "head", "k": "element", "v": "whole"}


def test_options_come_before_those_of_the_recipe(folder, capsys):
    data = as_json(capsys, "llm/llama2_7b", "--override", r"re:.*layers\.0\..*v_proj.*=row")
    structures = [of_row(data, f"model.model.layers.{n}.self_attn.v_proj.weight")["structure"] for n in (0, 1)]
    assert structures == ["row", "whole"]


def test_a_recipe_of_ones_own_as_fit_would_build_it(work_dir, capsys):
    """The vocabulary comes from the data's options; the first moment's dtype from the optimizer's."""
    optimizer = {**RECIPE["optimizer"], "init_args": {"partition": "element", "exp_avg_dtype": "bfloat16"}}
    write_recipe(work_dir, optimizer=optimizer)
    data = as_json(capsys, "tiny.yaml")
    assert of_row(data, "model.transformer.wte.weight")["shape"] == [280, 32]
    assert data["totals"]["state_bytes"] == sum(4 + 6 * n for n in elements(data))
    assert data["warnings"][0] == "the vocabulary has 280 tokens at most: a tokenizer is trained on the text"
    assert {path.name for path in work_dir.iterdir()} == {"text.txt", "tiny.yaml"}


def elements(data):
    return [torch.Size(row["shape"]).numel() for row in data["rows"]]


def test_a_recipe_whose_text_is_elsewhere(work_dir, capsys):
    (work_dir / "text.txt").unlink()
    assert as_json(capsys, "tiny.yaml")["totals"]["tensors"] > 0


@pytest.mark.parametrize("kind", ["TokenFiles", "TextFiles"])
def test_the_vocabulary_of_a_tokenizer_that_is_there(work_dir, capsys, kind):
    """Neither text nor tokens are read: they are not there."""
    from lightning_adam_mini.tasks.llm.data.tokenizer import train_bpe

    train_bpe(iter(["the cat saw the fish"]), vocab_size=270).save("tokenizer.json")
    paths = {"train": "train.bin", "val": "val.bin"} if kind == "TokenFiles" else {"path": "no.txt"}
    data = {"class_path": f"lightning_adam_mini.tasks.llm.data.{kind}", "init_args": paths}
    data["init_args"]["tokenizer"] = "tokenizer.json"
    write_recipe(work_dir, data=data)
    told = as_json(capsys, "tiny.yaml")
    assert of_row(told, "model.transformer.wte.weight")["shape"] == [270, 32]
    assert told["warnings"] == []
    data["init_args"]["vocab_size"] = 288
    write_recipe(work_dir, data=data)
    assert of_row(as_json(capsys, "tiny.yaml"), "model.transformer.wte.weight")["shape"] == [288, 32]


def test_a_recipe_whose_tokenizer_is_missing(work_dir, capsys):
    init_args = {"path": "text.txt", "tokenizer": "nowhere"}
    write_recipe(work_dir, data={"class_path": RECIPE["data"]["class_path"], "init_args": init_args})
    refused(capsys, VALUE, "The tokenizer 'nowhere' is not a local file or folder", "tiny.yaml")


def test_a_recipe_for_another_optimizer(work_dir, capsys):
    write_recipe(work_dir, optimizer={"class_path": "lightning_adam_mini.factory.AdamW", "init_args": {"lr": 0.1}})
    data = as_json(capsys, "tiny.yaml")
    assert data["partition"] == "transformer"
    assert "the recipe's optimizer is AdamW, which has no blocks; this is AdamMini with its def" in data["warnings"][1]


def test_a_recipe_for_devices_that_are_not_here(work_dir, capsys):
    trainer = {**RECIPE["trainer"], "accelerator": "cuda", "devices": 8, "num_nodes": 2, "precision": "bf16-mixed"}
    write_recipe(work_dir, trainer=trainer | {"strategy": "fsdp"})
    assert as_json(capsys, "tiny.yaml")["totals"]["tensors"] > 0


def test_a_recipe_that_starts_from_a_folder(work_dir, capsys):
    """Its weights are not read: they need not even be there."""
    model = {"class_path": RECIPE["model"]["class_path"], "init_args": {"init_from": "model"}}
    write_recipe(work_dir, model=model)
    (work_dir / "model").mkdir()
    write_json(work_dir / "model" / "config.json", LLAMA | {"dtype": "bfloat16"})
    data = as_json(capsys, "tiny.yaml")
    assert of_row(data, "model.lm_head.weight")["shape"] == [11, 8]
    assert {row["dtype"] for row in data["rows"]} == {"float32"}


def test_layouts_of_a_recipe_and_of_the_command(work_dir, capsys):
    """One that does not fit the class, so that it makes a difference."""
    as_is = as_json(capsys, "tiny.yaml")
    optimizer = {**RECIPE["optimizer"], "init_args": {"partition_layouts": {"GPT2Attention": "gpt2_cross_attention"}}}
    write_recipe(work_dir, optimizer=optimizer)
    refused(capsys, VALUE, "c_attn.weight: its 96 rows do not match GPT2Attention", "tiny.yaml")
    assert as_json(capsys, "tiny.yaml", "--layout", "GPT2Attention=gpt2") == as_is


# Other libraries


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_configuration_of_transformers(folder, capsys, dtype):
    """The parameters are float32, whatever the file says: it tells how weights were saved, not how one trains."""
    write_json(folder / "config.json", LLAMA | {"dtype": dtype})
    data = as_json(capsys, "--hf", "config.json")
    module = tiny_models.llama(num_hidden_layers=3)
    assert data == explain(module).to_dict()
    assert data["totals"]["state_bytes"] == optimizer_state_bytes(AdamMini(module))
    assert data["totals"]["adamw_state_bytes"] == adamw_state_bytes(module.parameters())
    assert data == as_json(capsys, "--hf", str(folder)), "its folder will do"


def test_the_table_and_all_rows(folder, capsys):
    write_json(folder / "config.json", LLAMA)
    explanation = explain(tiny_models.llama(num_hidden_layers=3))
    assert as_text(capsys, "--hf", "config.json") == f"{explanation}\n"
    assert as_text(capsys, "--hf", "config.json", "--full") == f"{explanation.table(full=True)}\n"


def test_a_name_in_the_cache_of_the_hub(folder, capsys, monkeypatch):
    repository = folder / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    write_json(repository / "snapshots" / "abc" / "config.json", LLAMA)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    assert as_json(capsys, "--hf", "org/name")["totals"]["tensors"] == 3 * 9 + 3


def test_a_class_that_transformers_lacks(folder, capsys):
    write_json(folder / "config.json", LLAMA | {"architectures": ["LlamaForPoetry"]})
    data = as_json(capsys, "--hf", "config.json")
    assert data["warnings"] == ["transformers has no class LlamaForPoetry; this is LlamaForCausalLM"]
    assert data["rows"] == explain(tiny_models.llama(num_hidden_layers=3)).to_dict()["rows"]


def test_a_configuration_without_heads(folder, capsys):
    small = {**LLAMA, "hidden_size": 64}
    write_json(folder / "config.json", {key: small[key] for key in small if key != "num_attention_heads"})
    (warning,) = as_json(capsys, "--hf", "config.json")["warnings"]
    assert warning.startswith("config.json does not say num_attention_heads, so LlamaConfig's default of 32 is taken")


def test_a_part_of_a_configuration_without_heads(folder, capsys):
    parts = {"text_config": {"hidden_size": 16, "num_hidden_layers": 1}, "vision_config": {"num_attention_heads": 4}}
    write_json(folder / "config.json", {"model_type": "clip", **parts})
    (warning,) = as_json(capsys, "--hf", "config.json")["warnings"]
    assert "so CLIPTextConfig's default of 8 is taken" in warning


def test_a_configuration_without_heads_of_keys(folder, capsys):
    """Llama takes as many as there are heads; Mistral has a number of its own."""
    options = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    write_json(folder / "config.json", options)
    assert as_json(capsys, "--hf", "config.json")["warnings"] == []
    mistral = options | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 64}
    write_json(folder / "config.json", mistral | {"num_attention_heads": 16})
    (warning,) = as_json(capsys, "--hf", "config.json")["warnings"]
    assert warning.startswith("config.json does not say num_key_value_heads, so MistralConfig's default of 8 is taken")
    write_json(folder / "config.json", mistral | {"num_key_value_heads": 2})
    assert as_json(capsys, "--hf", "config.json")["warnings"] == []


@pytest.mark.parametrize("alias", ["num_attention_heads", "n_head"])
def test_a_configuration_with_heads_under_another_name(folder, capsys, alias):
    write_json(folder / "config.json", {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, alias: 2})
    assert as_json(capsys, "--hf", "config.json")["warnings"] == []
    write_json(folder / "config.json", {"model_type": "gpt2", "n_embd": 24, "n_layer": 1})
    (warning,) = as_json(capsys, "--hf", "config.json")["warnings"]
    assert warning.startswith("config.json does not say n_head, so GPT2Config's default of 12 is taken")


@pytest.mark.parametrize("option", ["_attn_implementation", "attn_implementation"])
def test_attention_that_is_not_installed(folder, capsys, option):
    """It never runs."""
    write_json(folder / "config.json", LLAMA)
    as_is = as_json(capsys, "--hf", "config.json")
    write_json(folder / "config.json", LLAMA | {option: "flash_attention_2"})
    assert as_json(capsys, "--hf", "config.json") == as_is
    write_json(folder / "config.json", {key: value for key, value in LLAMA.items() if key != "architectures"})
    assert as_json(capsys, "--hf", "config.json") == as_is


def test_attention_of_a_part_that_is_not_installed(folder, capsys):
    part = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    asked = {"_attn_implementation": "flash_attention_2"}
    parts = {"text_config": part | asked, "vision_config": part | asked}
    write_json(folder / "config.json", {"model_type": "clip", **parts, **asked})
    assert as_json(capsys, "--hf", "config.json")["warnings"] == []


def test_a_model_of_timm(folder, capsys):
    timm = pytest.importorskip("timm")
    assert as_json(capsys, "--timm", "resnet18") == explain(timm.create_model("resnet18")).to_dict()
    assert as_json(capsys, "--timm", "resnet18.a1_in1k") == as_json(capsys, "--timm", "resnet18")


def test_what_a_library_prints_is_no_json(folder, capsys, monkeypatch):
    timm = pytest.importorskip("timm")

    def talkative(*_, **__):
        print("look at me")
        return torch.nn.Linear(2, 3)

    monkeypatch.setattr(timm, "create_model", talkative)
    assert main(["explain", "--timm", "resnet18", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2


def test_models_of_diffusers(folder, capsys):
    diffusers = pytest.importorskip("diffusers")
    write_json(folder / "config.json", UNET)
    assert as_json(capsys, "--diffusers", ".") == explain(diffusers.UNet2DModel.from_config(UNET)).to_dict()
    shown = as_text(capsys, "--diffusers", "AutoencoderTiny")
    assert "second moment" in shown


# What is wrong


def refused(capsys, expected_code, told, *arguments):
    capsys.readouterr()
    assert main(["explain", *arguments]) == expected_code
    line = error_line(capsys)
    assert told in line
    assert len(line) < 400, "a line that somebody reads"


GPT2_TINY = ["llm/gpt2_tiny"]
COMMANDS = [
    ([], COMMAND, "give exactly one of RECIPE, --hf, --timm and --diffusers"),
    ([*GPT2_TINY, "--hf", "config.json"], COMMAND, "give exactly one of"),
    (["--hf"], COMMAND, "expected one argument"),
    (
        [*GPT2_TINY, "--partitoin", "default"],
        COMMAND,
        "there is no option --partitoin; did you mean --partition? `adam-mini explain --help` lists all",
    ),
    ([*GPT2_TINY, "--over", "value=row"], COMMAND, "there is no option --over; did you mean --override?"),
    ([*GPT2_TINY, "--override", "value"], COMMAND, "--override value: expected KEY=STRUCTURE"),
    ([*GPT2_TINY, "--override", "=row"], COMMAND, "--override =row: expected KEY=STRUCTURE"),
    ([*GPT2_TINY, "--override", "key=row", "--override", "key=whole"], COMMAND, "key is given twice"),
    ([*GPT2_TINY, "--layout", "GPT2Attention"], COMMAND, "--layout GPT2Attention: expected CLASS=LAYOUT"),
    (
        [*GPT2_TINY, "--override", "value=hole"],
        VALUE,
        "unknown block structure 'hole' for 'value'",
    ),
    ([*GPT2_TINY, "--override", "vale=whole"], VALUE, "'vale' matches no parameter"),
    ([*GPT2_TINY, "--override", "re:[=row"], VALUE, "'re:[' is not a valid regular expression"),
    ([*GPT2_TINY, "--partition", ""], COMMAND, "--partition is empty: give a name, or leave it out"),
    ([""], COMMAND, "RECIPE is empty: give a name"),
    (["--hf", ""], COMMAND, "--hf is empty: give a name"),
    (["--timm", ""], COMMAND, "--timm is empty: give a name"),
    (["--diffusers", ""], COMMAND, "--diffusers is empty: give a name"),
    ([*GPT2_TINY, "--partition", "transfomer"], COMMAND, "--partition transfomer: choose from auto, transformer"),
    ([*GPT2_TINY, "--partition", "transfomer"], COMMAND, "did you mean transformer?"),
    ([*GPT2_TINY, "--partition", "transformer_rank_one"], COMMAND, "transformer_early, factored, slimadam"),
    ([*GPT2_TINY, "--layout", "Foo=gpt2"], VALUE, "no module of this model is of class 'Foo'"),
    ([*GPT2_TINY, "--layout", "GPT2Attention=foo"], VALUE, "there is no layout 'foo'"),
    (
        ["llm/gpt2_tinny"],
        COMMAND,
        "recipe llm/gpt2_tinny: no such file, and no recipe of that name; did you mean llm/gpt2",
    ),
    (["llm/llama2_7b", "--override", "re:.*v_proj.weight=row"], VALUE, "(the recipe itself overrides value=whole;"),
    (["--hf", "nowhere.json"], VALUE, "--hf nowhere.json: no such file"),
    (["--hf", "./nowhere"], VALUE, "--hf ./nowhere: no such file"),
    (["--hf", "."], VALUE, "--hf .: the folder has no config.json"),
    (
        ["--hf", "meta-llama/Llama-3.1-70B"],
        VALUE,
        "not on this machine, and nothing is downloaded; give a local config",
    ),
    (["--hf", "no such//name"], VALUE, "not on this machine"),
    (["--timm", "vit_base_patch16_2244"], VALUE, "timm has no model of that name; did you mean vit_base_patch16_224"),
    (["--timm", "hf-hub:timm/resnet18"], VALUE, "timm has no model of that name; did you mean resnet18"),
    (["--diffusers", "UNet2DConditonModel"], VALUE, "did you mean UNet2DConditionModel"),
    (["--diffusers", "ModelMixin"], VALUE, "diffusers has no model ModelMixin; did you mean VQModel"),
    (["--diffusers", "AutoModel"], VALUE, "diffusers has no model AutoModel; did you mean AutoencoderKL"),
    (["--diffusers", "AutoModl"], VALUE, "diffusers has no model AutoModl; did you mean AutoencoderKL"),
    (["--diffusers", "DDPMScheduler"], VALUE, "diffusers has no model DDPMScheduler"),
    (["--diffusers", "Transformer2DModel"], VALUE, "its defaults may be incomplete: give a config.json"),
    (["--diffusers", "nowhere.json"], VALUE, "--diffusers nowhere.json: no such file"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "told"), [pytest.param(*case, id=" ".join(case[0]) or "nothing") for case in COMMANDS]
)
def test_options(folder, capsys, arguments, code, told):
    for package in {"--timm", "--diffusers"} & set(arguments):
        pytest.importorskip(package.removeprefix("--"))
    refused(capsys, code, told, *arguments)
    assert list(folder.iterdir()) == []


NESTED = "[" * 100_000
FILES = [
    ("--hf", "{", "this is not JSON"),
    ("--hf", NESTED, "this is nested too deeply for a configuration"),
    ("--hf", "[1]", "a configuration is a JSON object, not a list"),
    (
        "--hf",
        LLAMA | {"architectures": ["PreTrainedModel"]},
        "PreTrainedModel is the base of all models; name one, such",
    ),
    ("--hf", {"hidden_size": 8}, "it has no model_type, such as llama"),
    ("--hf", {"model_type": ["llama"]}, "it has no model_type"),
    ("--hf", {"model_type": "lama"}, "transformers knows no model_type 'lama'; did you mean llama"),
    ("--hf", {"model_type": "x", "auto_map": {"AutoModel": "a.B"}}, "code of its own, which is never run here"),
    ("--hf", LLAMA | {"hidden_size": "wide"}, "cannot be built: TypeError: Field 'hidden_size' expected int, got str"),
    ("--hf", LLAMA | {"num_attention_heads": None}, "Field 'num_attention_heads' expected int, got NoneType"),
    ("--hf", LLAMA | {"num_attention_heads": 0}, "cannot be built: ZeroDivisionError"),
    (
        "--hf",
        LLAMA | {"hidden_size": 10},
        "The hidden size (10) is not a multiple of the number of attention heads (4)",
    ),
    ("--hf", LLAMA | {"vocab_size": -1}, "cannot be built: RuntimeError"),
    (
        "--hf",
        {"model_type": "moshi", "architectures": ["MoshiForConditionalGeneration"]},
        "its defaults may be incomplete: give the config.json of a model",
    ),
    ("--hf", {"model_type": "hunyuan_v1_dense"}, "its defaults may be incomplete"),
    ("--hf", {"model_type": "sam_mask_decoder"}, "it describes a part of a model"),
    ("--hf", {"model_type": "aimv2_text_model"}, "name one in architectures: Aimv2TextModel"),
    ("--diffusers", "{", "this is not JSON"),
    ("--diffusers", NESTED, "this is nested too deeply for a configuration"),
    ("--diffusers", {"_class_name": "ModelMixin"}, "diffusers has no model ModelMixin"),
    ("--diffusers", {}, "it has no _class_name"),
    ("--diffusers", {"_class_name": "UNet2DModl"}, "diffusers has no model UNet2DModl; did you mean UNet2DModel"),
    ("--diffusers", UNET | {"block_out_channels": []}, "config.json: cannot be built"),
]


@pytest.mark.parametrize(("option", "content", "told"), FILES)
def test_files(folder, capsys, option, content, told):
    if option == "--diffusers":
        pytest.importorskip("diffusers")
    write_json(folder / "config.json", content)
    refused(capsys, VALUE, told, option, "config.json")


def test_the_content_of_a_configuration(folder, capsys):
    """Instead of a file: the same table, and messages that name what is wrong."""
    write_json(folder / "config.json", LLAMA)
    assert main(["explain", "--hf", "config.json"]) == 0
    of_file = capsys.readouterr().out
    assert main(["explain", "--hf", json.dumps(LLAMA)]) == 0
    assert capsys.readouterr().out == of_file
    refused(capsys, VALUE, "this is not JSON", "--hf", "{no")
    refused(capsys, VALUE, "it has no model_type", "--hf", " {}")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"model: \xff\n", "this is not UTF-8: 'utf-8' codec can't decode byte 0xff"),
        (b"model: [a\n b: }", "this is not YAML: while parsing"),
        (b"model: \x00", "this is not YAML: unacceptable character"),
        (NESTED.encode(), "this is nested too deeply for a recipe"),
        (b"some text", "a recipe holds options such as `model: ...`, not a str"),
        (b"", "a recipe holds options such as `model: ...`, not a NoneType"),
    ],
    ids=["bytes", "syntax", "characters", "nested", "text", "nothing"],
)
def test_a_recipe_that_cannot_be_read(folder, capsys, content, told):
    (folder / "tiny.yaml").write_bytes(content)
    refused(capsys, VALUE, f"recipe tiny.yaml: {told}", "tiny.yaml")


def test_a_recipe_that_fit_would_refuse(work_dir, capsys):
    (work_dir / "tiny.yaml").write_text(yaml.safe_dump({**RECIPE, "modell": 1}), "utf-8")
    refused(capsys, COMMAND, "there is no option --modell; did you mean --model?", "tiny.yaml")


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("lightning", GPT2_TINY, "llm"),
        ("transformers", ["--hf", "gpt2"], "llm"),
        ("timm", ["--timm", "resnet18"], "vision"),
        ("diffusers", ["--diffusers", "UNet2DModel"], "diffusion"),
    ],
)
def test_a_package_that_is_not_installed(folder, capsys, monkeypatch, package, arguments, extra):
    monkeypatch.setitem(sys.modules, package, None)
    told = f"needs the package {package}; install it with pip install 'lightning-adam-mini[{extra}]'"
    refused(capsys, VALUE, told, *arguments)


def test_a_reader_that_stops_early(monkeypatch):
    """As `adam-mini explain ... | head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        show("text")


@pytest.mark.slow
def test_a_model_of_70_billion_parameters_takes_no_memory(folder):
    """In a process of its own: less than 2 GB, most of it for torch and transformers."""
    write_json(folder / "config.json", LLAMA3_70B)
    script = "import sys; from lightning_adam_mini.cli.main import main; sys.exit(main())"
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", script, "explain", "--hf", "config.json", "--json"], stdout=out, stderr=err
        )
        # The peak of this process alone, where RUSAGE_CHILDREN has that of all that ended before.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert (process.returncode, (folder / "err").read_text()) == (0, "")
    totals = json.loads((folder / "out").read_text())["totals"]
    assert totals["elements"] == 70_553_706_496
    assert totals["state_bytes"] == 4 * (totals["elements"] + totals["blocks"] + totals["tensors"])
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert peak < 2e9


# Verified by a forward pass


def test_a_recipe_is_verified(folder, capsys):
    data = as_json(capsys, "llm/gpt2_tiny", "--partition", "transformer", "--verify")
    name = "model.transformer.h.1.attn.c_attn.weight"
    assert of_row(data, name)["verified"] == "confirmed"
    assert "4 query heads" in data["verification"]["parameters"][name]["reason"]
    assert not any(row["verified"] == "contradicted" for row in data["rows"])
    assert of_row(as_json(capsys, "llm/gpt2_tiny"), name)["verified"] is None


def test_a_wrong_layout_is_contradicted(folder, capsys, monkeypatch):
    """A large model is verified with fewer layers, and the rest as their like."""
    monkeypatch.setattr(runnable_models, "LARGE", 0)
    sizes = {"model_type": "gpt2", "n_embd": 24, "n_head": 4, "n_layer": 5, "vocab_size": 50}
    write_json(folder / "config.json", sizes)
    options = ["--hf", "config.json", "--verify"]
    shown = as_text(capsys, *options)
    assert re.search(r"h\.\{0\.\.4\}\.attn\.c_attn\.weight +x5 .* confirmed ", shown)
    assert "warning: verified with 2 of 5 layers (num_hidden_layers)" in shown
    assert main(["explain", *options, "--layout", "GPT2Attention=fused_per_head"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"c_attn\.weight +x5 .* contradicted ", shown)
    assert "contradicted: transformer.h.{0,1}.attn.c_attn.weight: " in shown
    assert "the correct partition:" in shown


def test_an_input_that_nobody_can_make_up(folder, capsys):
    config = {"model_type": "decision_transformer", "hidden_size": 8, "n_layer": 1, "n_head": 1}
    assert main(["explain", "--hf", json.dumps(config), "--verify"]) == VALUE
    told = error_line(capsys)
    assert "DecisionTransformerModel: its forward pass asks for states, actions" in told
    assert "verify_partition with an input of yours" in told
