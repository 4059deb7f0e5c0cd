"""A library among others: copies, locks and hooks of providers and bridges (faults B)."""

import copy
import os
import subprocess
import sys

import pytest
import torch

import toy_models
from bridges import AutoBridge, ConfigError, GoldengateError, GPTModelProvider, PlanError
from bridges.conversion.transfer import box_view
from bridges.conversion.views import Box
from bridges.providers.lock import ProviderError
from harness import forked


def _twice(folder, out) -> list[list[str]]:
    bridge = AutoBridge.from_hf_pretrained(folder)
    wrong = []
    for n in range(2):
        model = bridge.to_megatron_provider().finalize().provide_distributed_model(wrap_with_ddp=False)
        bridge.save_hf_pretrained(model, out / str(n))
        again = AutoBridge.from_hf_pretrained(out / str(n)).hf_pretrained.checkpoint
        source = bridge.hf_pretrained.checkpoint
        wrong.append([name for name in source.tensors if not torch.equal(source.view(name), again.view(name))])
    return wrong


@pytest.mark.parametrize("row", toy_models.rows())
def test_fault_B1_the_path_of_the_readme_twice_from_one_bridge(row, tmp_path):
    folder = toy_models.write(row, tmp_path / "hf", shards=1)
    assert forked.run(_twice, folder, tmp_path) == [[], []]


def _small(**fields) -> GPTModelProvider:
    sizes = {"num_layers": 8, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64, "vocab_size": 64}
    return GPTModelProvider(**{**sizes, **fields})


@pytest.mark.parametrize("name", ["hidden_size", "tensor_model_parallel_size", "rope_scaling", "weight_loader"])
def test_fault_B2_finalize_locks(name):
    provider = _small()
    provider.hidden_size = 64
    provider.finalize()
    with pytest.raises(ProviderError, match=f"provider.{name} cannot be set after"):
        setattr(provider, name, None)
    with pytest.raises(GoldengateError, match="layout"):
        provider.apply_layout("tp2")
    assert copy.deepcopy(provider).hidden_size == copy.copy(provider).hidden_size == 64
    provider.finalize_model_grads_func = print  # what training hangs on it


def test_fault_B2_a_misspelt_field_is_an_error():
    provider = _small()
    for _ in range(2):
        with pytest.raises(
            ProviderError, match="no field tensor_model_paralel_size; did you mean tensor_model_parallel_size"
        ):
            provider.tensor_model_paralel_size = 2
        provider.finalize()


@pytest.mark.parametrize(
    ("fields", "split"),
    [
        ({"pipeline_model_parallel_layout": "Et*3|t*5L"}, (3, 5)),
        ({"num_layers_in_first_pipeline_stage": 3}, (3, 5)),
        ({"num_layers_in_last_pipeline_stage": 3}, (5, 3)),
        ({"num_layers_per_chunk": (2, 6), "pipeline_model_parallel_layout": "Ett|t*6L"}, (2, 6)),
    ],
)
def test_fault_B3_the_split_that_a_user_sets_is_built(fields, split):
    provider = _small(pipeline_model_parallel_size=2, **fields).finalize()
    assert provider.layout.split == split
    stages = provider.pipeline_model_parallel_layout.layout
    assert tuple(sum(str(t).endswith("decoder") for t in stage[0]) for stage in stages) == split


@pytest.mark.parametrize(
    "fields",
    [
        {"account_for_embedding_in_pipeline_split": True},
        {"account_for_loss_in_pipeline_split": True},
        {"pipeline_model_parallel_layout": "E|t*8L", "num_layers_in_first_pipeline_stage": 3},
        {"pipeline_model_parallel_layout": "Et*4|t*4|L"},
        {"num_layers_in_first_pipeline_stage": 9},
    ],
)
def test_fault_B3_what_is_not_built_is_refused_by_name(fields):
    with pytest.raises(ProviderError, match=next(iter(fields))):
        _small(pipeline_model_parallel_size=2, **fields).finalize()


def _hooks() -> tuple[float, list[str]]:
    seen = []

    class Own(GPTModelProvider):
        def __init__(self, scale: float = 1.0, **kwargs):
            super().__init__(**kwargs)
            self.scale = scale

        def get_transformer_config(self):
            config = super().get_transformer_config()
            config.layernorm_epsilon = self.scale
            return config

        def get_layer_spec(self):
            seen.append("get_layer_spec")
            return super().get_layer_spec()

        def provide_distributed_model(self, **kwargs):
            return super().provide_distributed_model(transformer_layer_spec=self.get_layer_spec(), **kwargs)

    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64, "vocab_size": 64}
    model = Own(scale=0.25, **sizes).finalize().provide_distributed_model(wrap_with_ddp=False)
    return model[0].decoder.final_layernorm.eps, seen


def test_fault_B4_hooks_of_a_provider_are_run():
    assert forked.run(_hooks) == (0.25, ["get_layer_spec"])


class _Computed(torch.Tensor):
    """A tensor whose values are not its memory, as Transformer Engine's fp8 tensors are."""


def test_fault_B7_a_view_of_what_is_no_plain_memory_is_refused():
    box = Box(0, (2,), (1,))
    with pytest.raises(PlanError, match="not contiguous"):
        box_view(torch.zeros(4, 4).t(), box)
    with pytest.raises(PlanError, match="_Computed"):
        box_view(torch.zeros(4, 4).as_subclass(_Computed), box)
    assert box_view(torch.nn.Parameter(torch.ones(4, 4)), box).tolist() == [1, 1]


def test_fault_B5_megatrons_own_classes_are_as_they_were(tmp_path):
    from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver

    before = QKNormConfigResolver._resolve_mla_qk_layernorm
    folder = toy_models.write("deepseek_v3", tmp_path / "hf", shards=1)
    AutoBridge.from_hf_pretrained(folder).to_megatron_provider().finalize()
    assert QKNormConfigResolver._resolve_mla_qk_layernorm is before


def _asynchronous() -> list[bool]:
    import torch.distributed as dist

    from bridges.providers import cpu_substitutions

    cpu_substitutions.install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    output = torch.zeros(2)
    work = dist.reduce_scatter(output, [torch.ones(2)], async_op=True)
    return [work.wait(), bool(output.eq(1).all())]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the substitutions are for machines without a GPU")
def test_fault_B5_collectives_keep_async_op():
    assert forked.run(_asynchronous) == [True, True]


def test_fault_B8_a_bug_is_no_bad_input_and_bad_input_shows_its_stack(monkeypatch, capsys):
    from harness import cli

    for debug in ("", "1"):
        monkeypatch.setenv("GOLDENGATE_DEBUG", debug)
        for error, code in ((RuntimeError("ours"), 3), (PlanError("theirs"), 2)):

            def fail(error=error):
                raise error

            monkeypatch.setattr(cli, "app", fail)
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert ended.value.code == code
            assert ("Traceback" in capsys.readouterr().err) == (code == 3 or bool(debug))


def test_fault_B8_the_stack_of_a_rank_is_in_the_report(monkeypatch):
    from harness.report.cells import Cell, Report
    from harness.report.page import page

    cell = Cell("llama3", "tp1", "logits", "error", None, None, "", 0.1, "no expert 7", "--- rank 1\nin break_on")
    report = Report([], [cell], {}, 1.0)
    assert Report.from_json(report.to_json()).cells == [cell]
    assert "in break_on" in page(report)


def _registered_before() -> bool:
    import importlib

    import bridges.families.llama as ours
    from bridges import model_bridge

    class Mine(model_bridge.MegatronModelBridge):
        pass

    register = model_bridge.MegatronModelBridge.register_bridge(source="LlamaForCausalLM")
    register(Mine)
    importlib.reload(ours)
    return model_bridge._REGISTERED["LlamaForCausalLM"].bridge is Mine


def test_fault_B5_a_bridge_that_a_user_registered_first_stays():
    assert forked.run(_registered_before)


def test_fault_B5_verify_leaves_warnings_loggers_and_environment(monkeypatch):
    import logging
    import os
    import warnings

    import harness

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.delenv(name, raising=False)
    logging.getLogger("megatron").setLevel(logging.INFO)

    def state():
        levels = [logging.getLogger(name).level for name in ("megatron", "transformers", "torch")]
        return list(warnings.filters), levels, dict(os.environ)

    before = state()
    assert harness.verify("llama3", layouts="tp1", checks=["roundtrip"]).ok
    assert state() == before


_BEFORE_AND_AFTER = """
import logging, os, sys, warnings

import megatron.core.models.gpt.gpt_layer_specs
import torch
import transformers
from megatron.core.models.gpt import gpt_layer_specs, moe_module_specs
from megatron.core.tensor_parallel import random
from megatron.core.transformer import mla_qk_norm_config, multi_latent_attention
from megatron.core.transformer.moe import token_dispatcher
from transformers.models.llama import modeling_llama

WATCHED = (
    torch.cuda, torch.distributed, torch.Tensor, gpt_layer_specs, moe_module_specs, random, mla_qk_norm_config,
    mla_qk_norm_config.QKNormConfigResolver, multi_latent_attention, token_dispatcher, modeling_llama,
)


def state():
    found = {(str(home), name): id(value) for home in WATCHED for name, value in vars(home).items() if name[:2] != "__"}
    found |= {("environment", name): value for name, value in os.environ.items()}
    found |= {("level", name): logging.getLogger(name).level for name in ("", "megatron", "transformers", "torch",
                                                                          "torch.utils.cpp_extension")}
    found["filters"] = [str(one) for one in warnings.filters]
    found["threads"] = torch.get_num_threads()
    found["verbosity"] = transformers.logging.get_verbosity()
    return found


def compare(what):
    after = state()
    changed = sorted(str(key) for key in {*before, *after} if before.get(key) != after.get(key))
    new = [key for key in changed if "modules" not in key]
    print(what, new)


before = state()
import bridges
from bridges import AutoBridge, MegatronModelBridge
import harness, harness.flops, toy_models
compare("imports")
before = state()
folder = toy_models.write("llama3", sys.argv[1], shards=1)
bridge = AutoBridge.from_hf_pretrained(folder)
bridge.to_megatron_provider().finalize()
compare("bridge")
before = state()
report = harness.verify("llama3", layouts="tp1")
assert report.ok, report.cells
compare("verify")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the substitutions are for machines without a GPU")
def test_fault_B5_the_callers_process_is_as_it_was(tmp_path):
    """In a new interpreter: torch, Megatron, transformers, the environment, loggers and filters before and after imports, a
    bridge and a verify."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(
        [sys.executable, "-c", _BEFORE_AND_AFTER, str(tmp_path / "hf")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["imports []", "bridge []", "verify []"], ended.stdout


def test_fault_B4_a_hook_that_is_not_run_is_refused_by_name(tmp_path):
    from bridges.families.llama import LlamaBridge

    class Hooked(LlamaBridge):
        def maybe_modify_loaded_hf_weight(self, hf_param, hf_state_dict):
            return hf_state_dict[hf_param] * 2

    folder = toy_models.write("llama3", tmp_path / "hf", shards=1)
    with pytest.raises(ConfigError, match="Hooked overrides maybe_modify_loaded_hf_weight, which is never called"):
        AutoBridge.from_hf_pretrained(folder, bridge=Hooked)
