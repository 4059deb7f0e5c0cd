"""Published models from their published config.json: FLOPs per token against published throughput, and the command.

GFLOP per token, forward and backward, sequence 4096, causal convention: published TFLOP/s over published tokens/s of the
Megatron-Bridge model cards (H100, bf16). Their calculator leaves the router out and rounds its inputs; 0.1 % covers that.
"""

import json
import sys
from pathlib import Path

import pytest
import typer.main
from transformers import CONFIG_MAPPING

from bridges import AutoBridge
from harness import cli
from harness.bench.published import PUBLISHED
from harness.flops import flops
from harness.flops.command import describe, human, load_provider
from harness.flops.run import Run


def provider_of(name: str):
    """Through the bridge, without the storage format of the weights."""
    raw = {k: v for k, v in PUBLISHED[name].items() if k != "quantization_config"}
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    return AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False).finalize()


@pytest.mark.parametrize(
    ("name", "published", "router"),
    [
        ("Qwen3-8B", 49.032, 0),
        ("Qwen3-30B-A3B", 23.007, 48 * 2048 * 128),
        ("DeepSeek-V3", 260.11, (61 - 3 + 1) * 7168 * 256),
        ("Moonlight-16B-A3B", 17.160, 26 * 2048 * 64),
    ],
)
def test_published_throughput_over_published_tokens(name, published, router):
    """Without the router, which the published calculator leaves out, within 0.1 %; the router is what it should be by hand."""
    found = flops(provider_of(name), seq=4096, convention="causal")
    parts = found.by_part()
    routed = parts["router"].total if "router" in parts else 0
    assert routed == 6 * 4096 * router
    assert (found.total - routed) / 4096e9 == pytest.approx(published, rel=1e-3)
    # Counted, the router is 0.33 % of the smallest of these experts, and less of the others.
    assert found.per_token / 1e9 == pytest.approx(published, rel=4e-3)


def test_qwen3_8b_to_the_integer():
    """36 x (q, k, v; o; three matrices; half of two 4096-key products of 32 heads of 128) and the head."""
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 12288 + 4096 * 4096
    assert flops(provider_of("Qwen3-8B"), seq=4096).total == 6 * 4096 * (36 * layer + 4096 * 151936)


def test_deepseek_v3_part_by_part():
    """MACs a token and layer by hand; 61 layers and one MTP layer, of which the first three are dense."""
    parts = flops(provider_of("DeepSeek-V3"), seq=4096).by_part()
    per_token = {name: part.total // (6 * 4096) for name, part in parts.items()}
    assert per_token == {
        "mla_q_down": 62 * 7168 * 1536,
        "mla_q_up": 62 * 1536 * 128 * 192,
        "mla_kv_down": 62 * 7168 * 576,
        "mla_kv_up": 62 * 512 * 128 * 256,
        "core_attention": 62 * 2048 * 128 * (192 + 128),
        "o_proj": 62 * 128 * 128 * 7168,
        "dense_mlp": 3 * 3 * 7168 * 18432,
        "router": 59 * 7168 * 256,
        "experts": 59 * 8 * 3 * 7168 * 2048,
        "shared_experts": 59 * 3 * 7168 * 2048,
        "mtp_proj": 2 * 7168 * 7168,
        "mtp_head": 7168 * 129280,
        "logits": 7168 * 129280,
    }


# -- the command -----------------------------------------------------------------------------------------------------


def run(*words: str) -> None:
    typer.main.get_command(cli.app).main(["flops", *words], standalone_mode=False)


@pytest.fixture
def published(tmp_path):
    """A folder with the config.json of a published model."""

    def write(name: str) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
        return tmp_path

    return write


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_command_reads_published_configs(name, published, capsys):
    """A folder or the file itself; the sum of the parts is the total."""
    folder = published(name)
    run(str(folder), "--seq", "4096", "--json", "-")
    data = json.loads(capsys.readouterr().out)
    assert data["total"] == flops(provider_of(name), seq=4096).total == sum(p["total"] for p in data["parts"])
    assert data["convention"] == "causal"
    assert "half of full attention" in data["description"]
    run(str(folder / "config.json"), "--seq", "4096", "--json", "-")
    assert json.loads(capsys.readouterr().out)["total"] == data["total"]


def test_a_quantised_checkpoint_computes_the_same(published, capsys):
    """How weights are stored is no computation."""
    folder = published("Qwen3-8B")
    run(str(folder), "--json", "-")
    plain = json.loads(capsys.readouterr().out)["total"]
    quantised = {**PUBLISHED["Qwen3-8B"], "quantization_config": PUBLISHED["DeepSeek-V3"]["quantization_config"]}
    (folder / "config.json").write_text(json.dumps(quantised))
    run(str(folder), "--json", "-")
    assert json.loads(capsys.readouterr().out)["total"] == plain


def test_the_command_prints_the_table_with_its_convention(capsys):
    """For a row, with packed documents."""
    run(
        "qwen2_moe",
        "--seq",
        "24",
        "--batch",
        "2",
        "--packed",
        "10,14",
        "--convention",
        "hardware",
        "--kernels",
        "fused",
    )
    out = capsys.readouterr().out
    assert "hardware, fused kernels" in out
    assert "4 sequences, 48 tokens" in out
    for part in ("qkv", "core_attention", "router", "experts", "shared_expert_gate", "logits", "total", "100.00%"):
        assert part in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no such row"], "no such row is neither a row"),
        (["qwen3", "--seq", "0"], "each a whole number above 0"),
        (["qwen3", "--batch", "-1"], "batch is -1"),
        (["qwen3", "--convention", "full"], "convention 'full' is not known"),
        (["qwen3", "--kernels", "gpu"], "kernels 'gpu' are not known"),
        (["qwen3", "--packed", "1,x"], "--packed '1,x'"),
        (["qwen3", "--packed", "4000,97"], "packed lengths sum to 4097"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["goldengate", "flops", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "does not hold a JSON object"), ('{"architectures": ["X"]}', "X has no bridge")],
)
def test_a_bad_config_file_is_an_error_that_names_it(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_provider(str(tmp_path))


def test_numbers_are_short():
    assert [human(n) for n in (7, 999.96, 49.0325e9, 200_836e9)] == ["7 ", "1 K", "49.03 G", "200.8 T"]
    assert len({describe(Run((1,), c, k)) for c in ("model", "causal", "hardware") for k in ("torch", "fused")}) == 4
