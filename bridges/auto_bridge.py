"""AutoBridge: the one class most users import."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from bridges import families as _families  # noqa: F401 - registers every family
from bridges.checkpoints.companions import companions
from bridges.checkpoints.megatron import open_source
from bridges.checkpoints.reader import CONFIG_FILE, Checkpoint, CheckpointError
from bridges.checkpoints.writer import CheckpointWriter
from bridges.config_spelling import check_spellings, patched
from bridges.conversion.agreement import of_all_ranks
from bridges.conversion.exact import exporting
from bridges.conversion.live import live_export
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.conversion.plan import PlanError, Shape
from bridges.conversion.tasks import ConversionTask, build_tasks, current_layout, matching, repeated_tensors
from bridges.conversion.transfer import Progress, export_weights, import_weights, written
from bridges.conversion.walk import unwrap
from bridges.derived_source import derived_source
from bridges.hf_pretrained import PreTrainedCausalLM
from bridges.layout import Coords
from bridges.model_bridge import ConfigError, MegatronModelBridge
from bridges.providers.provider import GPTModelProvider
from bridges.source_checks import check_mtp, check_rotary, check_vocabulary, rotary_tensors


class AutoBridge:
    """Hugging Face <-> Megatron-Core for one model, in any layout.

    bridge = AutoBridge.from_hf_pretrained("org/model")
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    bridge.save_hf_pretrained(model, "exported")
    """

    def __init__(self, hf_pretrained: PreTrainedCausalLM, bridge: type[MegatronModelBridge] | None = None):
        if bridge is None:
            bridge = MegatronModelBridge.find(hf_pretrained.config).bridge
        _refuse_hooks(bridge)
        bridge.check_config(hf_pretrained.config, hf_pretrained.raw)
        check_spellings(hf_pretrained.raw or {}, hf_pretrained.config.attribute_map)
        self.hf_pretrained = hf_pretrained
        self._model_bridge = bridge()
        self._model_bridge.hf_config = hf_pretrained.config

    # -- making one --------------------------------------------------------------------------------------------------

    @classmethod
    def from_hf_pretrained(
        cls,
        path: str | os.PathLike,
        trust_remote_code: bool | None = None,
        *,
        bridge: type[MegatronModelBridge] | None = None,
    ) -> AutoBridge:
        """From a checkpoint folder or hub id. `bridge` tries out a bridge class that is not registered.

        Raises ConfigError (architecture, config field, remote code) or CheckpointError.
        """
        return cls(PreTrainedCausalLM.open(path, trust_remote_code), bridge)

    @classmethod
    def from_hf_config(cls, config: PreTrainedConfig) -> AutoBridge:
        """From a config alone: a provider and a plan, no weights."""
        return cls(PreTrainedCausalLM(config))

    @classmethod
    def can_handle(cls, path: str | os.PathLike, trust_remote_code: bool | None = None) -> bool:
        """Is there a bridge for the model at `path`, and permission to read its config?"""
        try:
            MegatronModelBridge.find(PreTrainedCausalLM.open(path, trust_remote_code).config)
        except (ConfigError, CheckpointError):
            return False
        return True

    @staticmethod
    def list_supported_models() -> list[str]:
        """Architectures that have a bridge."""
        return MegatronModelBridge.supported()

    # -- configuration -----------------------------------------------------------------------------------------------

    def to_megatron_provider(self, load_weights: bool = True) -> GPTModelProvider:
        """A provider for the model, still to be finalized. Where there is a checkpoint, the models it provides come with
        its weights, unless `load_weights` is False."""
        with _one_error(self.hf_pretrained):
            provider = self._model_bridge.provider_bridge(self.hf_pretrained)
        _check_numbers(provider)
        if not provider.vocab_size:  # a bridge that makes its own provider may leave it to the config
            provider.vocab_size = self.hf_pretrained.config.vocab_size
        if load_weights and self.hf_pretrained.path is not None:
            provider.perform_initialization = False  # every tensor is about to be written
            provider.weight_loader = _Loader(self)
        return provider

    @property
    def transformer_config(self):
        """The Megatron-Core configuration on one rank, finalized."""
        return self.to_megatron_provider(load_weights=False).finalize()

    def mapping_registry(self, source: Checkpoint | None = None) -> MegatronMappingRegistry:
        """The mappings for a checkpoint; for the published form where a family's checkpoints differ and none is given."""
        registry = self._model_bridge.mapping_registry()
        return registry.for_tensors(source.tensors) if source else registry

    def megatron_to_hf_config(self, provider: GPTModelProvider, *, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """config.json for a provider: the source's own file where there is one, with the fields that changed patched in the
        spelling that it uses. Its dtype is that of the exported tensors: the source's, unless `dtype` says another."""
        config = type(self._model_bridge).megatron_to_hf_config(provider)
        if self.hf_pretrained.raw is None:
            return config
        before = type(self._model_bridge).megatron_to_hf_config(self._model_bridge.provider_bridge(self.hf_pretrained))
        return patched(
            self.hf_pretrained.raw,
            before,
            config,
            rules=self._model_bridge._rules(),
            attribute_map=self.hf_pretrained.config.attribute_map,
            dtype=dtype,
        )

    def _config_alone(self, provider: GPTModelProvider, dtype: torch.dtype) -> dict[str, Any]:
        """config.json of a model made from a config object: the object's own fields, with those that changed patched."""
        family, config = type(self._model_bridge), self.hf_pretrained.config
        before = family.megatron_to_hf_config(self._model_bridge.provider_bridge(self.hf_pretrained))
        after = family.megatron_to_hf_config(provider)
        raw = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
        raw["architectures"] = raw.get("architectures") or before.get("architectures")
        return patched(raw, before, after, rules=family._rules(), attribute_map=config.attribute_map, dtype=dtype)

    # -- weights -----------------------------------------------------------------------------------------------------

    def get_conversion_tasks(self, model, hf_path: str | os.PathLike | None = None) -> list[ConversionTask]:
        """This rank's parameters with their mappings and copies, in model order."""
        return self._tasks(model, self._source(hf_path, model))

    def _source(self, hf_path: str | os.PathLike | None, model: Any = None) -> Checkpoint:
        """The checkpoint that names and shapes are of; with a `model` and without any, the one that it would make."""
        if hf_path is not None:
            return open_source(hf_path)
        if self.hf_pretrained.path is None and model is not None:
            return derived_source(_chunks(model), self.mapping_registry(), _config(model))
        return self.hf_pretrained.checkpoint

    def _tasks(self, model, source: Checkpoint) -> list[ConversionTask]:
        chunks = _chunks(model)
        registry, config = self.mapping_registry(source), _config(chunks)
        check_mtp(source, config, registry)
        check_vocabulary(registry, source, config.vocab_size)
        repeated = self.repeated_tensors(source, config, registry)
        return build_tasks(chunks, registry, self.mapped_shapes(source), config, repeated)

    def ignored_tensors(self, source: Checkpoint) -> set[str]:
        """The tensors that no parameter is made of, which an export copies: those that the bridge names in IGNORED_TENSORS,
        and rope frequencies, which an import compares with the config's."""
        return {*matching(self._model_bridge.IGNORED_TENSORS, source.tensors), *rotary_tensors(source.tensors)}

    def mapped_shapes(self, source: Checkpoint) -> dict[str, Shape]:
        """{tensor: shape} of all others."""
        ignored = self.ignored_tensors(source)
        return {name: info.shape for name, info in source.tensors.items() if name not in ignored}

    def repeated_tensors(
        self, source: Checkpoint, provider: GPTModelProvider, registry: MegatronMappingRegistry
    ) -> dict[str, str]:
        """{tensor of the checkpoint: the one of which it is a second copy}."""
        return repeated_tensors(self._model_bridge.REPEATED_TENSORS, registry, source.tensors, provider)

    def load_hf_weights(
        self, model, hf_path: str | os.PathLike | None = None, *, lossy: bool = False, progress: Progress | None = None
    ) -> None:
        """Fill this rank's parameters and buffers from the checkpoint. No collective but one: ranks agree on which
        tensors were read, so that one nobody reads is an error.

        Raises MappingError, PlanError or CheckpointError for the first tensor that is missing, left over, or unfit.
        """
        source, tasks, _ = self._plan(model, self._source(hf_path))
        check_rotary(source, _config(model), self.hf_pretrained.config)
        import_weights(tasks, source, lossy=lossy, progress=progress)

    def _plan(self, model, source: Checkpoint) -> tuple[Checkpoint, list[ConversionTask], Coords]:
        """What an import or export goes by, after the ranks have agreed that no tensor is left over."""
        tasks = self._tasks(model, source)
        _, coords = current_layout(_config(model))
        used = set().union(*of_all_ranks(written(tasks, coords)))  # each tensor has a writer; replicas stay silent
        if left := [name for name in self.mapped_shapes(source) if name not in used]:
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise PlanError(
                f"{source.path}: tensor {left[0]} is not used by any Megatron parameter{more}; map it in "
                f"{type(self._model_bridge).__name__} or name it in IGNORED_TENSORS with a reason"
            )
        return source, tasks, coords

    def export_hf_weights(
        self, model, cpu: bool = True, hf_path: str | os.PathLike | None = None, *, lossy: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor) in the checkpoint's names, dtypes and order; all ranks must consume it together.

        Raises PlanError when values would be narrowed to the checkpoint's dtypes, unless `lossy`.
        """
        source, tasks, coords = self._plan(model, self._source(hf_path, model))
        yield from live_export(tasks, coords, source, self.ignored_tensors(source), cpu=cpu, lossy=lossy)

    def save_hf_pretrained(
        self,
        model,
        path: str | os.PathLike,
        hf_path: str | os.PathLike | None = None,
        *,
        dtype: torch.dtype | None = None,
        lossy: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Write the model as a Hugging Face folder with the source's tensors, dtypes and files, and its config.json.
        With `dtype` all floating-point tensors are of that dtype, and config.json says so.

        Every rank writes its own blocks in place; nothing carries its final name until all of it is written. Raises
        CheckpointError for a folder that is not empty or a disk that is too small, leaving nothing behind;
        PlanError, naming all tensors, when values would be narrowed and it is not `lossy`.
        """
        source, tasks, coords = self._plan(model, self._source(hf_path, model))
        extra = self._extra_files(_config(model), source, dtype)
        writer = CheckpointWriter(
            path,
            {
                file: {n: (_stored(source.tensors[n].dtype, dtype), source.tensors[n].shape) for n in names}
                for file, names in source.files.items()
            },
            metadata=next(iter(source.metadata.values())),
            index=source.has_index,
        )
        first = not dist.is_initialized() or dist.get_rank() == 0
        _together(writer.create if first else None)

        def write() -> None:
            writer.open()
            export_weights(tasks, coords, writer.view, progress, lossy=lossy)
            exact = exporting(lossy=lossy)
            for name in self.ignored_tensors(source) if first else ():
                exact.copy(name, writer.view(name), source.view(name))
            exact.check()
            writer.flush()

        try:
            _together(write)
            _together((lambda: writer.commit(extra)) if first else None)
        except BaseException:
            writer.abort()
            raise

    def _extra_files(
        self, provider: GPTModelProvider, source: Checkpoint, dtype: torch.dtype | None
    ) -> dict[str, str | bytes | Path]:
        if self.hf_pretrained.raw is None and not source.path.is_dir():
            config = self._config_alone(provider, dtype or provider.params_dtype)
            return {CONFIG_FILE: json.dumps(config, indent=2) + "\n"}
        config = self.megatron_to_hf_config(provider, dtype=dtype)
        return {**companions(source.path), CONFIG_FILE: json.dumps(config, indent=2) + "\n"}


class _Loader:
    """Fills models from the bridge's checkpoint. Megatron copies configurations deeply; the open checkpoint stays one."""

    def __init__(self, bridge: AutoBridge):
        self.bridge = bridge

    def __call__(self, chunks: list) -> None:
        self.bridge.load_hf_weights(chunks)

    def __deepcopy__(self, memo: dict) -> _Loader:
        return self


@contextlib.contextmanager
def _one_error(pretrained: PreTrainedCausalLM) -> Iterator[None]:
    """What a wrong value of a config sets off in a bridge's code is a ConfigError; the stack stays behind it."""
    try:
        yield
    except (TypeError, KeyError, IndexError, AttributeError, ArithmeticError, AssertionError, MemoryError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"{pretrained.path or 'config'}: no model can be made of this config ({what})") from error


def _check_numbers(provider: GPTModelProvider) -> None:
    """ConfigError, naming all, for fields of the provider that count something and hold no whole number."""
    counts = ("int", "Optional[int]", "int | None", int, int | None)
    wrong = [
        f"{field.name} is {value!r}"
        for field in dataclasses.fields(provider)
        if field.type in counts and not isinstance(value := getattr(provider, field.name), int | None)
    ]
    if wrong:
        raise ConfigError(f"the config gives {', '.join(wrong)}: whole numbers are needed")


def _stored(source: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and source.is_floating_point else source


def _chunks(model: Any) -> Sequence:
    return model if isinstance(model, list | tuple) else [model]


def _config(model) -> Any:
    return unwrap(model[0] if isinstance(model, list | tuple) else model).config


# Hooks of other bridges' base classes. Weights go through declared views here, so that a hook would never be called.
NEVER_CALLED = (
    "maybe_modify_loaded_hf_weight",
    "maybe_modify_converted_hf_weight",
    "load_weights_hf_to_megatron",
    "stream_weights_hf_to_megatron",
    "stream_weights_megatron_to_hf",
    "build_conversion_tasks",
)


def _refuse_hooks(bridge: type[MegatronModelBridge]) -> None:
    """Raise ConfigError for a bridge that relies on methods which nobody calls, all named."""
    if found := [name for name in NEVER_CALLED if hasattr(bridge, name)]:
        raise ConfigError(
            f"{bridge.__name__} overrides {', '.join(found)}, which is never called here: say with views in "
            "mapping_registry() how tensors become parameters, and dequantise a checkpoint before it is converted"
        )


def _together(action) -> None:
    """Run `action` on the ranks that have one. Nobody goes on before all are done, and an error of any is raised on every
    rank, so that nobody waits for ever."""
    error = None
    if action is not None:
        try:
            action()
        except Exception as caught:
            error = caught
    for one in of_all_ranks(error):
        if one is not None:
            raise one
