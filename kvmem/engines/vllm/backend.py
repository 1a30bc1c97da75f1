"""The vLLM engine in this process: memories are built and injected by kvmem's KV connector, and are kept in files."""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import torch

from kvmem.engines.base import FirstToken, GreedyAnswer, Injectable, MeasuredBackend
from kvmem.engines.vllm import launch
from kvmem.engines.vllm.benchmarking import Benchmarking, attention_of, block_tokens_of, conditions_of
from kvmem.engines.vllm.config import VLLMConfig
from kvmem.engines.vllm.engine_loop import EngineLoop, answer_of
from kvmem.engines.vllm.file_injection import FileInjectingEngine
from kvmem.engines.vllm.memory_files import FileStore
from kvmem.engines.vllm.open_loop import OpenLoop
from kvmem.engines.vllm.pinning import Pins
from kvmem.engines.vllm.requests import EngineAnswer, EngineRequest, without_end
from kvmem.errors import ConfigError, EngineError, KVMemError
from kvmem.models import loading, max_positions
from kvmem.prompt import PromptTemplate, TemplateKind, TokenizedPrompt


class VLLMBackend(FileInjectingEngine, MeasuredBackend):
    """A vLLM engine with kvmem's connector. It runs one batch at a time; calls from other threads wait.

    `pins` keeps memories in the engine's prefix cache, `serving` serves requests as they arrive, and `benchmarking`
    answers what measurements ask.
    """

    name: ClassVar[str] = VLLMConfig.backend
    config_class: ClassVar[type] = VLLMConfig
    store: FileStore

    def __init__(
        self,
        config: VLLMConfig,
        template: TemplateKind = "chat",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        launch.check_installed()
        self.config = config
        on_gpu = torch.cuda.is_available()
        self.dtype = launch.dtype_of(config)
        loaded = launch.load_description(config, self.dtype)
        self.own_weights = loaded.model.device.type == "meta"
        self.folder = loading.engine_folder(config.model_name_or_path, loaded)
        self.tokenizer = loaded.tokenizer
        self.template = PromptTemplate(loaded.tokenizer, template, chat_template_kwargs)
        found = launch.fingerprint_of_description(loaded)
        self.fingerprint = found.model_copy(update={"template": self.template.identity()})
        self.model_config = loaded.model.config
        self.device = torch.device("cpu")  # of loaded items: the engine takes them from files
        self.compute_device = torch.device("cuda" if on_gpu else "cpu")
        ends = loaded.model.generation_config.eos_token_id
        end_tokens = [*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id]
        del loaded
        if on_gpu:
            torch.cuda.empty_cache()
        self.window = config.max_model_len or max_positions(self.model_config)
        self.window_label = f"the engine's window of {self.window}"
        self.larger_window = "raise max_model_len"
        self.ranks = config.tensor_parallel_size
        self.store = FileStore(Path(config.store_dir) if config.store_dir else None)
        self.end_tokens = {token for token in end_tokens if token is not None}
        self._start()

    def _start(self, inject: str | None = None, overrides: Mapping[str, Any] | None = None) -> None:
        self.llm, connector = launch.start(
            self.config,
            self.folder,
            self.dtype,
            self.window,
            self.store.folder,
            self.fingerprint,
            self.own_weights,
            inject,
            overrides,
        )
        self.attention = attention_of(self.llm)
        self.prefix_block_tokens = block_tokens_of(self.llm)
        drains = bool({"kv_transfer_config", "kv_offloading_size"} & (overrides or {}).keys())
        self.loop = EngineLoop(self.llm, connector, self.end_tokens, drains)
        self.pins = Pins(self.loop, self.store, self.check_length)
        self.serving = OpenLoop(self, self.loop)
        self.benchmarking = Benchmarking(self, self.reset, self.prefix_block_tokens)

    @classmethod
    def open(
        cls,
        config: VLLMConfig,
        template: TemplateKind = "chat",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> VLLMBackend:
        return cls(config, template, chat_template_kwargs)

    def beside(self, inject: str | None = None, **overrides: Any) -> VLLMBackend:
        """Another engine in this process, of the same weights and settings, that injects files of the same store.

        inject: `auto` has it find memories by the prompts' tokens, as a server does.
        overrides: arguments of vLLM's LLM instead of kvmem's; None leaves one to vLLM. Without a `kv_transfer_config`
        it is vLLM without kvmem, and builds and injects nothing.
        Raises EngineError if it does not start, such as for too little GPU memory: give both a `kv_cache_gib`.
        """
        if torch.cuda.is_available() and self.config.kv_cache_gib is not None:
            free, total = torch.cuda.mem_get_info()  # vLLM refuses a share that is not free, though it would not use it
            overrides.setdefault("gpu_memory_utilization", min(self.config.gpu_memory_utilization, 0.95 * free / total))
        other = copy.copy(self)
        other._start(inject, overrides)
        return other

    @property
    def may_recompute(self) -> bool:
        return self.config.on_load_failure == "recompute"

    @property
    def weights(self) -> str:
        if self.own_weights:
            raise ConfigError(
                "This merge needs the weights in transformers too, and the engine made its own. "
                "Use random_weights='saved', or merge=Reprefill."
            )
        return self.folder

    def submit(self, request: EngineRequest) -> EngineAnswer:
        with self.loop.lock:
            (output,) = self.loop.run([request])
        return answer_of(output)

    def submit_behind(self, request: EngineRequest) -> EngineAnswer:
        return answer_of(self.loop.run_behind(request))

    def submit_batch(self, requests: Sequence[EngineRequest]) -> list[EngineAnswer | KVMemError]:
        with self.loop.lock:
            answers = {output.request_id: answer_of(output) for output in self.loop.run(requests)}
        return [answers[request.id] for request in requests]

    def submit_stream(self, request: EngineRequest) -> Generator[int, None, EngineAnswer]:
        """Holds the engine until the answer ends or the generator is closed."""
        token_ids: list[int] = []
        with self.loop.lock, closing(self.loop.run([request], stream=True)) as outputs:
            for output in outputs:
                completion = output.outputs[0]
                token_ids += completion.token_ids
                yield from without_end(completion.token_ids, completion.finish_reason)
                if output.finished:
                    return answer_of(output, token_ids)
        raise EngineError("The engine aborted the request; its log says why.")

    def hold_prefix(self, token_ids: tuple[int, ...], cache_salt: str | None) -> float:
        started = time.perf_counter()
        self.answer_prompt(TokenizedPrompt((), token_ids), cache_salt=cache_salt)
        return time.perf_counter() - started

    def reset(self, unpin: bool = False) -> None:
        """Empties the engine's own prefix cache; files and items stay.

        Raises EngineError while requests hold blocks, or if memories are pinned, unless `unpin` releases them.
        """
        with self.loop.lock:
            if unpin:
                self.pins.unpin_all()
            elif pinned := ", ".join(self.pins.pinned_ids()):
                raise EngineError(f"Pinned in the engine's prefix cache: {pinned}. Unpin, or use reset(unpin=True).")
            self.loop.reset_prefix_cache()

    def first_token(self, prompt: TokenizedPrompt, kv_cache: Injectable | None = None) -> FirstToken:
        return self.benchmarking.first_token(prompt, kv_cache)

    def greedy(self, prompt: TokenizedPrompt, kv_cache: Injectable | None, steps: int) -> GreedyAnswer:
        return self.benchmarking.greedy(prompt, kv_cache, steps)

    def two_chunkings(self, token_ids: Sequence[int], at: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.benchmarking.two_chunkings(token_ids, at)

    def held_tokens(self, prompt: TokenizedPrompt, kv_cache: Injectable) -> int:
        return self.benchmarking.held_tokens(prompt, kv_cache)

    def conditions(self) -> dict[str, Any]:
        return conditions_of(self.llm)
