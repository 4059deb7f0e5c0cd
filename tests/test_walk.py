"""Nothing assumes the plain decoder: the provider says where layers stand, what is in them and how large they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

import toy_models
from bridges.conversion import tasks
from bridges.conversion.mapping import QKVMapping
from bridges.conversion.plan import symbol_sizes
from bridges.conversion.walk import Walk, walk_of
from harness.checks.localise import hf_layers
from harness.mechanisms import mechanisms, provider_of


class Layer(nn.Module):
    """A hybrid's layer: it has a mixer where others have attention, and nothing in the place of the other block."""

    def __init__(self, number: int):
        super().__init__()
        self.layer_number = number
        self.mixer = nn.Linear(2, 2, bias=False)
        self.mlp = nn.Identity()


class Composed(nn.Module):
    """A tower beside a language model whose layers are called otherwise; this rank has layers 4 and 5."""

    def __init__(self):
        super().__init__()
        self.pre_process = True
        self.config = SimpleNamespace(walk=Walk("language.", ("backbone.blocks",), embedding="tokens", output="head"))
        self.tower = nn.ModuleList([nn.Linear(2, 2)])
        self.language = nn.Module()
        self.language.backbone = nn.Module()
        self.language.backbone.blocks = nn.ModuleList([Layer(5), Layer(6)])
        self.language.tokens = nn.Embedding(3, 2)
        self.language.head = nn.Linear(2, 3, bias=False)


def test_layers_in_other_containers_are_named_by_their_number_in_the_whole_model():
    names = [name for name, _ in tasks.global_tensors([Composed()])]
    assert names == [
        "tower.0.weight",
        "tower.0.bias",
        "language.backbone.blocks.4.mixer.weight",
        "language.backbone.blocks.5.mixer.weight",
        "language.tokens.weight",
        "language.head.weight",
    ]


def test_a_walk_finds_what_a_layer_has_and_the_ends_of_the_model():
    model = Composed()
    walk = walk_of(model.config)
    layers = list(walk.layers(model))
    assert [(layer.name, layer.path) for layer in layers] == [
        ("language.backbone.blocks.4", "language.backbone.blocks.0"),
        ("language.backbone.blocks.5", "language.backbone.blocks.1"),
    ]
    assert list(walk.blocks_of(layers[0].module)) == [("self_attention", layers[0].module.mixer)]
    assert walk.embedding_of(model) is model.language.tokens
    assert walk.output_of(model) is model.language.head
    assert walk.layer_of("language.backbone.blocks.5.mixer.weight") == 5
    assert walk.layer_of("tower.0.weight") is None
    assert (walk.embedding_weight, walk.output_weight) == (
        "language.tokens.word_embeddings.weight",
        "language.head.weight",
    )


def test_symbols_are_sizes_of_the_layer_that_a_parameter_is_in():
    """Heads and groups of a heterogeneous model: of this layer, and not of the model."""

    def size_in_layer(attribute, layer):
        return {"num_query_groups": 8 >> layer, "heads_per_group": 1 << layer, "kv_channels": 16}[attribute]

    provider = SimpleNamespace(size_in_layer=size_in_layer)
    qkv = QKVMapping("decoder.layers.*.self_attention.linear_qkv.weight", "q.*", "k.*", "v.*")
    sizes = [symbol_sizes(qkv, provider, f"decoder.layers.{i}.self_attention.linear_qkv.weight") for i in (0, 2)]
    assert sizes == [{"g": 8, "n": 1, "d": 16}, {"g": 2, "n": 4, "d": 16}]


@pytest.mark.parametrize(
    ("row", "has"),
    {
        "glm4_moe": {"sigmoid router", "MTP"},
        "dots1": {"sigmoid router"},
        "bailing_moe_v2": {"sigmoid router"},
        "sarvam_moe": {"sigmoid router"},
        "ernie4_5_moe": {"shared expert"},
        "qwen3_next": {"MTP", "GDN"},
        "mimo_7b": {"MTP"},
    }.items(),
)
def test_fault_C8_mechanisms_come_from_the_provider(row, has):
    assert has <= set(mechanisms(provider_of(row)))


def test_fault_C8_experts_under_whatever_field_name_get_expert_layouts():
    """The choice of layouts asks the provider; ERNIE calls the field moe_num_experts."""
    from harness.sweep import layouts_of

    for row in toy_models.rows():
        experts = bool(provider_of(row).num_moe_experts)
        assert any(layout.ep > 1 for layout in layouts_of(row, "quick")) == experts, row


def test_a_module_list_beside_the_stacks_keeps_its_names():
    model = Composed()
    model.language.backbone.extra = nn.ModuleList([nn.Linear(2, 2, bias=False)])
    assert "language.backbone.extra.0.weight" in dict(tasks.global_tensors([model]))


def test_layers_of_a_hugging_face_model_are_found_inside_another():
    """A decoder below a composed model, in a list of whatever name."""
    layers = nn.ModuleList([nn.Linear(2, 2)])
    decoder = nn.Module()
    decoder.embed = nn.Embedding(3, 2)
    decoder.blocks = layers

    class Outer(nn.Module):
        def get_decoder(self):
            return decoder

    assert hf_layers(Outer()) is layers
