"""What llama.cpp tells of the next token, with a LoRA and without; run by benchmarks/llama_cpp.py."""

import json
import os
import sys
from importlib.metadata import version

import xllamacpp  # type: ignore[import-not-found] (an environment of its own)


def told(call: dict, lora: bool) -> list[float]:
    """The log-probabilities of all tokens."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.warmup = call["base"], 128, 0, False
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = call["lora"], 1.0
        params.lora_adapters = [adapter]
    asked = {"prompt": call["ids"], "n_predict": 1, "temperature": 0, "n_probs": call["n"], "logprobs": call["n"]}
    answer = xllamacpp.Server(params).handle_completions(asked)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    by = {one["id"]: one["logprob"] for one in top}
    return [by[i] for i in range(call["n"])]


if __name__ == "__main__":
    call = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    said = {"bare": told(call, False), "lora": told(call, True), "version": version("xllamacpp")}
    print(json.dumps(said), file=answers, flush=True)
